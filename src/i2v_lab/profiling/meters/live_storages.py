"""Meter of live storages: when each was allocated and freed, by which module, and what it is for."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Self

import torch

from i2v_lab.errors import VramCapExceeded
from i2v_lab.profiling.meters.base import Allocator, Block
from i2v_lab.profiling.meters.storage_record import StorageRecord
from i2v_lab.profiling.module_paths import ModulePaths
from i2v_lab.profiling.records import CostRow
from i2v_lab.torch_compat import (
    ModeStacks,
    TorchDispatchMode,
    dense_flex_attention,
    inner_tensors,
    is_wrapper,
    storage_key,
    tree_leaves,
    uncompiled_flex_attention,
)

REPLACED = "could not determine the shape of object type"  # of torch.asarray, for any error of its operators


@dataclass(frozen=True, slots=True)
class _Allocation:
    """What a storage adds to the allocated bytes, and its block where an allocator is modelled."""

    nbytes: int
    block: Block | None


@dataclass
class LocalPeak:
    """Peak within a scope.

    Attributes:
        bytes: Maximum of the allocated bytes; valid once the scope has ended.
    """

    bytes: int


@cache
def operator_name(operator: Any) -> str:
    """The name of what a dispatch mode sees, such as ``aten.mm``; ``aten.add.Scalar`` where it is no default."""
    return str(operator).removesuffix(".default")


class _FlexAttention(threading.local):
    """How a thread runs it."""

    def __init__(self) -> None:
        self.scopes = ExitStack()


class LiveStorageMeter(TorchDispatchMode):
    """Counts the storages behind all tensors that operators touch while the mode is active.

    A tensor that holds others, such as a quantized one, is those that it holds. Each storage counts once, with its full
    size, from the first operator that takes or returns a tensor on it (or from :meth:`observe`) until it is freed.
    Views add nothing. Only weak references are held. What a kernel allocates and frees internally is not seen.

    Args:
        cap_bytes: Raise :class:`~i2v_lab.errors.VramCapExceeded` at the operator whose results exceed this.
        paths: Names the running module; without it no storage is attributed to a module.
        device_type: Count only storages on devices of this type, such as ``cuda``.
        allocator: Count the blocks of this modelled allocator instead of the storages' own sizes.

    Attributes:
        lock: Held while storages are counted, which may be allocated and freed in any thread.
        storages: Allocation records since :meth:`drop_freed`, in the order of allocation.

    Example:
        >>> with LiveStorageMeter() as meter:
        ...     a = torch.zeros(1024)
        ...     b = a.view(32, 32)
        ...     del a
        ...     meter.allocated_bytes()
        4096
    """

    stays_in_thread = True  # a stream during whose step a meter is entered or left does not undo that

    def __init__(
        self,
        cap_bytes: int | None = None,
        paths: ModulePaths | None = None,
        device_type: str | None = None,
        allocator: Allocator | None = None,
    ) -> None:
        super().__init__()
        self.paths = paths
        self.storages: list[StorageRecord] = []
        self._cap_bytes = cap_bytes
        self._device_type = device_type
        self._allocator = allocator
        self._live: dict[int, tuple[StorageRecord, weakref.ref[Any], _Allocation]] = {}
        self._live_bytes = 0
        self._peak_bytes = 0
        self._tick = 0
        self._peak_tick = 0
        self._clock = (0, [time.perf_counter()])  # the first tick since drop_freed, and the time of each since
        self._thread = _FlexAttention()
        self._is_over = False
        self._refusal: VramCapExceeded | None = None
        self.lock = threading.RLock()

    def __enter__(self) -> Self:
        self._enter_flex_attention()
        super().__enter__()
        self._is_over = False
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over = True  # in a thread that is metered still, where it cannot be left from here
        self.leave_thread()
        self.enter_thread()  # torch takes the innermost mode of this thread away, which may be another
        super().__exit__(*exc)
        self._thread.scopes.close()
        error: Any = exc[1] if len(exc) > 1 else None
        if self.behind(error) is not error:
            raise self.behind(error) from error

    def behind(self, error: Any) -> Any:
        """The refusal in whose place torch raised an error, as where safetensors makes a tensor; or the error."""
        replaced = isinstance(error, ValueError) and REPLACED in str(error)
        return self._refusal if replaced and self._refusal is not None else error

    def enter_thread(self) -> None:
        """Meter this thread too: a dispatch mode sees the operators of the thread that entered it."""
        stacks = ModeStacks.current()
        replace(stacks, dispatch=(*stacks.dispatch, self)).apply()
        self._enter_flex_attention()

    def leave_thread(self) -> None:
        """Meter this thread no more."""
        stacks = ModeStacks.current()
        replace(stacks, dispatch=tuple(mode for mode in stacks.dispatch if mode is not self)).apply()
        self._thread.scopes.close()

    def _enter_flex_attention(self) -> None:
        self._thread.scopes.close()
        self._thread.scopes.enter_context(uncompiled_flex_attention(dense_flex_attention))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's wrapper that disables dynamo doubles the cost per operator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(map(is_wrapper, types)):
            return NotImplemented  # they run operators on what they hold, which come here
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._is_over:
            return result
        self.observe(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        self.observe((leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)), operator=func)
        return result

    # --- MemoryMeter ---

    def allocated_bytes(self) -> int:
        """Bytes of all live storages."""
        return self._live_bytes

    def peak_bytes(self) -> int:
        """Maximum of the live bytes since :meth:`reset_peak`."""
        return self._peak_bytes

    def reserved_peak_bytes(self) -> int | None:
        """Maximum of the bytes that the modelled allocator reserved since :meth:`reset_peak`; ``None`` without one."""
        return self._allocator.peak_reserved_bytes if self._allocator else None

    def reset_peak(self) -> None:
        """Reset the peaks to what is live and reserved now."""
        self._peak_bytes = self._live_bytes
        self._peak_tick = self._tick
        if self._allocator is not None:
            self._allocator.reset_peak()

    def observe(self, tensors: Iterable[torch.Tensor], *, weights: bool = False, operator: Any = None) -> None:
        """Count these tensors' storages, where they are not counted yet.

        Args:
            tensors: Any tensors; those on the meta device have no memory and are skipped.
            weights: Whether they are parameters or buffers.
            operator: What returned them.
        """
        with self.lock:
            self._observe(tensors, weights, operator)

    def _observe(self, tensors: Iterable[torch.Tensor], weights: bool, operator: Any) -> None:
        before_bytes = self._live_bytes
        for tensor in (inner for outer in tensors for inner in inner_tensors(outer)):
            device_type = (getattr(tensor, "fake_device", None) or tensor.device).type  # the attribute is faster
            if device_type == "meta" or (self._device_type is not None and device_type != self._device_type):
                continue
            storage = tensor.untyped_storage()
            key = storage_key(tensor)
            nbytes = storage.nbytes()
            known = self._live.get(key)
            if known is not None:
                if known[0].nbytes == nbytes:
                    if weights and not known[0].is_weight:
                        known[0].mark_weight(tensor, self._module())
                    continue
                self._free(key)  # resized in place: freed at the old size, allocated at the new one
            module = self._module()  # first: it registers modules not seen before, with their weights
            is_weight = weights or (self.paths is not None and key in self.paths.weights)
            record = StorageRecord(nbytes, tuple(tensor.shape), tensor.dtype, module, is_weight, self._advance())
            record.operator = "" if operator is None else operator_name(operator)
            self.storages.append(record)
            self._live[key] = (record, weakref.ref(storage, partial(self._on_freed, key)), self._allocate(nbytes))
        self._update_peak(before_bytes)

    def _allocate(self, nbytes: int) -> _Allocation:
        block = self._allocator.allocate(nbytes) if self._allocator is not None and nbytes else None
        allocation = _Allocation(block.size if block is not None else nbytes, block)
        self._live_bytes += allocation.nbytes
        return allocation

    def _deallocate(self, allocation: _Allocation) -> None:
        self._live_bytes -= allocation.nbytes
        if self._allocator is not None and allocation.block is not None:
            self._allocator.free(allocation.block)

    def _update_peak(self, before_bytes: int) -> None:
        if self._live_bytes > self._peak_bytes:
            self._peak_bytes = self._live_bytes
            self._peak_tick = self._tick
            if self._cap_bytes is not None and self._live_bytes > self._cap_bytes:
                self._raise_cap_exceeded(before_bytes)

    def take_costs(self) -> list[tuple[CostRow, ...]]:
        """What operators cost since it was asked last, segment by segment; counted in forecasts alone."""
        return []

    # --- Workspaces: allocations that no operator returns ---

    def add_persistent_workspace(self, nbytes: int, name: str) -> None:
        """Count a workspace that a library allocates once and never frees.

        Args:
            nbytes: Its size.
            name: Takes the place of the module in the records, such as ``cuBLAS workspace``.
        """
        self._add_workspace(nbytes, name)

    def add_transient_workspace(self, nbytes: int, name: str) -> None:
        """Count a workspace that a kernel allocates and frees before it returns.

        Args:
            nbytes: Its size.
            name: As in :meth:`add_persistent_workspace`.
        """
        record, allocation = self._add_workspace(nbytes, name)
        record.freed_at = self._advance()
        self._deallocate(allocation)

    def _add_workspace(self, nbytes: int, name: str) -> tuple[StorageRecord, _Allocation]:
        before_bytes = self._live_bytes
        record = StorageRecord(nbytes, (nbytes,), torch.uint8, name, False, self._advance(), is_workspace=True)
        self.storages.append(record)
        allocation = self._allocate(nbytes)
        self._update_peak(before_bytes)
        return record, allocation

    # --- Memoized calls ---

    @contextmanager
    def local_peak(self) -> Iterator[LocalPeak]:
        """Measure the peak of this scope alone, without losing the one since :meth:`reset_peak`."""
        outer = (self._peak_bytes, self._peak_tick)
        self._peak_bytes, self._peak_tick = self._live_bytes, self._tick
        local = LocalPeak(self._peak_bytes)
        try:
            yield local
        finally:
            local.bytes = self._peak_bytes
            if outer[0] >= self._peak_bytes:
                self._peak_bytes, self._peak_tick = outer

    def raise_peak(self, nbytes: int) -> None:
        """Raise the peak to that of a memoized call, which is not executed."""
        if nbytes > self._peak_bytes:
            self._peak_bytes, self._peak_tick = nbytes, self._tick

    def block(self, tensor: torch.Tensor) -> Block | None:
        """The modelled allocator's block of a tensor; ``None`` where it is not counted or no allocator is modelled."""
        known = self._live.get(storage_key(tensor))
        return known[2].block if known is not None else None

    def counted_bytes(self, tensors: Iterable[torch.Tensor]) -> int:
        """Allocated bytes of the storages of ``tensors``, each counted once."""
        keys = {storage_key(inner) for tensor in tensors for inner in inner_tensors(tensor)}
        return sum(self._live[key][2].nbytes for key in keys if key in self._live)

    def operators(self, tensors: Iterable[torch.Tensor]) -> list[str]:
        """What returned each of these tensors' storages first; empty where that is not known."""
        return [known[0].operator if known else "" for known in map(self._live.get, map(storage_key, tensors))]

    def name_operators(self, tensors: Iterable[torch.Tensor], names: Iterable[str]) -> None:
        """Say what returned each of these tensors' storages: of a memoized call, whose operators do not run."""
        for tensor, name in zip(tensors, names, strict=True):
            known = self._live.get(storage_key(tensor))
            if known is not None:
                known[0].operator = name

    # --- Storages saved by autograd graphs ---

    def mark_saved(self, tensor: torch.Tensor) -> None:
        """An autograd graph saved a tensor on this storage, the first one to do so."""
        self.observe([tensor])
        for inner in inner_tensors(tensor):
            known = self._live.get(storage_key(inner))
            if known is not None:  # otherwise on another device
                known[0].saved.append([self._advance(), None])

    def mark_released(self, key: int) -> None:
        """No graph saves the storage with this key any more."""
        known = self._live.get(key)
        if known is not None and known[0].saved:
            known[0].saved[-1][1] = self._advance()

    # --- Allocation records ---

    @property
    def tick(self) -> int:
        """The logical clock: number of events so far."""
        return self._tick

    @property
    def peak_tick(self) -> int:
        """Tick of the peak since :meth:`reset_peak`."""
        return self._peak_tick

    def live_at(self, tick: int) -> Iterator[StorageRecord]:
        """Records of the storages that were live at a tick, no earlier than the last :meth:`drop_freed`."""
        return (record for record in self.storages if record.is_live_at(tick))

    def time_s(self, tick: int) -> float:
        """Time of a tick on ``time.perf_counter``'s clock."""
        first_tick, times_s = self._clock
        return times_s[tick - first_tick]

    def drop_freed(self, tick: int | None = None) -> None:
        """Drop the records of storages freed by a tick, by default now, once they have been written."""
        with self.lock:
            tick = self._tick if tick is None else tick
            self.storages = [record for record in self.storages if record.freed_at is None or record.freed_at > tick]
            first_tick, times_s = self._clock
            self._clock = (tick, times_s[tick - first_tick :])

    def _advance(self) -> int:
        first_tick, times_s = self._clock
        times_s.append(time.perf_counter())  # the tick follows from it: Ctrl-C in a notebook may come between the two
        self._tick = first_tick + len(times_s) - 1
        return self._tick

    def _on_freed(self, key: int, reference: weakref.ref[Any]) -> None:
        with self.lock:
            known = self._live.get(key)
            if known is not None and known[1] is reference:
                self._free(key)

    def _free(self, key: int) -> None:
        record, _, allocation = self._live.pop(key)
        record.freed_at = self._advance()
        self._deallocate(allocation)

    def _module(self) -> str:
        return self.paths.current if self.paths else ""

    def _raise_cap_exceeded(self, before_bytes: int) -> None:
        phase = self.paths.phase if self.paths else ""
        module, asked_bytes = self._module(), self._live_bytes - before_bytes
        where = f"in {module or 'no module'}" + (f" during {phase}" if phase else "")
        self._refusal = VramCapExceeded(
            f"allocating {asked_bytes} bytes {where}, with {before_bytes} allocated, exceeds "
            f"vram_cap_bytes={self._cap_bytes}; lower the resolution, the frames or the tile, or raise the cap",
            phase=phase,
            module=module,
            asked_bytes=asked_bytes,
            alive_bytes=before_bytes,
            cap_bytes=self._cap_bytes,
        )
        raise self._refusal
