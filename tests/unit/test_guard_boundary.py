"""What crosses between a guarded producer and its consumer: no graph, whoever recorded it, and no mode."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.utils import BaseOutput
from torch.utils.checkpoint import checkpoint

from i2v_lab import guard_stream, watch
from i2v_lab.errors import GradEscape
from i2v_lab.profiling.containers import map_leaves
from i2v_lab.profiling.escape import GradEscapeWarning, has_graph
from i2v_lab.thread_modes import Autocast

X = torch.arange(8.0).reshape(2, 4)


def _layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 4)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x @ weight * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, ctx.saved_tensors[0].t() @ grad * 2


def _scripted(layer: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch deprecate it
        return torch.jit.script(layer)


def _other_thread(layer: torch.nn.Module) -> torch.Tensor:
    with ThreadPoolExecutor(1) as pool:  # whose grad mode is its own
        return pool.submit(layer, X).result()


class Inner(torch.nn.Module):
    """Has no parameter of its own; a graph begins in what it calls."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.held = way, [_layer()]  # which is no submodule, and so not hooked itself

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return GRAPHS[self.way](self.held[0])


GRAPHS = {
    "function": lambda layer: Twice.apply(X, layer.weight),
    "script": lambda layer: _scripted(layer)(X),
    "thread": _other_thread,
    "checkpoint": lambda layer: checkpoint(layer, X.clone().requires_grad_(), use_reentrant=True),
    "enabled": lambda layer: torch.enable_grad()(layer)(X),
}


def _expected(way: str) -> torch.Tensor:
    with torch.no_grad():
        return GRAPHS[way](_layer()).detach()


@pytest.mark.parametrize("way", GRAPHS)
def test_a_graph_is_seen_at_the_boundary_whoever_recorded_it(way):
    def produce():
        yield GRAPHS[way](_layer())

    (item,) = guard_stream(produce())
    assert item.grad_fn is None
    assert not item.requires_grad
    assert torch.equal(item, _expected(way))
    stream = guard_stream(produce(), "warn")
    with pytest.warns(GradEscapeWarning) as caught:
        (item,) = stream
    assert [warning.filename for warning in caught] == [__file__]
    assert item.grad_fn is not None
    assert stream.escaped
    with pytest.raises(GradEscape) as escape:
        next(guard_stream(produce(), "raise"))
    assert escape.value.fields.keys() == {"function", "module"}
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("way", GRAPHS)
def test_watch_sees_a_graph_that_a_module_returns_whoever_recorded_it(way):
    model = torch.nn.Sequential(Inner(way), torch.nn.Identity())
    with watch(model) as handle:
        item = model(X)
    assert item.grad_fn is None
    assert torch.equal(item, _expected(way))
    assert handle.escaped == ["Sequential.0"]
    with watch(model, "warn") as handle, pytest.warns(GradEscapeWarning, match=r"Sequential\.0 returned") as caught:
        assert model(X).grad_fn is not None
    assert (len(caught), handle.escaped) == (1, ["Sequential.0"])
    with watch(model, "raise"), pytest.raises(GradEscape) as escape:
        model(X)
    assert escape.value.fields == {"module": "Sequential.0"}
    assert torch.is_grad_enabled()


def test_watch_guards_torchscript_whose_submodules_take_no_hook():
    script = _scripted(torch.nn.Sequential(_layer(), torch.nn.ReLU()))
    model = torch.nn.Sequential(script)
    for watched, name in ((script, "RecursiveScriptModule"), (model, "Sequential.0")):
        with watch(watched) as handle:
            assert watched(X).grad_fn is None
            _layer()(X)  # another's module
        assert handle.escaped == [name]
        with watch(watched, "raise"), pytest.raises(GradEscape) as escape:
            watched(X)
        assert escape.value.fields == {"module": name}
        assert watched(X).grad_fn is not None
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks


def test_watch_leaves_alone_what_a_caller_records_itself():
    model = torch.nn.Sequential(_layer().requires_grad_(False), torch.nn.ReLU())
    x = X.clone().requires_grad_() * 2
    with watch(model, "raise") as handle:
        assert model(x).grad_fn is not None
    assert handle.escaped == []


class Pair(NamedTuple):
    video: Any
    audio: Any


@dataclass(frozen=True, slots=True)
class Output:
    frames: Any
    rate: int = field(default=24, init=False)


@dataclass
class ModelOutput(BaseOutput):
    """A dictionary and a dataclass."""

    frames: Any


