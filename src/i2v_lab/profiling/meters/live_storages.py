"""Every storage that operators touch: when it was made, by which module, what it is for, and when it went."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from i2v_lab.errors import VramCapExceeded
from i2v_lab.profiling.fake.allocator import Block, CachingAllocator
from i2v_lab.profiling.module_paths import ModulePaths

CATEGORIES = ("weight", "saved", "activation", "other")


@dataclass(slots=True)
class StorageLife:
    """One storage, from the first operator that touched it to the release of its last owner.

    Moments are ticks of the meter's clock, which advances with every change of what is alive or saved.

    Attributes:
        nbytes: Its size.
        shape: Of the first tensor seen on it.
        dtype: Of that tensor.
        module: Path of the module that was running then; empty outside any.
        is_weight: Whether a module has it as a parameter or buffer.
        born: First tick alive.
        died: First tick no longer alive; ``None`` while it is.
        saved: Intervals ``[from, to)`` in which an autograd graph held it; ``to`` is ``None`` while it does.
        is_workspace: Whether a library took it for itself; it is no tensor then, and ``module`` names the library.
    """

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str
    is_weight: bool
    born: int
    died: int | None = None
    saved: list[list[int | None]] = field(default_factory=list)
    is_workspace: bool = False

    def become_weight(self, tensor: torch.Tensor, module: str) -> None:
        """What was loaded turns out to be a parameter or buffer of a module."""
        self.is_weight, self.module = True, module
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def alive_at(self, tick: int) -> bool:
        """Whether it was alive at a tick."""
        return self.born <= tick and (self.died is None or tick < self.died)

    def category_at(self, tick: int) -> str:
        """What it was for at a tick: one of ``CATEGORIES``, the first that fits."""
        if self.is_weight:
            return "weight"
        if any(start is not None and start <= tick and (end is None or tick < end) for start, end in self.saved):
            return "saved"
        return "activation" if self.module and not self.is_workspace else "other"


@dataclass(frozen=True, slots=True)
class _Counted:
    """What a storage adds to the count, and the allocator's block for it, if there is an allocator."""

    nbytes: int
    block: Block | None


@dataclass
class LocalPeak:
    """The most that was alive at any time within a scope.

    Attributes:
        bytes: Once the scope has ended.
    """

    bytes: int


