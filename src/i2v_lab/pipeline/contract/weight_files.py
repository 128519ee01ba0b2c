"""Verification of weight files, of any runner, before a tensor is loaded: presence, headers, shapes, values."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from i2v_lab.errors import CheckpointError
from i2v_lab.paths import cache_dir
from i2v_lab.pipeline.contract.architectures import Architecture

Progress = Callable[[str, int, int], None]  # a file's name, tensors verified, tensors in all
Layout = Mapping[str, tuple[int, ...]]  # shapes of a weight file's tensors, by their names in the file
# What is wrong with a weight file, as the ``fault`` of a CheckpointError's fields.
Fault = Literal[
    "not-found", "not-a-file", "not-a-folder", "unreadable", "format", "architecture", "incomplete", "config", "values"
]


def weights_refused(option: str, path: Path, fault: Fault, message: str, **fields: Any) -> CheckpointError:
    """The error for a weight file that is not used.

    Args:
        option: The command-line option that named it.
        path: The file or folder.
        fault: What is wrong.
        message: What is wrong and the remedy, after the option and the path.
        **fields: Further values, such as the ``tensor`` or what is ``missing``.

    Example:
        >>> error = weights_refused("--lora", Path("lora.safetensors"), "not-found", "does not exist; check the path")
        >>> print(error)
        --lora 'lora.safetensors' does not exist; check the path
        >>> error.fields["fault"]
        'not-found'
    """
    return CheckpointError(f"{option} '{path}' {message}", option=option, path=path, fault=fault, **fields)


def require_together(given: Mapping[str, Path | None], needed: Sequence[str], options: Mapping[str, str]) -> None:
    """Refuse paths of some weight files without those of the others.

    Args:
        given: Paths by the weight file's name; ``None`` for one that is not given.
        needed: Names of the weight files that a run reads.
        options: The command-line option of each weight file.

    Raises:
        CheckpointError: Some are missing; ``fields`` has their options as ``missing``.
    """
    missing = [options[name] for name in needed if given[name] is None]
    if missing:
        named = ", ".join(options[name] for name, path in given.items() if path)
        raise CheckpointError(
            f"{named} given without {', '.join(missing)}: real weights come together; add the missing, or give none",
            missing=missing,
        )


def element_count(layout: Layout) -> int:
    """The number of elements of all tensors of a layout."""
    return sum(torch.Size(shape).numel() for shape in layout.values())


def require_files(folder: Path, patterns: Sequence[str], option: str, what: str) -> None:
    """Check that a folder holds the files that its reader will open, and that JSON files among them parse.

    Args:
        folder: Searched recursively.
        patterns: File names, with wildcards.
        option: The command-line option that named the folder.
        what: The component whose files they are, for the messages.

    Raises:
        CheckpointError: The folder or a file does not exist, or a JSON file is damaged; ``fields`` has the ``option``,
            the ``path``, the ``fault``, and the pattern of a missing file as ``missing``.
    """
    if not folder.is_dir():
        raise weights_refused(option, folder, "not-a-folder", f"is not a folder; give the folder of {what}'s files")
    for pattern in patterns:
        found = next(folder.rglob(pattern), None)
        if found is None:
            words = f"holds no {pattern}; give a complete {what} folder"
            raise weights_refused(option, folder, "incomplete", words, missing=pattern)
        if found.suffix == ".json":
            try:
                json.loads(found.read_bytes())
            except (OSError, ValueError) as error:
                words = f"is not readable as JSON ({reason(error)}); download it again"
                raise weights_refused(option, found, "format", words) from error


def read_headers(paths: Sequence[Path], option: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in safetensors files.

    Raises:
        CheckpointError: A file is missing, truncated or of another format; ``fields`` has the ``option``, the ``path``
            and the ``fault``.
    """
    return {key: shape for path in paths for key, shape in _read_header(path, option).items()}


