"""Live, peak, saved for backward and holders, exact to the byte, against a count made on paper.

The independent count knows nothing of weak references or hooks: it is a little model of tensors, buffers and graph
nodes, in which a buffer is alive when it can be reached from a name or through the graph of a name.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from i2v_lab.errors import VramCapExceeded
from i2v_lab.profiling.autograd_graph import AutogradGraphProbe
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.module_paths import ModulePaths
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import (
    GraphRecord,
    HolderRecord,
    ModuleRecord,
    OperatorRecord,
    OutOfMemoryRecord,
    TimelineRecord,
)

WIDTH = 6  # every tensor is (rows, WIDTH) float32; every layer keeps the width


@dataclass(eq=False)
class Buffer:
    nbytes: int


@dataclass(eq=False)
class Node:
    saved: list[Buffer]
    parents: list[Node]


@dataclass(eq=False)
class Paper:
    """A tensor on paper: its buffer, and the node that made it if a graph was recorded."""

    buffer: Buffer
    node: Node | None = None


@dataclass
class Model:
    """The program's state on paper, next to the real tensors."""

    real: list[torch.Tensor] = field(default_factory=list)
    paper: list[Paper] = field(default_factory=list)

    def nodes(self) -> set[Node]:
        reached: set[Node] = set()
        todo = [tensor.node for tensor in self.paper if tensor.node]
        while todo:
            node = todo.pop()
            if node not in reached:
                reached.add(node)
                todo += node.parents
        return reached

    def saved(self) -> set[Buffer]:
        return {buffer for node in self.nodes() for buffer in node.saved}

    def alive(self) -> set[Buffer]:
        return {tensor.buffer for tensor in self.paper} | self.saved()


def _total(buffers: set[Buffer]) -> int:
    return sum(buffer.nbytes for buffer in buffers)


def _apply(model: Model, layers: dict[str, torch.nn.Module], op: str, index: int, other: int, rows: int) -> None:
    """One operation, for real and on paper."""
    if op == "new":
        model.real.append(torch.ones(rows, WIDTH))
        model.paper.append(Paper(Buffer(rows * WIDTH * 4)))
        return
    if not model.real:
        return
    index, other = index % len(model.real), other % len(model.real)
    x, p = model.real[index], model.paper[index]
    grad = torch.is_grad_enabled()
    if op == "drop":
        del model.real[index], model.paper[index], x
        return
    if op == "alias":
        model.real.append(x)
        model.paper.append(p)
        return
    if op == "view":
        if p.node and not grad:
            return  # such a view says that it requires grad, and refers to its base: see the test below
        model.real.append(x.view(-1).view(x.shape))
        model.paper.append(Paper(p.buffer, Node([], [p.node]) if p.node else None))
        return
    if op == "in_place":
        if not p.node:
            x.add_(1)
        return
    result, node = Buffer(p.buffer.nbytes), None
    if op == "linear":  # addmm keeps its input, and the weight, which is a parameter
        y = layers["linear"](x)
        if grad:
            node = Node([p.buffer], [p.node] if p.node else [])
    elif op == "conv":
        y = layers["conv"](x[None])[0]
        if grad:
            node = Node([p.buffer], [p.node] if p.node else [])
    elif op in ("relu", "exp"):  # keep their result
        y = getattr(torch, op)(x)
        if grad and p.node:
            node = Node([result], [p.node])
    elif op == "sin":  # keeps its input
        y = torch.sin(x)
        if grad and p.node:
            node = Node([p.buffer], [p.node])
    else:  # mul keeps each factor that the other one's gradient needs
        q = model.paper[other]
        if model.real[other].shape != x.shape:
            return
        y = x * model.real[other]
        if grad and (p.node or q.node):
            saved = ([q.buffer] if p.node else []) + ([p.buffer] if q.node else [])
            node = Node(saved, [n for n in (p.node, q.node) if n])
    model.real.append(y)
    model.paper.append(Paper(result, node))


