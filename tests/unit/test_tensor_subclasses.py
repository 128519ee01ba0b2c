"""Tensors that wrap others, as quantized weights do: the storages inside count, each once."""

from __future__ import annotations

import pytest
import torch

from i2v_lab.profiling.fake.forecast import forecast, forecasting
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import ModuleRecord

aten = torch.ops.aten
ROWS, COLUMNS = 256, 512
QUANTIZED = ROWS * COLUMNS + 4 * ROWS  # int8 and a float32 scale for each row
UNPACKED = 2 * ROWS * COLUMNS


class Int8Tensor(torch.Tensor):
    """As those of torchao: looks like bfloat16, holds int8 and scales."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Int8Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, device=data.device)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.int_data, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["int_data", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["int_data"], inner["scale"])

    def dequantize(self) -> torch.Tensor:
        return self.int_data.to(torch.bfloat16) * self.scale.to(torch.bfloat16)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].int_data, args[0].scale)
        if func in (aten._to_copy.default, aten.clone.default):
            moved = {key: value for key, value in kwargs.items() if key != "dtype"}
            return cls(func(args[0].int_data, **moved), func(args[0].scale, **moved))
        plain = [each.dequantize() if isinstance(each, Int8Tensor) else each for each in args]
        return func(*plain, **kwargs)


class Quantized(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        data = torch.zeros(ROWS, COLUMNS, dtype=torch.int8)
        self.weight = torch.nn.Parameter(Int8Tensor(data, torch.ones(ROWS, 1)), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(self.weight, x)


def run(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def test_live_storages_are_those_inside():
    with LiveStorageMeter() as meter:
        model = Quantized()
        assert meter.allocated_bytes() == QUANTIZED
        meter.observe([model.weight, model.weight.int_data], weights=True)
        assert meter.allocated_bytes() == QUANTIZED
        assert [record.is_weight for record in meter.storages] == [True, True]
        meter.reset_peak()
        out = run(model, torch.zeros(COLUMNS, 1, dtype=torch.bfloat16))
        after = meter.allocated_bytes()
        del out, model
        assert meter.allocated_bytes() == 0
    assert after == QUANTIZED + 2 * ROWS
    assert meter.peak_bytes() == QUANTIZED + 2 * COLUMNS + 2 * UNPACKED + 2 * ROWS


def test_a_profiler_counts_them_as_weights_of_their_module():
    with PhaseProfiler("cpu") as profiler:
        model = Quantized()
        profiler.component("model", model)
        with profiler.phase("call"):
            run(model, torch.zeros(COLUMNS, 1, dtype=torch.bfloat16))
    weights = [r.nbytes for r in profiler.records if isinstance(r, ModuleRecord) and r.category == "weight"]
    assert weights == [QUANTIZED]
    assert profiler.peak.start_bytes == QUANTIZED


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_forecast_of_a_real_module_is_the_real_run(device):
    model, x = Quantized(), torch.zeros(COLUMNS, 1, dtype=torch.bfloat16)
    with PhaseProfiler("cpu") as profiler:
        profiler.component("Quantized", model)
        profiler.observe([x])
        with profiler.phase("call"):
            run(model, x)
    found = forecast(run, model, x, device=device)
    assert (found.peak.start_bytes, found.peak.peak_bytes) == (profiler.peak.start_bytes, profiler.peak.peak_bytes)
    weights = [r.nbytes for r in found.records if isinstance(r, ModuleRecord) and r.category == "weight"]
    assert weights == [QUANTIZED]
    assert type(model.weight.int_data) is torch.Tensor


def test_one_that_is_made_and_moved_within_a_forecast_counts_once():
    with forecasting("cuda") as profiler, profiler.phase("make"):
        model = Quantized().to("cuda")
        assert profiler.allocated_bytes() == QUANTIZED
        run(model, torch.zeros(COLUMNS, 1, dtype=torch.bfloat16, device="cuda"))
        model.to("cpu")
        assert profiler.allocated_bytes() == 0


class PackedParameter(torch.nn.Parameter):
    """As diffusers' GGUFParameter and bitsandbytes' Params4bit: bytes of a plain tensor, and what they mean."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, bits: int = 0) -> PackedParameter:
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.bits = bits
        return made

    def as_tensor(self) -> torch.Tensor:
        return torch.Tensor._make_subclass(torch.Tensor, self, self.requires_grad)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return cls(result, bits=args[0].bits) if isinstance(result, torch.Tensor) else result


class Packed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = PackedParameter(torch.zeros(ROWS, COLUMNS, dtype=torch.uint8), bits=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight.bits == 8
        return torch.mm(self.weight.as_tensor().to(torch.bfloat16), x)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_packed_parameter_keeps_its_class_its_attributes_and_its_storage(device):
    with LiveStorageMeter() as meter:
        real = Packed()
        meter.reset_peak()
        run(real, torch.zeros(COLUMNS, 1, dtype=torch.bfloat16))
    with forecasting(device) as profiler, profiler.phase("call"):
        model = Packed().to(device)
        assert isinstance(model.weight, PackedParameter)
        assert isinstance(model._parameters["weight"], torch.nn.Parameter)
        assert (model.weight.bits, model.weight.device.type, model.weight.requires_grad) == (8, device, False)
        assert profiler.allocated_bytes() == ROWS * COLUMNS  # also after a view of it was made
        assert model.weight.as_tensor().shape == (ROWS, COLUMNS)
        assert not isinstance(model.weight.as_tensor(), PackedParameter)
        assert profiler.allocated_bytes() == ROWS * COLUMNS
        run(model, torch.zeros(COLUMNS, 1, dtype=torch.bfloat16, device=device))
    assert profiler.peak.peak_bytes == meter.peak_bytes()
