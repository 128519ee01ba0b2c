"""How the profilers are used and misused, and what they say of the published defect."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, SimpleNamespace

import pynvml
import pytest
import torch

from i2v_lab.errors import ProfilerError
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.meters.nvml import NvmlSampler, read_device
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import DeviceRecord, GraphRecord, ModuleRecord, OutOfMemoryRecord
from i2v_lab.request import DecodeScope, I2VRequest


def _refused(use: Callable[[], object]) -> dict[str, object]:
    with pytest.raises(ProfilerError) as caught:
        use()
    return caught.value.fields


def test_misuse_is_refused_with_what_to_do():
    assert _refused(lambda: PhaseProfiler(meter="rss")) == {"meter": "rss"}
    assert _refused(lambda: PhaseProfiler("cpu", meter="cuda")) == {"meter": "cuda", "device": "cpu"}
    assert _refused(lambda: PhaseProfiler(vram_cap_bytes=0)) == {"cap_bytes": 0}
    assert _refused(lambda: PhaseProfiler(snapshot="history.pickle")) == {"device": "cpu"}
    profiler = PhaseProfiler()
    assert _refused(lambda: profiler.phase("a").__enter__()) == {"state": "inactive"}
    with profiler:
        assert _refused(lambda: profiler.peak) == {"state": "no phase"}
        assert _refused(lambda: PhaseProfiler().__enter__()) == {"state": "another active"}
    assert _refused(profiler.__enter__) == {"state": "closed"}
    with PhaseProfiler(ambient=True) as outer, outer.phase("outer"):
        with PhaseProfiler() as inner, inner.phase("inner"):
            kept = torch.ones(100)
        assert inner.peak.peak_bytes == kept.nbytes
    assert outer.peak.peak_bytes == 400


def test_the_excess_of_the_defect_is_attributed_to_the_decoders_graph(tiny, still):
    """At least 95 % of what ``escaped`` takes more is named as the decoder's graph, module by module."""
    decode = {}
    for scope in (DecodeScope.NO_GRAD, DecodeScope.ESCAPED):
        request = I2VRequest(image=str(still), width=128, height=64, frames=17, fps=120, decode_scope=scope)
        with PhaseProfiler() as profiler:
            for _ in TwoStagePipeline(tiny, sinks=[profiler])(request).video:
                pass
        assert [record.phase for record in profiler.phases][-1] == "decode_video"
        decode[scope] = profiler
    free, kept = decode[DecodeScope.NO_GRAD], decode[DecodeScope.ESCAPED]
    excess = kept.phases[-1].peak_bytes - free.phases[-1].peak_bytes
    assert [record.saved_for_backward_bytes for record in free.phases] == [0] * 7
    assert not [record for record in free.records if isinstance(record, GraphRecord)]
    at_peak = [r for r in kept.records if isinstance(r, ModuleRecord) and r.phase == "decode_video"]
    saved = sum(r.nbytes for r in at_peak if r.category == "saved")
    assert saved >= 0.95 * excess
    graph = {r.module: r.nbytes for r in kept.records if isinstance(r, GraphRecord)}
    assert sum(graph.values()) == kept.phases[-1].saved_for_backward_bytes
    assert all(module.startswith("video_decoder") for module in graph)
    named = sum(nbytes for module, nbytes in graph.items() if module.startswith("video_decoder."))
    assert named >= 0.6 * excess  # the rest is the decoder's own blending of tiles, outside any of its parts


# --- NVML ---


def test_without_a_driver_everything_is_none_and_a_sentence_says_why():
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    record = read_device()
    assert {record.total_bytes, record.used_bytes, record.own_bytes, record.others_bytes, record.budget_bytes} == {None}
    assert record.others is None
    assert record.reason.startswith("There is no NVIDIA driver to query here (")


