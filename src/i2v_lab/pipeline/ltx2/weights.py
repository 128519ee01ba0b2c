"""Weights: which files a run reads, and proof that they are what the model needs before any of them is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from i2v_lab.errors import CheckpointError
from i2v_lab.pipeline.contract import random_tensors
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.weight_files import (
    FILE_LIMIT_BYTES,
    Progress,
    architecture_remedy,
    cached_folder,
    elements,
    is_described,
    read_headers,
    require_files,
    require_together,
    verify_tensors,
    verify_values,
)
from i2v_lab.pipeline.ltx2 import components as ltx2
from i2v_lab.pipeline.ltx2 import synthetic
from i2v_lab.pipeline.ltx2.memory.readers import SafetensorsReader, TensorReader

OPTIONS = {"checkpoint": "--checkpoint", "gemma": "--gemma", "upsampler": "--upsampler", "lora": "--lora"}


@dataclass(frozen=True)
class Weights:
    """Where the tensors of one model come from; real and synthetic weights look alike from here on.

    Attributes:
        architecture: What they are the weights of.
        checkpoint: Path of the main checkpoint.
        gemma_root: Folder with Gemma's tokenizer and image-processor configuration.
        gemma_shards: Paths of Gemma's weight files.
        upsampler: Path of the spatial latent upsampler.
        lora: Path of the distilled LoRA (``dev`` variant, stage 2).
        loader: Reads them: ltx-core's own for safetensors files.

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
    loader: Any = field(default_factory=ltx2.SafetensorsModelStateDictLoader)

    def reader(self) -> TensorReader:
        """What reads single tensors: the loader, where it makes them, else one for safetensors files."""
        return self.loader if isinstance(self.loader, synthetic.SyntheticStateDictLoader) else SafetensorsReader()

    @property
    def is_synthetic(self) -> bool:
        """True where tensors are made when asked for, with no file behind them."""
        return self.checkpoint.startswith(synthetic.SCHEME)


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
    """Find, verify and name the weights of a model.

    With no path at all the weights are synthetic: files in the cache for a small model, made on demand for a large one.

    Args:
        architecture: The model.
        checkpoint: The main checkpoint, safetensors.
        gemma: The Gemma 3 folder.
        upsampler: The spatial upsampler, safetensors.
        lora: The distilled LoRA, safetensors; only the ``dev`` variant reads it.
        needs_lora: Whether the run will.
        progress: Called with a file's name, tensors checked, and tensors in all.

    Raises:
        CheckpointError: A file is missing, truncated, of another architecture, lacks tensors or holds NaN.
        OutputError: Synthetic weights cannot be kept in the cache.

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
        verify_layout(architecture, name, paths)
    for name, paths in files.items():  # last, since with real weights this takes minutes
        verify_values(OPTIONS[name], paths, progress)
    return Weights(
        architecture=architecture,
        checkpoint=str(checkpoint),
        gemma_root=str(gemma),
        gemma_shards=tuple(map(str, files["gemma"])),
        upsampler=str(upsampler),
        lora=str(lora) if lora else "",
    )


# --- Synthetic --------------------------------------------------------------------------------------------------------


def synthetic_weights(architecture: Architecture) -> Weights:
    """Random weights in the real layout (see :mod:`i2v_lab.pipeline.ltx2.synthetic`)."""
    on_demand = elements(ltx2.file_layout(architecture, "checkpoint")) * ltx2.DTYPE.itemsize > FILE_LIMIT_BYTES
    folder = _cached_folder(architecture, with_weights=not on_demand)
    if on_demand:
        return _on_demand(architecture, folder, values=True)
    path = {file: str(folder / name) for file, name in synthetic.FILES.items()}
    return _at(architecture, folder, path, ltx2.SafetensorsModelStateDictLoader())


def skeleton_weights(architecture: Architecture) -> Weights:
    """Weights in the real layout without values, made on demand: all that a forecast of memory needs."""
    for file in synthetic.FILES:
        ltx2.file_layout(architecture, file)  # kept from here on; under fake tensors it would take thrice as long
    folder = _cached_folder(architecture, with_weights=False)
    return _on_demand(architecture, folder, values=False)


def _on_demand(architecture: Architecture, folder: Path, *, values: bool) -> Weights:
    path = {file: f"{synthetic.SCHEME}{file}" for file in synthetic.FILES}
    return _at(architecture, folder, path, synthetic.SyntheticStateDictLoader(architecture, values=values))


def _at(architecture: Architecture, folder: Path, path: dict[str, str], loader: Any) -> Weights:
    return Weights(
        architecture=architecture,
        checkpoint=path["checkpoint"],
        gemma_root=str(folder / "gemma"),
        gemma_shards=(path["gemma"],),
        upsampler=path["upsampler"],
        lora=path["lora"],
        loader=loader,
    )


def _cached_folder(architecture: Architecture, *, with_weights: bool) -> Path:
    code = "".join(Path(str(module.__file__)).read_text() for module in (synthetic, random_tensors))
    recipe = f"{architecture.to_json()}:{code}:{version('ltx-core')}"

    def fill(folder: Path) -> None:
        if with_weights:
            for _ in synthetic.write_weights(architecture, folder):
                pass
        else:
            synthetic.write_gemma_folder(architecture, folder / "gemma")

    return cached_folder(architecture.name, recipe, fill, "" if with_weights else "-tokenizer")


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
        CheckpointError: The folder, or a file that ltx-core will look for in it, does not exist or is damaged.
    """
    require_files(folder, GEMMA_FILES, OPTIONS["gemma"], "Gemma 3")
    return tuple(sorted(next(folder.rglob("model*.safetensors")).parent.rglob("*.safetensors")))


