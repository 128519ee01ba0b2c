"""Weights: which files a run reads, and proof that they are what the model needs before any of them is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from i2v_lab.errors import CheckpointError, OutputError
from i2v_lab.paths import CACHE_VARIABLE, cache_dir
from i2v_lab.pipeline import ltx2, synthetic
from i2v_lab.pipeline.architectures import Architecture
from i2v_lab.pipeline.memory.weight_files import SafetensorsReader, TensorReader

OPTIONS = {"checkpoint": "--checkpoint", "gemma": "--gemma", "upsampler": "--upsampler", "lora": "--lora"}
Progress = Callable[[str, int, int], None]


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
        >>> from i2v_lab.pipeline.architectures import load_architecture
        >>> resolve_weights(load_architecture("ltx-2.3-22b"), checkpoint=Path("gone.safetensors"))
        Traceback (most recent call last):
        ...
        i2v_lab.errors.CheckpointError: ...
    """
    given = {"checkpoint": checkpoint, "gemma": gemma, "upsampler": upsampler, "lora": lora}
    if not any(given.values()):
        return synthetic_weights(architecture)
    needed = ["checkpoint", "gemma", "upsampler", *(["lora"] if needs_lora else [])]
    missing = [OPTIONS[name] for name in needed if given[name] is None]
    if missing:
        named = ", ".join(OPTIONS[name] for name, path in given.items() if path)
        raise CheckpointError(
            f"{named} given without {', '.join(missing)}: real weights come together; add the missing, or give none",
            missing=missing,
        )
    files = {name: gemma_shards(path) if name == "gemma" else (path,) for name, path in given.items() if path}
    for name, paths in files.items():
        verify_layout(architecture, name, paths)
    for name, paths in files.items():  # last, since with real weights this takes minutes
        verify_values(name, paths, progress)
    return Weights(
        architecture=architecture,
        checkpoint=str(checkpoint),
        gemma_root=str(gemma),
        gemma_shards=tuple(map(str, files["gemma"])),
        upsampler=str(upsampler),
        lora=str(lora) if lora else "",
    )


# --- Synthetic --------------------------------------------------------------------------------------------------------

FILE_LIMIT_BYTES = 2**30  # a model up to this size is written to files; a larger one is made on demand


def synthetic_weights(architecture: Architecture) -> Weights:
    """Random weights in the real layout (see :mod:`i2v_lab.pipeline.synthetic`)."""
    elements = sum(_elements(ltx2.file_layout(architecture, "checkpoint")))
    on_demand = elements * ltx2.DTYPE.itemsize > FILE_LIMIT_BYTES
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


def _elements(layout: dict[str, tuple[int, ...]]) -> list[int]:
    return [torch.Size(shape).numel() for shape in layout.values()]


def _cached_folder(architecture: Architecture, *, with_weights: bool) -> Path:
    """The cache's copy, written whole or not at all: into a folder beside it, then renamed."""
    recipe = f"{architecture.to_json()}:{synthetic.SEED}:{Path(synthetic.__file__).read_text()}:{version('ltx-core')}"
    name = f"{architecture.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    folder = cache_dir() / "synthetic" / (name if with_weights else f"{name}-tokenizer")
    try:
        if not folder.is_dir():
            _fill(folder, architecture, with_weights=with_weights)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"the cache folder '{cache_dir()}' cannot be written ({_reason(error)}); free some space, or name another "
            f"folder in {CACHE_VARIABLE}",
            path=cache_dir(),
        ) from error
    return folder


def _fill(folder: Path, architecture: Architecture, *, with_weights: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if with_weights:
            for _ in synthetic.write_weights(architecture, scratch):
                pass
        else:
            synthetic.write_gemma_folder(architecture, scratch / "gemma")
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first; its copy is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
    if not folder.is_dir():
        raise CheckpointError(f"--gemma '{folder}' is not a folder; give the folder of Gemma 3's files", path=folder)
    for pattern in GEMMA_FILES:
        found = next(folder.rglob(pattern), None)
        if found is None:
            raise CheckpointError(
                f"--gemma '{folder}' holds no {pattern}; give a complete Gemma 3 folder", path=folder, missing=pattern
            )
        if found.suffix == ".json":
            try:
                json.loads(found.read_bytes())
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"--gemma '{found}' is not readable as JSON ({_reason(error)}); download it again", path=found
                ) from error
    return tuple(sorted(next(folder.rglob("model*.safetensors")).parent.rglob("*.safetensors")))


