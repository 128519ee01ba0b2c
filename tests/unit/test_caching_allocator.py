"""The allocator on paper: its rules one by one, and what must hold after any sequence of calls."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i2v_lab.profiling.fake.allocator import Block, CachingAllocator
from i2v_lab.profiling.fake.block_trace import TracingAllocator
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.fake.workspaces import load_workspaces

MIB = 2**20


def test_requests_are_rounded_up_to_512_bytes():
    allocator = CachingAllocator()
    assert [allocator.allocate(n).size for n in (1, 512, 513, MIB)] == [512, 512, 1024, MIB]
    assert allocator.allocated_bytes == 2048 + MIB


def test_segments_are_2_mib_for_small_requests_20_mib_for_middling_ones_and_made_to_measure_above():
    for request, reserved in ((512, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB + 1, 12 * MIB)):
        allocator = CachingAllocator()
        allocator.allocate(request)
        assert allocator.reserved_bytes == reserved


def test_a_rest_of_up_to_1_mib_of_a_large_segment_is_counted_with_the_block():
    allocator = CachingAllocator()
    assert allocator.allocate(11 * MIB).size == 12 * MIB  # torch.empty(11 * 2**20) says so on a real card
    allocator = CachingAllocator()
    assert allocator.allocate(18 * MIB - 512).size == 18 * MIB


def test_the_smallest_free_block_that_is_large_enough_is_taken():
    allocator = CachingAllocator()
    large, small = allocator.allocate(40 * MIB), allocator.allocate(16 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.allocate(14 * MIB) is small
    assert allocator.reserved_bytes == 56 * MIB


def test_freed_neighbours_become_one_block_again():
    allocator = CachingAllocator()
    first, second, third = (allocator.allocate(4 * MIB) for _ in range(3))
    for block in (first, third, second):
        allocator.free(block)
    assert allocator.allocate(20 * MIB - 512).size == 20 * MIB
    assert allocator.reserved_bytes == 20 * MIB


def test_empty_cache_returns_only_segments_of_which_every_byte_is_free():
    allocator = CachingAllocator()
    kept, freed = allocator.allocate(4 * MIB), allocator.allocate(64 * MIB)
    allocator.free(freed)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.peak_reserved_bytes == 84 * MIB
    allocator.reset_peak()
    assert allocator.peak_reserved_bytes == 20 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved_bytes == allocator.allocated_bytes == 0


@given(st.lists(st.one_of(st.integers(1, 64 * MIB), st.integers(-100, -1), st.just(0)), max_size=60))
def test_after_any_calls_blocks_are_apart_and_every_byte_is_accounted_for(calls: list[int]):
    allocator = CachingAllocator()
    mine: list[Block] = []
    for call in calls:  # a size to allocate, which block to free, or 0 for empty_cache
        if call > 0:
            mine.append(allocator.allocate(call))
            assert mine[-1].size >= call
        elif call == 0:
            allocator.empty_cache()
        elif mine:
            allocator.free(mine.pop(call % len(mine)))
        spans = sorted((block.address, block.address + block.size) for block in mine)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert allocator.allocated_bytes == sum(block.size for block in mine)
        assert allocator.peak_reserved_bytes >= allocator.reserved_bytes >= allocator.allocated_bytes
    for block in mine:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == allocator.allocated_bytes == 0


# --- Traces -----------------------------------------------------------------------------------------------------------

CALLS = st.lists(st.one_of(st.integers(1, 64 * MIB), st.integers(-100, -1), st.just(0)), max_size=30)


def _carry_out(allocator: CachingAllocator, calls: list[int]) -> tuple[list[Block], int]:
    """Sizes to allocate, which own block to free, or 0 for empty_cache; the blocks left, and the peak allocated."""
    mine: list[Block] = []
    peak_bytes = allocator.allocated_bytes
    for call in calls:
        if call > 0:
            mine.append(allocator.allocate(call))
            peak_bytes = max(peak_bytes, allocator.allocated_bytes)
        elif call == 0:
            allocator.empty_cache()
        elif mine:
            allocator.free(mine.pop(call % len(mine)))
    return mine, peak_bytes


@given(CALLS, CALLS, CALLS)
def test_a_replay_places_every_block_where_the_calls_would(before: list[int], traced: list[int], between: list[int]):
    executed, replayed = CachingAllocator(), TracingAllocator()
    _carry_out(executed, before)
    _carry_out(executed, traced)
    _carry_out(executed, between)
    left, peak_bytes = _carry_out(executed, traced)

    _carry_out(replayed, before)
    with replayed.trace() as outer, replayed.trace() as trace:
        first, _ = _carry_out(replayed, traced)
    assert trace.is_closed
    assert outer.events == trace.events
    _carry_out(replayed, between)
    assert replayed.replay(trace.events, [trace.indices[block] for block in first]) == peak_bytes
    again = [replayed.allocate(block.size) for block in left]
    assert [(block.address, block.size) for block in again] == [(block.address, block.size) for block in left]
    assert replayed.allocated_bytes == executed.allocated_bytes
    assert replayed.peak_reserved_bytes == executed.peak_reserved_bytes
    assert [(size, address) for size, address, _ in replayed._free[True]] == [e[:2] for e in executed._free[True]]
    assert [(size, address) for size, address, _ in replayed._free[False]] == [e[:2] for e in executed._free[False]]


def test_a_trace_that_frees_what_it_did_not_allocate_is_not_closed():
    allocator = TracingAllocator()
    older = allocator.allocate(512)
    with allocator.trace() as trace:
        allocator.free(allocator.allocate(1024))
        assert trace.is_closed
        allocator.free(older)
    assert not trace.is_closed


def test_a_replay_within_a_trace_is_part_of_it():
    allocator = TracingAllocator()
    with allocator.trace() as inner:
        kept = allocator.allocate(512)
    with allocator.trace() as outer:
        allocator.replay(inner.events, [inner.indices[kept]])
        assert allocator.allocate(512) in outer.indices
    assert outer.events == [512]


class Scratch(torch.nn.Module):
    """Needs 30 MiB for as long as it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty(30 * MIB, dtype=torch.uint8, device=x.device)[:1] + x


