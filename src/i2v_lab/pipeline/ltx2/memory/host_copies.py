"""The form of a streamed block in host memory: one buffer, with each tensor as its file has it or as its module has it.

The smaller of the two forms is kept. A float8 weight that is used in bfloat16, with or without a scale, stays float8 in
host memory and on the link, and becomes bfloat16 on the device; a bfloat16 weight that is used in float8 is cast when
it is read. A float8 weight with a scale that is used in float8 without one is looked up, value by value, in its place.
What is kept as it is in the file is read straight into the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from i2v_lab.pipeline.contract.scaled_fp8 import dequantized
from i2v_lab.pipeline.ltx2.memory.host_memory import PageLocked
from i2v_lab.pipeline.ltx2.memory.readers import FilePart

ALIGNMENT = 256  # bytes; of a tensor in a block's buffer
PIECE_BYTES = 2**25  # that one thread reads at once
LOOKUP_BYTES = 2**16  # whose indices stay in a core's cache

Convert = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HostTensor:
    """One tensor in a block's buffer.

    Attributes:
        name: In the module.
        offset: In bytes.
        dtype: In the buffer.
        shape: Its shape.
        target: Dtype in the module.
        scale: Of a float8 weight, in the same buffer.
    """

    name: str
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    target: torch.dtype
    scale: HostTensor | None = None

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """In elements."""
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        return tuple(strides[: len(self.shape)])

    @cached_property
    def first(self) -> int:
        """The offset in elements."""
        return self.offset // self.dtype.itemsize


@dataclass(frozen=True)
class HostCopy:
    """A block's tensors in host memory.

    Attributes:
        buffer: Holds all of them.
        tensors: Where.
    """

    buffer: PageLocked
    tensors: tuple[HostTensor, ...]

    def unpacked(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors as the module has them: views of ``buffer``, a copy on the device, or made from such views."""
        return dict(_unpacked(self.tensors, buffer, lambda view: view))

    def tensors_on(self, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as the module has them, one after another, each with memory of its own on ``device``.

        They are complete for work that is queued next on the current stream.
        """
        return _unpacked(self.tensors, self.buffer.data, lambda view: view.to(device, non_blocking=True, copy=True))


def _unpacked(
    tensors: Iterable[HostTensor], buffer: torch.Tensor, placed: Convert
) -> Iterator[tuple[str, torch.Tensor]]:
    typed: dict[torch.dtype, tuple[torch.Tensor, int]] = {}

    def view(one: HostTensor) -> torch.Tensor:
        if one.dtype not in typed:
            whole = buffer.view(one.dtype)
            typed[one.dtype] = whole, int(whole.storage_offset())  # from which as_strided does not count
        whole, begin = typed[one.dtype]
        return whole.as_strided(one.shape, one.strides, begin + one.first)

    for one in tensors:
        value = placed(view(one))
        if one.scale is not None:
            value = dequantized(value, placed(view(one.scale)))
        yield one.name, value if value.dtype is one.target else value.to(one.target)


@dataclass(frozen=True)
class PlannedTensor:
    """How one tensor of a block comes into host memory.

    Attributes:
        name: In the module.
        shape: There.
        dtype: In the buffer.
        target: In the module.
        part: Its bytes in a file; ``None`` for a tensor that is made on demand.
        scale: The scale of a float8 weight.
        convert: From what the file has, with the scale applied, to what the module has, on the CPU; ``None`` where the
            bytes are taken as they are.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    target: torch.dtype
    part: FilePart | None
    scale: FilePart | None = None
    convert: Convert | None = None

    @property
    def keeps_scale(self) -> bool:
        """Whether the scale is applied on the device, and so is in the buffer too."""
        return self.scale is not None and self.convert is None

    @property
    def is_requantized(self) -> bool:
        """Whether it is float8 with a scale in the file, and float8 without one in the module."""
        assert self.part is not None
        return self.scale is not None and self.part.dtype.itemsize == self.dtype.itemsize == 1


class Job(Protocol):
    """Part of the filling of a buffer; any thread may call it."""

    @property
    def staging_bytes(self) -> int:
        """Of pageable memory, while it is called."""

    def __call__(self) -> None:
        """Fill it."""


class BlockPlan:
    """How a block comes into host memory.

    Args:
        tensors: Its tensors.
        capacity: Of its buffer in bytes, if it is to be larger than they are; buffers of one size are filled again.

    Attributes:
        layout: Where each is in the buffer.
        nbytes: Of the buffer.
        paths: The files that it is read from; none where a tensor is made on demand.
    """

    def __init__(self, tensors: Iterable[PlannedTensor], capacity: int = 0) -> None:
        self._tensors = tuple(tensors)
        self.layout, nbytes = packed(
            (one.name, one.dtype, one.shape, one.target, one.scale if one.keeps_scale else None)
            for one in self._tensors
        )
        self.nbytes = max(nbytes, capacity)
        from_files = all(one.part is not None for one in self._tensors)
        self.paths = {one.part.path for one in self._tensors if one.part is not None} if from_files else set[str]()

    @property
    def content(self) -> tuple[object, ...]:
        """Equal for blocks whose buffers have the same content, from files that have not changed."""
        return tuple(
            (one.name, one.target, None if one.part is None else (one.part.path, one.part.key)) for one in self._tensors
        )

    def loaded(self, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of files on ``device``, as the module has them, without a buffer."""
        for one in self._tensors:
            assert one.part is not None
            value = one.part.read().to(device)
            if one.scale is not None:
                value = dequantized(value, one.scale.read())
            yield one.name, value if one.convert is None else one.convert(value)

    def jobs(self, buffer: torch.Tensor) -> list[Job]:
        """What fills a buffer, ``(nbytes,)`` uint8: to be called in any order, by any thread, each once."""
        memory = buffer.numpy().data
        found: list[Job] = []
        for one, place in zip(self._tensors, self.layout, strict=True):
            assert one.part is not None
            if one.convert is not None:
                found.append((_Lookup if one.is_requantized else _Conversion)(one, place, buffer))
                continue
            found += _reads(one.part, memory[place.offset : place.offset + one.part.nbytes])
            if place.scale is not None and one.scale is not None:
                found += _reads(one.scale, memory[place.scale.offset : place.scale.offset + one.scale.nbytes])
        return found


def packed(
    tensors: Iterable[tuple[str, torch.dtype, torch.Size, torch.dtype, FilePart | None]],
) -> tuple[tuple[HostTensor, ...], int]:
    """Where tensors are in a buffer, and its size in bytes.

    Args:
        tensors: For each its name, its dtype in the buffer, shape, dtype in the module, and its scale where that is in
            the buffer too.
    """
    layout, size = [], 0

    def place(dtype: torch.dtype, shape: torch.Size) -> int:
        nonlocal size
        offset = size
        size += -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return offset

    for name, dtype, shape, target, scale in tensors:
        offset = place(dtype, shape)
        factor = None
        if scale is not None:
            factor = HostTensor(scale.key, place(scale.dtype, scale.shape), scale.dtype, scale.shape, scale.dtype)
        layout.append(HostTensor(name, offset, dtype, shape, target, factor))
    return tuple(layout), size


def _reads(part: FilePart, target: memoryview) -> list[Job]:
    return [_Read(part, target[first : first + PIECE_BYTES], first) for first in range(0, len(target), PIECE_BYTES)]


@dataclass(frozen=True)
class _Read:
    """Reads bytes of a file to their place."""

    part: FilePart
    target: memoryview
    first: int
    staging_bytes = 0

    def __call__(self) -> None:
        self.part.read_into(self.target, self.first)


@dataclass(frozen=True)
class _Conversion:
    """Reads a tensor, converts it and puts it in its place."""

    tensor: PlannedTensor
    place: HostTensor
    buffer: torch.Tensor

    @property
    def staging_bytes(self) -> int:
        """Of the tensor as its file has it, and as the module has it."""
        assert self.tensor.part is not None
        return self.tensor.part.nbytes + self.place.shape.numel() * self.place.dtype.itemsize

    def __call__(self) -> None:
        one, convert = self.tensor, self.tensor.convert
        assert one.part is not None
        assert convert is not None
        value = one.part.read()
        if one.scale is not None:
            value = dequantized(value, one.scale.read())
        _, target = next(_unpacked([self.place], self.buffer, lambda view: view))
        target.copy_(convert(value))


@dataclass(frozen=True)
class _Lookup:
    """Reads a float8 weight to its place, and there replaces each of its 256 values by what the module has for it.

    On a core this takes a sixth of the time that the product in bfloat16 and its rounding take, and no memory.
    """

    tensor: PlannedTensor
    place: HostTensor
    buffer: torch.Tensor
    staging_bytes = 0

    def __call__(self) -> None:
        one = self.tensor
        assert one.part is not None
        assert one.scale is not None
        assert one.convert is not None
        scale = one.scale.read()
        rows = scale.numel()
        every = torch.arange(256, dtype=torch.uint8, device="cpu").view(one.part.dtype).repeat(rows, 1)
        tables = one.convert(dequantized(every, scale)).view(torch.uint8).numpy()
        data = self.buffer[self.place.offset : self.place.offset + one.part.nbytes].numpy()
        one.part.read_into(data.data)
        for values, table in zip(data.reshape(rows, -1), tables, strict=True):
            for first in range(0, len(values), LOOKUP_BYTES):
                some = values[first : first + LOOKUP_BYTES]
                np.take(table, some, out=some, mode="clip")  # which, with this mode, writes without a copy


def planned(
    name: str,
    part: FilePart | None,
    scale: FilePart | None,
    stored: torch.Tensor,
    module_form: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
) -> PlannedTensor:
    """How a tensor of a file comes into host memory.

    Args:
        name: In the module.
        part: Its bytes; ``None`` for a tensor that is made on demand.
        scale: Those of its scale.
        stored: What the file has, with the scale applied, on the meta device.
        module_form: From that to what the module has, by its name.
    """
    result = module_form(stored)[name]
    target = result.dtype
    if part is None:
        return PlannedTensor(name, result.shape, target, target, None)
    widened = part.dtype.itemsize < target.itemsize and part.dtype.is_floating_point and result.shape == part.shape
    if (scale is None and result is stored) or widened:
        return PlannedTensor(name, part.shape, part.dtype, target, part, scale)
    return PlannedTensor(name, result.shape, target, target, part, scale, lambda value: module_form(value)[name])
