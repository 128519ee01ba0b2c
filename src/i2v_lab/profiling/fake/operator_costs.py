"""What the operators of a forecast cost on any card: operations, bytes and launches, counted and not timed.

Operators are counted in cells: their kind, their dtype, and the power of two of their operations and of their bytes. A
device profile turns cells into seconds, see ``capacity.time_model``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from i2v_lab.profiling.fake.operator_kinds import is_view
from i2v_lab.profiling.fake.page_locked import is_page_locked
from i2v_lab.profiling.records import CostRow
from i2v_lab.torch_compat import FakeTensor

aten = torch.ops.aten

MATMULS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._scaled_mm}
ATTENTIONS = {
    aten._scaled_dot_product_flash_attention: "flash",
    aten._scaled_dot_product_efficient_attention: "efficient",
}  # cuDNN's runs as no operator where no gradient is needed
FIRST = "first "  # begins the kinds of what a process does once
TILES = {"flash": 128, "efficient": 64, "cudnn": 128}  # queries and keys that a kernel of attention takes at once
WIDTH_TILE = 64  # of the heads' width
FEW_CHANNELS, NARROW_CHANNELS = 128, 32  # below which convolutions are slower
FULL_GROUPS = 128  # groups to normalize that occupy a card
NOTHING = {aten.empty, aten.empty_strided, aten.empty_like, aten.empty_permuted, aten.new_empty, aten.new_empty_strided}
VIEW_LIKE = {aten._unsafe_view, aten._reshape_alias, aten.lift_fresh, aten.set_, aten.resize_}
WRITES = {aten.fill_, aten.zero_, aten.zeros, aten.ones, aten.full, aten.zeros_like, aten.ones_like, aten.full_like}
LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}  # read no more than they return
NEAREST_3D = {aten.upsample_nearest3d, aten._upsample_nearest_exact3d, aten.upsample_trilinear3d}
REDUCTIONS = {
    *(aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.var, aten.var_mean, aten.std),
    *(aten.linalg_vector_norm, aten.prod, aten.any, aten.all, aten.cumsum, aten.norm),
}
SOFTMAXES = {aten._softmax, aten._log_softmax, aten._fused_rms_norm}
LAYER_NORMS = {aten.native_layer_norm, aten.native_batch_norm, aten.cudnn_batch_norm}
RANDOM = {aten.randn, aten.rand, aten.normal_, aten.uniform_, aten.randint, aten.randperm, aten.bernoulli_}
RESAMPLED = {
    *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten._upsample_nearest_exact2d, aten.constant_pad_nd),
    *(aten.upsample_bilinear2d, aten.upsample_bicubic2d),
    *(aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d, aten.reflection_pad1d),
    *(aten.reflection_pad2d, aten.reflection_pad3d, aten.avg_pool2d, aten.max_pool2d_with_indices, aten.avg_pool3d),
}

Cell = tuple[str, str, int, int]  # kind, dtype, powers of two of operations and of bytes
Counted = tuple[tuple[Cell, tuple[int, int, int]], ...]  # cells, each with count, operations and bytes


@functools.cache
def operator_kind(packet: Any) -> str:
    """The kind of an operator that is neither a product nor a view, by what limits its kernel.

    Example:
        >>> operator_kind(torch.ops.aten.mul), operator_kind(torch.ops.aten.native_layer_norm)
        ('pointwise', 'layer norm')
    """
    kinds = {
        "write": WRITES,
        "lookup": LOOKUPS,
        "reduction": REDUCTIONS,
        "softmax": SOFTMAXES,
        "layer norm": LAYER_NORMS,
        "upsample 3d": NEAREST_3D,
        "random": RANDOM,
        "resample": RESAMPLED,
    }
    return next((kind for kind, members in kinds.items() if packet in members), "pointwise")


@functools.cache
def _packet(func: Any) -> Any:
    return getattr(func, "overloadpacket", func)


@functools.cache
def _is_view(func: Any) -> bool:
    return _packet(func) in VIEW_LIKE or is_view(func)


class OperatorCosts:
    """Counts the operators of a forecast, segment by segment.

    Args:
        device_type: Of the device that is forecast; what other devices compute is the host's work.

    Example:
        >>> costs = OperatorCosts("cuda")
        >>> costs.count("pointwise", "bfloat16", nbytes=1024)
        >>> costs.cut()
        >>> costs.take()
        [(('pointwise', 'bfloat16', 1, 0, 1024),)]
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._cells: dict[Cell, list[int]] = {}
        self._segments: list[tuple[CostRow, ...]] = []
        self._seen: set[Any] = set()

    # --- Segments ---

    def cut(self) -> None:
        """End a segment: the host waits for the device here, or is taken to."""
        if self._cells:
            self._segments.append(
                tuple(
                    (kind, dtype, count, flops // count, nbytes // count)
                    for (kind, dtype, _, _), (count, flops, nbytes) in sorted(self._cells.items())
                )
            )
            self._cells = {}

    def take(self) -> list[tuple[CostRow, ...]]:
        """The rows of the segments since it was asked last, in order."""
        taken, self._segments = self._segments, []
        return taken

    def counted(self) -> dict[Cell, tuple[int, int, int]]:
        """Count, operations and bytes by cell so far in this segment."""
        return {cell: (values[0], values[1], values[2]) for cell, values in self._cells.items()}

    def since(self, before: dict[Cell, tuple[int, int, int]]) -> Counted:
        """What was counted since ``before``, within one segment."""
        found = []
        for cell, (count, flops, nbytes) in self._cells.items():
            was = before.get(cell, (0, 0, 0))
            if count != was[0] and not cell[0].startswith(FIRST):
                found.append((cell, (count - was[0], flops - was[1], nbytes - was[2])))
        return tuple(found)

    def replay(self, counted: Counted) -> None:
        """Count once more what :meth:`since` returned."""
        for cell, (count, flops, nbytes) in counted:
            self._add(cell, count, flops, nbytes)

    # --- Counting ---

    def count(self, kind: str, dtype: str, flops: int = 0, nbytes: int = 0, count: int = 1) -> None:
        """Count operators of one kind.

        Args:
            kind: As in :class:`~i2v_lab.profiling.records.CostRecord`.
            dtype: That it computes in, without ``torch.``.
            flops: Operations of one of them.
            nbytes: Bytes that one of them reads and writes.
            count: How many.
        """
        cell = (kind, dtype, flops.bit_length(), nbytes.bit_length())
        self._add(cell, count, flops * count, nbytes * count)

    def _add(self, cell: Cell, count: int, flops: int, nbytes: int) -> None:
        values = self._cells.get(cell)
        if values is None:
            self._cells[cell] = [count, flops, nbytes]
        else:
            values[0] += count
            values[1] += flops
            values[2] += nbytes

    def weights(self, tensors: list[torch.Tensor]) -> None:
        """Count the weights of a module that was built: all of one dtype and device as one."""
        self.count("module", "")
        by_kind: dict[tuple[str, str], list[int]] = {}
        for tensor in tensors:
            place = "weight" if _device_type(tensor) == self._device_type else "host weight"
            by_kind.setdefault((place, _name(tensor.dtype)), []).append(_bytes(tensor))
        for (place, dtype), sizes in by_kind.items():
            self.count(place, dtype, 0, sum(sizes) // len(sizes), len(sizes))

    def attention(
        self, kernel: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        """Count one attention by a fused kernel.

        Args:
            kernel: ``flash``, ``efficient`` or ``cudnn``.
            query: ``(B, H, L, E)``.
            key: ``(B, H, S, E)``.
            value: ``(B, H, S, E)``.
            mask: Added to the scores.
        """
        batch, heads, queries, width = query.shape
        keys = key.shape[-2]
        tile = TILES[kernel]
        padded_width = -(-width // WIDTH_TILE) * WIDTH_TILE
        flops = 4 * batch * heads * (-(-queries // tile) * tile) * (-(-keys // tile) * tile) * padded_width
        nbytes = 2 * _bytes(query) + _bytes(key) + _bytes(value) + (0 if mask is None else _bytes(mask))
        kind = f"{kernel} attention {padded_width}" + ("" if mask is None else " masked")
        self.count(kind, _name(query.dtype), flops, nbytes)
        if kernel == "cudnn":  # which compiles a kernel for each configuration, and plans each shape
            ragged = bool(queries % tile or keys % tile)
            self._first("cudnn attention", (kind, query.shape, key.shape))
            self._first("configuration of cudnn attention", (kind, ragged))
        else:
            self._first("kernel", kind)

    def operator(self, func: Any, args: Any, result: Any, tensors: list[torch.Tensor]) -> None:
        """Count an operator.

        Args:
            func: The operator.
            args: Its positional arguments.
            result: What it returned.
            tensors: All tensors in both.
        """
        if _is_view(func):
            self.count("view", "")
            return
        packet = _packet(func)
        if packet in NOTHING or not tensors or _device_type(tensors[-1]) == "meta":  # where offloaded weights end
            self.count("empty", "")
            return
        last = tensors[-1]
        device = _device_type(last)
        devices = {_device_type(tensor) for tensor in tensors}
        if len(devices) > 1 and packet in (aten._to_copy, aten.copy_):
            self._copy(args[1] if packet is aten.copy_ else args[0], last, device == self._device_type)
        elif self._device_type not in devices:
            self.count("host", _name(last.dtype), 0, _sum(tensors))
        elif packet in ATTENTIONS:
            mask = args[3] if packet is aten._scaled_dot_product_efficient_attention and len(args) > 3 else None
            self.attention(ATTENTIONS[packet], args[0], args[1], args[2], mask)
        elif packet in MATMULS:
            flops = int(flop_registry[packet](*args, out_val=result))
            kind = "matmul" if packet is not aten._scaled_mm else "scaled matmul"
            self.count(kind, _name(tensors[0].dtype), flops, _sum(tensors))
            self._first(kind, (kind, last.dtype, flops.bit_length()))
            self._first("use of cuBLAS", "cuBLAS")
        elif packet is aten.convolution:
            self._convolution(args, result, tensors)
        else:
            self._memory_bound(packet, args, last, tensors)

    def _convolution(self, args: Any, result: Any, tensors: list[torch.Tensor]) -> None:
        source, weight = args[0], args[1]
        flops = int(flop_registry[aten.convolution](*args[:7], out_val=result))
        kind = f"convolution {source.dim() - 2}d"
        channels = min(weight.shape[:2])
        if args[8] > 1:
            kind = "grouped convolution"
        elif math.prod(weight.shape[2:]) == 1:
            kind = "1x1 convolution"
        elif source.dim() > 3 and channels < NARROW_CHANNELS:
            kind = "narrow convolution"
        elif source.dim() == 5 and channels < FEW_CHANNELS:
            kind += " of few channels"
        self.count(kind, _name(source.dtype), flops, _sum(tensors))
        self._first("use of cuDNN", "cuDNN")
        self._first("convolution", ("convolution", source.shape, weight.shape, source.dtype, tuple(args[3])))

    def _memory_bound(self, packet: Any, args: Any, last: torch.Tensor, tensors: list[torch.Tensor]) -> None:
        kind = operator_kind(packet)
        nbytes = _sum(tensors)
        if kind in ("write", "lookup"):
            nbytes = _bytes(last) * (1 if kind == "write" else 2)
        if packet is aten.native_group_norm:
            groups = min(FULL_GROUPS, args[3] * args[6])
            kind, last = f"group norm {1 << groups.bit_length() - 1}", args[0]
        elif kind == "pointwise":
            kind = _pointwise_kind(tensors)
        self.count(kind, _name(last.dtype), 0, nbytes)
        self._first("kernel", packet)

    def _copy(self, source: torch.Tensor, target: torch.Tensor, to_device: bool) -> None:
        host = source if to_device else target
        memory = "page-locked" if is_page_locked(host) else "pageable"
        self.count(f"copy {'to device' if to_device else 'to host'}, {memory}", "", 0, _bytes(target))

    def _first(self, kind: str, key: Any) -> None:
        """What a process does once: load a library or a kernel, or choose one for a shape."""
        if key not in self._seen:
            self._seen.add(key)
            self.count(f"{FIRST}{kind}", "")


def _device_type(tensor: torch.Tensor) -> str:
    device: torch.device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return device.type


def _name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded one is read from cache."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or size == 0:
            count *= size
    return count * tensor.itemsize


def _sum(tensors: list[torch.Tensor]) -> int:
    return sum(map(_bytes, tensors))


def _pointwise_kind(tensors: list[torch.Tensor]) -> str:
    """How a pointwise kernel reads: whole vectors, single elements, or elements that are far from each other."""
    last = tensors[-1]
    shape, strides, itemsize = last.shape, last.stride(), last.itemsize
    kind = "pointwise"
    for tensor in tensors[:-1]:
        if tensor.shape != shape:
            if tensor.numel() > 1:
                kind = "strided pointwise"
        elif tensor.itemsize == 1 and tensor.is_floating_point() and itemsize > 1:
            return "cast from 8 bit"
        elif tensor.stride() != strides:
            if last.dim() > 1 and _innermost(tensor) != _innermost(last):
                return "transposition"
            kind = "strided pointwise"
        elif tensor.itemsize < itemsize:
            kind = "strided pointwise"
    return kind


def _innermost(tensor: torch.Tensor) -> int:
    """The dimension whose neighbours are nearest in memory, of those with more than one element."""
    best, nearest = -1, 0
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride and (best < 0 or stride < nearest):
            best, nearest = dimension, stride
    return best
