"""Tensors in ``functools``' caches, which outlive the code that made them."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def no_cached_tensors() -> Iterator[None]:
    """No tensor passes the borders of this scope in a ``functools.lru_cache``.

    ltx-core keeps its grids of frequencies so. Those of a forecast are fake, and a real run that found one would
    compute with nothing; a real one in a forecast is memory that it does not see allocated.
    """
    _forget_tensors()
    try:
        yield
    finally:
        _forget_tensors()


def _forget_tensors() -> None:
    for each in gc.get_objects():
        if type(each) is functools._lru_cache_wrapper and _holds_tensor(gc.get_referents(each), depth=3):
            each.cache_clear()


def _holds_tensor(values: Any, depth: int) -> bool:
    """Whether there is one among ``values``, or in containers in them; functions and their globals are not followed."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return True
        if depth and isinstance(value, dict) and _holds_tensor(value.values(), depth - 1):
            return True
        if depth and isinstance(value, list | tuple) and _holds_tensor(value, depth - 1):
            return True
    return False
