"""Any torch code under fake tensors: the same bytes as for real, no device touched, and no guess."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.attention import fused_attention
from i2v_lab.profiling.fake.forecast import forecast, forecasting
from i2v_lab.profiling.fake.workspaces import Workspaces, load_workspaces
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import HolderRecord, ModuleRecord, OperatorRecord
from i2v_lab.torch_compat import FakeTensor, FakeTensorMode

F = torch.nn.functional
WIDTH = 8


class Inplace(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1).mul_(2)


class Joined(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.flip(0)])[: len(x)]


class Attention(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(1, -1, 2, WIDTH // 2).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape)


class Convolved(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x.T[None])[0].T


class Branching(torch.nn.Module):
    """Doubles its memory where a count, which is known, is even."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = torch.arange(len(x)).sum()
        return torch.cat([x, x])[: len(x)] if count.item() % 2 == 0 else x.clone()


LAYERS = {
    "linear": lambda: torch.nn.Linear(WIDTH, WIDTH),
    "norm": lambda: torch.nn.LayerNorm(WIDTH),
    "gelu": torch.nn.GELU,
    "inplace": Inplace,
    "joined": Joined,
    "attention": Attention,
    "convolved": Convolved,
    "branching": Branching,
}


@settings(max_examples=int(os.environ.get("I2V_LAB_EXAMPLES", "15")), deadline=None)
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6), st.integers(1, 40), st.booleans())
def test_on_the_cpu_any_chain_of_layers_is_forecast_to_the_byte(names: list[str], rows: int, grad: bool):
    model = torch.nn.Sequential(*(LAYERS[name]() for name in names))
    source = torch.ones(rows, WIDTH)
    with torch.set_grad_enabled(grad), PhaseProfiler("cpu") as profiler:
        profiler.component("Sequential", model)
        with profiler.phase("call"):
            result = model(source)
            del result
    with torch.set_grad_enabled(grad):
        found = forecast(model, source, device="cpu").peak
    real = profiler.peak
    weights = sum(p.nbytes for p in model.parameters())
    alive_before = real.start_bytes + source.nbytes  # a forecast's arguments are there when it begins
    assert found.start_bytes == alive_before == weights + source.nbytes
    assert (found.peak_bytes, found.saved_for_backward_bytes) == (real.peak_bytes, real.saved_for_backward_bytes)


def test_on_a_fake_card_no_cuda_is_touched_with_or_without_one(monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", never)
    model, source = torch.nn.Linear(WIDTH, WIDTH), torch.ones(4, WIDTH)
    peaks = set()
    for there_is_one in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)  # noqa: B023 - used within the round
        peaks.add(forecast(model, source).peak.peak_bytes)
        assert torch.cuda.is_available() is there_is_one
    assert peaks == {4 * (WIDTH * WIDTH + WIDTH + 2 * 4 * WIDTH)}


def test_the_original_model_and_tensors_are_left_alone():
    model, source = torch.nn.Linear(WIDTH, WIDTH), torch.ones(4, WIDTH)
    before = model.weight.detach().clone()
    forecast(model, source)
    assert type(model.weight) is torch.nn.Parameter
    assert torch.equal(model.weight, before)
    assert model(source).shape == (4, WIDTH)


def test_real_weights_are_not_turned_into_fakes_by_moving_their_module():
    model = torch.nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ForecastError) as caught:
        forecast(lambda: model.to("cuda"))
    assert caught.value.fields == {"cause": "real weights", "module": "Linear"}
    assert model.weight.device.type == "cpu"


def test_what_is_on_the_cpu_does_not_count_on_the_card():
    with forecasting("cuda") as profiler, profiler.phase("mixed"):
        here, there = torch.ones(1000), torch.ones(10, device="cuda")
        there += here[:10].to("cuda")
    assert profiler.peak.peak_bytes == 80


@pytest.mark.parametrize("layer", [torch.nn.Conv3d(2, 2, 3), torch.nn.Linear(4, 4)], ids=["Conv3d", "Linear"])
def test_weights_that_stayed_behind_on_the_cpu_fail_as_they_would_on_a_card(layer):
    x = torch.zeros(1, 2, 4, 4, 4)
    with pytest.raises((RuntimeError, ForecastError), match="cuda:0.* cpu|cpu.* cuda:0"):
        forecast(lambda: layer(x.cuda()))


