"""What a value holds, found through tuples, lists, dictionaries, sets and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch


def map_leaves(convert: Callable[[Any], Any], value: Any) -> Any:
    """The same value with its leaves converted; what holds no changed leaf stays the same object, the rest is copied.

    Args:
        convert: Called with everything that is no container.
        value: A leaf, or a container of any depth; subclasses of containers keep their class.

    Example:
        >>> map_leaves(lambda leaf: leaf + 1, {"a": (1, [2])})
        {'a': (2, [3])}
    """
    return _map(convert, value, set())


def _map(convert: Callable[[Any], Any], value: Any, outer: set[int]) -> Any:
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if not (is_data or isinstance(value, tuple | list | dict | set | frozenset)) or id(value) in outer:
        return value if id(value) in outer else convert(value)
    outer = outer | {id(value)}
    if isinstance(value, dict | list) or is_data:  # a dataclass may be a dictionary too, as in diffusers
        replace: Callable[[Any, Any, Any], None] = operator.setitem
        items: list[tuple[Any, Any]]
        if isinstance(value, dict):
            items = list(value.items())
        elif isinstance(value, list):
            items = list(enumerate(value))
        else:
            fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
            items, replace = [(name, getattr(value, name)) for name in fields], object.__setattr__  # frozen ones too
        mapped = {key: _map(convert, each, outer) for key, each in items}
        changed = [key for key, each in items if mapped[key] is not each]
        if changed:
            value = copy.copy(value)
        for key in changed:
            replace(value, key, mapped[key])
            if is_data and isinstance(value, dict):  # as diffusers' outputs: the same by key and by name
                object.__setattr__(value, key, mapped[key])
        return value
    leaves = [_map(convert, each, outer) for each in value]
    if all(after is before for after, before in zip(leaves, value, strict=True)):
        return value
    return value._make(leaves) if hasattr(value, "_make") else type(value)(leaves)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors that a value holds, in its order."""
    found: list[torch.Tensor] = []

    def keep(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        return leaf

    map_leaves(keep, value)
    return found


def is_picture(value: Any) -> bool:
    """Whether the first tensor in a value has the three channels of pictures or of a video: ``[B, 3, (T,) H, W]``."""
    tensors = tensors_in(value)
    return bool(tensors) and tensors[0].ndim in (4, 5) and tensors[0].shape[1] == 3
