"""``profile_call(..., phases=...)``: the caller says which parts of a pipeline a phase consists of."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from i2v_lab import profile_call
from i2v_lab.errors import ProfilerError
from i2v_lab.profiling.records import StepRecord


class Part(nn.Module):
    """Allocates this many KiB during a call, and nothing beyond it."""

    def __init__(self, kib: int, **parts: nn.Module) -> None:
        super().__init__()
        self.kib = kib
        self.weight = nn.Parameter(torch.zeros(1))
        self.parts = nn.ModuleDict(parts)

    def forward(self, *args: Any) -> None:
        torch.zeros(self.kib, 256)
        for part in self.parts.values():
            part()


class Vae:
    def __init__(self) -> None:
        self.model = Part(2, decoder=Part(6))

    def decode(self) -> None:
        torch.zeros(7, 256)
        self.model()

    def lazily(self) -> Any:
        for _ in range(2):
            torch.zeros(3, 256)
            yield 1


def blend() -> None:
    torch.zeros(9, 256)


class Pipeline:
    def __init__(self) -> None:
        self.alpha, self.beta, self.vae = Part(4), [Part(5), Part(3)], Vae()

    def __call__(self) -> Any:
        self.alpha()
        for part in self.beta:
            part()
            part()
        self.vae.decode()
        blend()
        return self.finish()

    generate = __call__

    def finish(self) -> int:
        torch.zeros(1, 256)
        return sum(self.vae.lazily())


def _kib(call: Any) -> list[tuple[str, float]]:
    return [(phase.phase, (phase.peak_bytes - phase.start_bytes) / 1024) for phase in call.phases]


NOT_NAMED = [("alpha", 4), ("beta", 5), ("beta_2", 3), ("decode_video", 9)]


def test_without_names_the_components_own_are_taken():
    assert _kib(profile_call(Pipeline())) == NOT_NAMED


NAMED: dict[str, Callable[[Pipeline], Any]] = {
    "modules": lambda p: {"first": p.alpha, "denoise": p.beta, "last": p.vae},
    "names": lambda p: {"first": "alpha", "denoise": ["beta.0", "beta.1"], "last": "vae.model"},
    "both": lambda p: {"first": ["alpha"], "denoise": ("beta.0", p.beta[1]), "last": p.vae.model},
}


@pytest.mark.parametrize("way", NAMED)
@pytest.mark.parametrize("call", [lambda p: p, lambda p: p.generate, lambda p: functools.partial(p.generate)])
def test_parts_may_be_modules_their_holders_names_and_lists_of_these(way, call):
    pipeline = Pipeline()
    profiled = profile_call(call(pipeline), phases=NAMED[way](pipeline))
    assert _kib(profiled) == [("first", 4), ("denoise", 7), ("last", 9)]  # what follows denoising is of it
    steps = [(step.phase, step.step, step.steps) for step in profiled.records if isinstance(step, StepRecord)]
    assert steps == [("denoise", step, 4) for step in (1, 2, 3, 4)]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in (pipeline.alpha, *pipeline.beta))


def test_methods_and_functions_are_phases_and_are_restored():
    pipeline = Pipeline()
    phases = {"decode": pipeline.vae.decode, "blend": blend, "frames": "vae.lazily"}
    expected = [*NOT_NAMED[:3], ("decode", 7), ("blend", 9), ("frames", 3)]
    before = dict(globals())
    assert _kib(profile_call(pipeline, phases=phases)) == expected
    assert globals() == before
    assert "decode" not in vars(pipeline.vae)
    assert _kib(profile_call(pipeline, phases={"end": pipeline.finish})) == [*NOT_NAMED, ("end", 3)]
    with pytest.raises(ZeroDivisionError):
        profile_call(lambda: (blend(), 1 / 0), phases={"blend": blend})
    assert globals() == before
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        assert _kib(profile_call(lambda: pool.submit(blend).result(), phases={"blend": blend})) == [("blend", 9)]


def test_a_part_of_a_component_interrupts_its_phase():
    vae = Part(2, decoder=Part(6), norm=Part(1))
    call = profile_call(lambda: vae(), phases={"decode_video": "vae.parts.decoder", "normalise": vae.parts["norm"]})
    assert _kib(call) == [("vae", 2), ("decode_video", 6), ("vae", 0), ("normalise", 1), ("vae", 0)]
    assert _kib(profile_call(vae, phases={"whole": vae})) == [("whole", 6)]
    assert _kib(profile_call(lambda: vae.parts["norm"](), phases={"whole": vae})) == [("whole", 1)]


REFUSED: list[tuple[Callable[[Pipeline], Any], dict[str, Any]]] = [
    (lambda p: {"decode": "vae.model.decodr"}, {"phase": "decode", "name": "vae.model.decodr"}),
    (lambda p: {"decode": "vea"}, {"phase": "decode", "name": "vea"}),
    (lambda p: {"decode": "beta.2"}, {"phase": "decode", "name": "beta.2"}),
    (lambda p: {"decode": ""}, {"phase": "decode", "name": ""}),
    (lambda p: {"a": "alpha", "b": p.alpha}, {"phase": "b"}),
    (lambda p: {"a": p.vae.decode, "b": "vae.decode"}, {"phase": "b"}),
    (lambda p: {"a": 3}, {"phase": "a"}),
    (lambda p: {"a": None}, {"phase": "a"}),
    (lambda p: {"a": []}, {"phase": "a"}),
    (lambda p: {"a": lambda: 1}, {"phase": "a"}),
    (lambda p: {"a": Part}, {"phase": "a"}),
    (lambda p: {"": p.alpha}, {"phase": ""}),
    (lambda p: {"a\nb": p.alpha}, {"phase": "a\nb"}),
    (lambda p: {3: p.alpha}, {"phase": 3}),
    (lambda p: ["alpha"], {}),
]


@pytest.mark.parametrize(("phases", "fields"), REFUSED)
def test_what_is_no_part_of_the_pipeline_is_refused_before_it_runs(phases, fields):
    pipeline = Pipeline()
    ran = []
    pipeline.vae.decode = ran.append  # type: ignore[method-assign]
    if "b" in fields.values():
        del pipeline.vae.decode
    with pytest.raises(ProfilerError) as refused:
        profile_call(pipeline, phases=phases(pipeline))
    assert refused.value.fields == fields
    assert (ran, str(refused.value).count("\n")) == ([], 0)
    assert pickle.loads(pickle.dumps(refused.value)).fields == fields
