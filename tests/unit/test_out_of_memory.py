"""A device that is full: one line of ours, nothing of the run is held, and the next generation is as ever."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from i2v_lab.errors import OutOfDeviceMemory, VramCapExceeded
from i2v_lab.events import ComponentBuilt, StepEnded
from i2v_lab.profiling.records import OutOfMemoryRecord
from i2v_lab.runs.execute import Hooks, execute
from i2v_lab.runs.spec import SMALL_MODEL, ProfilerMode, RunSpec, make_request
from i2v_lab.runs.store import read_run

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB\nof which ..."


class Full:
    """Fails as torch does on a card that is full, after a step; keeps nothing but a weak reference."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.module: weakref.ref | None = None

    def __call__(self, event) -> None:
        if isinstance(event, ComponentBuilt):
            self.module = weakref.ref(event.module)
        if isinstance(event, StepEnded) and event.phase == self.phase:
            raise torch.OutOfMemoryError(MESSAGE)


@pytest.fixture(scope="module")
def spec(still) -> RunSpec:
    request = make_request(
        SMALL_MODEL, image=str(still), width=64, height=64, frames=9, fps=120, memory="streamed", seed=3
    )
    return RunSpec(request=request, model=SMALL_MODEL)


@pytest.mark.parametrize("mode", [ProfilerMode.FULL, ProfilerMode.BOUNDARIES, ProfilerMode.NONE])
def test_torchs_error_is_one_line_with_the_phase_and_holds_nothing_of_the_run(spec, mode, tmp_path):
    values = {**spec.to_json(), "profiler": mode.value, "vram_cap_bytes": 2**40}
    full, written = Full("denoise_stage_2"), tmp_path / "run"
    with pytest.raises(OutOfDeviceMemory) as caught:
        execute(RunSpec.from_json(values), device="cpu", run_dir=written, hooks=Hooks(sinks=[full]))
    error = caught.value
    assert "\n" not in str(error)
    assert error.exit_status == 1
    assert error.__cause__ is error.__context__ is None
    metered = mode is not ProfilerMode.NONE
    assert error.fields["phase"] == ("denoise_stage_2" if metered else None)
    assert error.fields["asked_bytes"] == (2 * 2**30 if metered else None)
    assert error.fields["cap_bytes"] == 2**40
    assert error.fields["reason"] == MESSAGE.splitlines()[0]
    gc.collect()
    assert full.module is not None
    assert full.module() is None
    if metered:
        run = read_run(written)
        assert [record.phase for record in run.of(OutOfMemoryRecord)][:1] == ["denoise_stage_2"]
        assert run.status == "failed"


def test_after_a_cap_was_exceeded_the_next_generation_is_as_ever(spec):
    def generated(cap: int | None = None) -> dict[str, int]:
        profiler = execute(RunSpec.from_json({**spec.to_json(), "vram_cap_bytes": cap}), device="cpu")
        return {phase.phase: phase.peak_bytes for phase in profiler.phases}

    before = generated()
    highest = max(before, key=before.__getitem__)
    cap = before[highest] - 1
    with pytest.raises(VramCapExceeded) as caught:
        generated(cap)
    assert "\n" not in str(caught.value)
    assert caught.value.fields["phase"] == highest
    assert caught.value.fields["cap_bytes"] == cap
    assert generated(cap + 1) == before
    with pytest.raises(VramCapExceeded) as caught:  # within the tokenizer, which replaces it by an error of its own
        generated(1000)
    assert caught.value.fields["phase"] == "encode_prompt"
