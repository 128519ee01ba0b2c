"""A weak set of tensor storages."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from i2v_lab.torch_compat import inner_tensors, storage_key


class StorageSet:
    """A set of storages that owns none of them; a storage leaves it when it is freed."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add the storages of these tensors."""
        for tensor in (inner for outer in tensors for inner in inner_tensors(outer)):
            key = storage_key(tensor)
            if key not in self._references:
                self._references[key] = weakref.ref(tensor.untyped_storage(), partial(self._discard, key))

    def __contains__(self, key: int) -> bool:
        """Whether the storage with this :func:`storage_key` is in the set."""
        return key in self._references

    def _discard(self, key: int, reference: weakref.ref[Any]) -> None:
        if self._references.get(key) is reference:
            del self._references[key]
