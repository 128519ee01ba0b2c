"""Blocks of streamed weights in page-locked host memory, read from their files by threads ahead of their use.

Blocks that are called many times are kept while their component is used, and over generations by a
:class:`HostWeights` that says so; the others pass through a few buffers, which are filled again once the device has its
copy.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Self

import torch

from i2v_lab.pipeline.ltx2.memory.block_reader import BlockReader, Reading, Spare
from i2v_lab.pipeline.ltx2.memory.host_copies import BlockPlan, HostCopy, packed
from i2v_lab.pipeline.ltx2.memory.host_memory import PageLocked, host_budget_bytes
from i2v_lab.torch_compat import is_fake

AHEAD_BYTES = 2**30  # of blocks that are not kept, read ahead of their use


class HostWeights:
    """Streamed weights in host memory, of all components of a pipeline; they share one budget.

    Args:
        budget_bytes: The most host memory that they may take; by default 0.8 of what is available when a component is
            built, and none for a model on a CPU.
        keep: Keep blocks until :meth:`close`; otherwise until their component is released.

    Attributes:
        keep: As given.
        budget_bytes: As given.
        changed: Notified when a thread ends the reading of a block; its lock is that of all components.
        held_bytes: What they take now.

    Example:
        >>> with HostWeights(keep=True) as host_weights:
        ...     host_weights.held_bytes
        0
    """

    def __init__(self, budget_bytes: int | None = None, *, keep: bool = False) -> None:
        self.keep = keep
        self.changed = threading.Condition(threading.RLock())
        self.budget_bytes = budget_bytes
        self._limit_bytes = budget_bytes or 0
        self._components: dict[Hashable, HostBlocks] = {}  # the last to be used last
        self._ahead: list[tuple[HostBlocks, Any, Any]] = []
        self.held_bytes = 0

    def limit_bytes(self, device: torch.device) -> int:
        """The most host memory that weights for ``device`` may take, with what they take now."""
        if self.budget_bytes is not None:
            return self.budget_bytes
        return self.held_bytes + host_budget_bytes(device)

    def blocks(
        self, key: Hashable, files: Hashable, plans: Mapping[str, BlockPlan], device: torch.device, *, repeated: bool
    ) -> HostBlocks:
        """The blocks of a component, for one use, which :meth:`HostBlocks.close` ends.

        Args:
            key: What they hold: equal keys have equal blocks, from files that have not changed.
            files: The state of the files; blocks of another state are released.
            plans: How each block comes into host memory, in the order in which they are called; none for blocks that
                are loaded.
            device: Where the component runs.
            repeated: Whether its blocks are called many times, and so are kept while it is used.
        """
        with self.changed:
            found = self._components.get((key, device))
            if found is not None and found.files != files and not found.users:
                found.release()
                found = None
            if found is None or found.files != files:
                found = HostBlocks(self, files, plans, device)
            self._components.pop((key, device), None)
            self._components[key, device] = found
            found.users += 1
            self._limit_bytes = self.limit_bytes(device)
            found.start(repeated=repeated)
            return found

    def read_ahead(self, blocks: HostBlocks, identity: Any, prepared: Any) -> None:
        """Have threads read a component's blocks until :meth:`end_ahead`, or for longer if it is claimed.

        Args:
            blocks: The blocks, in use.
            identity: By which the component is claimed.
            prepared: What :meth:`claim` returns.
        """
        self._ahead.append((blocks, identity, prepared))
        blocks.read_ahead()

    def claim(self, identity: Any) -> Any:
        """What was prepared when a component was read ahead, once; ``None`` if it was not. Its blocks are in use."""
        for index, (_, own, prepared) in enumerate(self._ahead):
            if own == identity:
                del self._ahead[index]
                return prepared
        return None

    def end_ahead(self) -> None:
        """End the reading ahead of components that were not claimed."""
        while self._ahead:
            self._ahead.pop()[0].close()

    def close(self) -> None:
        """Release everything; threads that read have ended. Components still in use load their blocks from then on."""
        self.end_ahead()
        with self.changed:
            components = list(self._components.values())
            self._components.clear()
        for blocks in components:
            blocks.stop()
            blocks.release()

    def holds(self, blocks: HostBlocks) -> bool:
        """Whether a component's blocks are found again when it is used again."""
        return blocks in self._components.values()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- For components, with the lock held ---

    def make_room(self, nbytes: int, blocks: HostBlocks) -> int:
        """Release blocks of components that are not in use until ``nbytes`` are free; returns how many are then."""
        idle = [one for one in self._components.values() if not one.users and one is not blocks]
        for victim in sorted(idle, key=lambda one: one.repeated):  # what is called once a generation goes first
            while self._limit_bytes - self.held_bytes < nbytes and len(victim):
                victim.evict()
        return self._limit_bytes - self.held_bytes

    def reserve(self, nbytes: int) -> bool:
        """Whether there is room for ``nbytes`` more, which are then taken."""
        if self.held_bytes + nbytes > self._limit_bytes:
            return False
        self.held_bytes += nbytes
        return True

    def unreserve(self, nbytes: int) -> None:
        """``nbytes`` are free again."""
        self.held_bytes -= nbytes

    def refused(self) -> None:
        """The driver refuses to lock more memory."""
        self._limit_bytes = 0


