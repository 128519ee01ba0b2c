"""Third-party pipelines: what they would take, and how their grad scope is found."""

from __future__ import annotations

import copy
import gc

import pandas as pd
import pytest
import torch

from i2v_lab import I2VRequest, forecasting
from i2v_lab.errors import InvalidRequest
from i2v_lab.profiling.records import GraphRecord
from i2v_lab.runs.forecast import forecast_specs
from i2v_lab.runs.phases import phase_peaks
from i2v_lab.runs.sources import observe
from i2v_lab.runs.spec import SMALL_MODEL
from i2v_lab.studies.pipelines import (
    THIRD_PARTY,
    observe_third_party,
    pipelines_table,
    policy_specs,
    third_party_specs,
)
from i2v_lab.studies.third_party_leaks import leak_summary, own_scope, restarted

MIB = 2**20
DIFFUSERS = ("diffusers", "diffusers, model offloading", "diffusers, group offloading")


@pytest.fixture(scope="module")
def request_(still) -> I2VRequest:
    return I2VRequest(image=str(still), width=128, height=64, frames=9, fps=120)


@pytest.fixture(scope="module")
def forecasts(request_):
    specs = third_party_specs(request_, SMALL_MODEL, "128x64")
    return dict(zip(specs, forecast_specs(list(specs.values()), progress=False), strict=True))


def test_every_third_party_pipeline_can_be_forecast_on_a_card(forecasts):
    assert tuple(forecasts) == THIRD_PARTY
    stages = ["encode_prompt", "encode_image", "denoise_stage_1", "upsample_latent"]
    for name, forecast in forecasts.items():
        phases = [phase.phase for phase in forecast.phases]
        assert phases[:4] == stages
        assert set(phases) >= {"denoise_stage_2", "decode_audio", "decode_video"}
        assert forecast.context_bytes > 0
        assert not [record for record in forecast.records if isinstance(record, GraphRecord)], name


def test_offloading_keeps_weights_off_the_card(forecasts):
    def starts(name: str) -> dict[str, int]:
        return {phase.phase: phase.start_bytes for phase in forecasts[name].phases}

    resident, model, group = map(starts, DIFFUSERS)
    assert resident["denoise_stage_1"] - group["denoise_stage_1"] > 8 * MIB
    assert all(group[phase] < resident[phase] for phase in resident)
    assert all(model[phase] < resident[phase] for phase in resident)
    peaks = {
        name: {phase.phase: phase.peak_bytes for phase in forecast.phases}["denoise_stage_2"]
        for name, forecast in forecasts.items()
    }
    assert peaks[DIFFUSERS[2]] < peaks[DIFFUSERS[1]] < peaks[DIFFUSERS[0]]
    first, _, _, _, second, *_ = forecasts[DIFFUSERS[2]].phases
    assert first.phase == second.phase == "encode_prompt"
    # What went on the card the first time is not there twice. cuBLASLt took its 1 MiB after the first peak.
    assert second.end_bytes - first.end_bytes < MIB // 8
    assert second.peak_bytes - first.peak_bytes < MIB + MIB // 8


def test_they_stand_beside_our_policies(request_, forecasts, tmp_path):
    asked = policy_specs(request_, SMALL_MODEL, ["128x64"])
    observations = observe(asked, "forecast", tmp_path, progress=False)
    third_party = observe_third_party(observations, "128x64", (), tmp_path)
    table = pipelines_table(observations, "128x64", third_party).set_index("pipeline")
    ours = ["i2v-lab, resident", "i2v-lab, lean", "i2v-lab, streamed"]
    assert list(table.index) == [*ours, *THIRD_PARTY]
    assert table.loc[ours, "peak_bytes"].to_list() == [max(phase_peaks(each.run).values()) for each in observations]
    assert all(table.loc[name, "peak_bytes"] == forecasts[name].peak.peak_bytes for name in THIRD_PARTY)
    assert table["measured_bytes"].isna().all()
    assert table.loc["i2v-lab, streamed", "decode_bytes"] < table.loc["i2v-lab, resident", "decode_bytes"]
    few = pipelines_table(observations, "128x64", observe_third_party(observations, "128x64", ["diffusers"], tmp_path))
    assert few["pipeline"].to_list() == [*ours, "diffusers"]
    with pytest.raises(InvalidRequest) as refused:
        third_party_specs(request_, SMALL_MODEL, "128x64", ["i2v-lab"])
    assert refused.value.fields == {"pipeline": "i2v-lab"}


def test_what_is_copied_or_moved_by_its_data_is_where_a_forecast_says():
    with forecasting("cuda") as profiler, profiler.phase("move"):
        before = profiler.allocated_bytes()
        layer = torch.nn.Linear(256, 256, bias=False)
        assert profiler.allocated_bytes() == before  # on the CPU
        layer.weight.data = layer.weight.data.to("cuda")
        gc.collect()
        assert profiler.allocated_bytes() - before == 256 * 256 * 4
        assert layer(torch.ones(1, 256, device="cuda")).device.type == "cuda"
        twin = copy.deepcopy(layer)
        assert isinstance(twin.weight, torch.nn.Parameter)
        assert twin.weight.untyped_storage()._cdata != layer.weight.untyped_storage()._cdata
        assert profiler.allocated_bytes() - before == 2 * 256 * 256 * 4
        layer.tied = layer.weight
        moved = torch.nn.Sequential(layer).to("cpu")[0]
        assert moved.tied is moved.weight is layer.weight
        assert layer.weight.device.type == "cpu"
        gc.collect()
        assert profiler.allocated_bytes() - before == 256 * 256 * 4  # its twin's
        sigmas = copy.deepcopy({"sigmas": torch.tensor([1.0, 0.5])})
        assert sigmas["sigmas"].tolist() == [1.0, 0.5]  # known before, known after


def test_the_grad_scope_of_a_call_is_that_of_its_first_module():
    layer = torch.nn.Linear(1, 1)
    call = lambda: layer(torch.ones(1))  # noqa: E731
    with torch.no_grad():  # it is asked with grad enabled, whatever the mode here
        assert own_scope(call) == "the caller's"
    assert own_scope(torch.no_grad()(call)) == "no_grad"
    assert own_scope(torch.inference_mode()(call)) == "inference_mode"
    assert call().requires_grad  # nothing is left hooked in


def counted(start: int, items: list[int]):
    yield from (start + item for item in items)


def test_a_stream_that_has_not_started_can_be_restarted():
    stream = counted(1, [1, 2])
    assert [list(restarted(stream)), list(restarted(stream)), list(stream)] == [[2, 3]] * 3


def test_the_summary_counts_what_leaks():
    rows = {
        "lazy": [True, False, False],
        "grad_bytes": [5, 3, 0],
        "no_grad_bytes": [0, 0, 0],
        "guarded_bytes": [0, 1, None],
    }
    table = pd.DataFrame(rows).astype({"guarded_bytes": "Int64"})
    assert leak_summary(table) == {
        "others": 3,
        "others_lazy": 1,
        "others_leaking": 2,
        "others_no_grad_bytes": 0,
        "others_guarded_bytes": 1,
    }
