"""Arrays of zeros that take the memory of one element: a decoded video of unknown values, on its way to pictures."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from i2v_lab.thread_patches import unpatched

COMPACT_BYTES = 2**20  # from here on arrays are compact
NOTHING = np.dtype("V0")  # arrays of it have a shape and no memory
SHAPES: dict[Any, Callable[..., tuple[int, ...]]] = {
    np.concatenate: lambda arrays, axis=0, **_: _joined(list(map(np.shape, arrays)), axis),
    np.copy: lambda array, *_, **__: np.shape(array),
    np.ravel: lambda array, *_, **__: (array.size,),
    np.repeat: lambda array, repeats, axis=None: _without_memory(array).repeat(repeats, axis).shape,
    np.take: lambda array, indices, axis=None, **_: _taken(array, indices, axis),
}  # of functions whose results have the elements of their arguments; np.stack and others call these
BY_ELEMENT = {np.empty_like, np.full_like, np.nan_to_num, np.ones_like, np.where, np.zeros_like}  # but no ufuncs


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros; an array of more than 1 MiB takes the memory of one element.

    Example:
        >>> video = zeros((121, 704, 1280, 3), np.dtype("float32"))
        >>> frames = (video * 255).round().astype("uint8")  # 327 MB in a contiguous array
        >>> frames.shape, frames.strides, frames[0].tobytes() == bytes(704 * 1280 * 3)
        ((121, 704, 1280, 3), (0, 0, 0, 0), True)
    """
    if math.prod(shape) * dtype.itemsize <= COMPACT_BYTES:
        return np.zeros(shape, dtype)
    return _expanded(np.zeros((1,) * len(shape), dtype), shape)


class _CompactArray(np.ndarray):
    """An array whose elements are one in memory; so are the results of ufuncs on it, and of functions that copy it.

    To write to one element is to write to all.
    """

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        arrays = list(_arrays((args, kwargs)))
        if all(map(_is_compact, arrays)):
            if func in BY_ELEMENT and "shape" not in kwargs:
                shape = np.broadcast_shapes(*map(np.shape, arrays))
                return _expanded(func(*_mapped(_one, args), **_mapped(_one, kwargs)), shape)
            if func in SHAPES and len({(each.dtype, _one(each).tobytes()) for each in arrays}) == 1:
                return _filled(_one(arrays[0]), SHAPES[func](*args, **kwargs))
        return super().__array_function__(func, types, args, kwargs)

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if _is_compact(self) and self.size and any(isinstance(part, list | np.ndarray) for part in parts):
            return _filled(_one(_plain(self)), _without_memory(self)[index].shape)
        return super().__getitem__(index)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.copy()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **kwargs: Any) -> Any:
        plain, targets = [[_plain(each) for each in values] for values in (inputs, out)]
        if method != "__call__" or ufunc.signature is not None or not all(map(_is_compact, plain + targets)):
            kwargs = {**kwargs, "out": tuple(targets)} if out else kwargs
            return getattr(ufunc, method)(*plain, **kwargs)
        if out:
            ufunc(*map(_one, plain), out=tuple(map(_one, targets)), **kwargs)
            return out[0] if len(out) == 1 else out
        result = ufunc(*map(_one, plain), **kwargs)
        shape = np.broadcast_shapes(*map(np.shape, plain))
        return tuple(_expanded(each, shape) for each in result) if ufunc.nout > 1 else _expanded(result, shape)

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Also compact."""
        plain = _plain(self)
        if not _is_compact(plain):
            return np.asarray(plain.astype(dtype, *args, **kwargs))
        return _expanded(_one(plain).astype(dtype), self.shape)

    def copy(self, order: Any = "C") -> Any:
        """Also compact, and so are the copies below."""
        return np.copy(self)

    def flatten(self, order: Any = "C") -> np.ndarray:
        """As :meth:`copy`."""
        return np.ravel(self)

    ravel = flatten

    def repeat(self, repeats: Any, axis: Any = None) -> np.ndarray:
        """As :meth:`copy`."""
        return np.repeat(self, repeats, axis)


def picture_patches() -> Iterator[tuple[Any, str, Any]]:
    """What to replace, and by what, so that the pictures of compact arrays are one in memory too, where they are equal.

    To write to one is to write to all.
    """
    image = sys.modules.get("PIL.Image")
    if image is None:
        return
    known: dict[Any, Any] = {}

    def fromarray(array: Any, mode: str | None = None) -> Any:
        make = unpatched(image, "fromarray")
        if not (isinstance(array, _CompactArray) and array.size and _is_compact(array)):
            return make(array, mode)
        key = (array.shape, array.dtype, _one(array).tobytes(), mode)
        if key not in known:
            known[key] = make(array, mode)
        return known[key]

    yield image, "fromarray", fromarray


def _arrays(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield _plain(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, dict):
        yield from _arrays(list(value.values()))


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Nested arguments with ``function`` of each array."""
    if isinstance(value, np.ndarray):
        return function(_plain(value))
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, item) for item in value])
    return {key: _mapped(function, item) for key, item in value.items()} if isinstance(value, dict) else value


def _without_memory(array: np.ndarray) -> np.ndarray:
    return np.empty(array.shape, NOTHING)


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, _CompactArray) else value


def _is_compact(value: Any) -> bool:
    if not isinstance(value, np.ndarray):
        return np.ndim(value) == 0
    return all(stride == 0 or size == 1 for size, stride in zip(value.shape, value.strides, strict=True))


def _one(value: Any) -> Any:
    return value[(slice(0, 1),) * value.ndim] if isinstance(value, np.ndarray) else value


def _joined(shapes: list[tuple[int, ...]], axis: int | None) -> tuple[int, ...]:
    if axis is None:
        return (sum(map(math.prod, shapes)),)
    joined = list(shapes[0])
    joined[axis] = sum(shape[axis] for shape in shapes)
    if any(len(shape) != len(joined) or _but(shape, axis) != _but(joined, axis) for shape in shapes):
        raise ValueError("all the input array dimensions except for the concatenation axis must match exactly")
    return tuple(joined)


def _but(shape: Sequence[int], axis: int) -> list[int]:
    rest = list(shape)
    rest.pop(axis)
    return rest


def _taken(array: np.ndarray, indices: Any, axis: int | None) -> tuple[int, ...]:
    if axis is None:
        return np.shape(indices)
    axis %= array.ndim
    return (*array.shape[:axis], *np.shape(indices), *array.shape[axis + 1 :])


def _filled(one: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array of any shape with the one element of another."""
    return _expanded(one.reshape(-1)[0].copy(), shape)


def _expanded(one: Any, shape: tuple[int, ...]) -> np.ndarray:
    whole = np.lib.stride_tricks.as_strided(np.asarray(one), shape, (0,) * len(shape))
    return whole.view(_CompactArray)
