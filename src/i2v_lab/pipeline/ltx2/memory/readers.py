"""Readers of single tensors of weight files, without a cache.

The ``safetensors`` package maps a file into memory: if the file is truncated while it is mapped, the process is killed
by SIGBUS. A plain read returns fewer bytes instead, which can be reported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from i2v_lab.errors import CheckpointError
from i2v_lab.pipeline.contract.host_memory import available_bytes
from i2v_lab.pipeline.contract.scaled_fp8 import dequantized, own_keys, scale_keys

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class FilePart:
    """The bytes of one tensor in a weight file.

    Attributes:
        path: The file.
        key: The tensor's name in it.
        offset: Of its first byte in the file.
        dtype: As stored.
        shape: Its shape.
    """

    path: str
    key: str
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.shape.numel() * self.dtype.itemsize

    def read_into(self, target: memoryview, first: int = 0) -> None:
        """Read some of its bytes, without a copy on the way and without the GIL.

        Args:
            target: Gets them, as many as it has.
            first: Of the tensor's bytes, the first that is read.

        Raises:
            CheckpointError: The file has been removed or is shorter than its header says; ``fields`` has its ``path``
                and the ``tensor``.
        """
        _read_into(self.path, self.offset + first, target, self.key)

    def read(self) -> torch.Tensor:
        """The tensor, in pageable memory; raises as :meth:`read_into`."""
        data = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        self.read_into(data.numpy().data)
        return data.view(self.dtype).reshape(self.shape)


class TensorReader(Protocol):
    """Reads single tensors of weight files, or makes them on demand."""

    def keys(self, path: str) -> list[str]:
        """The names of all weights in a file, without their scales."""

    def tensor(self, path: str, key: str, device: torch.device) -> torch.Tensor:
        """One tensor, on ``device``, in the file's dtype; bfloat16 if it has a scale, which is applied."""

    def part(self, path: str, key: str) -> FilePart | None:
        """Where a tensor's bytes are; ``None`` where it is made on demand."""

    def scale(self, path: str, key: str) -> FilePart | None:
        """Where the scale of a float8 weight is; ``None`` for a tensor that has none."""

    def identity(self, path: str) -> Hashable:
        """Equal for a file that has not changed."""


class SafetensorsReader:
    """Reads safetensors files by plain reads, one tensor at a time.

    A file is opened for each tensor, so that one that has been removed is noticed.
    """

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, FilePart]] = {}
        self._scales: dict[str, dict[str, str]] = {}

    def keys(self, path: str) -> list[str]:
        """The names of all weights in a file, without their scales."""
        return own_keys(self._header(path))

    def tensor(self, path: str, key: str, device: torch.device) -> torch.Tensor:
        """One tensor, on ``device``, in the file's dtype; bfloat16 if it has a scale, which is applied.

        Raises:
            CheckpointError: The file has been removed or is shorter than its header says; ``fields`` has its ``path``
                and the ``tensor``.
        """
        scale = self.scale(path, key)
        if device.type == "meta":
            part = self.part(path, key)
            return torch.empty(part.shape, dtype=part.dtype if scale is None else torch.bfloat16, device=device)
        value = self.part(path, key).read().to(device)
        return value if scale is None else dequantized(value, scale.read())

    def part(self, path: str, key: str) -> FilePart:
        """Where a tensor's bytes are."""
        return self._header(path)[key]

    def scale(self, path: str, key: str) -> FilePart | None:
        """Where the scale of a float8 weight is; ``None`` for a tensor that has none."""
        self._header(path)
        scale = self._scales[path].get(key)
        return None if scale is None else self.part(path, scale)

    def identity(self, path: str) -> tuple[str, int, int]:
        """A file's path, size and time of modification.

        Raises:
            CheckpointError: It has been removed; ``fields`` has its ``path``.
        """
        return file_identity(path)

    def _header(self, path: str) -> dict[str, FilePart]:
        if path not in self._parts:
            length = bytearray(8)
            _read_into(path, 0, memoryview(length), "its header")
            size = int.from_bytes(length, "little")
            try:
                if size > Path(path).stat().st_size:
                    raise ValueError(size)
                text = bytearray(size)
                _read_into(path, 8, memoryview(text), "its header")
                entries = json.loads(text)
                entries.pop("__metadata__", None)
                parts = {key: _part(path, key, 8 + size, entry) for key, entry in entries.items()}
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                raise CheckpointError(
                    f"weight file '{path}' has no valid header any more; it was replaced or damaged after it had been "
                    "verified: restore it and run again",
                    path=path,
                    tensor="its header",
                ) from error
            self._parts[path], self._scales[path] = parts, scale_keys(parts)
        return self._parts[path]


def _part(path: str, key: str, start: int, entry: Mapping[str, Any]) -> FilePart:
    return FilePart(path, key, start + entry["data_offsets"][0], DTYPES[entry["dtype"]], torch.Size(entry["shape"]))


def will_need(paths: Iterable[str]) -> None:
    """Have the system read files into its page cache, in their order, as far as they take half of what is available."""
    room = available_bytes() // 2
    for path in paths:
        with suppress(OSError), open(path, "rb", buffering=0) as file:  # noqa: PTH123
            room -= os.fstat(file.fileno()).st_size
            if room >= 0 and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def file_identity(path: str) -> tuple[str, int, int]:
    """A file's path, size and time of modification, in nanoseconds.

    Raises:
        CheckpointError: It has been removed; ``fields`` has its ``path``.
    """
    try:
        status = Path(path).stat()
    except OSError as error:
        raise _unreadable(path, error, "its size") from error
    return str(Path(path).resolve()), status.st_size, status.st_mtime_ns


def _unreadable(path: str, error: OSError, what: str) -> CheckpointError:
    return CheckpointError(
        f"weight file '{path}' cannot be read any more ({error.strerror}), for {what}; leave weights in place "
        "while a run streams them",
        path=path,
        tensor=what,
    )


def _read_into(path: str, offset: int, target: memoryview, what: str) -> None:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            file.seek(offset)
            done = 0
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    size = os.fstat(file.fileno()).st_size
                    raise CheckpointError(
                        f"weight file '{path}' ends at byte {size}, within {what}, while the run reads it; it was cut "
                        "short after it had been verified: restore it and run again",
                        path=path,
                        tensor=what,
                    )
                done += count
    except OSError as error:
        raise _unreadable(path, error, what) from error