class _FakeNvml(SimpleNamespace):
    """NVML's own interface over a card that does not exist: 100 bytes, 60 used."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, compute: list, graphics: list, cards: int = 1) -> None:
        super().__init__(open=0)
        self._compute, self._graphics, self._cards = compute, graphics, cards

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= self._cards:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetMemoryInfo(self, _):
        return SimpleNamespace(total=100, used=60)

    def nvmlDeviceGetComputeRunningProcesses(self, _):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._compute]

    def nvmlDeviceGetGraphicsRunningProcesses(self, _):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._graphics]

    def nvmlSystemGetProcessName(self, pid):
        if pid == 8:
            raise self.NVMLError("Not Found")
        return f"server-{pid}".encode()


OWN = os.getpid()


@pytest.mark.parametrize(
    ("compute", "graphics", "own", "others", "budget", "names"),
    [
        ([(OWN, 20), (7, 30)], [(7, 30), (8, 10)], 20, 40, 60, ((7, "server-7", 30), (8, "unknown", 10))),
        ([(7, 30)], [], 0, 60, 40, ((7, "server-7", 30),)),
        ([(OWN, 20)], [], 20, 40, 60, ()),  # 40 of the driver, or of processes that NVML does not list
        ([(OWN, None)], [(OWN, 20)], 20, 40, 60, ()),
        ([(OWN, 61)], [], None, None, None, ()),  # more than is used: of another process, or of another card
        ([(OWN, 20), (7, None)], [], 20, 40, 60, ((7, "server-7", None),)),
        ([(OWN, None), (7, None)], [], None, None, None, ((7, "server-7", None),)),
    ],
)
def test_own_others_and_budget(monkeypatch, compute, graphics, own, others, budget, names):
    fake = _FakeNvml(compute, graphics)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    record = read_device(0, 1.5)
    assert (record.time_s, record.total_bytes, record.used_bytes) == (1.5, 100, 60)
    assert (record.own_bytes, record.others_bytes, record.budget_bytes) == (own, others, budget)
    assert record.others == names
    assert record.reason == ""
    assert fake.open == 0


def test_a_process_with_a_context_that_nvml_does_not_list_is_of_another_namespace(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", _FakeNvml([(7, 30)], []))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    record = read_device()
    assert (record.total_bytes, record.used_bytes) == (100, 60)
    assert {record.own_bytes, record.others_bytes, record.budget_bytes} == {None}
    assert record.others == ((7, "server-7", 30),)


@pytest.mark.parametrize("code", ["NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND", "NOT_FOUND", "UNKNOWN"])
@pytest.mark.parametrize("query", ["nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"])
def test_where_nvml_lists_no_processes_the_card_is_still_read(monkeypatch, code, query):
    error = pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{code}"))
    fake = _FakeNvml([(OWN, 20)], [])
    fake.NVMLError = pynvml.NVMLError
    monkeypatch.setattr(fake, query, lambda _: (_ for _ in ()).throw(error))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    record = read_device()
    assert (record.total_bytes, record.used_bytes) == (100, 60)
    assert {record.own_bytes, record.others_bytes, record.budget_bytes, record.others} == {None}
    assert str(error) in record.reason


@pytest.mark.parametrize(("enabled", "others"), [(1, None), (0, 40)])
def test_the_processes_of_a_card_are_not_those_of_a_mig_slice(monkeypatch, enabled, others):
    fake = _FakeNvml([(OWN, 20)], [])
    fake.nvmlDeviceGetMigMode = lambda _: (enabled, 0)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert read_device().others_bytes == others
    assert bool(read_device().reason) == bool(enabled)


def test_a_card_that_is_not_there_is_named(monkeypatch):
    fake = _FakeNvml([], [])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert read_device(3).reason == "NVML does not answer for card 3 (Invalid Argument)."
    assert fake.open == 0


def test_samples_keep_to_their_grid(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", _FakeNvml([], []))
    enough = threading.Event()

    def count(_: DeviceRecord) -> None:
        if len(sampler.samples) >= 5:
            enough.set()

    sampler = NvmlSampler(interval_s=0.02, on_sample=count)
    with sampler:
        assert enough.wait(60)
    times = [sample.time_s for sample in sampler.samples]
    assert times == sorted(times)
    slots = [int(t / 0.02 + 1e-6) for t in times]
    assert len(set(slots)) == len(slots)  # never two in one interval, however late one was
    assert _refused(lambda: NvmlSampler(interval_s=0)) == {"interval_s": 0}


class _Greedy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of ..."
        )


def test_the_allocators_refusal_is_charged_to_the_module_that_asked():
    """Whoever calls it: a component, one of its parts, or a module that nobody has announced."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(_Greedy()))
    calls = {"net.1.0": lambda: net(torch.ones(2)), "_Greedy": lambda: _Greedy()(torch.ones(2))}
    for path, call in calls.items():
        with PhaseProfiler() as profiler, pytest.raises(torch.OutOfMemoryError), profiler.phase("a"):
            profiler.component("net", net)
            call()
        (record,) = [record for record in profiler.records if isinstance(record, OutOfMemoryRecord)]
        assert (record.module, record.asked_bytes) == (path, 3 * 2**29)


def test_attribution_hooks_into_no_call_of_a_module():
    from torch.nn.modules import module

    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with PhaseProfiler() as profiler:
        profiler.component("net", net)
        hooks = (module._global_forward_hooks, module._global_forward_pre_hooks, net._forward_hooks)
        assert not any(hooks)
        assert not any(net._forward_pre_hooks for net in net.modules())


def test_an_interrupt_at_any_moment_leaves_the_clock_of_the_meter_right():
    """Ctrl-C in a notebook: raised before each bytecode in turn of what advances the clock and what cuts it off."""
    methods = {LiveStorageMeter._advance.__code__, LiveStorageMeter.drop_freed.__code__}

    def interrupted(meter: LiveStorageMeter, after: int) -> bool:
        left = after

        def trace(frame: FrameType, event: str, _: object) -> object:
            nonlocal left
            if frame.f_code not in methods:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            meter.add_transient_workspace(16, "workspace")
            meter.drop_freed()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    for after in itertools.count():
        meter = LiveStorageMeter()
        meter.add_transient_workspace(8, "workspace")
        if not interrupted(meter, after):
            break
        first = meter.tick
        times_s = [time.perf_counter()]
        for _ in range(3):
            meter.add_transient_workspace(32, "workspace")
            times_s.append(meter.time_s(meter.tick))
        times_s.append(time.perf_counter())
        assert meter.tick >= first + 6
        assert times_s == sorted(times_s)
        with pytest.raises(IndexError):
            meter.time_s(meter.tick + 1)
    assert after > 30
