"""The guard around lazy streams and modules: catches the escape, and nothing else."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i2v_lab.errors import GradEscape, ProfilerError
from i2v_lab.profiling.autograd_graph import AutogradGraphProbe
from i2v_lab.profiling.escape import GradEscapeWarning
from i2v_lab.profiling.guard import guard_stream, watch


def _decoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def _stream(decoder: torch.nn.Module, chunks: int = 3):
    for index in range(chunks):
        yield decoder(torch.full((5, 8), float(index)))


def test_fix_keeps_no_graph_and_changes_no_value():
    decoder = _decoder()
    with torch.no_grad():
        expected = list(_stream(decoder))
    with AutogradGraphProbe() as probe:
        fixed = list(guard_stream(_stream(decoder), "fix"))
    probe.peak_by_module()
    assert probe.peak_bytes == 0
    assert not any(chunk.requires_grad for chunk in fixed)
    assert all(torch.equal(a, b) for a, b in zip(fixed, expected, strict=True))


def test_warn_warns_once_where_the_stream_is_consumed_and_goes_on():
    stream = guard_stream(_stream(_decoder()), "warn")
    with pytest.warns(GradEscapeWarning, match=r"linear in Sequential\.0 recorded an autograd graph") as caught:
        chunks = list(stream)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(chunks) == 3
    assert stream.escaped


def test_raise_stops_at_the_operator():
    stream = guard_stream(_stream(_decoder()), "raise")
    with pytest.raises(GradEscape) as caught:
        next(stream)
    assert caught.value.fields == {"function": "linear", "module": "Sequential.0"}
    assert torch.is_grad_enabled()


def test_parameters_used_without_a_module_are_seen_too():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(GradEscape) as caught:
        list(guard_stream((torch.ones(3) * weight for _ in range(1)), "raise"))
    assert caught.value.fields == {"function": "mul", "module": ""}


@pytest.mark.parametrize("on_escape", ["fix", "warn", "raise"])
@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_a_consumer_inside_no_grad_is_left_alone(on_escape, outside):
    stream = guard_stream(_stream(_decoder()), on_escape)
    with outside():
        assert len(list(stream)) == 3
    assert not stream.escaped


def test_a_generator_that_leaves_its_own_mode_behind_does_not_change_the_callers():
    def leaky():
        with torch.no_grad():
            yield 1
            yield 2

    for on_escape in ("fix", "warn", "raise"):
        stream = guard_stream(leaky(), on_escape)
        next(stream)
        assert torch.is_grad_enabled()
        stream.close()


def test_closing_closes_the_generator():
    closed = []

    def generator():
        try:
            yield 1
        finally:
            closed.append(True)

    with guard_stream(generator()) as stream:
        next(stream)
    assert closed == [True]


def test_an_unknown_reaction_is_refused():
    for guard in (lambda: guard_stream([], "ignore"), lambda: watch(_decoder(), "ignore")):
        with pytest.raises(ProfilerError) as caught:
            guard()
        assert caught.value.fields == {"on_escape": "ignore"}


def test_watch_in_all_three_ways():
    decoder, x = _decoder(), torch.ones(5, 8)
    with torch.no_grad():
        expected = decoder(x)
    with watch(decoder, "fix") as handle:
        fixed = decoder(x)
    assert torch.equal(fixed, expected)
    assert not fixed.requires_grad
    assert handle.escaped == ["Sequential.0", "Sequential.2"]
    with watch(decoder, "warn"), pytest.warns(GradEscapeWarning, match="Sequential.0 was called") as caught:
        assert decoder(x).requires_grad
    assert len(caught) == 1
    with watch(decoder, "raise"), pytest.raises(GradEscape) as escape:
        decoder(x)
    assert escape.value.fields == {"module": "Sequential.0"}
    assert decoder(x).requires_grad  # nobody watches any more
    assert torch.is_grad_enabled()


def test_watch_restores_the_mode_when_the_module_fails():
    decoder = _decoder()
    with watch(decoder, "fix"), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        decoder(torch.ones(5, 9))
    assert torch.is_grad_enabled()


STEP = st.sampled_from(["linear", "mul", "relu", "detach", "view", "clone", "item", "shape", "data", "compare", "to"])


@settings(max_examples=1000, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=6), st.sampled_from(["frozen", "no_grad", "inference", "inside"]))
def test_no_false_alarm_in_grad_free_programs(steps, how):
    """Frozen weights with grad enabled; or trainable ones inside no_grad, put around the consumer or the work."""
    layer = torch.nn.Linear(4, 4).requires_grad_(how != "frozen")
    weight = layer.weight

    def work(x: torch.Tensor, step: str) -> torch.Tensor:
        match step:
            case "linear":
                return layer(x)
            case "mul":
                return x * weight
            case "relu":
                return x.relu()
            case "detach":
                return x + weight.detach()
            case "view":
                return x.view(4, 4)
            case "clone":
                return weight.detach().clone()
            case "item":
                return x + weight.sum().item()
            case "shape":
                return x[: weight.shape[0]]
            case "data":
                return x + weight.data
            case "compare":
                return (x > weight).float()
            case _:
                return x.to(weight.dtype)

    def generator():
        x = torch.ones(4, 4)
        for step in steps:
            with torch.no_grad() if how == "inside" else nullcontext():
                x = work(x, step)
            yield x

    outside = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(how, nullcontext)
    with outside(), watch(layer, "raise") if how != "inside" else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(guard_stream(generator(), "raise"))) == len(steps)
