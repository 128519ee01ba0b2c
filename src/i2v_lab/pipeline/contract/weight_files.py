"""Weight files of any backend: found, verified before they are loaded, and synthetic ones kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from i2v_lab.errors import CheckpointError, OutputError
from i2v_lab.paths import CACHE_VARIABLE, cache_dir
from i2v_lab.pipeline.contract.architectures import Architecture

Progress = Callable[[str, int, int], None]
Layout = Mapping[str, tuple[int, ...]]
FILE_LIMIT_BYTES = 2**30  # a model up to this size is written to files; a larger one is made on demand


def require_together(given: Mapping[str, Path | None], needed: Sequence[str], options: Mapping[str, str]) -> None:
    """Refuse a part of the real weights without the rest.

    Raises:
        CheckpointError: With the options that are missing.
    """
    missing = [options[name] for name in needed if given[name] is None]
    if missing:
        named = ", ".join(options[name] for name, path in given.items() if path)
        raise CheckpointError(
            f"{named} given without {', '.join(missing)}: real weights come together; add the missing, or give none",
            missing=missing,
        )


# --- The cache --------------------------------------------------------------------------------------------------------


def elements(layout: Layout) -> int:
    """How many numbers a layout's tensors hold."""
    return sum(torch.Size(shape).numel() for shape in layout.values())


def cached_folder(model: str, recipe: str, fill: Callable[[Path], None], suffix: str = "") -> Path:
    """The cache's copy, written whole or not at all: into a folder beside it, then renamed.

    Args:
        model: The architecture's name.
        recipe: Everything that decides the content.
        fill: Writes into the folder that it is given.
        suffix: Of the folder's name.

    Raises:
        OutputError: The cache cannot be written.
    """
    folder = cache_dir() / "synthetic" / f"{model}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}{suffix}"
    try:
        if not folder.is_dir():
            _fill(folder, fill)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"the cache folder '{cache_dir()}' cannot be written ({reason(error)}); free some space, or name another "
            f"folder in {CACHE_VARIABLE}",
            path=cache_dir(),
        ) from error
    return folder


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first; its copy is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def kept_layout(
    name: str, recipe: str, work_out: Callable[[], dict[str, tuple[int, ...]]]
) -> dict[str, tuple[int, ...]]:
    """A weight file's layout, kept in the cache folder, since working it out takes seconds for a large model."""
    kept = cache_dir() / "layouts" / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.json"
    with suppress(OSError, ValueError, AttributeError):
        return {key: tuple(shape) for key, shape in json.loads(kept.read_text()).items()}
    layout = work_out()
    with suppress(OSError):  # a cache that cannot be written is said where it is needed
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(layout))
        part.replace(kept)
    return layout


# --- Verification -----------------------------------------------------------------------------------------------------


def require_files(folder: Path, patterns: Sequence[str], option: str, what: str) -> None:
    """Make sure that a folder holds what its reader will look for, and that what is JSON can be read.

    Args:
        folder: Searched with its subfolders.
        patterns: File names, with wildcards.
        option: By which the folder was given.
        what: Whose files, for the messages.

    Raises:
        CheckpointError: The folder, or a file in it, does not exist or is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{option} '{folder}' is not a folder; give the folder of {what}'s files", path=folder)
    for pattern in patterns:
        found = next(folder.rglob(pattern), None)
        if found is None:
            raise CheckpointError(
                f"{option} '{folder}' holds no {pattern}; give a complete {what} folder", path=folder, missing=pattern
            )
        if found.suffix == ".json":
            try:
                json.loads(found.read_bytes())
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{option} '{found}' is not readable as JSON ({reason(error)}); download it again", path=found
                ) from error


def read_headers(paths: Sequence[Path], option: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in safetensors files.

    Raises:
        CheckpointError: A file is missing, truncated or of another format.
    """
    return {key: shape for path in paths for key, shape in _read_header(path, option).items()}


def verify_tensors(
    paths: Sequence[Path], option: str, model: str, expected: Layout, is_described: Callable[[Path], bool] | None
) -> None:
    """Check weight files against a layout: header, names, shapes and configuration. Reads no tensor.

    Args:
        paths: The files, which hold the layout's tensors together.
        option: By which they were given.
        model: Whose layout it is.
        expected: The layout.
        is_described: Whether a file's metadata has the configuration of its tensors; ``None`` where it needs none.

    Raises:
        CheckpointError: With the file, the first offending tensor, and what to do.
    """
    shapes = read_headers(paths, option)
    remedy = architecture_remedy(model)
    path = paths[0] if len(paths) == 1 else paths[0].parent
    where = f"{option} '{path}'"
    missing = [key for key in expected if key not in shapes]
    if sum(key in expected for key in shapes) < len(shapes) / 2:  # most of what is there is not of this model
        raise CheckpointError(f"{where} is of another architecture than {model}; {remedy}", path=path)
    wrong = [key for key in expected if key in shapes and shapes[key] != expected[key]]
    if wrong:
        raise CheckpointError(
            f"{where} is of another architecture than {model}: {wrong[0]} has shape "
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
    if is_described is not None and not is_described(path):
        raise CheckpointError(
            f"{where} has no 'config' in its safetensors metadata that describes its tensors; use the original file, "
            "or export it again with its metadata",
            path=path,
        )


def is_described(
    architecture: Architecture, section: str, layout: Callable[[Architecture], Layout], path: Path
) -> bool:
    """Whether a backend, which builds by the configuration in the file's metadata, would build for these tensors.

    Args:
        architecture: The model.
        section: Which of its attributes the file's metadata holds.
        layout: The file's layout for an architecture.
        path: The file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
        if config == getattr(architecture, section):
            return True
        described = layout(replace(architecture, **{section: config}))
    except Exception:  # the backends' classes raise whatever a malformed configuration leads them to
        return False
    return described == layout(architecture)


def architecture_remedy(model: str) -> str:
    """What to do about weights of another architecture."""
    return f"use the weights of {model}, or name their architecture with --model"


def verify_values(option: str, paths: Sequence[Path], progress: Progress = lambda *_: None) -> None:
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
        _read_values(path, option, progress)
        with suppress(OSError):  # where the cache cannot be written, the file is read again next time
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()


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
            f"{option} '{path}' is truncated or not a safetensors file ({reason(error)}); download it again "
            "(pickled checkpoints are not read)",
            path=path,
        ) from error
    except OSError as error:
        raise CheckpointError(f"{option} '{path}' cannot be read ({reason(error)}); check it", path=path) from error


def reason(error: Exception) -> str:
    """An error in a few words."""
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