def test_attention_on_a_card_does_not_materialise_its_scores():
    def attend(mask: torch.Tensor | None = None) -> torch.Tensor:
        q = torch.empty(1, 2, 4096, 64, dtype=torch.bfloat16, device="cuda")
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    tensor = 2 * 4096 * 64 * 2
    scores = 2 * 4096 * 4096 * 2
    assert 2 * tensor <= forecast(attend).peak.peak_bytes < 3 * tensor
    mask = torch.ones(1, 1, 1, 4096, dtype=torch.bool)
    assert forecast(attend, mask).peak.peak_bytes < 3 * tensor < scores


@pytest.mark.parametrize(("heads", "width", "keys"), [(4, 64, 24), (4, 60, 24), (2, 64, 21)])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_has_the_shape_of_torchs_own(heads, width, keys, masked):
    def shapes() -> tuple[torch.Size, torch.Size]:
        q = torch.empty(2, 4, 16, width, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.empty(2, heads, keys, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        mask = torch.ones(16, keys, dtype=torch.bool, device="cuda") if masked else None
        found.append(fused_attention(q, k, v, mask, enable_gqa=heads != 4).shape)

    found: list[torch.Size] = []
    forecast(shapes)
    assert found == [torch.Size((2, 4, 16, width))]


# --- What follows from data -------------------------------------------------------------------------------------------


class Choosing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_branch_on_unknown_data_stops_with_operator_and_module():
    with pytest.raises(ForecastError) as caught:
        forecast(torch.nn.Sequential(Choosing()), torch.ones(4096, 4), assume="nothing")
    place = f"test_forecast.py:{Choosing.forward.__code__.co_firstlineno + 1}"
    assert caught.value.fields == {
        "cause": "data dependent",
        "operator": "torch.Tensor.__bool__",
        "module": "Sequential.0",
        "place": place,
    }
    assert place in str(caught.value)


def test_a_size_that_follows_from_unknown_data_stops_with_operator_and_module():
    class Selecting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0]

    with pytest.raises(ForecastError) as caught:
        forecast(Selecting(), torch.ones(4096, 4))
    assert (caught.value.fields["cause"], caught.value.fields["module"]) == ("data dependent", "Selecting")
    assert caught.value.fields["operator"].startswith(("aten.index", "aten.nonzero"))


def test_what_follows_from_known_data_is_followed():
    def select() -> None:
        mask = torch.tensor([True, False, True, True], device="cuda")
        picked = torch.empty(4, 1000, device="cuda")[mask]
        counted.append((len(picked), len(torch.nonzero(mask)), mask.sum().item()))

    counted: list[tuple[int, int, int]] = []
    forecast(select)
    assert counted == [(3, 3, 3)]


def test_values_overwritten_with_unknown_ones_are_unknown():
    def overwrite() -> float:
        values = torch.zeros(4)
        first = values[:1]
        values.copy_(torch.rand(4))
        return first.item()

    with pytest.raises(ForecastError) as caught:
        forecast(overwrite, device="cpu")
    assert caught.value.fields["cause"] == "data dependent"


def test_what_was_overwritten_with_something_known_is_known():
    def overwrite() -> None:
        values = torch.zeros(4)
        first = values[:1]
        values.add_(torch.arange(3, 7))
        seen.append(first.item())

    seen: list[float] = []
    forecast(overwrite, device="cpu")
    assert seen == [3.0]


def test_an_operator_without_a_fake_kernel_stops_with_its_name():
    @torch.library.custom_op("i2v_lab_test::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    class Opaque(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return opaque(x)

    with pytest.raises(ForecastError) as caught:
        forecast(Opaque(), torch.ones(4))
    assert caught.value.fields == {
        "cause": "no fake kernel",
        "operator": "i2v_lab_test.opaque.default",
        "module": "Opaque",
    }


def test_attention_by_a_name_of_its_own_is_refused(monkeypatch):
    own_name = F.scaled_dot_product_attention

    def attend() -> torch.Tensor:
        q = torch.empty(1, 2, 64, 64, dtype=torch.bfloat16, device="cuda")
        return own_name(q, q, q)

    with pytest.raises(ForecastError) as caught:
        forecast(attend)
    assert caught.value.fields["cause"] == "math attention"


# --- Real tensors that are no arguments -------------------------------------------------------------------------------


def _by_itself(x):
    x.add_(1)


def _by_a_view(x):
    x.view(2, 2)[0].mul_(2)


def _by_out(x):
    torch.add(torch.ones(4), 1, out=x)


def _by_a_list(x):
    torch._foreach_add_([torch.ones(4), x], 1)


def _with_what_is_unknown(x):
    x.copy_(torch.rand(4))


@pytest.mark.parametrize("write", [_by_itself, _by_a_view, _by_out, _by_a_list, _with_what_is_unknown])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_real_tensor_that_is_no_argument_cannot_be_written_to(write, device):
    held, part = torch.ones(4), torch.ones(5000)[1:5]
    for real in (held, part):
        with pytest.raises(ForecastError) as caught:
            forecast(lambda tensor=real: write(tensor), device=device)
        assert (caught.value.fields["cause"], caught.value.fields["module"]) == ("writes to a real tensor", "")
        assert torch.equal(real, torch.ones(4))


def test_a_view_of_a_large_real_tensor_cannot_be_written_to_where_a_small_one_could_tell():
    large = torch.zeros(10_000)
    small = large[:4]

    def write() -> float:
        large[:2].fill_(1)
        return small[0].item()

    with pytest.raises(ForecastError) as caught:
        forecast(write, device="cpu")
    assert caught.value.fields["cause"] == "writes to a real tensor"
    assert large.sum() == 0


def test_a_clone_of_a_real_tensor_can_be_written_to_and_the_real_one_read():
    held, seen = torch.arange(4), []

    def write() -> None:
        mine = held.clone()
        mine.add_(10)
        torch.zeros(4, dtype=torch.int64).add_(held)
        seen.append((mine.tolist(), held.tolist(), held.numpy().tolist(), mine.numpy().tolist(), held.sum().item()))

    forecast(write, device="cpu")
    mine, own = [10, 11, 12, 13], [0, 1, 2, 3]
    assert seen == [(mine, own, own, mine, 6)]
    assert held.numpy().tolist() == own


def test_each_of_many_short_lived_real_tensors_has_a_result_of_its_own_size():
    raw, sizes = bytes(range(64)), []

    def read() -> None:
        counts = range(1, 65)  # no two of the tensors are alive at a time, so that their addresses recur
        sizes.extend(len(torch.frombuffer(bytearray(raw), dtype=torch.uint8, count=count) + 1) for count in counts)

    forecast(read, device="cpu")
    assert sizes == list(range(1, 65))


def test_an_argument_can_be_written_to_where_the_original_is_also_reached_by_another_way():
    held, seen = torch.zeros(4), []

    def write(given: torch.Tensor) -> None:
        seen.append(held.view(2, 2)[0, 0].item())
        given.add_(1)
        seen.append(held[0].item())

    forecast(write, held, device="cpu")
    assert seen == [0, 0]
    assert torch.equal(held, torch.zeros(4))


def test_running_statistics_of_a_real_module_are_left_alone():
    norm, source = torch.nn.BatchNorm1d(3, track_running_stats=True), torch.rand(2, 3)
    norm.num_batches_tracked = None
    for run in (lambda: norm(source), lambda: norm(source + torch.rand(2, 3))):
        with pytest.raises(ForecastError) as caught:
            forecast(run, device="cpu")
        assert caught.value.fields["cause"] == "writes to a real tensor"
        assert "batch_norm" in caught.value.fields["operator"]
    assert torch.equal(norm.running_mean, torch.zeros(3))
    forecast(norm, source)
    norm.eval()
    assert forecast(lambda: norm(source), device="cpu").peak.peak_bytes > 0


def test_running_statistics_are_forgotten_once_training_has_overwritten_them():
    def train() -> float:
        norm = torch.nn.BatchNorm1d(3)
        norm(torch.rand(2, 3))
        return norm.running_mean[0].item()

    with pytest.raises(ForecastError) as caught:
        forecast(train, device="cpu")
    assert caught.value.fields["cause"] == "data dependent"


def test_a_backward_through_a_real_module_leaves_its_gradients_as_they_were():
    model, source = torch.nn.Linear(3, 3), torch.ones(2, 3)
    model.bias.grad = kept = torch.ones(3)

    def backward() -> None:
        (model.weight.grad,) = torch.autograd.grad(model(source).sum(), [model.weight])
        model.bias.grad = None
        (source @ model.weight).sum().backward()

    forecast(backward, device="cpu")
    assert model.weight.grad is None
    assert model.bias.grad is kept


def _train(model: torch.nn.Module, source: torch.Tensor) -> None:
    model(source).sum().backward()
    torch.optim.Adam(model.parameters()).step()


def test_a_training_step_counts_gradients_and_the_optimizers_state():
    model, source = torch.nn.Linear(64, 64), torch.ones(2, 64)
    weights = 4 * (64 * 64 + 64)
    states = 4 * weights + 2 * 4  # with gradients, two moments, and two counters of steps
    temporaries = 2 * 4 * 64 * 64  # of the larger parameter's update
    assert forecast(_train, model, source, device="cpu").peak.peak_bytes == states + temporaries + source.nbytes


def test_an_optimizer_step_runs_on_a_fake_card():
    def step(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.Adam(model.parameters()).step()

    assert forecast(step, torch.nn.Linear(64, 64)).peak.peak_bytes > 4 * 4 * (64 * 64 + 64)


def test_a_backward_on_a_fake_card_is_refused_without_a_driver_and_where_frames_are_not_listed(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    monkeypatch.setattr("i2v_lab.profiling.fake.autograd_devices._C_LIBRARY", None)  # as on Windows
    with pytest.raises(ForecastError) as caught:
        forecast(_train, torch.nn.Linear(2, 2), torch.ones(1, 2))
    assert caught.value.fields == {"cause": "backward without a driver", "device": "cuda"}


def test_what_numpy_is_asked_to_show_and_is_not_known_stops_with_the_module():
    class Showing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> float:
            return float(x.numpy().sum())

    with pytest.raises(ForecastError) as caught:
        forecast(Showing(), torch.ones(4), device="cpu", assume="nothing")
    fields = caught.value.fields
    found = (fields["cause"], fields["operator"], fields["module"])
    assert found == ("data dependent", "torch.Tensor.numpy", "Showing")


# --- What the fake run cannot see -------------------------------------------------------------------------------------

MODEL = Workspaces(input_factor=1, output_factor=1, weight_factor=1, cublas_bytes=2**25, context_bytes=7)


def test_a_convolutions_workspace_is_as_large_as_what_it_reads_and_writes():
    def convolve() -> torch.Tensor:
        source = torch.empty(1, 64, 128, 128, dtype=torch.bfloat16, device="cuda")
        return F.conv2d(source, torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, device="cuda"), padding=1)

    tensor, weight = 64 * 128 * 128 * 2, 64 * 64 * 9 * 2
    with forecasting("cuda", workspaces=MODEL) as profiler, profiler.phase("call"):
        convolve()
    assert profiler.peak.peak_bytes == 2 * (2 * tensor + weight)
    holders = [record for record in profiler.records if isinstance(record, HolderRecord)]
    workspaces = [(record.nbytes, record.category) for record in holders if record.module == "cuDNN workspace"]
    assert workspaces == [(2 * tensor + weight, "other")]


def test_the_first_product_allocates_the_persistent_workspace_of_cublas():
    with forecasting("cuda", workspaces=MODEL) as profiler:
        with profiler.phase("product"):
            product = torch.empty(512, 512, device="cuda") @ torch.empty(512, 512, device="cuda")
            del product
        with profiler.phase("after"):
            torch.empty(1, device="cuda")
    product, after = profiler.phases
    assert product.peak_bytes == 3 * 2**20 + 2**25
    assert after.start_bytes == 2**25
    modules = [record for record in profiler.records if isinstance(record, ModuleRecord)]
    assert {record.module for record in modules if record.phase == "after"} == {"cuBLAS workspace", ""}


def test_without_a_model_of_workspaces_bytes_are_those_of_tensors_and_nothing_is_said_to_be_reserved():
    found = forecast(lambda: torch.empty(3, device="cuda"))
    assert (found.peak.peak_bytes, found.peak.peak_reserved_bytes, found.context_bytes) == (12, None, 0)
    modelled = forecast(lambda: torch.empty(3, device="cuda"), workspaces=load_workspaces())
    assert (modelled.peak.peak_bytes, modelled.peak.peak_reserved_bytes) == (512, 2**21)
    assert modelled.context_bytes > 2**29


def test_empty_cache_returns_what_is_reserved():
    with forecasting("cuda", workspaces=MODEL) as profiler:
        with profiler.phase("large"):
            torch.empty(2**28, device="cuda")
            torch.cuda.empty_cache()
        with profiler.phase("small"):
            torch.empty(1, device="cuda")
    assert [phase.peak_reserved_bytes for phase in profiler.phases] == [2**30, 2**21]


# --- Memoized calls ---------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    runs = 0

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(width, 4 * width)
        self.outer = torch.nn.Linear(4 * width, width)
        self.cache: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, *, keep: bool = False) -> dict[str, torch.Tensor]:
        Block.runs += 1
        if keep:
            self.cache.append(x + 1)
        return {"out": self.outer(self.inner(x).relu()), "same": x}


def _peaks(memoize: bool, *, keep: bool = False, grad: bool = False, widths: tuple[int, ...] = (WIDTH,) * 6):
    Block.runs = 0
    memory_keys = {Block: lambda block, x, keep=False: keep}
    with forecasting("cpu", memoize=memory_keys if memoize else None) as profiler, torch.set_grad_enabled(grad):
        for step in range(2):
            with profiler.phase(f"step {step}"):
                x = torch.ones(10, WIDTH)
                for width in widths:
                    block = Block(width)
                    result = block(F.pad(x, (0, width - WIDTH)), keep=keep)
                    x = result["out"][:, :WIDTH]
                    del result
    return [(phase.peak_bytes, phase.end_bytes) for phase in profiler.phases], Block.runs


def test_equal_blocks_are_run_once_in_a_phase_and_the_bytes_are_the_same():
    executed, runs = _peaks(memoize=False)
    assert runs == 12
    memoized, runs = _peaks(memoize=True)
    assert memoized == executed
    assert 2 <= runs <= 4  # once in each phase, and again where more was alive than the first time


@pytest.mark.parametrize("case", [{"keep": True}, {"grad": True}, {"widths": (8, 16, 24)}])
def test_blocks_that_keep_something_or_a_graph_or_differ_are_all_run(case):
    executed, runs = _peaks(memoize=False, **case)
    memoized, runs_with = _peaks(memoize=True, **case)
    assert memoized == executed
    assert runs_with == runs


@dataclass
class Output(OrderedDict):
    """As diffusers and transformers have them: a dataclass and a dict."""

    sample: torch.Tensor
    extra: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self["sample"] = self.sample


class Sampling(torch.nn.Module):
    runs = 0

    def forward(self, x: torch.Tensor) -> Output:
        Sampling.runs += 1
        return Output(sample=x + 1)


def test_calls_that_are_not_repeated_return_what_the_first_did():
    Sampling.runs = 0
    memoize = {Sampling: lambda *_: None}
    with forecasting("cpu", memoize=memoize) as profiler, torch.no_grad(), profiler.phase("outputs"):
        x = torch.ones(10, WIDTH)
        for _ in range(3):
            made = Sampling()(x)
            assert type(made) is Output
            assert made.extra is None
            assert made["sample"] is made.sample
            assert made.sample.shape == (10, WIDTH)
            del made
    assert Sampling.runs == 1
    assert profiler.peak.peak_bytes == 2 * x.nbytes


def test_what_a_memoized_call_returns_has_the_operator_of_the_first():
    Sampling.runs = 0
    with forecasting("cpu", memoize={Sampling: lambda *_: None}) as profiler, torch.no_grad(), profiler.phase("twice"):
        x = torch.ones(10, WIDTH)
        Sampling()(x)
        kept = [Sampling()(x), torch.ones(1000)]  # noqa: F841
    assert Sampling.runs == 1
    found = {r.operator: r.nbytes for r in profiler.records if isinstance(r, OperatorRecord)}
    assert found == {"aten.add.Tensor": 40 * WIDTH, "aten.ones": 40 * WIDTH + 4000}


class Viewing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x[1:], (x + 1)[1:]  # a view of what is given, and one of a larger storage


def test_calls_that_return_views_are_all_run():
    found = []
    for memoize in (None, {Viewing: lambda *_: None}):
        with forecasting("cpu", memoize=memoize) as profiler, torch.no_grad(), profiler.phase("views"):
            x = torch.ones(10, WIDTH)
            Viewing()(x)
            kept = Viewing()(x)
        assert len(kept) == 2
        found.append((profiler.peak.peak_bytes, profiler.peak.end_bytes))
    assert found == [(2 * 10 * WIDTH * 4, 2 * 10 * WIDTH * 4)] * 2


class Masked(torch.nn.Module):
    runs = 0

    def forward(self, x: torch.Tensor, mask: Mask) -> torch.Tensor:
        Masked.runs += 1
        return x * mask.values


class Mask:
    """No tensor, but it has one."""

    def __init__(self) -> None:
        self.values = torch.ones(10, WIDTH)


def test_memoized_calls_keep_nothing_alive_that_they_were_given():
    with forecasting("cpu", memoize={Masked: lambda *_: None}) as profiler, torch.no_grad(), profiler.phase("masks"):
        x = torch.ones(10, WIDTH)
        for _ in range(3):
            mask = Mask()
            for _ in range(2):  # the second has the same mask as the first
                Masked()(x, mask)
            del mask
    assert profiler.peak.peak_bytes == 3 * x.nbytes
    assert profiler.peak.end_bytes == x.nbytes
    assert Masked.runs == 3


def test_the_live_meter_is_untouched_by_forecasts():
    with LiveStorageMeter() as meter:
        kept = torch.ones(100)
        forecast(lambda: torch.ones(10_000, device="cuda"))
        assert meter.peak_bytes() == kept.nbytes


def test_a_dtype_that_is_left_out_is_the_default_of_the_moment():
    def make() -> None:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            made.append({torch.linspace(0, 1, 4, device="cuda").dtype})

    made: list[set[torch.dtype]] = []
    try:
        forecast(make)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made == [{torch.float32}, {torch.float64}]


@pytest.mark.parametrize("maxsize", [5, None])
def test_what_a_cache_keeps_of_a_forecast_is_not_met_by_real_code_nor_the_reverse(maxsize):
    @functools.lru_cache(maxsize=maxsize)
    def grid(size: int) -> tuple[torch.Tensor, int]:
        return torch.arange(size), size

    @functools.lru_cache
    def number(size: int) -> int:
        calls.append(size)
        return size

    calls: list[int] = []
    assert (grid(3)[0].tolist(), number(3)) == ([0, 1, 2], 3)
    seen = []
    forecast(lambda: seen.append((type(grid(3)[0]), type(grid(4)[0]), number(3))), device="cpu")
    assert seen == [(FakeTensor, FakeTensor, 3)]
    assert [type(grid(size)[0]) for size in (3, 4)] == [torch.Tensor] * 2
    assert (grid(4)[0].tolist(), number(3), calls) == ([0, 1, 2, 3], 3, [3])


class Detecting:
    """Remembers whether there is a card, as the libraries around diffusers do."""

    @staticmethod
    @functools.lru_cache
    def card() -> bool:
        return torch.cuda.is_available()

    def ask(self) -> bool:
        return self.card() and Detecting.card()


def test_what_a_cache_says_of_the_card_is_that_of_the_forecast_within_it_alone(monkeypatch):
    for there_is_one in (False, True):
        Detecting.card.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)  # noqa: B023 - used within the round
        assert Detecting.card() is there_is_one
        with forecasting("cuda"):
            assert Detecting().ask()
        assert Detecting().ask() is there_is_one
    Detecting.card.cache_clear()


def test_parts_of_a_tensor_that_are_filled_one_by_one_are_not_inferred_one_by_one(monkeypatch):
    inferred = []
    dispatch = FakeTensorMode.dispatch
    monkeypatch.setattr(FakeTensorMode, "dispatch", lambda *args: inferred.append(args[1]) or dispatch(*args))
    with forecasting("cuda") as profiler, profiler.phase("mask"):
        mask = torch.full((300, 300), -1.0, device="cuda")  # as the causal mask of HunyuanVideo 1.5's autoencoder
        few = torch.zeros(3, 2, device="cuda")
        inferred.clear()
        for row in range(300):
            mask[row, : row + 1] = 0
        assert len(inferred) < 10
        few[1, :] = 2
        few[2].zero_()
        assert few.tolist() == [[0, 0], [2, 2], [0, 0]]
    assert profiler.phases[0].end_bytes == 300 * 300 * 4 + 3 * 2 * 4
    with forecasting("cuda"), pytest.raises(RuntimeError):  # by itself: torch logs the error, with its arguments
        torch.zeros(3, 2, device="cuda").fill_(torch.ones(2, device="cuda"))


def test_a_forecast_of_a_call_says_where_library_workspaces_are_not_counted():
    model, data = torch.nn.Linear(64, 64), torch.empty(8, 64)
    (note,) = forecast(model, data).notes
    assert (note.phase, note.topic) == ("call", "workspaces")
    assert "load_workspaces()" in note.text
    assert forecast(model, data, workspaces=load_workspaces()).notes == []
    assert forecast(model, data, device="cpu").notes == []
