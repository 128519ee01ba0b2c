"""Readers of single tensors of weight files, without a cache.

The ``safetensors`` package maps a file into memory: if the file is truncated while it is mapped, the process is killed
by SIGBUS. A plain read returns fewer bytes instead, which can be reported.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from i2v_lab.errors import CheckpointError
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


class TensorReader(Protocol):
    """Reads single tensors of weight files, or makes them on demand."""

    def keys(self, path: str) -> list[str]:
        """The names of all weights in a file, without their scales."""

    def tensor(self, path: str, key: str, device: torch.device) -> torch.Tensor:
        """One tensor, on ``device``, in the file's dtype; bfloat16 if it has a scale, which is applied."""


class SafetensorsReader:
    """Reads safetensors files by plain reads, one tensor at a time.

    A file is opened for each tensor, so that one that has been removed is noticed.
    """

    def __init__(self) -> None:
        self._headers: dict[str, tuple[int, Mapping[str, Any]]] = {}
        self._scales: dict[str, dict[str, str]] = {}

    def keys(self, path: str) -> list[str]:
        """The names of all weights in a file, without their scales."""
        return own_keys(self._header(path)[1])

    def tensor(self, path: str, key: str, device: torch.device) -> torch.Tensor:
        """One tensor, on ``device``, in the file's dtype; bfloat16 if it has a scale, which is applied.

        Raises:
            CheckpointError: The file has been removed or is shorter than its header says; ``fields`` has its ``path``
                and the ``tensor``.
        """
        self._header(path)
        scale = self._scales[path].get(key)
        value = self._read(path, key).to(device)
        return value if scale is None else dequantized(value, self._read(path, scale))

    def _read(self, path: str, key: str) -> torch.Tensor:
        start, entries = self._header(path)
        entry = entries[key]
        begin, end = entry["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        _read_into(path, start + begin, data.numpy().data, key)
        return data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def _header(self, path: str) -> tuple[int, Mapping[str, Any]]:
        if path not in self._headers:
            length = bytearray(8)
            _read_into(path, 0, memoryview(length), "its header")
            text = bytearray(struct.unpack("<Q", length)[0])
            _read_into(path, 8, memoryview(text), "its header")
            entries = json.loads(text)
            entries.pop("__metadata__", None)
            self._headers[path] = (8 + len(text), entries)
            self._scales[path] = scale_keys(entries)
        return self._headers[path]


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
        raise CheckpointError(
            f"weight file '{path}' cannot be read any more ({error.strerror}), for {what}; leave weights in place "
            "while a run streams them",
            path=path,
            tensor=what,
        ) from error
