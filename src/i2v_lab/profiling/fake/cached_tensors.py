"""Clears tensors from ``functools`` caches, so that fake and real ones do not mix."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def no_cached_tensors() -> Iterator[None]:
    """Clear every ``functools.lru_cache`` that holds a tensor, on entry and on exit of this scope.

    ltx-core caches its grids of frequencies this way. A fake one would be useless to a later real run; a real one would
    be memory whose allocation a forecast does not see.
    """
    _clear_caches_with_tensors()
    try:
        yield
    finally:
        _clear_caches_with_tensors()


def _clear_caches_with_tensors() -> None:
    for candidate in gc.get_objects():
        if type(candidate) is functools._lru_cache_wrapper and _contains_tensor(gc.get_referents(candidate), depth=3):
            candidate.cache_clear()


def _contains_tensor(values: Any, depth: int) -> bool:
    """Whether ``values``, or containers among them, hold a tensor; functions and their globals are not followed."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return True
        if depth and isinstance(value, dict) and _contains_tensor(value.values(), depth - 1):
            return True
        if depth and isinstance(value, list | tuple) and _contains_tensor(value, depth - 1):
            return True
    return False
