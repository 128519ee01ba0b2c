"""Forecasts beside other threads: real work there is as if alone, and a forecast's own belongs to its thread."""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from i2v_lab.errors import ForecastError
from i2v_lab.paths import find_still
from i2v_lab.profiling.fake.forecast import forecast, forecasting
from i2v_lab.profiling.fake.garbage import no_collection
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import Mode, execute
from i2v_lab.runs.spec import RunSpec
from i2v_lab.thread_modes import ModeStacks
from i2v_lab.thread_patches import patched_here, unpatched
from i2v_lab.torch_compat import FakeTensor

F = torch.nn.functional


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*(self.inner(x)[None, None],) * 3)


@functools.lru_cache(maxsize=4)
def grid(size: int) -> torch.Tensor:
    return torch.arange(size) + 1


@contextmanager
def _within_a_forecast(device: str = "cuda", **settings: Any) -> Iterator[None]:
    """Another thread is within a forecast for as long as this scope lasts."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> int:
        with forecasting(device, **settings) as profiler, profiler.phase("held"):
            torch.manual_seed(7)
            torch.set_default_dtype(torch.float16)
            kept = [grid(4), Block()(torch.ones(4, 8)), torch.empty(10)]
            entered.set()
            leave.wait(60)
            kept.append(torch.empty(10))
        return profiler.peak.peak_bytes + len(kept)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        try:
            while not entered.wait(0.01) and not held.done():
                pass
            yield
        finally:
            leave.set()
        held.result()


def _everything() -> list[Any]:
    """What a forecast replaces, as real code sees it."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, 32), torch.nn.Conv2d(2, 2, 3), torch.nn.Embedding(3, 2)]
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    weights.append(torch.nn.init.trunc_normal_(torch.empty(5)))
    weights += [torch.tensor([1.0, 2.0]), torch.rand(3), torch.get_rng_state(), grid(4)]
    block = Block()
    weights.append(block(torch.ones(4, 8)))
    weights.append(block.half().float().inner.weight)
    weights[-1].data = torch.ones(8, 8)
    facts = [
        torch.cuda.is_available(),
        torch.cuda.device_count(),
        torch.cuda.memory_allocated(),
        torch.get_default_dtype(),
        torch.initial_seed(),
        isinstance(torch.Generator("cpu"), torch.Generator),
        torch.Generator("cpu").manual_seed(3).initial_seed(),
        [type(weight) for weight in weights],
        [weight.detach().numpy().tolist() for weight in weights],
    ]
    gradients = torch.autograd.grad(block(torch.ones(4, 8)).sum(), [block.inner.weight])
    return [*facts, gradients[0].tolist()]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_real_code_beside_a_forecast_is_as_if_alone(device):
    alone = _everything()
    with _within_a_forecast(device, memoize={Block: lambda block, x: ()}):
        assert _everything() == alone
    assert _everything() == alone


def test_a_weight_that_was_initialized_beside_forecasts_has_the_values_of_its_seed():
    def initialize() -> bytes:
        torch.manual_seed(0)
        return torch.nn.Linear(32, 32).weight.detach().numpy().tobytes()

    stop = threading.Event()

    def forecasts() -> int:
        count = 0
        while not stop.is_set():
            forecast(lambda: Block()(torch.ones(4, 8)), device="cpu")
            count += 1
        return count

    alone = initialize()
    with ThreadPoolExecutor(2) as pool:
        counts = [pool.submit(forecasts) for _ in range(2)]
        try:
            found = {initialize() for _ in range(100)}
        finally:
            stop.set()
    assert found == {alone}
    assert all(count.result() > 0 for count in counts)


@pytest.mark.slow  # until its duration is recorded
def test_generations_beside_forecasts_have_the_frames_of_those_alone():
    request = I2VRequest(image=str(find_still("stills/lighthouse.png")), width=64, height=64, frames=9)
    spec = RunSpec(request=request, model="ltx-2.3-tiny")
    weights = spec.runner_spec.resolve_weights(spec.architecture, request.variant)

    def generate() -> bytes:
        video = spec.runner_spec.pipeline(weights, "cpu", [], spec.technique_set)(request).video
        return b"".join(chunk.contiguous().numpy().tobytes() for chunk in video)

    alone, stop = generate(), threading.Event()

    def forecasts() -> set[int]:
        peaks = set()
        while not stop.is_set():  # by the runner that replaces the most functions
            peaks.add(execute(replace(spec, runner="ltx-pipelines"), Mode.FAKE, "cuda").peak.peak_bytes)
        return peaks

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(forecasts)
        try:
            assert generate() == alone
        finally:
            stop.set()
    assert len(running.result()) == 1


