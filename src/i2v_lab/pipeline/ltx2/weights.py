"""LTX-2's weights: the files that a run reads, verified before any tensor is loaded, or synthetic ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ltx_core.loader import LTXV_LORA_COMFY_RENAMING_MAP, SDOps

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.synthetic import is_on_demand
from i2v_lab.pipeline.contract.weight_files import (
    Progress,
    config_matches,
    require_together,
    verify_tensors,
    verify_values,
)
from i2v_lab.pipeline.contract.weight_folders import require_files
from i2v_lab.pipeline.ltx2.layout import FILES, UNREAD, file_layout
from i2v_lab.pipeline.ltx2.loader import AheadStateDictLoader, ScaledStateDictLoader
from i2v_lab.pipeline.ltx2.lora import LoraKeys, read_lora
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.memory.readers import SafetensorsReader, TensorReader
from i2v_lab.pipeline.ltx2.synthetic import SYNTHETIC, SyntheticStateDictLoader

OPTIONS = {"checkpoint": "--checkpoint", "gemma": "--gemma", "upsampler": "--upsampler", "lora": "--lora"}


@dataclass(frozen=True)
class Weights:
    """The weight files of one model and what reads them, real or synthetic.

    Attributes:
        architecture: The model.
        checkpoint: Path of the main checkpoint.
        gemma_root: Folder with Gemma's tokenizer and image-processor configuration.
        gemma_shards: Paths of Gemma's weight files.
        upsampler: Path of the spatial latent upsampler.
        lora: Path of the distilled LoRA (``dev`` variant, stage 2).
        lora_keys: Its map from names in the file to those for ltx-core.
        notes: What is applied of the files, in lines for the user.
        loader: ltx-core's ``StateDictLoader`` for them: for safetensors files, or for tensors on demand.

    Example:
        >>> weights = resolve_weights(load_architecture("ltx-2.3-tiny"))  # doctest: +SKIP
        >>> weights.is_synthetic  # doctest: +SKIP
        True
    """

    architecture: Architecture
    checkpoint: str
    gemma_root: str
    gemma_shards: tuple[str, ...]
    upsampler: str
    lora: str
    lora_keys: LoraKeys | SDOps = LTXV_LORA_COMFY_RENAMING_MAP
    notes: tuple[str, ...] = ()
    loader: Any = field(default_factory=ScaledStateDictLoader)

    def reader(self) -> TensorReader:
        """What reads single tensors: the loader where it makes them on demand, else a reader of safetensors files."""
        return self.loader if isinstance(self.loader, SyntheticStateDictLoader) else SafetensorsReader()

    def loader_ahead(self, host_weights: HostWeights) -> Any:
        """The loader, where it reads files the one that has threads read them ahead."""
        return AheadStateDictLoader(host_weights) if type(self.loader) is ScaledStateDictLoader else self.loader

    @property
    def is_synthetic(self) -> bool:
        """Whether tensors are made on demand, with no file."""
        return is_on_demand(self.checkpoint)


def resolve_weights(
    architecture: Architecture,
    *,
    checkpoint: Path | None = None,
    gemma: Path | None = None,
    upsampler: Path | None = None,
    lora: Path | None = None,
    needs_lora: bool = False,
    progress: Progress = lambda *_: None,
) -> Weights:
    """Find and verify the weights of a model.

    With no path at all the weights are synthetic: files in the cache for a small model, made on demand for a large one.

    Args:
        architecture: The model.
        checkpoint: The main checkpoint, safetensors.
        gemma: The Gemma 3 folder.
        upsampler: The spatial upsampler, safetensors.
        lora: The distilled LoRA, safetensors; only the ``dev`` variant reads it.
        needs_lora: Whether the run reads the LoRA.
        progress: Called with a file's name, the number of tensors verified, and of tensors in all.

    Raises:
        CheckpointError: A file is missing, truncated, of another architecture, lacks tensors or has values that are
            not finite; ``fields`` has its ``path``, and the ``tensor`` or what is ``missing``.
        OutputError: Synthetic weights cannot be written to the cache.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> resolve_weights(load_architecture("ltx-2.3-22b"), checkpoint=Path("gone.safetensors"))
        Traceback (most recent call last):
        ...
        i2v_lab.errors.CheckpointError: ...
    """
    given = {"checkpoint": checkpoint, "gemma": gemma, "upsampler": upsampler, "lora": lora}
    if not any(given.values()):
        return synthetic_weights(architecture)
    require_together(given, ["checkpoint", "gemma", "upsampler", *(["lora"] if needs_lora else [])], OPTIONS)
    files = {name: gemma_shards(path) if name == "gemma" else (path,) for name, path in given.items() if path}
    for name, paths in files.items():
        if name != "lora":
            verify_layout(architecture, name, paths)
    lora_keys = None if lora is None else read_lora(lora, architecture)
    for name, paths in files.items():  # last, since with real weights this takes minutes
        verify_values(OPTIONS[name], paths, progress)
    return Weights(
        architecture=architecture,
        checkpoint=str(checkpoint),
        gemma_root=str(gemma),
        gemma_shards=tuple(map(str, files["gemma"])),
        upsampler=str(upsampler),
        lora=str(lora) if lora else "",
        lora_keys=lora_keys or LTXV_LORA_COMFY_RENAMING_MAP,
        notes=_notes(lora_keys, needs_lora),
    )


def _notes(lora_keys: LoraKeys | None, needs_lora: bool) -> tuple[str, ...]:
    if lora_keys is None:
        return ()
    return (lora_keys.summary if needs_lora else "LoRA: not applied, which only --variant dev does",)


def synthetic_weights(architecture: Architecture) -> Weights:
    """Random weights in the real layout (see :mod:`i2v_lab.pipeline.contract.synthetic`).

    Raises:
        OutputError: The cache cannot be written.
    """
    if not SYNTHETIC.fit_in_files(architecture):
        return _on_demand(architecture, values=True)
    folder = SYNTHETIC.folder(architecture, with_weights=True)
    return located(architecture, folder, SYNTHETIC.paths(folder), ScaledStateDictLoader())


def skeleton_weights(architecture: Architecture) -> Weights:
    """Weights in the real layout without values, made on demand: enough for a forecast of memory.

    Raises:
        OutputError: The cache cannot be written.
    """
    for file in FILES:
        file_layout(architecture, file)  # cached now: under fake tensors, computing it would take three times as long
    return _on_demand(architecture, values=False)


def _on_demand(architecture: Architecture, *, values: bool) -> Weights:
    folder = SYNTHETIC.folder(architecture, with_weights=False)
    return located(architecture, folder, SYNTHETIC.paths(), SyntheticStateDictLoader(architecture, values=values))


def located(architecture: Architecture, folder: Path, paths: dict[str, str], loader: Any) -> Weights:
    """The weights in files of the real layout, which are not verified: that would read their values.

    Args:
        architecture: What they are for.
        folder: Has Gemma's configuration and tokenizer.
        paths: Of each kind of file.
        loader: As in :class:`Weights`.
    """
    return Weights(
        architecture=architecture,
        checkpoint=paths["checkpoint"],
        gemma_root=str(folder / "gemma"),
        gemma_shards=(paths["gemma"],),
        upsampler=paths["upsampler"],
        lora=paths["lora"],
        loader=loader,
    )


# --- Verification -----------------------------------------------------------------------------------------------------


GEMMA_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "model*.safetensors",
)


def gemma_shards(folder: Path) -> tuple[Path, ...]:
    """Gemma's weight files, found as ltx-pipelines finds them.

    Raises:
        CheckpointError: The folder, or a file that ltx-core opens in it, does not exist or is damaged; ``fields`` has
            its ``path``.
    """
    require_files(folder, GEMMA_FILES, OPTIONS["gemma"], "Gemma 3")
    return tuple(sorted(next(folder.rglob("model*.safetensors")).parent.rglob("*.safetensors")))


def verify_layout(architecture: Architecture, file: str, paths: tuple[Path, ...]) -> None:
    """Check weight files against an architecture: header, names, shapes and configuration. Reads no tensor.

    Args:
        architecture: The model.
        file: ``checkpoint``, ``gemma`` or ``upsampler``.
        paths: The files that hold its tensors.

    Raises:
        CheckpointError: They do not match; ``fields`` has the ``path``, and the ``tensor`` or what is ``missing``.
    """
    layout = partial(file_layout, file=file)
    section = "upsampler" if file == "upsampler" else "config"
    configured = None if file == "gemma" else partial(config_matches, architecture, section, layout)
    verify_tensors(paths, OPTIONS[file], architecture.name, layout(architecture), configured, UNREAD)