def verify_layout(architecture: Architecture, file: str, paths: tuple[Path, ...]) -> None:
    """Check weight files against an architecture: header, names, shapes and configuration. Reads no tensor.

    Raises:
        CheckpointError: With the file, the first offending tensor, and what to do.
    """
    if file == "lora":
        _verify_lora(read_headers(paths, OPTIONS[file]), paths[0], architecture)
        return
    layout = partial(ltx2.file_layout, file=file)
    section = "upsampler" if file == "upsampler" else "config"
    described = None if file == "gemma" else partial(is_described, architecture, section, layout)
    verify_tensors(paths, OPTIONS[file], architecture.name, layout(architecture), described)


def _verify_lora(shapes: dict[str, tuple[int, ...]], path: Path, architecture: Architecture) -> None:
    remedy = architecture_remedy(architecture.name)
    where = f"{OPTIONS['lora']} '{path}'"
    layout = ltx2.file_layout(architecture, "lora")
    targets = [key for key in shapes if key.endswith((".lora_A.weight", ".lora_B.weight"))]
    matching = [key for key in targets if key in layout]
    if not matching:
        raise CheckpointError(
            f"{where} is of another architecture than {architecture.name}: none of its {len(targets)} LoRA tensors "
            f"names a layer of the transformer; {remedy}",
            path=path,
        )
    for key in matching:
        axis = 1 if ".lora_A." in key else 0  # the other axis is the rank, which may be any
        if len(shapes[key]) != 2 or shapes[key][axis] != layout[key][axis]:
            raise CheckpointError(
                f"{where} is of another architecture than {architecture.name}: {key} has shape {shapes[key]}; {remedy}",
                path=path,
                tensor=key,
            )
        twin = key.replace(".lora_A.", ".lora_B.") if axis else key.replace(".lora_B.", ".lora_A.")
        if twin not in shapes:
            raise CheckpointError(f"{where} lacks {twin}; download or export it again", path=path, missing=[twin])
        if shapes[key][1 - axis] != shapes[twin][axis]:
            raise CheckpointError(
                f"{where} has {key} of rank {shapes[key][1 - axis]} and {twin} of rank {shapes[twin][axis]}; download "
                "or export it again",
                path=path,
                tensor=key,
            )
