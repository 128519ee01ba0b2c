"""The fastest placement on every card, and time against memory: from few forecasts, beside what was measured."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from i2v_lab.capacity.cards import context_bytes
from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_settings import MemorySettings
from i2v_lab.profiling.records import CostRecord, Forecast, PhaseRecord
from i2v_lab.runs.provenance import run_metadata
from i2v_lab.runs.recorded import recorded_runs
from i2v_lab.runs.sources import Observation, Source, observe
from i2v_lab.runs.spec import DEFAULT_STILL, SMALL_MODEL, RunSpec, make_request
from i2v_lab.runs.store import RunWriter
from i2v_lab.studies import card_map
from i2v_lab.studies.frontier import frontier_table, placements_table
from i2v_lab.studies.pipelines import third_party_specs
from i2v_lab.studies.placed import best_placements, fastest_settings, rates_of, settings_forecasts

GIB = 2**30
CARD = "H100 80GB"
REQUEST = make_request(SMALL_MODEL, image=DEFAULT_STILL, width=64, height=64, frames=9)
ERRORS = {"runs": 9, "median_error": 1e-4, "worst_error": 0.02, "share_under": 0.5}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[Observation]:
    specs = card_map.map_specs(REQUEST, SMALL_MODEL, ["64x64"], [9])
    return observe(specs, "forecast", tmp_path_factory.mktemp("runs"), progress=False)


@pytest.fixture(scope="module")
def ends(seen) -> tuple[int, int]:
    """The smallest memory that has a placement, and what the fastest needs."""
    least, most = best_placements(seen[0].spec.request, SMALL_MODEL, [(CARD, 0), (CARD, 2**60)])
    assert (least.placement, least.predicted_seconds) == ("none", None)
    assert least.needed_bytes < most.needed_bytes
    return least.needed_bytes, most.needed_bytes


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.9f}GiB"


def test_every_card_with_the_least_memory_has_a_placement_and_none_reads_as_too_small(seen, ends):
    least, most = ends
    sizes = [_size(least - 2**20), _size(least + 2**10), CARD, "RTX 4090"]
    table = card_map.card_table(seen, sizes)
    assert table["gpu"].to_list() == [sizes[0], sizes[1], "RTX 4090", CARD]  # ascending
    assert (table["placement"] == "none").to_list() == [True, False, False, False]
    assert table["needed_bytes"][0] == least
    assert (table["needed_bytes"] <= table["memory_bytes"]).to_list() == [False, True, True, True]
    assert table["needed_bytes"].to_list()[2:] == [most, most]
    assert table["rates"].to_list() == ["", "", "published", "measured"]
    assert table["predicted_seconds"].isna().to_list() == [True, True, False, False]
    assert (table["resident_verdict"] == "fits").to_list()[2:] == [True, True]
    reserved = seen[0].run.of(PhaseRecord)
    most_reserved = max(phase.peak_reserved_bytes for phase in reserved)
    assert set(table["resident_needed_bytes"]) == {most_reserved + most_reserved * 6 // 100 + context_bytes()}
    larger = table.assign(width=128, name="resident")
    assert card_map.largest_by_card(pd.concat([table, larger])).equals(larger)


def test_the_verdict_is_of_the_error_and_names_the_smallest_card_with_a_placement_for_all(seen, ends):
    table = card_map.card_table(seen, [_size(ends[0] - 2**20), _size(ends[0] + 2**10), CARD])
    results = card_map.card_verdict(seen, table, pd.DataFrame([ERRORS]))
    assert results["verdict"] == "confirmed"
    assert (results["pairs"], results["pairs_placed"]) == (3, 2)
    assert results["smallest_gpu_for_all"] == _size(ends[0] + 2**10)
    for changed, verdict in (({"worst_error": 0.04}, "refined"), ({"median_error": 0.02}, "refuted")):
        assert card_map.card_verdict(seen, table, pd.DataFrame([ERRORS | changed]))["verdict"] == verdict
    assert card_map.card_verdict(seen, table, pd.DataFrame())["verdict"] == "no data"
    recorded = [Observation(seen[0].spec, Source.RECORDED, seen[0].run)]  # nothing is forecast beside records
    empty = card_map.card_table(recorded)
    assert empty.empty
    results = card_map.card_verdict(recorded, empty, pd.DataFrame([ERRORS]))
    assert (results["verdict"], results["pairs"], results["smallest_gpu_for_all"]) == ("confirmed", 0, None)


def test_a_model_without_placements_has_what_its_reserved_memory_fits():
    model = "ltxv-tiny"
    request = make_request(model, image=DEFAULT_STILL, width=64, height=64, frames=9)
    placed = best_placements(request, model, [(CARD, 2**30), ("no card", 2**20)])
    assert [each.placement for each in placed] == ["resident", "none"]
    assert placed[0].needed_bytes == placed[1].needed_bytes >= placed[0].peak_bytes + context_bytes()
    assert placed[0].predicted_seconds > 0
    assert (placed[1].predicted_seconds, rates_of("no card")) == (None, "")


def test_time_falls_or_stays_as_the_budget_grows_and_nothing_is_forecast_for_a_budget(seen, ends):
    table = frontier_table(seen, [], recorded_runs(), CARD)
    assert set(table["kind"]) == {"placement"}
    assert len(table) == 24
    assert (table["budget_bytes"].iloc[0], table["budget_bytes"].iloc[-1]) == ends
    assert table["seconds"].is_monotonic_decreasing
    assert (table["warm_seconds"] < table["seconds"]).all()
    assert (table["peak_bytes"] + context_bytes() < table["budget_bytes"]).all()
    given = frontier_table(seen, [], recorded_runs(), CARD, [0.5, 80])
    assert given["budget_bytes"].to_list() == [GIB // 2, 80 * GIB]
    assert given["seconds"].isna().to_list() == [True, False]
    assert len(placements_table(given, "64x64")) == 2
    many = pd.DataFrame({"kind": "placement", "size": "64x64", "name": [f"{n // 2} blocks" for n in range(40)]})
    assert placements_table(many, "64x64")["name"].to_list() == [f"{n} blocks" for n in (0, 3, 5, 8, 11, 14, 16, 19)]
    assert placements_table(many, "128x64").empty
    with pytest.raises(InvalidRequest) as refused:
        frontier_table(seen, [], recorded_runs(), "RTX 9999")
    assert refused.value.fields == {"gpu": "RTX 9999"}


def test_beside_the_curve_are_third_parties_and_the_runs_of_that_card_alone(seen, tmp_path):
    spec = seen[0].spec
    theirs = third_party_specs(spec.request, SMALL_MODEL, "64x64", ["ltx-pipelines"])["ltx-pipelines"]
    kept = RunSpec(request=spec.request, model=SMALL_MODEL, write_video=False)
    measured = {
        "a": (kept, "NVIDIA H100 80GB HBM3", 3.0),
        "b": (kept.with_request(memory="streamed"), "NVIDIA H100 80GB HBM3", 5.0),
        "c": (kept, "NVIDIA H200", 2.0),
        "d": (spec, "NVIDIA H100 80GB HBM3", 4.0),  # wrote its video
        "e": (kept.with_request(width=128), "NVIDIA H100 80GB HBM3", 6.0),
    }
    for name, (one, card, seconds) in measured.items():
        with RunWriter(tmp_path / "runs" / name, run_metadata("cuda", spec=one, device_name=card)) as writer:
            writer.append(PhaseRecord("decode_video", None, 0, GIB, 0, None, GIB, 0, 0.0, seconds, True))
    recorded = recorded_runs(tmp_path / "runs")
    third_party = observe([theirs], "forecast", tmp_path, progress=False, recorded=recorded)
    only_recorded = [Observation(spec, Source.RECORDED, None)]
    table = frontier_table(only_recorded, [{"ltx-pipelines": third_party[0]}], recorded, CARD).set_index("kind")
    assert table.loc["pipeline", "name"] == "ltx-pipelines"
    assert table.loc["pipeline", "seconds"] > 0
    assert table.loc["measured", "name"].to_list() == ["resident", "streamed"]
    assert table.loc["measured", "seconds"].to_list() == [3.0, 5.0]
    assert set(table["gpu"]) == {CARD}


def test_a_model_with_memory_settings_has_the_fastest_that_fits(still):
    model = "ltx-2.3-tiny-diffusers"
    request = make_request(model, image=str(still), width=128, height=64, frames=9, fps=120)  # as of test_third_party
    offloaded = replace(request, settings=MemorySettings(offload="model"))
    untiled = replace(request, settings=MemorySettings(vae_tile={"no_such_argument": 1}, vae_tiling=True))
    tried = settings_forecasts([request, offloaded, untiled], model)
    assert list(tried) == [request, offloaded]
    (resident,) = best_placements(request, model, [(CARD, 2**60)])
    less = fastest_settings(tried, "L4", resident.needed_bytes - 1)
    assert [each.placement for each in (resident, less)] == ["resident", "offload-model"]
    assert less.needed_bytes < resident.needed_bytes
    assert less.predicted_seconds > resident.predicted_seconds
    assert [each.request for each in (resident, less)] == [request, offloaded]
    assert [each.host_bytes for each in (resident, less)] == [0, tried[request].phases[0].start_bytes]
    assert less.host_bytes > 0


def test_of_the_settings_that_fit_a_card_the_fastest_on_that_card_is_taken(still):
    slow, quick = (
        make_request("ltx-2.3-tiny-diffusers", image=str(still), settings=MemorySettings(**values))
        for values in ({}, {"vae_tiling": True})
    )
    forecasts = {}
    for request, nbytes in ((slow, 2 * GIB), (quick, GIB)):
        row = ("pointwise", "bfloat16", nbytes // GIB, 0, GIB)
        phase = PhaseRecord("decode_video", None, 0, GIB, 0, nbytes, GIB, 0, 0.0, 0.1, True)
        forecasts[request] = Forecast((CostRecord("decode_video", 1, (row,)), phase), 0, 0.0)
    for gpu in (CARD, "T4", "24GiB"):  # the last two have no rates: by those of the reference
        found = fastest_settings(forecasts, gpu, 4 * GIB)
        assert (found.request, found.needed_bytes) == (quick, GIB + GIB * 6 // 100)
        assert (found.predicted_seconds is None) == (gpu != CARD)
    nothing = fastest_settings(forecasts, CARD, GIB)
    assert (nothing.placement, nothing.request, nothing.needed_bytes) == ("none", None, GIB + GIB * 6 // 100)