def test_forecasts_in_threads_have_the_peaks_of_those_one_by_one():
    def peaks(number: int) -> tuple[int, ...]:
        def run(x: torch.Tensor) -> torch.Tensor:
            torch.set_default_dtype(torch.float16 if number % 2 else torch.float32)
            torch.manual_seed(number)
            return Block().to(x.device)(x.to(torch.get_default_dtype()))

        return tuple(
            forecast(run, torch.ones(4 + number, 8), device=device).peak.peak_bytes for device in ("cpu", "cuda")
        )

    expected = [peaks(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(peaks, [*range(4)] * 2)) == expected * 2
    assert len(set(expected)) == 4


def test_a_forecast_beside_and_within_a_profile_leaves_it_alone():
    def profiled(between: Callable[[], Any]) -> list[tuple[int, int]]:
        with PhaseProfiler("cpu") as profiler:
            for name in ("one", "two"):
                with profiler.phase(name):
                    x = torch.ones(16, 16, requires_grad=True)
                    y = (x * x).sum()
                    between()
                    y.backward()
        return [(phase.peak_bytes, phase.saved_for_backward_bytes) for phase in profiler.phases]

    def run() -> int:
        return forecast(Block(), torch.ones(4, 8)).peak.peak_bytes

    expected, alone = profiled(lambda: None), run()
    found = []
    with _within_a_forecast(), ThreadPoolExecutor(1) as pool:
        assert profiled(lambda: found.append(pool.submit(run).result())) == expected
    assert profiled(lambda: found.append(run())) == expected
    assert found == [alone] * 4


# --- What a forecast sets ends with it --------------------------------------------------------------------------------


def test_seeds_default_dtype_and_default_device_of_a_forecast_end_with_it():
    torch.manual_seed(11)
    before = torch.get_rng_state(), torch.get_default_dtype(), ModeStacks.current()
    seen = []

    def run() -> None:
        torch.manual_seed(5)
        torch.random.set_rng_state(torch.random.get_rng_state())
        with torch.random.fork_rng(devices=[]):
            torch.seed()
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        seen.extend([torch.initial_seed(), torch.get_default_dtype(), torch.nn.Linear(2, 2).weight.dtype])
        torch.set_default_device("cpu")
        made = [torch.tensor([1.5]), torch.arange(4) / 2, torch.linspace(0, 1, 3), torch.full((2,), 0.1), torch.rand(3)]
        seen.append({tensor.dtype for tensor in made})
        seen.append(torch.arange(4, dtype=torch.float32).dtype)
        seen.append([torch.tensor(1.001).item(), torch.tensor(1).dtype, torch.ones(1, dtype=torch.float64).dtype])

    forecast(run, device="cpu")
    assert seen == [
        5,
        torch.bfloat16,
        torch.bfloat16,
        {torch.bfloat16},
        torch.float32,
        [1.0, torch.int64, torch.float64],
    ]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_default_dtype(), ModeStacks.current()) == before[1:]


def test_a_cast_that_autocast_kept_is_not_given_to_real_code_nor_to_a_forecast():
    layer, x = torch.nn.Linear(8, 8), torch.ones(2, 8)
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        forecast(lambda: seen.append(type(layer(torch.ones(2, 8)))), device="cpu")
        assert torch.equal(layer(x), expected)
        assert type(layer(x)) is torch.Tensor
    assert seen == [FakeTensor]


def test_cached_tensors_are_a_forecasts_own():
    grid.cache_clear()
    real = grid(3)

    def run() -> None:
        seen.extend([grid(3), grid(3), grid(5)])

    seen: list[torch.Tensor] = []
    forecast(run, device="cpu")
    assert [type(each) for each in seen] == [FakeTensor] * 3
    assert seen[0] is seen[1]
    assert grid(3) is real
    assert type(grid(5)) is torch.Tensor
    assert grid.cache_info().currsize == 2


def test_the_original_is_found_while_another_thread_replaces_and_restores_it():
    def original() -> None: ...

    def replace_and_restore() -> None:
        while not ended.is_set():
            with patched_here(module, "name", lambda: None):
                pass

    module, ended = types.ModuleType("module"), threading.Event()
    module.name = original
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(2) as pool:
        try:
            for _ in range(2):
                pool.submit(replace_and_restore)
            found = {unpatched(module, "name") for _ in range(200_000)}
        finally:
            ended.set()
            sys.setswitchinterval(interval)
    assert found == {original}


def test_a_cache_that_was_frozen_out_of_garbage_collection_keeps_no_tensor_of_a_forecast():
    hidden = [functools.lru_cache(lambda size: torch.ones(size))]  # no attribute of a module or class
    forecast(lambda: torch.ones(1), device="cpu")
    gc.freeze()
    for _ in range(2):  # without a real one in it, and with one
        forecast(lambda: [hidden[0](3)], device="cpu")
        assert type(hidden[0](3)) is torch.Tensor


def test_the_collector_is_enabled_again_at_the_end_of_the_last_of_overlapping_scopes():
    first, second = no_collection(), no_collection()
    assert gc.isenabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_the_environment_that_is_set_during_a_forecast_stays_set(monkeypatch):
    monkeypatch.delenv("I2V_LAB_TEST", raising=False)
    with forecasting("cpu"):
        os.environ["I2V_LAB_TEST"] = "set"
    assert os.environ["I2V_LAB_TEST"] == "set"


# --- Threads of the code that is forecast -----------------------------------------------------------------------------


def _by_a_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work, name="worker_0")
    thread.start()
    thread.join()


