"""Weights: which files a run reads, and proof that they are what the model needs before any of them is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from i2v_lab.errors import CheckpointError
from i2v_lab.paths import cache_dir
from i2v_lab.pipeline import ltx2, synthetic
from i2v_lab.pipeline.architectures import Architecture

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
    """

    architecture: Architecture
    checkpoint: str
    gemma_root: str
    gemma_shards: tuple[str, ...]
    upsampler: str
    lora: str
    loader: Any = field(default_factory=ltx2.SafetensorsModelStateDictLoader)

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
    shards: tuple[Path, ...] = ()
    for name, path in given.items():
        if path is None:
            continue
        if name == "gemma":
            shards = gemma_shards(path)
            verify_files(architecture, name, shards, progress)
        else:
            verify_files(architecture, name, (path,), progress)
    return Weights(
        architecture=architecture,
        checkpoint=str(checkpoint),
        gemma_root=str(gemma),
        gemma_shards=tuple(map(str, shards)),
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
        path = {file: f"{synthetic.SCHEME}{file}" for file in synthetic.FILES}
        loader: Any = synthetic.SyntheticStateDictLoader(architecture)
    else:
        path = {file: str(folder / name) for file, name in synthetic.FILES.items()}
        loader = ltx2.SafetensorsModelStateDictLoader()
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
    folder = cache_dir() / "synthetic" / f"{architecture.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
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
    return folder


# --- Verification -----------------------------------------------------------------------------------------------------


def gemma_shards(folder: Path) -> tuple[Path, ...]:
    """Gemma's weight files, found as ltx-pipelines finds them.

    Raises:
        CheckpointError: The folder, or one of the files that ltx-core will look for in it, does not exist.
    """
    if not folder.is_dir():
        raise CheckpointError(f"--gemma '{folder}' is not a folder; give the folder of Gemma 3's files", path=folder)
    for pattern in ("tokenizer.model", "tokenizer.json", "preprocessor_config.json", "model*.safetensors"):
        if next(folder.rglob(pattern), None) is None:
            raise CheckpointError(
                f"--gemma '{folder}' holds no {pattern}; give a complete Gemma 3 folder", path=folder, missing=pattern
            )
    return tuple(sorted(next(folder.rglob("model*.safetensors")).parent.rglob("*.safetensors")))


def verify_files(
    architecture: Architecture, file: str, paths: tuple[Path, ...], progress: Progress = lambda *_: None
) -> None:
    """Check weight files against an architecture: header, names, shapes, then every value for NaN and infinity.

    A file found good is remembered by path, size and time of change, so that the reading happens once.

    Raises:
        CheckpointError: With the file, the first offending tensor, and what to do.
    """
    option = OPTIONS[file]
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        shapes |= _read_header(path, option)
    expected = ltx2.file_layout(architecture, file)
    remedy = f"use the weights of {architecture.name}, or name their architecture with --model"
    where = f"{option} '{paths[0] if len(paths) == 1 else paths[0].parent}'"
    if file == "lora":
        _verify_lora(shapes, where, architecture, remedy)
    else:
        missing = [key for key in expected if key not in shapes]
        if len(missing) > len(expected) // 2:
            raise CheckpointError(f"{where} is of another architecture than {architecture.name}; {remedy}", path=where)
        wrong = [key for key in expected if key in shapes and shapes[key] != expected[key]]
        if wrong:
            raise CheckpointError(
                f"{where} is of another architecture than {architecture.name}: {wrong[0]} has shape "
                f"{shapes[wrong[0]]}, not {expected[wrong[0]]}; {remedy}",
                path=where,
                tensor=wrong[0],
            )
        if missing:
            raise CheckpointError(
                f"{where} lacks {len(missing)} of {len(expected)} tensors, the first {missing[0]}; "
                "download or export it again",
                path=where,
                missing=missing,
            )
    for path in paths:
        stamp = _stamp(path)
        if not stamp.exists():
            _verify_values(path, option, progress)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()


def _verify_lora(shapes: dict[str, tuple[int, ...]], where: str, architecture: Architecture, remedy: str) -> None:
    layout = ltx2.file_layout(architecture, "lora")
    targets = [key for key in shapes if key.endswith((".lora_A.weight", ".lora_B.weight"))]
    matching = [key for key in targets if key in layout]
    if not matching:
        raise CheckpointError(
            f"{where} is of another architecture than {architecture.name}: none of its {len(targets)} LoRA tensors "
            f"names a layer of the transformer; {remedy}",
            path=where,
        )
    for key in matching:
        axis = 1 if ".lora_A." in key else 0  # the other axis is the rank, which may be any
        if len(shapes[key]) != 2 or shapes[key][axis] != layout[key][axis]:
            raise CheckpointError(
                f"{where} is of another architecture than {architecture.name}: {key} has shape {shapes[key]}; {remedy}",
                path=where,
                tensor=key,
            )
        twin = key.replace(".lora_A.", ".lora_B.") if axis else key.replace(".lora_B.", ".lora_A.")
        if twin not in shapes:
            raise CheckpointError(f"{where} lacks {twin}; download or export it again", path=where, missing=[twin])


def _read_header(path: Path, option: str) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise CheckpointError(f"{option} '{path}' does not exist; check the path", path=path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{option} '{path}' is truncated or not a safetensors file ({_reason(error)}); download it again "
            "(pickled checkpoints are not read)",
            path=path,
        ) from error
    except OSError as error:
        raise CheckpointError(f"{option} '{path}' cannot be read: {error.strerror}; check it", path=path) from error


def _reason(error: Exception) -> str:
    return str(error).removeprefix("Error while deserializing header: ").splitlines()[0]


def _verify_values(path: Path, option: str, progress: Progress) -> None:
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        for index, key in enumerate(keys, start=1):
            tensor = file.get_tensor(key)
            if not tensor.is_floating_point():
                continue
            if tensor.element_size() == 1:  # isfinite has no float8 kernel
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