class LiveStorageMeter(TorchDispatchMode):
    """Counts the storages behind all tensors that operators touch while the mode is active.

    Each storage counts once, with its full size, from the first operator that takes or returns a tensor on it (or from
    :meth:`observe`) until its last owner lets go. Views add nothing. Only weak references are held. What a kernel
    allocates and frees inside itself is not seen.

    Args:
        cap_bytes: Raise :class:`~i2v_lab.errors.VramCapExceeded` at the operator that takes the count beyond this.
        paths: Names the module that is running; without it every storage belongs to none.
        device_type: Count only what is on devices of this type, such as ``cuda``.
        allocator: Count what this allocator would for each storage, in the place of its own size.

    Attributes:
        lives: Storages seen since :meth:`forget_the_dead`, in the order in which they were first seen.

    Example:
        >>> with LiveStorageMeter() as meter:
        ...     a = torch.zeros(1024)
        ...     b = a.view(32, 32)
        ...     del a
        ...     meter.allocated_bytes()
        4096
    """

    def __init__(
        self,
        cap_bytes: int | None = None,
        paths: ModulePaths | None = None,
        device_type: str | None = None,
        allocator: CachingAllocator | None = None,
    ) -> None:
        super().__init__()
        self.paths = paths
        self.lives: list[StorageLife] = []
        self._cap_bytes = cap_bytes
        self._device_type = device_type
        self._allocator = allocator
        self._alive: dict[int, tuple[StorageLife, weakref.ref[Any], _Counted]] = {}
        self._live_bytes = 0
        self._peak_bytes = 0
        self._tick = 0
        self._peak_tick = 0
        self._times_s: list[float] = [time.perf_counter()]  # of every tick since forget_the_dead
        self._first_tick = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's wrapper against it costs as much as the counting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.observe(leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor))
        return result

    # --- MemoryMeter ---

    def allocated_bytes(self) -> int:
        """Alive now."""
        return self._live_bytes

    def peak_bytes(self) -> int:
        """The most alive at any time since :meth:`reset_peak`."""
        return self._peak_bytes

    def reserved_peak_bytes(self) -> int | None:
        """The most the allocator held since :meth:`reset_peak`; ``None`` without one."""
        return self._allocator.peak_reserved_bytes if self._allocator else None

    def reset_peak(self) -> None:
        """Look for a new peak, from what is alive now."""
        self._peak_bytes = self._live_bytes
        self._peak_tick = self._tick
        if self._allocator is not None:
            self._allocator.reset_peak()

    def observe(self, tensors: Iterable[torch.Tensor], *, weights: bool = False) -> None:
        """Count these tensors' storages, where they are not counted yet.

        Args:
            tensors: Any tensors; those on the meta device have no memory and are passed over.
            weights: They are parameters or buffers.
        """
        before = self._live_bytes
        for tensor in tensors:
            device_type = (getattr(tensor, "fake_device", None) or tensor.device).type  # a fake's own .device is slow
            if device_type == "meta" or (self._device_type is not None and device_type != self._device_type):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            nbytes = storage.nbytes()
            known = self._alive.get(key)
            if known is not None:
                if known[0].nbytes == nbytes:
                    if weights and not known[0].is_weight:
                        known[0].become_weight(tensor, self._module())
                    continue
                self._end(key)  # resized in place: the old size ends, the new one begins
            module = self._module()  # asked first: it meets modules that nobody announced, with their weights
            is_weight = weights or (self.paths is not None and key in self.paths.weights)
            life = StorageLife(nbytes, tuple(tensor.shape), tensor.dtype, module, is_weight, self._advance())
            self.lives.append(life)
            self._alive[key] = (life, weakref.ref(storage, partial(self._died, key)), self._count(nbytes))
        self._note_peak(before)

    def _count(self, nbytes: int) -> _Counted:
        block = self._allocator.allocate(nbytes) if self._allocator is not None and nbytes else None
        counted = _Counted(block.size if block is not None else nbytes, block)
        self._live_bytes += counted.nbytes
        return counted

    def _uncount(self, counted: _Counted) -> None:
        self._live_bytes -= counted.nbytes
        if self._allocator is not None and counted.block is not None:
            self._allocator.free(counted.block)

    def _note_peak(self, before: int) -> None:
        if self._live_bytes > self._peak_bytes:
            self._peak_bytes = self._live_bytes
            self._peak_tick = self._tick
            if self._cap_bytes is not None and self._live_bytes > self._cap_bytes:
                self._refuse(before)

    # --- What operators do not show ---

    def hold(self, nbytes: int, name: str) -> None:
        """Count bytes that a library takes for itself and keeps.

        Args:
            nbytes: How many.
            name: Stands for the module among the holders, such as ``cuBLAS workspace``.
        """
        self._take(nbytes, name)

    def borrow(self, nbytes: int, name: str) -> None:
        """Count bytes that a kernel allocates and frees inside itself; arguments as in :meth:`hold`."""
        life, counted = self._take(nbytes, name)
        life.died = self._advance()
        self._uncount(counted)

    def _take(self, nbytes: int, name: str) -> tuple[StorageLife, _Counted]:
        before = self._live_bytes
        life = StorageLife(nbytes, (nbytes,), torch.uint8, name, False, self._advance(), is_workspace=True)
        self.lives.append(life)
        counted = self._count(nbytes)
        self._note_peak(before)
        return life, counted

    # --- Calls that are not run again ---

    @contextmanager
    def local_peak(self) -> Iterator[LocalPeak]:
        """Find the peak of what runs within this scope, besides the one since :meth:`reset_peak`."""
        outer = (self._peak_bytes, self._peak_tick)
        self._peak_bytes, self._peak_tick = self._live_bytes, self._tick
        local = LocalPeak(self._peak_bytes)
        try:
            yield local
        finally:
            local.bytes = self._peak_bytes
            if outer[0] >= self._peak_bytes:
                self._peak_bytes, self._peak_tick = outer

    def rise_to(self, nbytes: int) -> None:
        """Count a peak that is known and not run."""
        if nbytes > self._peak_bytes:
            self._peak_bytes, self._peak_tick = nbytes, self._tick

    def bytes_of(self, tensors: Iterable[torch.Tensor]) -> int:
        """What the storages of ``tensors`` count together."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(self._alive[key][2].nbytes for key in keys if key in self._alive)

    # --- What an autograd graph holds ---

    def mark_saved(self, tensor: torch.Tensor) -> None:
        """An autograd graph begins to hold this tensor's storage."""
        self.observe([tensor])
        life = self._alive[tensor.untyped_storage()._cdata][0]
        life.saved.append([self._advance(), None])

    def mark_released(self, key: int) -> None:
        """No graph holds the storage at this address any more."""
        known = self._alive.get(key)
        if known is not None and known[0].saved:
            known[0].saved[-1][1] = self._advance()

    # --- What happened ---

    @property
    def tick(self) -> int:
        """Now."""
        return self._tick

    @property
    def peak_tick(self) -> int:
        """The moment of the peak since :meth:`reset_peak`."""
        return self._peak_tick

    def alive_at(self, tick: int) -> Iterator[StorageLife]:
        """All storages that were alive at a tick, no earlier than the last :meth:`forget_the_dead`."""
        return (life for life in self.lives if life.alive_at(tick))

    def time_s(self, tick: int) -> float:
        """When a tick was, on ``time.perf_counter``'s clock."""
        return self._times_s[tick - self._first_tick]

    def forget_the_dead(self, tick: int | None = None) -> None:
        """Drop what had ended at a tick, by default now, once it has been written down."""
        tick = self._tick if tick is None else tick
        self.lives = [life for life in self.lives if life.died is None or life.died > tick]
        del self._times_s[: tick - self._first_tick]
        self._first_tick = tick

    def _advance(self) -> int:
        self._tick += 1
        self._times_s.append(time.perf_counter())
        return self._tick

    def _died(self, key: int, reference: weakref.ref[Any]) -> None:
        known = self._alive.get(key)
        if known is not None and known[1] is reference:
            self._end(key)

    def _end(self, key: int) -> None:
        life, _, counted = self._alive.pop(key)
        life.died = self._advance()
        self._uncount(counted)

    def _module(self) -> str:
        return self.paths.current if self.paths else ""

    def _refuse(self, before: int) -> None:
        phase = self.paths.phase if self.paths else ""
        module, asked = self._module(), self._live_bytes - before
        where = f"in {module or 'no module'}" + (f" during {phase}" if phase else "")
        raise VramCapExceeded(
            f"{asked} bytes asked for {where}, with {before} alive, exceed vram_cap_bytes={self._cap_bytes}; lower the "
            "resolution, the frames or the tile, or raise the cap",
            phase=phase,
            module=module,
            asked_bytes=asked,
            alive_bytes=before,
            cap_bytes=self._cap_bytes,
        )
