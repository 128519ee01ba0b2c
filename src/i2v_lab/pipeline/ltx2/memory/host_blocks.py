"""The blocks of one streamed component in page-locked host memory, read from their files by threads ahead of their use.

Blocks that are called many times are kept while their component is used, and over generations by a
:class:`~i2v_lab.pipeline.ltx2.memory.host_weights.HostWeights` that says so; the others pass through a few buffers,
which are filled again once the device has its copy.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch

from i2v_lab.pipeline.ltx2.memory.block_reader import BlockReader, Reading, Spare
from i2v_lab.pipeline.ltx2.memory.host_copies import BlockPlan, HostCopy, packed
from i2v_lab.pipeline.ltx2.memory.host_memory import HostRoom, PageLocked
from i2v_lab.torch_compat import is_fake

AHEAD_BYTES = 2**30  # of blocks that are not kept, read ahead of their use


class HostBlocks:
    """The blocks of one component in host memory; made by its ``blocks``.

    Attributes:
        files: The state of the files that they are read from.
        kept: Whether they stay when they are no longer used.
        users: How many use them.
        repeated: Whether they are called many times.
        called_after: The block that is called after each, as observed in the last pass, also in the use before.
        page_locked_bytes: The most host memory that they took at once, since they were last not in use.
    """

    def __init__(
        self, room: HostRoom, files: Hashable, plans: Mapping[str, BlockPlan], device: torch.device, *, kept: bool
    ) -> None:
        self.files = files
        self.kept = kept
        self.users = 0
        self.repeated = False
        self.called_after: dict[str, str] = {}
        self.page_locked_bytes = 0
        self._room = room
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
        """The most pageable memory that the conversion of tensors took at once, likewise."""
        return self._reader.pageable_bytes

    @property
    def missing_bytes(self) -> int:
        """Of blocks that are not in host memory."""
        return sum(plan.nbytes for name, plan in self._plans.items() if name not in self._copies)

    def start(self, *, repeated: bool) -> None:
        """Decide how much is held for longer than a call; with the lock held."""
        self.repeated = self.repeated or repeated
        self._stopping = False
        if self.users == 1:
            self.page_locked_bytes, self._reader.pageable_bytes = self._held_bytes, 0
        sizes = [plan.nbytes for name, plan in self._plans.items() if name not in self._copies]
        room = self._room.free_bytes
        passing = 2 * max(sizes, default=0) if sum(sizes) > room and any(p.paths for p in self._plans.values()) else 0
        self._most_kept_bytes = self._held_bytes + room - passing

    # --- Use ---

    def take(self, name: str) -> HostCopy | None:
        """A block, once it has been read; ``None`` for one that is not in host memory and is to be loaded.

        Raises:
            CheckpointError: Its file has been removed, cut short or changed; ``fields`` has its ``path``.
        """
        with self._room.changed:
            if name not in self._copies:
                self._read(name)
                while name in self._reading and self._plans[name].paths:
                    self._room.changed.wait()
                if name in self._errors:
                    raise self._errors[name]
            return self._copies.get(name)

    def ready(self, name: str) -> HostCopy | None:
        """A block, if it is in host memory; never waits."""
        with self._room.changed:
            return self._copies.get(name)

    def used(self, name: str, event: Any) -> None:
        """A copy of a block to the device has been queued, which is complete after ``event``."""
        with self._room.changed:
            if name in self._passing and name in self._copies:
                self._passing.discard(name)
                self._spare.append(Spare(self._copies.pop(name).buffer, event))
                self._read(name, from_next=True)

    def offload(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy a block's tensors from the device, if there is room."""
        layout, size = packed((key, one.dtype, one.shape, one.dtype, None) for key, one in tensors.items())
        with self._room.changed:
            while name in self._reading:
                self._room.changed.wait()
            buffer = self._empty.pop(name, None)
            if buffer is not None and len(buffer.data) != size:
                self._release(buffer)
                buffer = None
            if buffer is None and self._keeps and self._reserve(size, kept=True):
                try:
                    buffer = PageLocked(size, self._device)
                except (RuntimeError, OSError):  # the driver refuses to lock more memory, or there is no more
                    self._unreserve(size)
                    self._room.refused()
            if buffer is None:
                return
            self._copies[name] = HostCopy(buffer, layout)
        for tensor, place in zip(tensors.values(), layout, strict=True):
            part = buffer.data[place.offset : place.offset + tensor.nbytes]
            part.copy_(tensor.contiguous().view(-1).view(torch.uint8), non_blocking=True)

    def read_ahead(self) -> None:
        """Have threads read blocks from the first on, as far as there is room."""
        with self._room.changed:
            for name in [*self._plans][:1]:
                self._read(name)

    def close(self) -> None:
        """End one use. After the last, threads have ended, and what is not kept is released; no copy is in flight."""
        with self._room.changed:
            self.users -= 1
            if self.users > 0:
                return
        self.stop()
        with self._room.changed:
            if not self.kept:
                self.release()

    # --- Memory, with the lock held ---

    @property
    def _keeps(self) -> bool:
        in_files = bool(self._plans) and all(plan.paths for plan in self._plans.values())
        return self.repeated or (self.kept and in_files)

    def evict(self) -> None:
        """Release the block that came last."""
        _, copy = self._copies.popitem()
        self._release(copy.buffer)

    def release(self) -> None:
        """Release every block, once no copy is in flight."""
        self._finish_copies()
        with self._room.changed:
            while self._copies:
                self.evict()

    def _finish_copies(self) -> None:
        """Wait for copies from its buffers; one that is not in use has none in flight."""
        if self.users and self._device.type == "cuda" and not is_fake():
            torch.cuda.synchronize(self._device)

    def _reserve(self, size: int, *, kept: bool) -> bool:
        if kept and self._held_bytes - self._passing_bytes + size > self._most_kept_bytes:
            return False
        if not self._room.reserve(size):
            return False
        self._held_bytes += size
        self._passing_bytes += 0 if kept else size
        self.page_locked_bytes = max(self.page_locked_bytes, self._held_bytes)
        return True

    def _unreserve(self, size: int, *, kept: bool = True) -> None:
        self._held_bytes -= size
        self._passing_bytes -= 0 if kept else size
        self._room.unreserve(size)

    def _release(self, buffer: PageLocked, *, kept: bool = True) -> None:
        buffer.release()
        self._unreserve(len(buffer.data), kept=kept)

    # --- Reading ahead, with the lock held ---

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
        with self._room.changed:
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
                    self._room.refused()
            self._room.changed.notify_all()

    def stop(self) -> None:
        """Wait until no thread reads any more; release what was not read to its end, and what only passes."""
        self._stopping = True
        self._reader.stop()
        self._finish_copies()
        with self._room.changed:
            for name in self._reading:  # an interrupt came between its registration here and with the reader
                self._unreserve(self._plans[name].nbytes, kept=name not in self._passing)
            for name in [name for name in self._copies if name in self._passing]:
                self._release(self._copies.pop(name).buffer, kept=False)
            for spare in self._spare:
                self._release(spare.buffer, kept=False)
            for buffer in self._empty.values():
                self._release(buffer)
            for left in (self._reading, self._passing, self._spare, self._empty, self._errors):
                left.clear()
