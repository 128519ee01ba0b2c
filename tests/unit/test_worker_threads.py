"""What a profiled call has other threads do: the same records as if it did it itself."""

from __future__ import annotations

import asyncio
import io
import multiprocessing.pool
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from tqdm import tqdm

from i2v_lab import PhaseProfiler, profile_call
from i2v_lab.profiling.records import GraphRecord, ModuleRecord
from i2v_lab.torch_compat import ModeStacks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


class Pipeline:
    def __init__(self, elsewhere: Callable[..., Any]) -> None:
        self.transformer, self.vae_decoder, self.elsewhere = Layer(), Layer(), elsewhere

    def __call__(self) -> Any:
        latent = torch.ones(16, 64)
        with torch.no_grad():
            latent = self.transformer(latent)
        return self.elsewhere(self.decode, latent)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        frames = self.vae_decoder(latent)
        return frames * torch.ones(16, 64)  # outside of any module's call


def _pool(function: Callable[..., Any], *args: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def _pools_map(function: Callable[..., Any], *args: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return next(pool.map(function, *[[arg] for arg in args]))


def _thread(function: Callable[..., Any], *args: Any) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join()
    return results[0]


class _Runs(threading.Thread):
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        super().__init__()
        self.function, self.args, self.result = function, args, None

    def run(self) -> None:
        self.result = self.function(*self.args)


def _subclass(function: Callable[..., Any], *args: Any) -> Any:
    thread = _Runs(function, *args)
    thread.start()
    thread.join()
    return thread.result


def _timer(function: Callable[..., Any], *args: Any) -> Any:
    results: list[Any] = []
    timer = threading.Timer(0.0, lambda: results.append(function(*args)))
    timer.start()
    timer.join()
    return results[0]


def _to_thread(function: Callable[..., Any], *args: Any) -> Any:
    async def run() -> Any:
        return await asyncio.to_thread(function, *args)

    return asyncio.run(run())


def _threads_thread(function: Callable[..., Any], *args: Any) -> Any:
    return _pool(_thread, function, *args)


def _multiprocessing(function: Callable[..., Any], *args: Any) -> Any:
    with multiprocessing.pool.ThreadPool(1) as pool:
        result = pool.apply(function, args)
    pool.join()
    return result


ELSEWHERE = [_pool, _pools_map, _thread, _subclass, _timer, _to_thread, _threads_thread, _multiprocessing]


@pytest.fixture(autouse=True)
def _replaces_nothing_for_good():
    before = (ModeStacks.current(), threading.Thread.start, ThreadPoolExecutor.submit)
    yield
    assert (ModeStacks.current(), threading.Thread.start, ThreadPoolExecutor.submit) == before


def _summary(profiler: Any) -> tuple[Any, ...]:
    phases = [
        (p.phase, p.start_bytes, p.peak_bytes, p.end_bytes, p.saved_for_backward_bytes, p.completed)
        for p in profiler.phases
    ]
    found = [record for record in profiler.records if isinstance(record, GraphRecord | ModuleRecord)]
    return phases, [(record.phase, record.module, record.nbytes) for record in found]


def _directly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@pytest.mark.parametrize("elsewhere", ELSEWHERE, ids=lambda function: function.__name__)
def test_decoding_in_another_thread_has_the_records_of_decoding_in_this_one(elsewhere):
    expected = profile_call(Pipeline(_directly))
    call = profile_call(Pipeline(elsewhere))
    assert call.result.requires_grad
    assert _summary(call) == _summary(expected)
    decode = call.phases[-1]
    size = 16 * 64 * 4  # saved: the layer's input, relu's result, and the factor
    assert (decode.phase, decode.saved_for_backward_bytes) == ("decode_video", 3 * size)


def test_a_pool_that_was_there_before_the_call_is_metered_during_it_only():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # its thread is started
        call = profile_call(Pipeline(lambda function, *args: pool.submit(function, *args).result()))
        assert _summary(call) == _summary(profile_call(Pipeline(_directly)))
        assert pool.submit(ModeStacks.current).result().dispatch == ()
        error = profile_call(lambda: pool.submit(nn.Linear(2, 2), torch.ones(3)).exception()).result
        assert isinstance(error, RuntimeError)
        assert pool.submit(ModeStacks.current).result().dispatch == ()


def test_a_module_that_a_thread_of_before_the_call_calls_is_metered():
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        while (task := tasks.get()) is not None:
            results.put(task())

    thread = threading.Thread(target=work)
    thread.start()

    def elsewhere(function: Callable[..., Any], *args: Any) -> Any:
        tasks.put(lambda: function(*args))
        return results.get()

    decoder = Layer()

    def pipeline() -> Any:
        return elsewhere(decoder, torch.ones(16, 64))

    for phases in (None, {"decoder": decoder}, {"decoder": decoder.forward}):
        found = [(each.phase, each.saved_for_backward_bytes) for each in profile_call(pipeline, phases=phases).phases]
        assert found == [("decoder", 2 * 16 * 64 * 4)]
        assert elsewhere(ModeStacks.current).dispatch == ()
    tasks.put(None)
    thread.join()


def test_the_thread_of_a_progress_bar_outlives_the_profiler_and_is_left_alone(monkeypatch):
    monkeypatch.setattr(tqdm, "monitor", None)
    start = threading.Thread.start
    profile_call(lambda: [layer(torch.ones(1, 64)) for layer in tqdm([Layer()], file=io.StringIO())])
    assert (tqdm.monitor.is_alive(), threading.Thread.start) == (True, start)
    tqdm.monitor.exit()


def test_the_threads_of_a_stream_and_of_a_named_phase_are_metered():
    def frames(elsewhere: Callable[..., Any], decoder: nn.Module) -> Any:
        for _ in range(2):
            yield elsewhere(decoder, torch.ones(16, 64))

    def run(elsewhere: Callable[..., Any]) -> tuple[Any, ...]:
        call = profile_call(frames, elsewhere, Layer())
        kept = list(call.result)
        decoder = Layer()
        with PhaseProfiler() as profiler:
            profiler.component("decoder", decoder)
            with profiler.phase("decode"):
                kept.append(elsewhere(decoder, torch.ones(16, 64)))
        return _summary(call), _summary(profiler)

    assert run(_pool) == run(_directly)


def test_many_threads_at_once_lose_no_byte_of_a_graph():
    layers = [Layer() for _ in range(8)]

    def pipeline() -> Any:
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(_repeat, layer) for layer in layers]
            return [future.result() for future in futures]

    call = profile_call(pipeline)
    assert max(phase.saved_for_backward_bytes for phase in call.phases) == 8 * 20 * 2 * 64 * 4
    assert call.phases[-1].end_bytes > 0


def _repeat(layer: nn.Module) -> list[torch.Tensor]:
    return [layer(torch.ones(1, 64)) for _ in range(20)]