class HostBlocks:
    """The blocks of one component in host memory; made by :meth:`HostWeights.blocks`.

    Attributes:
        files: The state of the files that they are read from.
        users: How many use them.
        repeated: Whether they are called many times.
        page_locked_bytes: The most host memory that they took at once.
    """

    def __init__(
        self, store: HostWeights, files: Hashable, plans: Mapping[str, BlockPlan], device: torch.device
    ) -> None:
        self.files = files
        self.users = 0
        self.repeated = False
        self.page_locked_bytes = 0
        self._store = store
        self._plans = plans
        self._device = device
        self._held_bytes = self._passing_bytes = 0
        self._most_kept_bytes = 0
        self._copies: dict[str, HostCopy] = {}
        self._passing: set[str] = set()  # blocks that are not kept
        self._spare: list[Spare] = []  # buffers of such
        self._empty: dict[str, PageLocked] = {}  # buffers of blocks that are made on demand
        self._reading: set[str] = set()
        self._errors: dict[str, BaseException] = {}
        self._reader = BlockReader(device)
        self._stopping = False

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def pageable_bytes(self) -> int:
        """The most pageable memory that the conversion of tensors took at once."""
        return self._reader.pageable_bytes

    def start(self, *, repeated: bool) -> None:
        """Make room, and decide how much is kept; with the lock of the store held."""
        self.repeated = self.repeated or repeated
        self._stopping = False
        sizes = [plan.nbytes for name, plan in self._plans.items() if name not in self._copies]
        room = self._store.make_room(sum(sizes) if repeated else 0, self)
        passing = 2 * max(sizes, default=0) if sum(sizes) > room and any(p.paths for p in self._plans.values()) else 0
        self._most_kept_bytes = self._held_bytes + room - passing

    # --- Use ---

    def take(self, name: str) -> HostCopy | None:
        """A block, once it has been read; ``None`` for one that is not in host memory and is to be loaded.

        Raises:
            CheckpointError: Its file has been removed, cut short or changed; ``fields`` has its ``path``.
        """
        with self._store.changed:
            if name not in self._copies:
                self._read(name)
                while name in self._reading and self._plans[name].paths:
                    self._store.changed.wait()
                if name in self._errors:
                    raise self._errors[name]
            return self._copies.get(name)

    def ready(self, name: str) -> HostCopy | None:
        """A block, if it is in host memory; never waits."""
        with self._store.changed:
            return self._copies.get(name)

    def used(self, name: str, event: Any) -> None:
        """A copy of a block to the device has been queued, which is complete after ``event``."""
        with self._store.changed:
            if name in self._passing and name in self._copies:
                self._passing.discard(name)
                self._spare.append(Spare(self._copies.pop(name).buffer, event))
                self._read(name, from_next=True)

    def offload(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy a block's tensors from the device, if there is room."""
        layout, size = packed((key, one.dtype, one.shape, one.dtype, None) for key, one in tensors.items())
        with self._store.changed:
            while name in self._reading:
                self._store.changed.wait()
            buffer = self._empty.pop(name, None)
            if buffer is not None and len(buffer.data) != size:
                self._release(buffer)
                buffer = None
            if buffer is None and self._keeps and self._reserve(size, kept=True):
                try:
                    buffer = PageLocked(size, self._device)
                except RuntimeError:  # the driver refuses to lock more memory
                    self._unreserve(size)
                    self._store.refused()
            if buffer is None:
                return
            self._copies[name] = HostCopy(buffer, layout)
        for tensor, place in zip(tensors.values(), layout, strict=True):
            part = buffer.data[place.offset : place.offset + tensor.nbytes]
            part.copy_(tensor.contiguous().view(-1).view(torch.uint8), non_blocking=True)

    def read_ahead(self) -> None:
        """Have threads read blocks from the first on, as far as there is room."""
        with self._store.changed:
            for name in [*self._plans][:1]:
                self._read(name)

    def close(self) -> None:
        """End one use. After the last, threads have ended, and what is not kept is released; no copy is in flight."""
        with self._store.changed:
            self.users -= 1
            if self.users > 0:
                return
        self.stop()
        with self._store.changed:
            if not (self._store.keep and self._store.holds(self)):
                self.release()

    # --- Memory, with the lock of the store held ---

    @property
    def _keeps(self) -> bool:
        in_files = bool(self._plans) and all(plan.paths for plan in self._plans.values())
        return self.repeated or (self._store.keep and in_files)

    def evict(self) -> None:
        """Release the block that came last."""
        _, copy = self._copies.popitem()
        self._release(copy.buffer)

    def release(self) -> None:
        """Release every block, once no copy is in flight."""
        if self.users and self._device.type == "cuda" and not is_fake():
            torch.cuda.synchronize(self._device)
        with self._store.changed:
            while self._copies:
                self.evict()

    def _reserve(self, size: int, *, kept: bool) -> bool:
        if kept and self._held_bytes - self._passing_bytes + size > self._most_kept_bytes:
            return False
        if not self._store.reserve(size):
            return False
        self._held_bytes += size
        self._passing_bytes += 0 if kept else size
        self.page_locked_bytes = max(self.page_locked_bytes, self._held_bytes)
        return True

    def _unreserve(self, size: int, *, kept: bool = True) -> None:
        self._held_bytes -= size
        self._passing_bytes -= 0 if kept else size
        self._store.unreserve(size)

    def _release(self, buffer: PageLocked, *, kept: bool = True) -> None:
        buffer.release()
        self._unreserve(len(buffer.data), kept=kept)

    # --- Reading ahead, with the lock of the store held ---

    def _read(self, first: str, *, from_next: bool = False) -> None:
        """Have threads read a block and those that follow, as far as there is room."""
        if self._stopping or first not in self._plans or is_fake():
            return
        for name in self._order(first, from_next=from_next):
            plan = self._plans[name]
            if name in self._copies or name in self._reading or name in self._empty:
                continue
            spare = None
            if not (self._keeps and self._reserve(plan.nbytes, kept=True)):
                if not plan.paths:
                    return
                spare = self._spare_buffer(plan.nbytes, needed=name == first and not from_next)
                if spare is None and not self._reserve_passing(plan.nbytes):
                    return
                self._passing.add(name)
            self._reading.add(name)
            self._reader.read(Reading(name, plan, self._ended), spare)

    def _order(self, first: str, *, from_next: bool) -> Iterator[str]:
        names = list(self._plans)
        index = names.index(first)
        yield from names[index + from_next :]
        if self.repeated:
            yield from names[: index + from_next]

    def _spare_buffer(self, size: int, *, needed: bool) -> Spare | None:
        if needed:  # what was read ahead in vain: blocks are called in another order
            for name in [name for name in self._copies if name in self._passing]:
                self._passing.discard(name)
                self._spare.append(Spare(self._copies.pop(name).buffer))
        for index, spare in enumerate(self._spare):
            if len(spare.buffer.data) == size:
                return self._spare.pop(index)
        return None

    def _reserve_passing(self, size: int) -> bool:
        while self._spare and self._passing_bytes + size > AHEAD_BYTES:
            spare = self._spare.pop(0)
            if spare.event is not None:
                spare.event.synchronize()
            self._release(spare.buffer, kept=False)
        if self._passing_bytes and self._passing_bytes + size > AHEAD_BYTES:
            return False
        return self._reserve(size, kept=False)

    # --- At the end of a reading ---

    def _ended(self, reading: Reading) -> None:
        """Called by the thread that ended it."""
        name = reading.name
        with self._store.changed:
            self._reading.discard(name)
            if reading.is_whole and reading.buffer is not None:
                if reading.plan.paths:
                    self._copies[name] = HostCopy(reading.buffer, reading.plan.layout)
                else:
                    self._empty[name] = reading.buffer
            else:
                if reading.buffer is not None:
                    reading.buffer.release()
                self._unreserve(reading.plan.nbytes, kept=name not in self._passing)
                self._passing.discard(name)
                if reading.error is not None:
                    self._errors[name] = reading.error
                if reading.refused:
                    self._store.refused()
            self._store.changed.notify_all()

    def stop(self) -> None:
        """Wait until no thread reads any more; release what was not read to its end, and what only passes."""
        self._stopping = True
        self._reader.stop()
        with self._store.changed:
            for name in [name for name in self._copies if name in self._passing]:
                self._release(self._copies.pop(name).buffer, kept=False)
            for spare in self._spare:
                self._release(spare.buffer, kept=False)
            for buffer in self._empty.values():
                self._release(buffer)
            for left in (self._passing, self._spare, self._empty, self._errors):
                left.clear()
