"""The table of devices, and the one place that opens NVML."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from i2v_lab.errors import ProfilerError
from i2v_lab.profiling.meters import devices, nvml
from i2v_lab.profiling.meters.devices import DEVICES, device_support, make_meter
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter


class _CudaMeter(SimpleNamespace):
    """Stands for CudaMeter, which needs a card."""

    def __init__(self, device: torch.device, cap_bytes: int | None) -> None:
        super().__init__(device=device, cap_bytes=cap_bytes)


@pytest.fixture
def cuda_meter(monkeypatch):
    rows = {
        name: dataclasses.replace(row, make_meter=_CudaMeter) if row.caching_allocator else row
        for name, row in DEVICES.items()
    }
    monkeypatch.setattr(devices, "DEVICES", rows)


@pytest.mark.parametrize(
    ("name", "allocator", "reserved", "process", "cap", "snapshot"),
    [
        ("cuda", True, True, True, True, True),
        ("rocm", True, True, False, True, True),
        ("cpu", False, False, False, True, False),
        ("mps", False, False, False, True, False),
        ("fake", False, True, False, False, False),
    ],
)
def test_each_row_says_what_can_be_known(name, allocator, reserved, process, cap, snapshot):
    row = DEVICES[name]
    assert row.name == name
    assert (row.caching_allocator, row.reserved_bytes, row.process_bytes) == (allocator, reserved, process)
    assert (row.cap, row.snapshot) == (cap, snapshot)
    assert row.limits.endswith(".")


def test_rocm_is_what_torch_calls_cuda_with_hip(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert device_support(torch.device("cuda:1")).name == "cuda"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device_support(torch.device("cuda:1")).name == "rocm"


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_auto_reads_the_caching_allocator_where_there_is_one(monkeypatch, cuda_meter, hip):
    monkeypatch.setattr(torch.version, "hip", hip)
    for kind in ("auto", "cuda"):
        meter = make_meter(torch.device("cuda:1"), kind, 1000)
        assert isinstance(meter, _CudaMeter)
        assert (meter.device, meter.cap_bytes) == (torch.device("cuda:1"), 1000)
    assert isinstance(make_meter(torch.device("cuda:1"), "live"), LiveStorageMeter)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_live_storages_are_counted_and_nothing_is_said_to_be_reserved(device):
    meter = make_meter(torch.device(device))
    assert isinstance(meter, LiveStorageMeter)
    assert meter.reserved_peak_bytes() is None
    with pytest.raises(ProfilerError) as caught:
        make_meter(torch.device(device), "cuda")
    assert caught.value.fields == {"meter": "cuda", "device": device}


def test_a_device_without_a_row_is_refused_but_its_storages_can_be_counted():
    with pytest.raises(ProfilerError) as caught:
        make_meter(torch.device("xpu"))
    assert caught.value.fields == {"device": "xpu"}
    assert isinstance(make_meter(torch.device("xpu"), "live"), LiveStorageMeter)


def test_a_new_device_is_a_row(monkeypatch):
    row = dataclasses.replace(DEVICES["cpu"], name="xpu", make_meter=_CudaMeter)
    monkeypatch.setattr(devices, "DEVICES", {**DEVICES, "xpu": row})
    assert make_meter(torch.device("xpu:3")).device == torch.device("xpu:3")


# --- NVML ---


class _Nvml(SimpleNamespace):
    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, failing: str = "") -> None:
        super().__init__(open=0)
        self._failing = failing

    def nvmlInit(self):
        if self._failing == "init":
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetCudaDriverVersion_v2(self):
        if self._failing == "query":
            raise self.NVMLError("Unknown Error")
        return 12040

    def nvmlSystemGetDriverVersion(self):
        return b"550.54"

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return range(1)[index]

    def nvmlDeviceGetMemoryInfo(self, _):
        return SimpleNamespace(free=70, total=80)

    def nvmlDeviceGetName(self, _):
        return "a card"


def test_the_driver_and_its_cards(monkeypatch):
    fake = _Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert nvml.read_driver() == nvml.Driver("550.54", (12, 4), (nvml.Card("a card", 70, 80),))
    assert nvml.driver_cuda_major() == 12
    assert nvml.describe_device("cuda:0") == ("a card", "550.54")
    assert nvml.describe_device("cpu") == (None, None)
    assert fake.open == 0


@pytest.mark.parametrize(
    ("module", "cause", "reason"),
    [
        (None, nvml.NO_PACKAGE, ""),
        (_Nvml("init"), nvml.NO_DRIVER, "Driver Not Loaded"),
        (_Nvml("query"), nvml.NO_ANSWER, "Unknown Error"),
    ],
    ids=["package", "driver", "answer"],
)
def test_what_is_missing_is_a_field(monkeypatch, module, cause, reason):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with pytest.raises(nvml.NvmlUnavailable) as caught:
        nvml.read_driver()
    assert caught.value.fields == {"cause": cause, "reason": reason}
    assert (caught.value.cause, caught.value.reason) == (cause, reason)
    assert nvml.driver_cuda_major() is None
    assert module is None or module.open == 0


def test_sessions_nest_and_close_after_any_error(monkeypatch):
    fake = _Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with pytest.raises(ZeroDivisionError), nvml.nvml_session(), nvml.nvml_session():
        assert fake.open == 2
        raise ZeroDivisionError
    assert fake.open == 0


def test_nvml_is_read_without_torch():
    code = "import sys, i2v_lab.profiling.meters.nvml; sys.exit(bool({'torch', 'pynvml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