OPS = ("new", "drop", "alias", "view", "in_place", "linear", "conv", "relu", "exp", "sin", "mul")
STEP = st.tuples(st.sampled_from(OPS), st.integers(0, 9), st.integers(0, 9), st.integers(1, 5), st.booleans())


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=30))
def test_random_programs_are_exact_to_the_byte(steps):
    layers = {"linear": torch.nn.Linear(WIDTH, WIDTH), "conv": _RowConv()}
    model, paths = Model(), ModulePaths()
    for name, layer in layers.items():
        paths.register(name, layer)
    weights = [t for layer in layers.values() for t in layer.parameters()]
    weight_bytes = sum(t.nbytes for t in weights)
    meter = LiveStorageMeter(paths=paths)
    peak, saved_peak, at_peak = 0, 0, []
    with meter, AutogradGraphProbe(paths, meter) as probe:
        meter.observe(weights, weights=True)
        for op, index, other, rows, grad in [("new", 0, 0, 3, False), *steps]:
            with torch.set_grad_enabled(grad):
                _apply(model, layers, op, index, other, rows)
            alive, saved = model.alive(), model.saved()
            assert meter.allocated_bytes() == weight_bytes + _total(alive)
            assert probe.saved_bytes == _total(saved) == sum(probe.by_module().values())
            saved_peak = max(saved_peak, _total(saved))
            if _total(alive) > peak:
                peak, at_peak = _total(alive), sorted(buffer.nbytes for buffer in alive)
        assert meter.peak_bytes() == weight_bytes + peak
        holders = list(meter.live_at(meter.peak_tick))
        assert sorted(storage.nbytes for storage in holders if not storage.is_weight) == at_peak
        probe.peak_by_module()
        assert probe.peak_bytes == saved_peak
        model.real.clear()
        model.paper.clear()
        assert meter.allocated_bytes() == weight_bytes
        assert probe.saved_bytes == 0


class _RowConv(torch.nn.Module):
    """A convolution along the rows of ``(1, rows, WIDTH)``, a sum of shifted linears: one dispatched operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x[None], self.weight)[0]


def test_a_chain_on_paper():
    """Linear 8 -> 16, ReLU, linear 16 -> 4 in float32 over 10 rows, with and without a graph."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    weights = 4 * (8 * 16 + 16 + 16 * 4 + 4)
    x, hidden, out = 4 * 10 * 8, 4 * 10 * 16, 4 * 10 * 4
    with PhaseProfiler("cpu") as profiler:
        profiler.component("net", net)
        data = torch.ones(10, 8)
        with profiler.phase("no_grad"), torch.no_grad():
            y = net(data)
        del y
        with profiler.phase("grad"):
            y = net(data)
        with profiler.phase("after"):
            del y
    free, kept, after = profiler.phases
    assert (free.start_bytes, free.end_bytes) == (weights + x, weights + x + out)
    assert free.peak_bytes == weights + x + 2 * hidden  # both sides of the ReLU
    assert free.saved_for_backward_bytes == 0
    assert kept.peak_bytes == weights + x + 2 * hidden
    assert kept.end_bytes == weights + x + hidden + out
    assert kept.saved_for_backward_bytes == x + hidden  # the linears' inputs; the ReLU's result is one of them
    assert after.end_bytes == weights + x
    assert after.peak_so_far_bytes == weights + x + 2 * hidden
    graph = {r.module: r.nbytes for r in profiler.records if isinstance(r, GraphRecord) and r.phase == "grad"}
    assert graph == {"net.0": x, "net.1": hidden}


def test_every_breakdown_adds_up_to_the_peak():
    net = torch.nn.Sequential(torch.nn.Conv1d(3, 5, 3), torch.nn.Sigmoid(), torch.nn.Conv1d(5, 2, 3))
    with PhaseProfiler("cpu") as profiler, profiler.phase("forward"):
        profiler.component("net", net)
        kept = net(torch.ones(1, 3, 50))  # noqa: F841
    peak = profiler.peak.peak_bytes
    by_module = [r for r in profiler.records if isinstance(r, ModuleRecord)]
    assert sum(r.nbytes for r in by_module) == peak
    assert sum(r.nbytes for r in profiler.records if isinstance(r, HolderRecord)) == peak
    moments = [r for r in profiler.records if isinstance(r, TimelineRecord)]
    totals = [r.weight_bytes + r.saved_bytes + r.activation_bytes + r.other_bytes for r in moments]
    assert max(totals) == peak
    assert totals[-1] == profiler.peak.end_bytes
    assert moments[-1].saved_bytes == profiler.peak.saved_for_backward_bytes == 4 * (3 * 50 + 5 * 48)
    assert {r.module for r in by_module if r.category == "weight"} == {"net.0", "net.2"}
    by_operator = {(r.module, r.operator): r.nbytes for r in profiler.records if isinstance(r, OperatorRecord)}
    assert by_operator == {
        ("", "aten.ones"): 4 * 3 * 50,
        ("net.0", "aten.convolution"): 4 * 5 * 48,
        ("net.1", "aten.sigmoid"): 4 * 5 * 48,
    }
    assert sum(by_operator.values()) == sum(r.nbytes for r in by_module if r.category != "weight")


def test_a_stream_consumed_later_is_charged_to_its_own_phase():
    layer = torch.nn.Linear(4, 4)

    def decode():
        for _ in range(3):
            yield layer(torch.ones(100, 4))

    with PhaseProfiler("cpu") as profiler:
        with profiler.phase("pipeline"):
            stream = profiler.stream(decode(), "decode")
        kept = list(stream)
    assert [record.phase for record in profiler.phases] == ["pipeline", *["decode"] * 4]
    assert profiler.phases[0].peak_bytes == 0
    assert len(kept) == 3
    assert [record.saved_for_backward_bytes for record in profiler.phases[1:4]] == [1600, 3200, 4800]


