"""Streams that are consumed in other threads than the one that made them: the same records as in one thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from i2v_lab import PhaseProfiler, guard_stream, profile_call
from i2v_lab.profiling.autograd_graph import AutogradGraphProbe
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.records import GraphRecord, StepRecord
from i2v_lab.torch_compat import ModeStacks


class VideoDecoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


class Pipeline:
    def __init__(self) -> None:
        self.vae_decoder = VideoDecoder()

    def __call__(self, items: int = 3) -> Iterator[torch.Tensor]:
        latent = torch.ones(16, 64)
        return (self.vae_decoder(latent * index) for index in range(items))


def _elsewhere(function: Callable[..., Any], *args: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def _one_by_one(stream: Iterator[torch.Tensor]) -> list[torch.Tensor]:
    async def consume() -> list[torch.Tensor]:
        items = []
        while (item := await asyncio.to_thread(next, stream, None)) is not None:
            items.append(item)
        return items

    return asyncio.run(consume())


CONSUMERS: dict[str, Callable[[Iterator[torch.Tensor]], list[torch.Tensor]]] = {
    "another thread": lambda stream: _elsewhere(list, stream),
    "asyncio.to_thread": _one_by_one,
    "its own thread, then another": lambda stream: [next(stream), *_elsewhere(list, stream)],
    "another thread, then its own": lambda stream: [_elsewhere(next, stream), *stream],
}


@pytest.fixture(autouse=True)
def _leaves_no_mode_behind():
    before = ModeStacks.current()
    yield
    assert ModeStacks.current() == before
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        (torch.ones(1, requires_grad=True) ** 2).sum()
    assert saved  # no hooks of a profiler are left above


def _summary(profiler: Any) -> tuple:
    phases = [
        (p.phase, p.start_bytes, p.peak_bytes, p.end_bytes, p.saved_for_backward_bytes, p.completed)
        for p in profiler.phases
    ]
    others = [
        (r.phase, getattr(r, "module", ""), getattr(r, "nbytes", 0), getattr(r, "peak_bytes", 0))
        for r in profiler.records
        if isinstance(r, GraphRecord | StepRecord)
    ]
    return phases, others


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_call_whose_stream_is_consumed_in_another_thread_has_the_same_records(consumer):
    expected = profile_call(Pipeline())
    frames = list(expected.result)
    with profile_call(Pipeline()) as call:
        items = CONSUMERS[consumer](call.result)
    assert len(items) == len(frames) == 3
    assert all(item.requires_grad for item in items)
    assert _summary(call) == _summary(expected)
    decode = call.phases[-1]
    assert (decode.phase, decode.saved_for_backward_bytes) == ("decode_video", 3 * 2 * 16 * 64 * 4)


def test_a_profile_that_ended_in_another_thread_leaves_this_one_at_the_next():
    call = profile_call(Pipeline())
    next(call.result)  # from now on this thread is metered
    _elsewhere(list, call.result)
    count = len(call.records)
    torch.ones(4)
    allocated = call.profiler.allocated_bytes()
    torch.ones(1 << 16)
    assert (call.profiler.allocated_bytes(), len(call.records)) == (allocated, count)
    list(profile_call(Pipeline()).result)


def test_a_call_within_an_active_profiler_leaves_it_active():
    with PhaseProfiler() as profiler:
        call = profile_call(Pipeline(), profiler=profiler)
        _elsewhere(list, call.result)
        before = profiler.allocated_bytes()
        kept = torch.ones(4)
        assert profiler.allocated_bytes() == before + kept.nbytes
        call.close()
        more = torch.ones(4)
        assert profiler.allocated_bytes() == before + kept.nbytes + more.nbytes
    assert call.phases[-1].saved_for_backward_bytes == 3 * 2 * 16 * 64 * 4


def test_phases_and_streams_of_a_profiler_are_metered_in_any_thread():
    def run(profiler: PhaseProfiler, call: Callable[..., Any]) -> tuple:
        decoder = VideoDecoder()
        profiler.component("decoder", decoder)
        call(lambda: list(profiler.stream((decoder(torch.ones(16, 64)) for _ in range(2)), "decode")))

        def phase() -> None:
            with profiler.phase("multiply"):
                torch.ones(16, 16) @ torch.ones(16, 16)

        call(phase)
        return _summary(profiler)

    with PhaseProfiler() as profiler:
        expected = run(profiler, lambda function: function())
    with PhaseProfiler() as profiler:
        assert run(profiler, _elsewhere) == expected


def test_a_meter_and_a_probe_can_be_left_in_another_thread_than_they_were_entered_in():
    meter, probe = LiveStorageMeter(), AutogradGraphProbe()
    meter.__enter__()
    probe.__enter__()
    _elsewhere(probe.__exit__, None, None, None)
    _elsewhere(meter.__exit__, None, None, None)
    torch.ones(1, requires_grad=True) ** 2
    assert (meter.allocated_bytes(), probe.saved_bytes) == (0, 0)
    probe.leave_thread()
    meter.leave_thread()


@pytest.mark.parametrize("before", [0, 1])
def test_a_guarded_stream_of_a_call_meters_the_consumer_too_and_ends_with_it(before):
    def consume(guard: Callable[[Any], Any]) -> Any:
        call = profile_call(Pipeline())
        with torch.no_grad():
            held = [next(call.result) for _ in range(before)]
        for item in guard(call.result):
            held += [item, torch.ones(64)]
        return call

    with torch.no_grad():
        expected = consume(lambda stream: stream)
    guarded = consume(guard_stream)
    assert _summary(guarded) == _summary(expected)
    assert ModeStacks.current().dispatch == ()
    with PhaseProfiler() as profiler, profiler.phase("next"):
        torch.ones(16)
    assert profiler.peak.peak_bytes == 64


def test_send_throw_and_the_returned_value_of_a_followed_stream():
    decoder = VideoDecoder()

    def produce():
        sent = yield decoder(torch.ones(16, 64))
        try:
            yield decoder(sent)
        except KeyError:
            yield decoder(sent)
        return "end"

    call = profile_call(produce)
    stream = call.result
    items = [next(stream), stream.send(torch.ones(16, 64)), stream.throw(KeyError())]
    with pytest.raises(StopIteration) as stop:
        next(stream)
    assert stop.value.value == "end"
    assert all(torch.equal(item, items[0]) for item in items)
    assert [r.steps for r in call.records if isinstance(r, StepRecord)] == [3, 3, 3]