def verify_tensors(
    paths: Sequence[Path], option: str, model: str, expected: Layout, config_matches: Callable[[Path], bool] | None
) -> None:
    """Check weight files against a layout: headers, names, shapes and configuration. Reads no tensor.

    Tensors that the layout does not have are ignored.

    Args:
        paths: The files, which together hold the layout's tensors.
        option: The command-line option that named them.
        model: The architecture's name.
        expected: The layout.
        config_matches: Whether the configuration in a file's metadata is that of its tensors; ``None`` for files that
            carry no configuration.

    Raises:
        CheckpointError: A file does not match; ``fields`` has the ``option``, the ``path``, the ``fault``, and the
            first ``tensor`` of a wrong shape or the names of those that are ``missing``.
    """
    shapes = read_headers(paths, option)
    remedy = architecture_remedy(model)
    path = paths[0] if len(paths) == 1 else paths[0].parent
    missing = [key for key in expected if key not in shapes]
    if sum(key in expected for key in shapes) < len(shapes) / 2:  # most tensors are not of this model
        raise weights_refused(option, path, "architecture", f"is of another architecture than {model}; {remedy}")
    wrong = [key for key in expected if key in shapes and shapes[key] != expected[key]]
    if wrong:
        words = (
            f"is of another architecture than {model}: {wrong[0]} has shape {shapes[wrong[0]]}, not "
            f"{expected[wrong[0]]}; {remedy}"
        )
        raise weights_refused(option, path, "architecture", words, tensor=wrong[0])
    if missing:
        words = f"lacks {len(missing)} of {len(expected)} tensors, the first {missing[0]}; download or export it again"
        raise weights_refused(option, path, "incomplete", words, missing=missing)
    if config_matches is not None and not config_matches(path):
        words = (
            "has no 'config' in its safetensors metadata that describes its tensors; use the original file, or export "
            "it again with its metadata"
        )
        raise weights_refused(option, path, "config", words)


def config_matches(
    architecture: Architecture, section: str, layout: Callable[[Architecture], Layout], path: Path
) -> bool:
    """Whether the configuration in a file's metadata, by which its runner builds modules, gives the model's layout.

    Args:
        architecture: The model.
        section: The attribute of the architecture that the file's metadata holds.
        layout: Computes the file's layout for an architecture.
        path: The safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
        if config == getattr(architecture, section):
            return True
        described = layout(replace(architecture, **{section: config}))
    except Exception:  # the runners' classes raise whatever a malformed configuration leads them to
        return False
    return described == layout(architecture)


def architecture_remedy(model: str) -> str:
    """The remedy of an error about weights of another architecture."""
    return f"use the weights of {model}, or name their architecture with --model"


def verify_values(option: str, paths: Sequence[Path], progress: Progress = lambda *_: None) -> None:
    """Check every value of weight files for NaN and infinity.

    A file that passed is recorded in the cache by path, size and modification time, and not read again.

    Args:
        option: The command-line option that named the files.
        paths: The safetensors files.
        progress: Called after each tensor.

    Raises:
        CheckpointError: A value is not finite; ``fields`` has the ``option``, the ``path``, the ``fault``, the
            ``tensor``, and its ``kind``, NaN or infinity.
    """
    for path in paths:
        stamp = _stamp(path)
        verified = False
        with suppress(OSError):
            verified = stamp.exists()
        if verified:
            continue
        _read_values(path, option, progress)
        with suppress(OSError):  # where the cache cannot be written, the file is read again next time
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()


def _read_header(path: Path, option: str) -> dict[str, tuple[int, ...]]:
    try:
        if path.is_dir():
            raise weights_refused(option, path, "not-a-file", "is a folder; name the safetensors file in it")
        if not path.is_file():
            raise weights_refused(option, path, "not-found", "does not exist; check the path")
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        words = (
            f"is truncated or not a safetensors file ({reason(error)}); download it again (pickled checkpoints are not "
            "read)"
        )
        raise weights_refused(option, path, "format", words) from error
    except OSError as error:
        raise weights_refused(option, path, "unreadable", f"cannot be read ({reason(error)}); check it") from error


def reason(error: Exception) -> str:
    """The first line of an error's message, without the library's prefix."""
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
                words = f"holds {kind} in {key}; download or export it again"
                raise weights_refused(option, path, "values", words, tensor=key, kind=kind)
            progress(path.name, index, len(keys))


def _stamp(path: Path) -> Path:
    status = path.stat()
    identity = json.dumps([os.fspath(path.resolve()), status.st_size, status.st_mtime_ns])
    return cache_dir() / "verified" / hashlib.sha256(identity.encode()).hexdigest()[:24]
