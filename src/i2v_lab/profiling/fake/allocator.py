"""Model of PyTorch's CUDA caching allocator: the bytes it counts as allocated, and those it reserves from the card.

Follows ``c10/cuda/CUDACachingAllocator.cpp`` of PyTorch 2.11 at its default settings, on a card that is large enough.
A free block is for requests of the stream alone on which it was allocated.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass

MIN_BLOCK_BYTES = 512  # kMinBlockSize: every request is rounded up to a multiple of it
SMALL_BYTES = 2**20  # kSmallSize: requests up to this come from small segments
SMALL_SEGMENT_BYTES = 2 * 2**20  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * 2**20  # kLargeBuffer: for requests below kMinLargeAlloc
MIN_LARGE_BYTES = 10 * 2**20  # kMinLargeAlloc: from here on a segment is as large as the request
ROUND_LARGE_BYTES = 2 * 2**20  # kRoundLarge: to multiples of this


@dataclass(eq=False, slots=True)
class Block:
    """A part of a segment.

    Attributes:
        size: Bytes that the allocator counts for it.
        address: Where it begins.
        small: Which pool of its stream it belongs to.
        stream: On which it was allocated.
        free: Whether it is in the pool of free blocks.
        previous: The block below it in the segment.
        next: The block above it.
    """

    size: int
    address: int
    small: bool
    stream: int = 0
    free: bool = False
    previous: Block | None = None
    next: Block | None = None


class CachingAllocator:
    """Allocates and frees blocks of segments, without a card.

    Attributes:
        stream: The current one, on which blocks are allocated.
        allocated_bytes: In blocks that are not free, as ``torch.cuda.memory_allocated()``.
        reserved_bytes: In segments, as ``torch.cuda.memory_reserved()``.
        peak_reserved_bytes: Maximum of the reserved bytes since :meth:`reset_peak`.
        segments: That were allocated so far, each by a call of the driver.

    Example:
        >>> allocator = CachingAllocator()
        >>> allocator.allocate(1000).size, allocator.reserved_bytes
        (1024, 2097152)
    """

    def __init__(self) -> None:
        self.stream = 0
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self.segments = 0
        self._free: defaultdict[tuple[int, bool], list[tuple[int, int, Block]]]  # by size, then address
        self._free = defaultdict(list)
        self._next_address = 0

    def allocate(self, nbytes: int) -> Block:
        """Allocate the smallest free block that is large enough, split to size, or one from a new segment.

        Args:
            nbytes: At least 1.
        """
        size = _round_up(nbytes, MIN_BLOCK_BYTES)
        small = size <= SMALL_BYTES
        pool = self._free[self.stream, small]
        index = bisect.bisect_left(pool, (size, -1))
        block = pool.pop(index)[2] if index < len(pool) else self._new_segment(size, small)
        block.free = False
        remaining = block.size - size
        if remaining >= MIN_BLOCK_BYTES if small else remaining > SMALL_BYTES:
            remainder = Block(remaining, block.address + size, small, block.stream, previous=block, next=block.next)
            if block.next is not None:
                block.next.previous = remainder
            block.size, block.next = size, remainder
            self._insert_free(remainder)
        self.allocated_bytes += block.size
        return block

    def free(self, block: Block) -> None:
        """Return a block to its pool, merged with its free neighbours."""
        self.allocated_bytes -= block.size
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.free:
                self._remove_free(neighbour)
                lower, upper = (neighbour, block) if neighbour is block.previous else (block, neighbour)
                lower.size += upper.size
                lower.next = upper.next
                if upper.next is not None:
                    upper.next.previous = lower
                block = lower
        self._insert_free(block)

    def empty_cache(self) -> None:
        """Release the segments that are entirely free, as ``torch.cuda.empty_cache()``."""
        for pool in self._free.values():
            for entry in [entry for entry in pool if entry[2].previous is None and entry[2].next is None]:
                pool.remove(entry)
                self.reserved_bytes -= entry[0]

    def use_stream(self, stream: int) -> None:
        """Allocate on a stream from now on; 0 is the default one."""
        self.stream = stream

    def reset_peak(self) -> None:
        """Reset the peak to what is reserved now."""
        self.peak_reserved_bytes = self.reserved_bytes

    def _new_segment(self, size: int, small: bool) -> Block:
        if small:
            segment = SMALL_SEGMENT_BYTES
        elif size < MIN_LARGE_BYTES:
            segment = LARGE_SEGMENT_BYTES
        else:
            segment = _round_up(size, ROUND_LARGE_BYTES)
        block = Block(segment, self._next_address, small, self.stream)
        self._next_address += segment
        self.segments += 1
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return block

    def _insert_free(self, block: Block) -> None:
        block.free = True
        bisect.insort(self._free[block.stream, block.small], (block.size, block.address, block))

    def _remove_free(self, block: Block) -> None:
        pool = self._free[block.stream, block.small]
        del pool[bisect.bisect_left(pool, (block.size, block.address))]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