WRAPS = {
    "tuple": lambda t: (1, t),
    "list": lambda t: [t],
    "dict": lambda t: {"a": (t,)},
    "set": lambda t: {t},
    "named tuple": lambda t: Pair(t, 1),
    "dataclass": Output,
    "model output": ModelOutput,
    "deep": lambda t: [Output(Pair({"x": [t]}, None))],
    "sizes": lambda t: torch.max(t, dim=0),
}


def _tensors(value: Any) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    map_leaves(lambda leaf: tensors.append(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)
    return tensors


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_graph_is_found_in_whatever_holds_it(wrap):
    graph = Twice.apply(X, _layer().weight)
    made = WRAPS[wrap](graph)
    (item,) = guard_stream([made])
    assert type(item) is type(made)
    assert not any(has_graph(tensor) for tensor in _tensors(item))
    assert torch.equal(_tensors(item)[0], _tensors(made)[0])
    assert not has_graph(getattr(item, "frames", None))
    assert has_graph(_tensors(made)[0])  # what the producer holds is its own
    with pytest.raises(GradEscape):
        list(guard_stream([made], "raise"))
    plain = WRAPS[wrap](graph.detach())
    assert next(guard_stream([plain])) is plain


def test_a_container_that_holds_itself_is_no_endless_loop():
    value: list[Any] = [Twice.apply(X, _layer().weight)]
    value.append(value)
    assert not has_graph(next(guard_stream([value]))[0])


def test_nested_streams_are_guarded_in_their_producers_modes():
    layer = _layer()

    def inner():
        for _ in range(2):
            yield layer(X)

    def outer():
        with torch.autocast("cpu", torch.bfloat16):
            yield {"video": inner(), "rate": 24}

    (item,) = guard_stream(outer())
    chunks = list(item["video"])
    assert [(chunk.requires_grad, chunk.dtype) for chunk in chunks] == [(False, torch.bfloat16)] * 2
    with pytest.raises(GradEscape):
        list(next(guard_stream(outer(), "raise"))["video"])

    class Lazy(torch.nn.Module):
        def forward(self):
            return inner()

    with watch(Lazy()) as handle, watch(Lazy(), "raise"):
        assert handle.escaped == []
    module = Lazy()
    with watch(module):
        assert not any(chunk.requires_grad for chunk in module())
    with Path(__file__).open(encoding="utf-8") as file:
        assert next(guard_stream([file])) is file


def test_send_throw_and_the_returned_value_cross_the_boundary_too():
    layer, received = _layer(), []

    def produce():
        try:
            received.append((yield layer(X)))
            yield layer(X)
        except KeyError as error:
            yield layer(X), error.args
        return Twice.apply(X, layer.weight)

    stream = guard_stream(produce())
    items = [next(stream), stream.send(layer(X)), *stream.throw(KeyError("again"))[:1]]
    assert not any(item.requires_grad for item in [*items, *received])
    with pytest.raises(StopIteration) as stop:
        next(stream)
    assert torch.equal(stop.value.value, _expected("function"))
    assert not has_graph(stop.value.value)
    stream = guard_stream(produce(), "raise")
    with torch.no_grad():
        next(stream)
    with pytest.raises(GradEscape):
        stream.send(layer(X))

    def delegates():
        return (yield from guard_stream(produce()))

    assert not any(has_graph(item) for item in delegates())


@pytest.mark.parametrize("on_escape", ["fix", "warn", "raise"])
@pytest.mark.parametrize(
    "scope",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["no_grad", "inference_mode", "autocast", "device"],
)
def test_the_consumers_own_loss_is_recorded_as_ever_between_two_items(on_escape, scope):
    layer = _layer()
    layer(X).square().mean().backward()
    expected = layer.weight.grad

    def produce():
        with scope():
            for _ in range(3):
                yield torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.empty(1).device.type

    items = []
    for item in guard_stream(produce(), on_escape):
        items.append(item)
        mine = _layer()
        loss = mine(torch.arange(8.0).reshape(2, 4)).square().mean()
        assert (loss.dtype, loss.is_inference()) == (torch.float32, False)
        loss.backward()
        assert torch.equal(mine.weight.grad, expected)
    assert items == items[:1] * 3  # and the producer's modes are as ever for it


def test_what_was_made_in_inference_mode_can_be_used_in_the_consumers_graph():
    with torch.inference_mode():
        stream = guard_stream(X * 2 for _ in range(2))
    layer = _layer()
    for item in stream:
        layer(item).sum().backward()
    assert torch.equal(layer.weight.grad, (2 * 2 * X.sum(0)).expand(4, 4))


@pytest.mark.parametrize("threaded", [False, True])
def test_a_stream_is_produced_in_the_autocast_and_on_the_device_it_was_guarded_in(threaded):
    layer = _layer()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        stream = guard_stream((layer(X), torch.empty(1)) for _ in range(2))
    items = asyncio.run(_consumed_in_threads(stream)) if threaded else list(stream)
    assert [(item.dtype, made.device.type) for item, made in items] == [(torch.bfloat16, "meta")] * 2
    plain = guard_stream(layer(X) for _ in range(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert next(plain).dtype == torch.float32  # in no other
        assert Autocast.current().nesting == 1


async def _consumed_in_threads(stream: Any) -> list[Any]:
    items = []
    while (item := await asyncio.to_thread(next, stream, None)) is not None:
        items.append(item)
    return items


def test_a_stream_that_is_dropped_leaves_its_scopes_in_its_own_modes():
    def produce():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            yield 1

    stream = guard_stream(produce())
    next(stream)
    with torch.no_grad():
        before = torch.is_inference_mode_enabled(), Autocast.current(), torch.get_default_device()
        del stream
        gc.collect()
        assert not torch.is_grad_enabled()
        assert (torch.is_inference_mode_enabled(), Autocast.current(), torch.get_default_device()) == before


# --- asyncio ----------------------------------------------------------------------------------------------------------


async def _decode(layer: torch.nn.Module, items: int = 2):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(items):
            await asyncio.sleep(0)
            yield layer(X)
            await asyncio.sleep(0)


def test_an_asynchronous_generator_keeps_its_modes_and_other_tasks_keep_theirs():
    layer, modes = _layer(), set()

    async def other() -> None:
        for _ in range(20):
            modes.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            await asyncio.sleep(0)

    async def consume() -> list[torch.Tensor]:
        items = []
        async for item in guard_stream(_decode(layer)):
            modes.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            items.append(item)
        return items

    async def both() -> Any:
        return await asyncio.gather(consume(), other(), consume())

    first, _, second = asyncio.run(both())
    assert modes == {(True, False)}
    assert [(item.dtype, item.requires_grad) for item in (*first, *second)] == [(torch.bfloat16, False)] * 4


def test_a_graph_of_asyncio_to_thread_is_seen_at_the_boundary():
    layer = _layer()

    async def produce():
        received = yield await asyncio.to_thread(layer, X)
        try:
            yield received
        except KeyError:
            yield await asyncio.to_thread(layer, X)

    async def fixed() -> list[torch.Tensor]:
        async with guard_stream(produce()) as stream:
            return [await anext(stream), await stream.asend(layer(X)), await stream.athrow(KeyError())]

    assert [item.requires_grad for item in asyncio.run(fixed())] == [False] * 3

    async def first(on_escape: Any) -> torch.Tensor:
        async with guard_stream(produce(), on_escape) as stream:
            return await anext(stream)

    with pytest.warns(GradEscapeWarning) as caught:
        assert asyncio.run(first("warn")).requires_grad
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(GradEscape) as escape:
        asyncio.run(first("raise"))
    assert escape.value.fields == {"function": "AddmmBackward0", "module": ""}


# --- threads ----------------------------------------------------------------------------------------------------------


class Meets(torch.nn.Module):
    """Keeps two threads' calls open at once, which return in the order in which they came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.both_inside, self.first_left = threading.Barrier(2, timeout=20), threading.Event()

    def forward(self, is_first: bool) -> tuple[bool, torch.Tensor]:
        self.both_inside.wait()
        if not is_first:
            assert self.first_left.wait(20)
        return torch.is_grad_enabled(), self.weight * 2


def test_watch_keeps_the_modes_of_each_thread_apart():
    module = Meets()
    entered = threading.Event()
    module.register_forward_pre_hook(lambda *_: entered.set())

    def call(is_first: bool) -> tuple[bool, bool, bool]:
        if not is_first:
            entered.wait(20)
        with torch.set_grad_enabled(is_first):
            enabled, result = module(is_first)
            after = torch.is_grad_enabled()
        if is_first:
            module.first_left.set()
        return enabled, result.requires_grad, after

    with watch(module) as handle, ThreadPoolExecutor(2) as pool:
        first, second = pool.map(call, (True, False))
    assert first == (False, False, True)
    assert second == (False, False, False)
    assert handle.escaped == ["Meets"]


def test_two_watches_of_one_module_undo_only_what_they_did():
    module = _layer()
    with watch(module, "raise"), watch(module), torch.no_grad():
        module(X)
        with torch.enable_grad(), pytest.raises(GradEscape):
            module(X)
        assert not torch.is_grad_enabled()
