"""Identity of tensor storages: a key for each, and a weak set of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch


def storage_key(tensor: torch.Tensor) -> int:
    """Address of the ``StorageImpl`` behind a tensor, the same for all its views.

    ``_cdata`` is private, but nothing public identifies the storage of a fake tensor: all their ``data_ptr()`` are 0.
    A key is valid only while the storage exists; hold a weak reference beside it.
    """
    return tensor.untyped_storage()._cdata


class StorageSet:
    """A set of storages that owns none of them; a storage leaves it when it is freed."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add the storages of these tensors."""
        for tensor in tensors:
            key = storage_key(tensor)
            if key not in self._references:
                self._references[key] = weakref.ref(tensor.untyped_storage(), partial(self._discard, key))

    def __contains__(self, key: int) -> bool:
        """Whether the storage with this :func:`storage_key` is in the set."""
        return key in self._references

    def _discard(self, key: int, reference: weakref.ref[Any]) -> None:
        if self._references.get(key) is reference:
            del self._references[key]
