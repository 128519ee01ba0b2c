"""Headers of safetensors files, and the error for a weight file that is not used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from i2v_lab.errors import CheckpointError
from i2v_lab.pipeline.contract.file_kinds import kind_of

# What is wrong with a weight file, as the ``fault`` of a CheckpointError's fields.
Fault = Literal[
    "not-found",
    "not-a-file",
    "not-a-folder",
    "unreadable",
    "format",
    "architecture",
    "incomplete",
    "config",
    "values",
    "dtype",
    "unknown",
    "duplicate",
    "code",
]


@dataclass(frozen=True)
class Stored:
    """What a safetensors header says of one tensor.

    Attributes:
        shape: Its shape.
        dtype: Its type in the header, such as ``BF16`` or ``F8_E4M3``.
        path: The file.
    """

    shape: tuple[int, ...]
    dtype: str
    path: Path


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


def read_headers(paths: Sequence[Path], option: str) -> dict[str, Stored]:
    """All tensors in safetensors files, by their names.

    Raises:
        CheckpointError: A file is missing, truncated or of another format, or a tensor is in two files; ``fields`` has
            the ``option``, the ``path`` and the ``fault``, and the ``tensor``.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        for key, stored in _read_header(path, option).items():
            if key in found:
                words = f"has {key}, which '{found[key].path.name}' has too; keep one of the files"
                raise weights_refused(option, path, "duplicate", words, tensor=key)
            found[key] = stored
    return found


def unknown_refused(option: str, stored: Mapping[str, Stored], unknown: Sequence[str]) -> CheckpointError:
    """The error for tensors that nothing reads.

    Args:
        option: The command-line option that named the file.
        stored: The tensors of the files.
        unknown: The names of those that are not known.
    """
    key = unknown[0]
    words = (
        f"has {len(unknown)} tensors that nothing here reads, the first {key} ({stored[key].dtype}): without them "
        "its weights may mean something else; use a file in bfloat16, or in float8 with scales (weight_scale)"
    )
    return weights_refused(option, stored[key].path, "unknown", words, tensor=key, dtype=stored[key].dtype)


def _read_header(path: Path, option: str) -> dict[str, Stored]:
    try:
        if path.is_dir():
            raise weights_refused(option, path, "not-a-file", "is a folder; name the safetensors file in it")
        if path.exists() and not path.is_file():  # to open a pipe would wait for a writer
            raise weights_refused(option, path, "not-a-file", "is no regular file; name the safetensors file")
        if not path.is_file():
            raise weights_refused(option, path, "not-found", "does not exist; check the path")
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: Stored(tuple(part.get_shape()), part.get_dtype(), path) for key, part in slices.items()}
    except SafetensorError as error:
        found = kind_of(path)
        if found is not None:
            raise weights_refused(option, path, "format", f"is {found[1]}", kind=found[0]) from error
        words = f"is truncated or not a safetensors file ({reason(error)}); download it again"
        raise weights_refused(option, path, "format", words) from error
    except OSError as error:
        raise weights_refused(option, path, "unreadable", f"cannot be read ({reason(error)}); check it") from error


def reason(error: Exception) -> str:
    """The first line of an error's message, without the library's prefix."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).removeprefix("Error while deserializing header: ")
    return next(iter(text.splitlines()), type(error).__name__)
