"""Training and other code under fake tensors: the bytes of a real run, or one error that says why not."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.forecast import forecast, forecasting
from i2v_lab.profiling.fake.workspaces import load_workspaces
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.torch_compat import TorchDispatchMode

F = torch.nn.functional
TOTAL_BYTES = 85_017_493_504  # of the card that a forecast stands for


def _mlp() -> torch.nn.Module:
    layers = torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.LayerNorm(32)
    return torch.nn.Sequential(*layers, torch.nn.Linear(32, 16))


def _two_layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))


class Checkpointed(torch.nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(_mlp() for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + 0).requires_grad_() if self.reentrant else x
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Recurrent(torch.nn.Module):
    def __init__(self, kind: type[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = kind(16, 16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x[None])[0]


class Attending(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[None])


class Convolving(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv1d(16, 8, 3), torch.nn.BatchNorm1d(8), torch.nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.T[None])


def _step(kind: type[torch.optim.Optimizer], **settings: Any) -> Callable[..., None]:
    def step(model: torch.nn.Module, x: torch.Tensor) -> None:
        optimizer = kind(model.parameters(), **settings)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    return step


def _accumulate(model: torch.nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        for _ in range(3):
            (model(x).square().mean() / 3).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _mixed_precision(model: torch.nn.Module, x: torch.Tensor) -> None:
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler(x.device.type)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


def _twice(model: torch.nn.Module, x: torch.Tensor) -> None:
    gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
    sum(gradient.square().sum() for gradient in gradients).backward()


def _hooked_and_offloaded(model: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    y.register_hook(lambda gradient: gradient * 2)
    y.sum().backward()


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x)
        return x * 2, unused + 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = ctx.saved_tensors[0].device
        for each in (gradient, zeros, gradient.new_zeros(2), torch.ones(2, device=gradient.device), gradient.double()):
            assert (each.device, each.is_cuda, each.is_meta) == (device, device.type == "cuda", False)
        assert gradient.to(device) is gradient.type_as(zeros) is gradient
        assert "meta" not in f"{gradient!r} {gradient.type()}"
        return gradient * 2, zeros


def _custom(model: torch.nn.Module, x: torch.Tensor) -> None:
    y, _ = Doubling.apply(model(x), torch.ones(8, device=x.device, requires_grad=True))
    y.register_hook(lambda gradient: gradient.to(x.device) * 2)
    y.sum().backward()
    assert all(parameter.grad.device == x.device for parameter in model.parameters())


def _hooked(model: torch.nn.Module, x: torch.Tensor) -> None:
    freed: list[int] = []

    def free(parameter: torch.Tensor) -> None:
        freed.append(parameter.grad.nbytes)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(free)
    x = x.clone().requires_grad_()
    y = model(x)
    y.retain_grad()
    (x + y).square().mean().backward()
    assert y.grad.device == x.grad.device == x.device
    assert sum(freed) == sum(parameter.nbytes for parameter in model.parameters())


def _in_place(model: torch.nn.Module, x: torch.Tensor) -> None:
    y = model(x).clone()
    y[:4].mul_(2)
    y[0] = 1
    rest = y.relu_().view(-1)[3:]
    rest.add_(1)
    y.mul_(2)
    with torch.no_grad():
        assert rest.grad_fn is not None  # autograd makes it again, after the write to its base
    (y.sum() + rest.sum()).backward()


def _of_several_roots(model: torch.nn.Module, x: torch.Tensor) -> None:
    y, z = model(x), model(x).chunk(2, dim=1)[0]
    with torch.no_grad():
        torch.autograd.backward([y, z], [torch.ones_like(y), torch.ones_like(z)])
        model(x)
    loss = model(x).sum()
    with torch.no_grad():
        loss.backward()


def _with_moved_weights(model: torch.nn.Module, x: torch.Tensor) -> None:
    y = model(x)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    y = y + model(x)
    accumulators, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        nodes += [following for following, _ in node.next_functions if following is not None]
        if hasattr(node, "variable"):
            accumulators.add(node)
    assert len(accumulators) == len(list(model.parameters()))
    y.sum().backward()


class Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def _scalars(model: torch.nn.Module, x: torch.Tensor) -> None:
    loss = model(x).sum()
    with Copies() as copies:
        (loss.exp() * loss).backward()
    assert copies.made == 0  # of gradients of no dimension, to the device in autograd's graph


def _with_casts(model: torch.nn.Module, x: torch.Tensor) -> None:
    y = model(x).to(torch.bfloat16).float().to(x.device, copy=True).to(x.device)
    torch.empty_like(y).copy_(y).sum().backward()


def _selectively_checkpointed(model: torch.nn.Module, x: torch.Tensor) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    checkpoint(model, x, use_reentrant=False, context_fn=contexts).sum().backward()


def _norms(model: torch.nn.Module, x: torch.Tensor) -> None:
    layers = [torch.nn.LayerNorm(16), torch.nn.GroupNorm(4, 16), torch.nn.LayerNorm(16).bfloat16()]
    sum(layer(x.bfloat16()).float().sum() for layer in layers).backward()


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
TRAINING: dict[str, tuple[Callable[[], torch.nn.Module], Callable[..., Any]]] = {
    "SGD": (_mlp, _step(SGD, lr=0.1)),
    "SGD with momentum": (_mlp, _step(SGD, lr=0.1, momentum=0.9)),
    "Adam": (_mlp, _step(ADAM)),
    "AdamW": (_mlp, _step(ADAMW)),
    "AdamW fused": (_mlp, _step(ADAMW, fused=True)),
    "AdamW foreach": (_mlp, _step(ADAMW, foreach=True)),
    "AdamW amsgrad": (_mlp, _step(ADAMW, amsgrad=True)),
    "checkpointed": (lambda: Checkpointed(False), _step(SGD, lr=0.1)),
    "checkpointed re-entrant": (lambda: Checkpointed(True), _step(SGD, lr=0.1)),
    "accumulation": (_mlp, _accumulate),
    "mixed precision": (_mlp, _mixed_precision),
    "mixed precision of linear layers": (_two_layers, _mixed_precision),
    "two backward passes": (_mlp, _twice),
    "hooks": (_mlp, _hooked),
    "offloaded": (_mlp, _hooked_and_offloaded),
    "custom function": (_mlp, _custom),
    "in place": (_mlp, _in_place),
    "several roots": (_mlp, _of_several_roots),
    "moved weights": (_mlp, _with_moved_weights),
    "scalars": (_mlp, _scalars),
    "casts": (_mlp, _with_casts),
    "checkpointed selectively": (_mlp, _selectively_checkpointed),
    "LSTM": (lambda: Recurrent(torch.nn.LSTM), _step(SGD, lr=0.1)),
    "LSTM backward": (lambda: Recurrent(torch.nn.LSTM), lambda model, x: model(x[:5]).sum().backward()),
    "LSTM forward": (lambda: Recurrent(torch.nn.LSTM), lambda model, x: model(x)),
    "norms of mixed dtypes": (_mlp, _norms),
    "GRU": (lambda: Recurrent(torch.nn.GRU), _step(SGD, lr=0.1)),
    "transformer": (Attending, _step(ADAMW)),
    "convolution": (Convolving, _step(ADAMW)),
}


COUNTER_BYTES = 4  # of the steps of a parameter, which Adam keeps on the host unless it is fused
HOST_BYTES: dict[str, int | None] = {
    "Adam": 6 * COUNTER_BYTES,
    "AdamW": 6 * COUNTER_BYTES,
    "AdamW foreach": 6 * COUNTER_BYTES,
    "AdamW amsgrad": 6 * COUNTER_BYTES,
    "accumulation": 6 * COUNTER_BYTES,
    "mixed precision of linear layers": 4 * COUNTER_BYTES,
    "convolution": 4 * COUNTER_BYTES,
    "transformer": None,  # another kernel of attention keeps more
    "mixed precision": None,  # autocast runs a layer norm in other dtypes on a card
    "norms of mixed dtypes": None,  # as the kernels themselves
    "offloaded": None,  # saved tensors are on the host
    "LSTM": None,  # its kernel is chosen on a real card
    "LSTM backward": None,
    "LSTM forward": None,
    "GRU": None,
}  # of what a run on the CPU holds and one on a card does not; None where their kernels keep different tensors
CASES = [("cpu", case) for case in TRAINING] + [
    ("cuda", case) for case in TRAINING if HOST_BYTES.get(case, 0) is not None
]


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")  # of selective checkpoints
@pytest.mark.parametrize(("device", "case"), CASES)
def test_training_is_forecast_to_the_byte(device, case):
    make, run = TRAINING[case]
    model, x = make(), torch.randn(8, 16)
    for module in model.modules() if device == "cuda" else ():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a card keeps its mask as bool
    found = forecast(run, model, x, device=device).peak
    assert all(parameter.grad is None for parameter in model.parameters())
    with PhaseProfiler("cpu") as profiler:
        profiler.component("model", model)
        profiler.observe([x])
        with profiler.phase("call"):
            result = run(model, x)
            del result
    real = profiler.peak
    host_bytes = HOST_BYTES.get(case, 0) if device == "cuda" else 0
    assert (found.start_bytes, found.peak_bytes + host_bytes) == (real.start_bytes, real.peak_bytes)
    assert found.saved_for_backward_bytes == real.saved_for_backward_bytes


@pytest.mark.parametrize(("device", "mask_bytes"), [("cpu", 512), ("cuda", 128)])
def test_dropout_keeps_the_mask_of_the_device(device, mask_bytes):
    def run(x: torch.Tensor) -> None:
        F.dropout(x.requires_grad_()).sum().backward()
        assert x.grad.device == x.device

    assert forecast(run, torch.ones(8, 16), device=device).peak.saved_for_backward_bytes == mask_bytes


def test_inference_of_an_lstm_is_forecast_to_the_byte():
    model, x = Recurrent(torch.nn.LSTM).eval(), torch.randn(8, 16)
    with torch.no_grad(), PhaseProfiler("cpu") as profiler:
        profiler.component("model", model)
        profiler.observe([x])
        with profiler.phase("call"):
            model(x)
    with torch.no_grad():
        assert forecast(model, x, device="cpu").peak.peak_bytes == profiler.peak.peak_bytes


# --- Other code -------------------------------------------------------------------------------------------------------


def _on_streams(x: torch.Tensor) -> torch.Tensor:
    side, start, end = torch.cuda.Stream(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    assert isinstance(side, torch.cuda.Stream)
    start.record()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.cuda.device(0):
        assert torch.cuda.current_stream() is side
        y = x + 1
        y.record_stream(side)
    end.record(side)
    end.synchronize()
    torch.cuda.current_stream().wait_event(end)
    with torch.Stream(device="cuda"):
        return y + torch.cuda.current_device()


def _page_locked(x: torch.Tensor) -> torch.Tensor:
    host = torch.empty(4, pin_memory=True), torch.zeros(4, pin_memory=True), torch.ones(4).pin_memory()
    assert host[2].is_pinned()
    return x.flatten()[:4] + sum(each.to("cuda", non_blocking=True) for each in host)


def _from_a_skeleton(x: torch.Tensor) -> torch.Tensor:
    with torch.device("meta"):
        model = torch.nn.Linear(16, 16)
    return model.to_empty(device=x.device)(x)


def _with_states_of_cards(x: torch.Tensor) -> torch.Tensor:
    torch.cuda.set_rng_state(torch.cuda.get_rng_state())
    torch.cuda.manual_seed_all(torch.cuda.initial_seed() % 7)
    with torch.random.fork_rng(devices=[0]):
        return F.dropout(x)


def _under_autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        result = torch.nn.Linear(16, 16, device="cuda")(x)
    assert result.dtype is torch.bfloat16
    return result


def _saving_a_tensor_of_the_host(x: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(16, 16, requires_grad=True)
    return x + (weight @ weight).sum().to("cuda")


@pytest.mark.parametrize(
    ("run", "peak_bytes"),
    [
        (_on_streams, 3 * 512),
        (_page_locked, 512 + 3 * 16),
        (_from_a_skeleton, 512 + 17 * 64 + 512),
        (_with_states_of_cards, 2 * 512 + 128),
        (_under_autocast, 512 + 17 * 64 + 256 + 17 * 32 + 256),
        (_saving_a_tensor_of_the_host, 2 * 512 + 4),
    ],
)
def test_what_code_for_a_card_does_is_forecast_without_one(run, peak_bytes):
    assert forecast(run, torch.ones(8, 16)).peak.peak_bytes == peak_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_module_on_the_meta_device_is_forecast_as_if_it_had_memory(device):
    with torch.device("meta"):
        skeleton = torch.nn.Linear(16, 16)
    expected = forecast(torch.nn.Linear(16, 16), torch.ones(8, 16), device=device).peak
    assert forecast(skeleton, torch.empty(8, 16, device="meta"), device=device).peak.peak_bytes == expected.peak_bytes
    assert skeleton.weight.is_meta
    with pytest.raises(ForecastError) as caught:
        forecast(lambda: skeleton.to_empty(device=device), device=device)
    assert caught.value.fields == {"cause": "real weights", "module": "Linear"}
    assert type(skeleton.weight.data) is torch.Tensor


def _sampling(x: torch.Tensor) -> torch.Tensor:
    return x[: int(x.argmax())]


def _timed(x: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return start.elapsed_time(end)


def _cudnn_rnn(x: torch.Tensor) -> None:
    """What an LSTM calls where there is a driver."""
    weights = [torch.ones(size, device="cuda") for size in [(32, 16), (32, 8), (32,), (32,)]]
    state = torch.zeros(1, 8, 8, device="cuda")
    x = x.cuda()[None]
    torch._VF._cudnn_rnn(x, weights, 4, None, state, state, 2, 8, 0, 1, False, 0.0, True, False, [], None)


def _functional(x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda each: each.square().sum())(x)


REFUSED: list[tuple[Callable[..., Any], str, str, str]] = [
    (lambda x: torch.compile(lambda y: y + 1, backend="eager")(x), "cpu", "compiled", "torch.compile"),
    (Recurrent(torch.nn.LSTM), "cuda", "needs a card", "torch.nn.modules.rnn.LSTM.forward"),
    (_sampling, "cuda", "data dependent", "aten._local_scalar_dense.default"),
    (_cudnn_rnn, "cuda", "no fake kernel", "aten._cudnn_rnn.default"),
    (_timed, "cuda", "needs a card", "torch.cuda.Event.elapsed_time"),
    (lambda x: torch.cuda.memory_summary(), "cuda", "needs a card", "torch.cuda.memory_summary"),
    (lambda x: torch.cuda.utilization(), "cuda", "needs a card", "torch.cuda.utilization"),
    (lambda x: torch.cuda.CUDAGraph(), "cuda", "needs a card", "torch.cuda.CUDAGraph"),
    (lambda x: torch.save(x, "never.pt"), "cpu", "data dependent", "torch.save"),
    (lambda x: x.to_sparse(), "cpu", "no fake kernel", "aten._to_sparse.default"),
    (_functional, "cpu", "no saved tensor hooks", "torch.autograd.graph.disable_saved_tensors_hooks"),
]


@pytest.mark.parametrize(("run", "device", "cause", "operator"), REFUSED)
def test_what_cannot_be_known_is_one_error_that_names_the_operator(run, device, cause, operator):
    with pytest.raises(ForecastError) as caught:
        forecast(run, torch.ones(8, 16), device=device)
    fields = caught.value.fields
    assert (fields["cause"], fields["operator"]) == (cause, operator)
    assert "\n" not in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).fields == fields


# Of hooks on all modules, which a profiler in another thread of the tests may have.
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning")
@pytest.mark.parametrize(("backend", "device"), [("eager", "cuda"), ("aot_eager", "cpu")])
def test_a_compiled_module_is_refused_and_the_one_it_was_made_from_is_not(backend, device):
    model, x = torch.nn.Linear(16, 16), torch.ones(8, 16)
    compiled = torch.compile(model, backend=backend)
    with pytest.raises(ForecastError) as caught:
        forecast(compiled, x, device=device)
    assert caught.value.fields == {"cause": "compiled", "operator": "torch.compile"}
    assert forecast(compiled._orig_mod, x, device=device).peak.peak_bytes == 17 * 64 + 2 * 512
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_an_error_of_the_code_itself_is_its_own():
    with pytest.raises(KeyError, match="missing"):
        forecast(lambda x: {}["missing"], torch.ones(1))
    with pytest.raises(RuntimeError, match="reduction dim"):
        forecast(lambda x: x @ torch.ones(3, 3, device="cuda"), torch.ones(8, 16))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_call_that_makes_nothing_on_the_device_is_no_forecast_of_zero_bytes(device):
    with pytest.raises(ForecastError) as caught:
        forecast(lambda: torch.ones(3, device="meta"), device=device)
    assert caught.value.fields == {"cause": "nothing allocated", "device": device}


# --- What torch.cuda tells the code -----------------------------------------------------------------------------------


def test_the_allocators_figures_are_those_of_the_forecast():
    cuda, seen = torch.cuda, []

    def read() -> None:
        seen.append(
            (
                cuda.memory_allocated(),
                cuda.max_memory_allocated(),
                cuda.memory_reserved(),
                cuda.max_memory_reserved(),
                cuda.mem_get_info(),
            )
        )

    def run(x: torch.Tensor) -> None:
        read()
        y = torch.empty(1000, device="cuda")
        read()
        stats = cuda.memory_stats()
        assert (stats["allocated_bytes.all.current"], stats["reserved_bytes.all.peak"]) == (4512, 4512)
        assert cuda.memory.memory_allocated(0) == torch.accelerator.memory_allocated() == 4512
        del y
        read()
        cuda.reset_peak_memory_stats()
        cuda.empty_cache()
        cuda.synchronize()
        read()

    forecast(run, torch.ones(8, 16))
    assert seen == [
        (512, 512, 512, 512, (TOTAL_BYTES - 512, TOTAL_BYTES)),
        (4512, 4512, 4512, 4512, (TOTAL_BYTES - 4512, TOTAL_BYTES)),
        (512, 4512, 4512, 4512, (TOTAL_BYTES - 4512, TOTAL_BYTES)),
        (512, 512, 512, 4512, (TOTAL_BYTES - 512, TOTAL_BYTES)),
    ]


def test_with_the_model_of_the_allocator_the_figures_are_its_blocks_and_segments():
    workspaces, seen = load_workspaces(), []

    def run() -> None:
        kept = torch.empty(10, device="cuda")
        large = torch.empty(2**26, device="cuda")
        del large
        seen.append([torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()])
        torch.cuda.empty_cache()
        seen.append([kept.element_size() * 128, torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]])

    forecast(run, workspaces=workspaces)
    free_bytes = TOTAL_BYTES - workspaces.context_bytes - 2**21
    assert seen == [[512, 2**21 + 2**28, 512 + 2**28], [512, 2**21, free_bytes]]


def test_a_peak_that_the_code_reads_is_not_that_of_a_phase():
    with forecasting("cuda") as profiler:
        with profiler.phase("large"):
            torch.empty(1000, device="cuda")
        with profiler.phase("small"):
            torch.empty(10, device="cuda")
            read = torch.cuda.max_memory_allocated()
    assert ([phase.peak_bytes for phase in profiler.phases], read) == ([4000, 40], 4000)


def test_the_card_is_the_one_that_the_models_were_measured_on():
    def run() -> None:
        properties = torch.cuda.get_device_properties("cuda")
        seen.extend([properties.total_memory, (properties.major, properties.minor), torch.cuda.get_device_name()])
        seen.extend([torch.cuda.get_device_capability(), torch.cuda.is_bf16_supported(), torch.cuda.device_count()])
        seen.append(torch.accelerator.current_accelerator())
        torch.empty(1, device="cuda")

    seen: list[Any] = []
    forecast(run)
    expected = [TOTAL_BYTES, (9, 0), "NVIDIA H100 80GB HBM3", (9, 0), True, 1, torch.device("cuda")]
    assert seen == expected


def test_a_result_without_a_hash_is_that_of_the_memoized_call_too():
    class Counting(torch.nn.Module):
        def forward(self, x: torch.Tensor, skipped: set[int]) -> tuple[torch.Tensor, set[int]]:
            runs.append(skipped)
            return x + 1, {len(x)}

    runs: list[set[int]] = []
    model, arguments = Counting(), [{1}, {2}]
    with forecasting("cpu", memoize={Counting: lambda *_: ()}) as profiler, torch.no_grad(), profiler.phase("call"):
        results = [model(torch.ones(3), copy.copy(arguments[index]))[1] for index in (0, 1)]
    assert (runs, results) == ([{1}, {2}], [{3}, {3}])
