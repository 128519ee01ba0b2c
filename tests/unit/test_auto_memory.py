"""``--memory auto``: the fastest policy whose forecast fits, or the largest request that does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from i2v_lab.capacity.placement import resolve_memory
from i2v_lab.errors import DeviceUnavailable
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import SMALL_MODEL


def test_auto_takes_the_fastest_policy_that_fits_says_why_and_refuses_where_none_does(still):
    asked = I2VRequest(image=str(still), width=64, height=64, frames=9, fps=120, memory="auto")
    forecasts = {m: forecast_request(replace(asked, memory=m), SMALL_MODEL) for m in ("resident", "lean", "streamed")}
    need = {memory: f.peak_reserved_bytes + f.context_bytes for memory, f in forecasts.items()}
    assert need["resident"] >= need["lean"] >= need["streamed"]
    chosen = resolve_memory(asked, need["resident"], SMALL_MODEL)
    assert chosen.request == replace(asked, memory="resident")
    assert chosen.reason.startswith("memory=resident, tiles of 768 px and 80 frames: ")
    below = min(f.peak.peak_bytes + f.context_bytes for f in forecasts.values())
    reason = resolve_memory(asked, below, SMALL_MODEL).reason
    assert reason.count("tightly") == reason.count("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True") == 1
    with pytest.raises(DeviceUnavailable) as refused:
        resolve_memory(asked, below - 1, SMALL_MODEL)
    assert refused.value.fields == {"needed_bytes": below, "memory_bytes": below - 1, "nearest": None}


def test_auto_refuses_with_the_nearest_request_that_fits_and_means_the_same_by_it(still):
    finest = Tiling(128, 32, 16, 8)  # so that no finer one is tried
    asked = I2VRequest(image=str(still), width=512, height=128, frames=9, fps=120, memory="auto", tiling=finest)
    smaller = replace(asked, width=256, height=64, memory="streamed")
    need = (forecast := forecast_request(smaller, SMALL_MODEL)).peak.peak_bytes + forecast.context_bytes
    with pytest.raises(DeviceUnavailable) as refused:
        resolve_memory(asked, need, SMALL_MODEL)  # where its allocator's reserve does not
    nearest = I2VRequest.from_json(refused.value.fields["nearest"])
    assert nearest == smaller
    assert resolve_memory(replace(nearest, memory="auto"), need, SMALL_MODEL).request.memory is MemoryPolicy.STREAMED