@pytest.mark.parametrize("memoize", [None, {Scratch: lambda *_: ()}], ids=["executed", "memoized"])
def test_a_memoized_call_reserves_what_it_would_if_it_were_executed(memoize):
    scratch = Scratch()
    forecast = forecasting("cuda", memoize=memoize, workspaces=load_workspaces())
    with forecast as profiler, torch.no_grad(), profiler.phase("calls"):
        x = torch.empty(1, dtype=torch.uint8, device="cuda")
        others = [torch.empty(10 * MIB, dtype=torch.uint8, device="cuda") for _ in range(4)]
        scratch(x)
        del others
        kept = torch.empty(25 * MIB, dtype=torch.uint8, device="cuda")  # where the scratch memory was
        scratch(x)  # so this one needs another segment
    assert profiler.peak.peak_reserved_bytes == (2 + 4 * 10 + 30 + 30) * MIB
    assert kept.numel() == 25 * MIB


class OnAStream(torch.nn.Module):
    """Allocates on another stream, as an offloading hook that prefetches does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            scratch = torch.empty(30 * MIB, dtype=torch.uint8, device=x.device)
        return scratch[:1] + x


class Emptying(torch.nn.Module):
    """Empties the cache between 40 MiB and 30, as accelerate does after each weight that it moves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.empty(40 * MIB, dtype=torch.uint8, device=x.device)
        torch.cuda.empty_cache()
        return torch.empty(30 * MIB, dtype=torch.uint8, device=x.device)[:1] + x


@pytest.mark.parametrize(
    ("kind", "peak_bytes", "left_bytes"),
    [(Emptying, (2 + 30 + 40) * MIB, 32 * MIB), (OnAStream, (2 + 4 * 30) * MIB, (2 + 4 * 30) * MIB)],
)
@pytest.mark.parametrize("is_memoized", [False, True])
def test_a_memoized_call_empties_the_cache_and_uses_the_streams_that_it_would_if_executed(
    kind: type[torch.nn.Module], peak_bytes: int, left_bytes: int, is_memoized: bool
):
    module = kind()
    memoize = {kind: lambda *_: ()} if is_memoized else None
    forecast = forecasting("cuda", memoize=memoize, workspaces=load_workspaces())
    with forecast as profiler, torch.no_grad(), profiler.phase("calls"):
        x = torch.empty(1, dtype=torch.uint8, device="cuda")
        for _ in range(4):
            module(x)
        assert torch.cuda.memory_reserved() == left_bytes
    assert profiler.peak.peak_reserved_bytes == peak_bytes
