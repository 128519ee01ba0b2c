"""Traces of what calls allocate and free, replayed for calls that are memoized.

Where a block is placed depends on what was allocated and freed before. With the blocks of a memoized call allocated and
freed again, in their order, reserved bytes are those of a forecast that executes every call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from i2v_lab.profiling.fake.allocator import Block, CachingAllocator

Event = int | None


@dataclass(eq=False)
class BlockTrace:
    """What was allocated and freed within a scope.

    Attributes:
        events: Requested bytes of an allocation, ``-1 - index`` where the allocation of that index is freed, or
            ``None`` where the cache is emptied.
        indices: Index of the allocation of each block that is not freed.
        is_closed: Whether it can be replayed: only blocks of the scope's own were freed, others cannot be freed a
            second time; and the current stream stayed the same.
    """

    events: list[Event] = field(default_factory=list)
    indices: dict[Any, int] = field(default_factory=dict)
    is_closed: bool = True
    _count: int = 0

    def add(self, nbytes: int, block: Block) -> None:
        """A block of ``nbytes`` was allocated."""
        self.events.append(nbytes)
        self.indices[block] = self._count
        self._count += 1

    def remove(self, block: Block) -> None:
        """A block was freed."""
        index = self.indices.pop(block, None)
        self.is_closed &= index is not None
        if index is not None:
            self.events.append(-1 - index)


class TracingAllocator(CachingAllocator):
    """A caching allocator whose allocations within a scope can be traced, and replayed later.

    Example:
        >>> allocator = TracingAllocator()
        >>> with allocator.trace() as trace:
        ...     a, b = allocator.allocate(512), allocator.allocate(2048)
        ...     allocator.free(a)
        >>> allocator.replay(trace.events, kept=[trace.indices[b]])  # peak, in bytes
        4608
        >>> allocator.allocate(2048).address, allocator.allocated_bytes  # the block that the replay kept
        (2560, 4096)
    """

    def __init__(self) -> None:
        super().__init__()
        self._traces: list[BlockTrace] = []
        self._kept: deque[Block] = deque()

    @contextmanager
    def trace(self) -> Iterator[BlockTrace]:
        """Trace what this scope allocates and frees; scopes may be nested."""
        trace = BlockTrace()
        self._traces.append(trace)
        try:
            yield trace
        finally:
            self._traces.remove(trace)

    def allocate(self, nbytes: int) -> Block:
        """As :meth:`CachingAllocator.allocate`; first the blocks that :meth:`replay` kept."""
        if self._kept:
            return self._kept.popleft()
        block = super().allocate(nbytes)
        for trace in self._traces:
            trace.add(nbytes, block)
        return block

    def free(self, block: Block) -> None:
        """As :meth:`CachingAllocator.free`."""
        for trace in self._traces:
            trace.remove(block)
        super().free(block)

    def empty_cache(self) -> None:
        """As :meth:`CachingAllocator.empty_cache`."""
        for trace in self._traces:
            trace.events.append(None)
        super().empty_cache()

    def use_stream(self, stream: int) -> None:
        """As :meth:`CachingAllocator.use_stream`."""
        for trace in self._traces:
            trace.is_closed &= stream == self.stream
        super().use_stream(stream)

    def replay(self, events: Sequence[Event], kept: Sequence[int]) -> int:
        """Allocate and free again what a trace did.

        Args:
            events: Of the trace.
            kept: Indices of the allocations that were not freed, in the order in which they will be asked for.

        Returns:
            The maximum of the allocated bytes meanwhile.
        """
        blocks: list[Block] = []
        peak_bytes = self.allocated_bytes
        for event in events:
            if event is None:
                self.empty_cache()
            elif event >= 0:
                blocks.append(self.allocate(event))
                peak_bytes = max(peak_bytes, self.allocated_bytes)
            else:
                self.free(blocks[-1 - event])
        self._kept.extend(blocks[index] for index in kept)
        return peak_bytes
