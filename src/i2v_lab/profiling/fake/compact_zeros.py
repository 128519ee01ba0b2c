"""Arrays of zeros that take the memory of one element: a decoded video of unknown values, on its way to pictures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

COMPACT_BYTES = 64 * 2**20  # from here on arrays are compact


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros; an array of more than 64 MiB takes the memory of one element.

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
    """An array whose elements are one in memory; so are the results of ufuncs on it.

    To write to one element is to write to all.
    """

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


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, _CompactArray) else value


def _is_compact(value: Any) -> bool:
    if not isinstance(value, np.ndarray):
        return np.ndim(value) == 0
    return all(stride == 0 or size == 1 for size, stride in zip(value.shape, value.strides, strict=True))


def _one(value: Any) -> Any:
    return value[(slice(0, 1),) * value.ndim] if isinstance(value, np.ndarray) else value


def _expanded(one: Any, shape: tuple[int, ...]) -> np.ndarray:
    whole = np.lib.stride_tricks.as_strided(np.asarray(one), shape, (0,) * len(shape))
    return whole.view(_CompactArray)
