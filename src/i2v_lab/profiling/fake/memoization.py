"""Memoization of identical module calls: a forecast of 48 equal blocks costs one.

Exact, not an estimate. A call is answered from the memo only where grad is off, where the first call with its key left
nothing allocated but its result, and where no more is allocated now than before that call: such a call allocates what
the first one did, and cannot raise the peak above it. Its blocks are allocated and freed in the modelled allocator.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

import torch

from i2v_lab.profiling.fake.block_trace import BlockTrace, Event, TracingAllocator
from i2v_lab.profiling.fake.operator_costs import Counted, OperatorCosts
from i2v_lab.profiling.fake.operators import are_new
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.module_paths import ModulePaths
from i2v_lab.thread_patches import patched_here, unpatched

# Called with a module and the arguments of a call: all that, besides shapes, decides which operators run.
MemoryKey = Callable[..., Hashable]


@dataclasses.dataclass(frozen=True)
class _Call:
    """An executed call.

    Attributes:
        start_bytes: Allocated before it.
        peak_above_start_bytes: Its peak, less those.
        result: Structure of what it returned.
        events: What it allocated and freed, see :class:`~i2v_lab.profiling.fake.block_trace.BlockTrace`.
        kept: Indices of the allocations that hold its result.
        operators: What returned each new tensor of it.
        costs: Of its operators.
    """

    start_bytes: int
    peak_above_start_bytes: int
    result: Any
    events: tuple[Event, ...]
    kept: tuple[int, ...]
    operators: tuple[str, ...]
    costs: Counted


class ModuleMemo:
    """Memoizes the calls of modules of certain classes.

    Args:
        meter: Counts what the calls allocate.
        allocator: Of the meter, where one is modelled.
        paths: Has the running phase; a call is executed anew in every phase.
        memory_keys: Module classes, each with its memory key. Two calls are identical if their modules' parameters and
            buffers have the same names, shapes and dtypes, their arguments the same structure and layouts, and their
            memory keys are equal.
        costs: Counts what their operators cost.
    """

    def __init__(
        self,
        meter: LiveStorageMeter,
        allocator: TracingAllocator | None,
        paths: ModulePaths,
        memory_keys: Mapping[type[torch.nn.Module], MemoryKey],
        costs: OperatorCosts,
    ) -> None:
        self._meter = meter
        self._allocator = allocator
        self._paths = paths
        self._memory_keys = dict(memory_keys)
        self._costs = costs
        self._scopes = ExitStack()
        self._calls: dict[Hashable, _Call] = {}
        self._layouts: weakref.WeakKeyDictionary[torch.nn.Module, Hashable] = weakref.WeakKeyDictionary()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Memoize calls within this scope."""
        before = _ACTIVE.set(self)
        try:
            with self._scopes:
                for kind, memory_key in self._memory_keys.items():
                    self._replace(kind, memory_key)
                yield
        finally:
            _ACTIVE.reset(before)

    def add(self, kind: type[torch.nn.Module], memory_key: MemoryKey) -> None:
        """Memoize one more class until the end of the scope of :meth:`active`; one that is memoized stays as it is."""
        if kind not in self._memory_keys:
            self._memory_keys[kind] = memory_key
            self._replace(kind, memory_key)

    def _replace(self, kind: type[torch.nn.Module], memory_key: MemoryKey) -> None:
        forward = functools.partial(self._forward, unpatched(kind, "forward"), memory_key)
        self._scopes.enter_context(patched_here(kind, "forward", functools.partial(_call, forward)))

    def _forward(self, forward: Any, memory_key: MemoryKey, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        inputs: list[torch.Tensor] = []
        arguments = _flatten((args, kwargs), inputs, known=len(inputs), weak=True)
        key = (forward, self._paths.phase, memory_key(module, *args, **kwargs), self._layout(module), arguments)
        start_bytes = self._meter.allocated_bytes()
        call = self._calls.get(key)
        if call is not None and start_bytes <= call.start_bytes:
            peak_bytes = start_bytes + call.peak_above_start_bytes
            if self._allocator is not None:  # the same requests may get larger blocks
                peak_bytes = self._allocator.replay(call.events, call.kept)
            self._meter.raise_peak(peak_bytes)
            self._costs.replay(call.costs)
            allocated: list[torch.Tensor] = []
            value = _unflatten(call.result, inputs, allocated)
            self._meter.name_operators(allocated, call.operators)
            return value
        tracing = self._allocator.trace() if self._allocator is not None else nullcontext(BlockTrace())
        before = self._costs.counted()
        with self._meter.local_peak() as peak, tracing as trace:
            result = forward(module, *args, **kwargs)
        tensors = list(inputs)
        structure = _flatten(result, tensors, known=len(inputs))
        new = tensors[len(inputs) :]
        left_bytes = self._meter.allocated_bytes() - start_bytes
        if are_new(new, inputs) and left_bytes == self._meter.counted_bytes(new) and trace.is_closed:
            kept = tuple(trace.indices[block] for block in map(self._meter.block, new) if block is not None)
            costs, events = self._costs.since(before), tuple(trace.events)
            operators = tuple(self._meter.operators(new))
            above = peak.bytes - start_bytes
            self._calls[key] = _Call(start_bytes, above, structure, events, kept, operators, costs)
        return result

    def _layout(self, module: torch.nn.Module) -> Hashable:
        if module not in self._layouts:
            tensors = [*module.named_parameters(), *module.named_buffers()]
            self._layouts[module] = tuple((name, tuple(t.shape), t.dtype) for name, t in tensors)
        return self._layouts[module]


_ACTIVE: ContextVar[ModuleMemo | None] = ContextVar("active memo", default=None)


def active_memo() -> ModuleMemo | None:
    """The memo of the forecast that this thread is in; ``None`` in no forecast."""
    return _ACTIVE.get()


def _call(forward: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return forward(module, args, kwargs)


# --- Structures: nested values in which a tensor is an index, if it is known already, or else its layout --------------


def _flatten(value: Any, tensors: list[torch.Tensor], known: int, weak: bool = False) -> Any:
    """``value`` as hashable nested tuples; its tensors are appended to ``tensors``, the first ``known`` of which exist.

    Not torch's pytree, which knows no dataclasses and would not tell apart tensors that occur once from tensors that
    occur twice. With ``weak`` it keeps no other object alive, which may hold tensors.
    """
    if isinstance(value, torch.Tensor):
        for index, tensor in enumerate(tensors):
            if tensor is value:
                return ("tensor", index)
        tensors.append(value)
        layout = (tuple(value.shape), value.stride(), value.dtype, value.device)
        return ("new", len(tensors) - 1 - known, *layout)
    if isinstance(value, list | tuple):
        return ("sequence", type(value), tuple(_flatten(item, tensors, known, weak) for item in value))
    # Outputs of diffusers and transformers are dataclasses and dicts.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        items = tuple((name, _flatten(getattr(value, name), tensors, known, weak)) for name in names)
        return ("dataclass", type(value), items)
    if isinstance(value, dict):
        return ("dict", tuple((key, _flatten(item, tensors, known, weak)) for key, item in value.items()))
    if not isinstance(value, Hashable):  # nor can an equal one be told: as an argument it equals nothing
        return ("other", object() if weak else value, None)
    with suppress(TypeError):  # numbers and the like, which hold nothing
        return ("other", weakref.ref(value) if weak else value, None)
    return ("other", value, None)


def _unflatten(structure: Any, inputs: list[torch.Tensor], new: list[torch.Tensor]) -> Any:
    """The value of a structure: its known tensors from ``inputs``, its new ones allocated and appended to ``new``."""
    match structure:
        case ("tensor", index):
            return inputs[index] if index < len(inputs) else new[index - len(inputs)]
        case ("new", _, shape, stride, dtype, device):
            new.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
            return new[-1]
        case ("sequence", kind, items):
            values = [_unflatten(item, inputs, new) for item in items]
            return kind(*values) if hasattr(kind, "_fields") else kind(values)
        case ("dict", items):
            return {key: _unflatten(item, inputs, new) for key, item in items}
        case ("dataclass", kind, items):
            return kind(**{name: _unflatten(item, inputs, new) for name, item in items})
        case _:
            return structure[1]