def verify_layout(architecture: Architecture, file: str, paths: tuple[Path, ...]) -> None:
    """Check weight files against an architecture: header, names, shapes and configuration. Reads no tensor.

    Raises:
        CheckpointError: With the file, the first offending tensor, and what to do.
    """
    option = OPTIONS[file]
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        shapes |= _read_header(path, option)
    expected = ltx2.file_layout(architecture, file)
    remedy = f"use the weights of {architecture.name}, or name their architecture with --model"
    path = paths[0] if len(paths) == 1 else paths[0].parent
    where = f"{option} '{path}'"
    if file == "lora":
        _verify_lora(shapes, path, architecture, remedy)
        return
    missing = [key for key in expected if key not in shapes]
    if sum(key in expected for key in shapes) < len(shapes) / 2:  # most of what is there is not of this model
        raise CheckpointError(f"{where} is of another architecture than {architecture.name}; {remedy}", path=path)
    wrong = [key for key in expected if key in shapes and shapes[key] != expected[key]]
    if wrong:
        raise CheckpointError(
            f"{where} is of another architecture than {architecture.name}: {wrong[0]} has shape "
            f"{shapes[wrong[0]]}, not {expected[wrong[0]]}; {remedy}",
            path=path,
            tensor=wrong[0],
        )
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(expected)} tensors, the first {missing[0]}; "
            "download or export it again",
            path=path,
            missing=missing,
        )
    if file != "gemma" and not _is_described(architecture, file, path):
        raise CheckpointError(
            f"{where} has no 'config' in its safetensors metadata that describes its tensors; use the original file, "
            "or export it again with its metadata",
            path=path,
        )


def _is_described(architecture: Architecture, file: str, path: Path) -> bool:
    """Whether ltx-core, which builds by the configuration in the file's metadata, would build for these tensors."""
    section = "upsampler" if file == "upsampler" else "config"
    try:
        config = ltx2.SafetensorsModelStateDictLoader().metadata(str(path))
        if config == getattr(architecture, section):
            return True
        described = ltx2.file_layout(replace(architecture, **{section: config}), file)
    except Exception:  # ltx-core's configurators raise whatever a malformed configuration leads them to
        return False
    return described == ltx2.file_layout(architecture, file)


def verify_values(file: str, paths: tuple[Path, ...], progress: Progress = lambda *_: None) -> None:
    """Check every value of weight files for NaN and infinity.

    A file found good is remembered by path, size and time of change, so that the reading happens once.

    Raises:
        CheckpointError: With the file and the first offending tensor.
    """
    for path in paths:
        stamp = _stamp(path)
        known = False
        with suppress(OSError):
            known = stamp.exists()
        if known:
            continue
        _read_values(path, OPTIONS[file], progress)
        with suppress(OSError):  # where the cache cannot be written, the file is read again next time
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()


def _verify_lora(shapes: dict[str, tuple[int, ...]], path: Path, architecture: Architecture, remedy: str) -> None:
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


def _read_header(path: Path, option: str) -> dict[str, tuple[int, ...]]:
    try:
        if path.is_dir():
            raise CheckpointError(f"{option} '{path}' is a folder; name the safetensors file in it", path=path)
        if not path.is_file():
            raise CheckpointError(f"{option} '{path}' does not exist; check the path", path=path)
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{option} '{path}' is truncated or not a safetensors file ({_reason(error)}); download it again "
            "(pickled checkpoints are not read)",
            path=path,
        ) from error
    except OSError as error:
        raise CheckpointError(f"{option} '{path}' cannot be read ({_reason(error)}); check it", path=path) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).removeprefix("Error while deserializing header: ")
    return next(iter(text.splitlines()), type(error).__name__)


def _read_values(path: Path, option: str, progress: Progress) -> None:
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        for index, key in enumerate(keys, start=1):
            tensor = file.get_tensor(key)
            if tensor.is_floating_point() and tensor.element_size() == 1:  # isfinite has no float8 kernel
                tensor = tensor.to(torch.bfloat16)
            if not torch.isfinite(tensor).all():
                kind = "NaN" if torch.isnan(tensor).any() else "infinity"
                raise CheckpointError(
                    f"{option} '{path}' holds {kind} in {key}; download or export it again", path=path, tensor=key
                )
            progress(path.name, index, len(keys))


def _stamp(path: Path) -> Path:
    status = path.stat()
    identity = json.dumps([os.fspath(path.resolve()), status.st_size, status.st_mtime_ns])
    return cache_dir() / "verified" / hashlib.sha256(identity.encode()).hexdigest()[:24]