def _by_a_pool(work: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="worker") as pool:
        pool.submit(work).result()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("start", [_by_a_thread, _by_a_pool])
@pytest.mark.parametrize("with_a_fake", [True, False])
def test_operators_in_a_thread_that_a_forecast_starts_are_refused_by_its_name(start, with_a_fake):
    def run(x: torch.Tensor) -> None:
        start(lambda: x + 1 if with_a_fake else torch.ones(4))

    with pytest.raises(ForecastError) as caught:
        forecast(run, torch.ones(4))
    assert caught.value.fields == {"cause": "another thread", "thread": "worker_0"}


def test_a_tensor_of_a_forecast_is_refused_in_a_thread_that_was_there_before():
    with ThreadPoolExecutor(1, thread_name_prefix="earlier") as pool:
        pool.submit(int).result()
        with pytest.raises(ForecastError) as caught:
            forecast(lambda x: pool.submit(lambda: x + 1).exception(), torch.ones(4))
    assert caught.value.fields == {"cause": "another thread", "thread": "earlier_0"}


def test_a_thread_that_does_no_work_of_torch_is_nothing_to_refuse():
    done, go_on = [], threading.Event()

    def outlives() -> None:
        go_on.wait(60)
        done.append(type(torch.ones(1)))

    def run() -> torch.Tensor:
        _by_a_thread(lambda: done.append("work"))
        threads.append(threading.Thread(target=outlives))
        threads[0].start()
        return torch.ones(4)

    threads: list[threading.Thread] = []
    assert forecast(run, device="cpu").peak.peak_bytes == 16
    go_on.set()
    threads[0].join()
    assert done == ["work", torch.Tensor]


# --- Patches of a thread ----------------------------------------------------------------------------------------------


def test_a_patch_is_seen_by_its_thread_alone_and_the_attribute_is_back_after_the_last():
    before = torch.cuda.device_count, vars(torch.Tensor).get("numpy")
    with ThreadPoolExecutor(1) as pool, patched_here(torch.cuda, "device_count", lambda: 5):
        inner = patched_here(torch.cuda, "device_count", lambda: unpatched(torch.cuda, "device_count")() + 7)
        with inner, patched_here(torch.Tensor, "numpy", lambda tensor: "mine"):
            count, shown = before[0](), torch.ones(1).numpy()
            assert (torch.cuda.device_count(), shown) == (count + 7, "mine")
            assert pool.submit(torch.cuda.device_count).result() == count
            assert pool.submit(lambda: torch.ones(1).numpy().tolist()).result() == [1.0]
        assert torch.cuda.device_count() == 5
    assert (torch.cuda.device_count, vars(torch.Tensor).get("numpy")) == before


class Base:
    @classmethod
    def load(cls, name: str = "it") -> str:
        return f"{cls.__name__} loads {name}"


class Derived(Base):
    @classmethod
    def load(cls, name: str = "it") -> str:
        return super().load(name) + "!"


def test_a_patched_class_method_has_the_class_and_reaches_the_original():
    original = vars(Base)["load"]
    with (
        ThreadPoolExecutor(1) as pool,
        patched_here(Base, "load", lambda cls, name="it": unpatched(Base, "load")(cls, name.upper())),
    ):
        assert (Base.load(), Base().load("a"), Derived.load("b")) == (
            "Base loads IT",
            "Base loads A",
            "Derived loads B!",
        )
        assert pool.submit(Derived.load, "b").result() == "Derived loads b!"
    assert vars(Base)["load"] is original


def test_a_patched_class_makes_instances_of_the_original_elsewhere():
    original = torch.Generator
    with patched_here(torch, "Generator", lambda device="cpu": "mine"), ThreadPoolExecutor(1) as pool:
        assert torch.Generator("cuda") == "mine"
        made = pool.submit(lambda: torch.Generator("cpu")).result()
        assert type(made) is original
        assert isinstance(made, torch.Generator)
        assert issubclass(original, torch.Generator)
        assert not isinstance(1, torch.Generator)
    assert torch.Generator is original


def test_a_patch_over_a_patch_that_another_made_is_kept(monkeypatch):
    module = sys.modules[__name__]
    with patched_here(module, "grid", lambda size: "first"):
        monkeypatch.setattr(module, "grid", lambda size: "laid over")
        assert grid(1) == "laid over"
        with patched_here(module, "grid", lambda size: "second"):
            assert grid(1) == "second"
    assert grid(1) == "laid over"


@pytest.mark.parametrize("over", [False, True])
def test_a_patch_over_a_patch_that_is_undone_afterwards_leaves_the_original(over, monkeypatch):
    module, original = types.ModuleType("module"), lambda: "original"
    module.name = original
    with patched_here(module, "name", lambda: "first"):
        monkeypatch.setattr(module, "name", lambda: "laid over")
        if over:
            with patched_here(module, "name", lambda: "second"):
                pass
    monkeypatch.undo()  # puts back what it found
    assert module.name() == "original"
    assert unpatched(module, "name") is original
    with patched_here(module, "name", lambda: "third"):
        assert (module.name(), unpatched(module, "name")) == ("third", original)
    assert module.name is original