def test_nested_phases_and_the_maximum_over_segments():
    with PhaseProfiler("cpu") as profiler, profiler.phase("outer"):
        first = torch.ones(1000)
        del first
        with profiler.phase("inner"):
            second = torch.ones(500)
            del second
        third = torch.ones(10)
    inner, outer = profiler.phases
    assert (inner.phase, inner.parent, inner.peak_bytes) == ("inner", "outer", 2000)
    assert (outer.phase, outer.parent, outer.peak_bytes, outer.end_bytes) == ("outer", None, 4000, third.nbytes)


def test_views_aliases_and_resized_storages():
    with LiveStorageMeter() as meter:
        a = torch.ones(100)
        views = [a[10:], a.view(10, 10), a.t(), a.detach()]
        assert meter.allocated_bytes() == 400
        a.resize_(300)
        assert meter.allocated_bytes() == 1200
        del a
        assert meter.allocated_bytes() == 1200  # a view is enough
        views.clear()
        gc.collect()
        assert meter.allocated_bytes() == 0
        assert meter.peak_bytes() == 1200


def test_a_view_made_inside_no_grad_keeps_the_graph_of_its_base():
    """Torch's own doing, and a way to keep a graph that nobody sees: the view refers to its base."""
    layer = torch.nn.Linear(6, 6)
    with AutogradGraphProbe() as probe:
        y = layer(torch.ones(3, 6))
        with torch.no_grad():
            view = y[1:]
        del y
        assert probe.saved_bytes == 72
        del view
        assert probe.saved_bytes == 0


def test_a_graph_freed_by_backward_is_no_longer_saved():
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    with AutogradGraphProbe() as probe:
        loss = net(torch.ones(5, 8)).sum()
        assert probe.saved_bytes == 2 * 5 * 8 * 4
        loss.backward()
        assert probe.saved_bytes == 0
        probe.peak_by_module()
        assert probe.peak_bytes == 320


def test_the_probe_changes_no_gradient():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Softplus(), torch.nn.Linear(8, 3))
    x = torch.randn(5, 8)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with AutogradGraphProbe():
        net(x).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected, strict=True))


def test_a_cap_names_phase_module_and_bytes_and_the_next_run_works():
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 800))
    weights = 4 * (72 + 8 * 800 + 800)
    with (
        pytest.raises(VramCapExceeded) as caught,
        PhaseProfiler("cpu", vram_cap_bytes=weights + 5000) as profiler,
        profiler.phase("decode"),
    ):
        profiler.component("net", net)
        net(torch.ones(10, 8))
    assert caught.value.fields == {
        "phase": "decode",
        "module": "net.1",
        "asked_bytes": 32000,
        "alive_bytes": weights + 640,
        "cap_bytes": weights + 5000,
    }
    failure, phase = profiler.records[0], profiler.phases[0]
    assert failure == OutOfMemoryRecord("decode", "net.1", 32000, weights + 640, weights + 5000, str(caught.value))
    assert phase.completed is False
    with PhaseProfiler("cpu", vram_cap_bytes=weights + 50_000) as again, again.phase("decode"):
        again.component("net", net)
        net(torch.ones(10, 8))
    assert again.phases[0].completed is True


def test_a_cap_below_the_weights_says_whose():
    net = torch.nn.Sequential(torch.nn.Linear(100, 100))
    with pytest.raises(VramCapExceeded) as caught:  # noqa: SIM117
        with PhaseProfiler("cpu", vram_cap_bytes=1000) as profiler, profiler.phase("decode"):
            profiler.component("net", net)
    assert (caught.value.fields["module"], caught.value.fields["phase"]) == ("net.0", "decode")
    assert caught.value.fields["cap_bytes"] == 1000


def test_a_cap_that_is_exceeded_while_safetensors_makes_a_tensor_is_said_as_any(tmp_path):
    """``torch.asarray``, which it makes tensors by, raises a ValueError in the place of every error."""
    file = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(100_000)}, file)
    profiler = PhaseProfiler("cpu", vram_cap_bytes=50_000)
    with pytest.raises(VramCapExceeded) as refused, profiler, profiler.phase("load"), safe_open(file, "pt") as opened:
        opened.get_tensor("weight")
    assert refused.value.fields["asked_bytes"] == 400_000
    (record,) = [r for r in profiler.records if isinstance(r, OutOfMemoryRecord)]
    assert (record.phase, record.asked_bytes, record.cap_bytes) == ("load", 400_000, 50_000)
    with PhaseProfiler("cpu", vram_cap_bytes=50_000), pytest.raises(ValueError, match="own"):
        raise ValueError("own")
