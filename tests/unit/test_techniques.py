"""What the peak is made of: techniques, policies, cards, third-party pipelines in tables, and the verdict on them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from i2v_lab.capacity.cards import RESERVED_MARGIN_PERCENT, context_bytes, gpu_table
from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import LABELS, TECHNIQUES, MemoryPolicy
from i2v_lab.pipeline.registry import find_runner
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.interleaved import ratio_table, recorded_rounds
from i2v_lab.runs.provenance import run_metadata
from i2v_lab.runs.recorded import recorded_runs
from i2v_lab.runs.sources import Observation, Source
from i2v_lab.runs.spec import DEFAULT_STILL, FULL_SIZE_MODEL, SMALL_MODEL, RunSpec, make_request
from i2v_lab.runs.store import Run, RunWriter
from i2v_lab.studies.pipelines import (
    capped_table,
    cards_table,
    phases_by_policy,
    policies_table,
    policy_specs,
    third_party_specs,
)
from i2v_lab.studies.published import published_peak
from i2v_lab.studies.techniques import (
    step_specs,
    steps_table,
    studied_techniques,
    techniques_verdict,
)

GIB = 2**30
LARGE = I2VRequest(image=DEFAULT_STILL, width=2048, height=1536, frames=97)


def seen(spec: RunSpec, seconds: float = 1.0, **peaks: float) -> Observation:
    """A measured run whose phases have these peaks in GiB, reserved as well."""
    phases = [
        PhaseRecord(name, None, 0, round(p * GIB), 0, round(p * GIB), round(p * GIB), 0, float(i), seconds, True)
        for i, (name, p) in enumerate(peaks.items())
    ]
    metadata = {"device": "cuda", "device_name": "a card", "model": spec.model}
    return Observation(spec, Source.MEASURE, Run(Path(spec.name), metadata, tuple(phases), "complete"))


def test_each_step_has_one_technique_more_from_resident_to_streamed():
    steps = step_specs(replace(LARGE, memory="lean"), FULL_SIZE_MODEL)
    assert steps[0].policy is MemoryPolicy.RESIDENT
    assert steps[-1].policy is MemoryPolicy.STREAMED
    sets = [step.technique_set for step in steps]
    assert (sets[0], sets[-1]) == (frozenset(), TECHNIQUES[MemoryPolicy.STREAMED])
    assert [after - before for before, after in pairwise(sets)] == [{each} for each in LABELS]
    assert set(LABELS) == find_runner("ltx-2").techniques
    assert len({step.name for step in steps}) == len(steps)
    assert [RunSpec.from_json(json.loads(json.dumps(step.to_json()))) for step in steps] == steps
    assert len({step.memory_key() for step in steps}) == len(steps)
    for model in ("ltxv-tiny", "ltx-2-tiny"):  # diffusers' offloading is no step of this study
        assert not studied_techniques(model)
        assert [spec.policy for spec in step_specs(make_request(model), model)] == [MemoryPolicy.RESIDENT]
        policies = {spec.policy for spec in policy_specs(make_request(model), model, ["64x64"])}
        assert policies == {MemoryPolicy.RESIDENT}


def test_chosen_techniques_come_in_the_order_asked_for_and_each_after_what_it_needs():
    chosen = ["row_bands", "text_only", "row_bands", "streamed_text"]
    steps = step_specs(LARGE, SMALL_MODEL, chosen)
    table = steps_table([seen(each, decode_video=1.0) for each in steps])
    assert table["technique"].to_list() == ["", "row_bands", "text_only", "streamed_text"]
    with pytest.raises(InvalidRequest) as refused:  # it needs text_only, which comes later
        step_specs(LARGE, SMALL_MODEL, ["streamed_text", "text_only"])
    assert refused.value.fields == {"technique": "streamed_text"}
    with pytest.raises(InvalidRequest) as refused:
        step_specs(LARGE, SMALL_MODEL, ["magic"])
    assert refused.value.fields == {"technique": "magic"}


def test_a_step_says_what_it_did_to_its_own_phase_and_to_the_whole_run():
    specs = step_specs(LARGE, "ltx-2.3-tiny")
    before = {"encode_prompt": 23.0, "denoise_stage_2": 26.0, "decode_video": 8.0}
    after = {**before, "denoise_stage_2": 21.0}
    observations = [seen(specs[0], 2.0, **before), *(seen(each, 3.0, **after) for each in specs[1:])]
    table = steps_table(observations)
    assert len(table) == len(LABELS) + 1
    first, second = table.iloc[0], table.iloc[1]
    assert (first["peak_bytes"], first["peak_phase"], first["target_phase"]) == (26 * GIB, "denoise_stage_2", "")
    assert pd.isna(first["before_bytes"])
    assert (second["technique"], second["target_phase"]) == ("shared_modulations", "denoise_stage_2")
    assert (second["peak_bytes"], second["peak_phase"]) == (23 * GIB, "encode_prompt")
    assert (second["before_bytes"], second["after_bytes"]) == (26 * GIB, 21 * GIB)
    assert (first["seconds"], second["seconds"]) == (6.0, 9.0)


@pytest.mark.parametrize(("last", "verdict"), [(3.2, "confirmed"), (4.0, "refined"), (26.0, "refuted")])
def test_the_verdict_follows_from_the_first_and_the_last_step(last, verdict):
    specs = step_specs(LARGE, FULL_SIZE_MODEL)
    peaks = [26.0, *[20.0] * (len(specs) - 2), last]
    observations = [seen(each, decode_video=peak) for each, peak in zip(specs, peaks, strict=True)]
    results = techniques_verdict(observations)
    assert results["verdict"] == verdict
    assert results["finding"].endswith("times less. The published study's set-up is another: 33.55 GiB as published.")
    assert (results["first_peak_bytes"], results["last_peak_bytes"]) == (26 * GIB, round(last * GIB))
    assert techniques_verdict([Observation(specs[0], Source.RECORDED, None)])["verdict"] == "no data"
    model = "ltxv-2b-0.9.8-distilled"
    other = seen(RunSpec(request=make_request(model), model=model), decode_video=19.0)
    results = techniques_verdict([other])
    assert (results["verdict"], results["model"], results["techniques"]) == ("no data", model, 0)


def test_policies_phase_by_phase_and_the_cards_that_each_opens():
    specs = policy_specs(LARGE, SMALL_MODEL, ["64x64", "128x64"])
    assert [(each.request.width, each.request.memory.value) for each in specs] == [
        (width, policy) for width in (64, 128) for policy in ("resident", "lean", "streamed")
    ]
    peaks = {"resident": 26.0, "lean": 22.0, "streamed": 3.0}
    observations = [seen(each, encode_prompt=peaks[each.request.memory.value], decode_video=1.0) for each in specs]
    table = policies_table(observations)
    assert len(table) == 12
    assert table["recorded_bytes"].isna().all()
    wide = phases_by_policy(table, "64x64")
    policies = ("resident", "lean", "streamed")
    assert list(wide.columns) == ["phase", *(f"{p}_bytes" for p in policies), *(f"{p}_seconds" for p in policies)]
    assert wide["lean_seconds"].to_list() == [1.0] * len(wide)
    assert wide["phase"].to_list() == ["encode_prompt", "decode_video"]
    assert wide.iloc[0, 1:4].to_list() == [26 * GIB, 22 * GIB, 3 * GIB]
    cards = cards_table(observations)
    memory = gpu_table()["memory_bytes"]
    for row in cards[cards["size"] == "64x64"].itertuples():
        reserved = round(peaks[row.policy] * GIB)
        needed = reserved + reserved * RESERVED_MARGIN_PERCENT // 100 + context_bytes()
        assert (row.needed_bytes, row.cards) == (needed, (memory >= needed).sum())
        assert row.memory_bytes == memory[memory >= needed].min()
    assert cards_table([seen(specs[0], decode_video=500.0)])["smallest_card"].to_list() == ["none"]


# --- Records of several cards -----------------------------------------------------------------------------------------


def _write(folder: Path, spec: RunSpec, card: str, seconds: float) -> None:
    metadata = run_metadata("cuda", spec=spec, device_name=card)
    with RunWriter(folder, metadata) as writer:
        writer.append(PhaseRecord("decode_video", None, 0, 100, 0, None, 100, 0, 0.0, seconds, True))


def test_what_is_compared_comes_from_the_card_that_has_most_of_it(tmp_path):
    request = I2VRequest(image=DEFAULT_STILL, width=64, height=64, frames=9)
    plain, lean = (
        RunSpec(request=replace(request, memory=memory), model=SMALL_MODEL) for memory in ("resident", "lean")
    )
    for name, spec, card in (
        ("a", plain, "H100"),
        ("b", lean, "H100"),
        ("c", plain, "H200"),
        ("d", plain, "H200"),
        ("e", replace(plain, generations=3), "H200"),
    ):
        _write(tmp_path / name, spec, card, 1.0)
    recorded = recorded_runs(tmp_path)
    found = recorded.find_together([plain, lean])
    assert [run.metadata["device_name"] for run in found] == ["H100", "H100"]
    (alone,) = recorded.find_together([plain])
    assert alone.metadata["device_name"] == "H200", "one that both have comes from the card with more runs"
    assert recorded.find_together([replace(plain, generations=2)]) == [None]


def test_a_run_of_a_third_party_pipeline_is_found_on_a_card(tmp_path):
    ours = RunSpec(request=I2VRequest(image=DEFAULT_STILL, width=64, height=64, frames=9), model=SMALL_MODEL)
    upstream = replace(ours, runner="ltx-pipelines")
    for name, seconds in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        _write(tmp_path / name, upstream, "H100", seconds)
    _write(tmp_path / "d", replace(upstream, vram_cap_bytes=1), "H100", 2.0)
    recorded = recorded_runs(tmp_path)
    assert recorded.find(upstream, "H100").folder.name == "c", "the median of three"
    assert recorded.find(upstream, "H200") is None
    assert recorded.find(third_party_specs(ours.request, SMALL_MODEL, "64x64")["diffusers"], "H100") is None
    assert recorded.find(ours) is None


def test_the_outcome_of_policies_below_a_cap():
    request = I2VRequest(image=DEFAULT_STILL, width=2048, height=1536, frames=97)
    asked = policy_specs(request, FULL_SIZE_MODEL, ["1024x768", "2048x1536"])
    table = capped_table([Observation(spec, Source.RECORDED, None) for spec in asked], recorded_runs())
    assert (set(table["size"]), set(table["policy"])) == ({"2048x1536"}, {"streamed"})
    assert (table["cap_bytes"] / GIB).to_list() == [4, 3.5, 3.25]
    assert table["status"].to_list() == ["complete", "complete", "out of memory"]
    assert table["phase"].to_list() == ["decode_video", "decode_video", "encode_prompt"]
    assert (table["reserved_bytes"] <= table["cap_bytes"]).all()
    assert capped_table([], recorded_runs()).empty


def test_rounds_of_several_sizes_are_compared_each_with_its_own(tmp_path):
    for width, factor in ((64, 1.5), (128, 1.1)):
        rounds = [
            {"round": n, "place": p, "arm": arm, "seconds": n * s, "event_seconds": None}
            for n in (1, 2)
            for p, (arm, s) in enumerate((("resident", 2.0), ("streamed", 2.0 * factor)), start=1)
        ]
        values = {"device": "a card", "request": {"width": width, "height": 64}, "rounds": rounds}
        (tmp_path / f"{width}.json").write_text(json.dumps(values))
    table = ratio_table(recorded_rounds(["64.json", "128.json", "not_there.json"], tmp_path))
    assert table[["size", "arm"]].to_numpy().tolist() == [
        ["64x64", "resident"],
        ["64x64", "streamed"],
        ["128x64", "resident"],
        ["128x64", "streamed"],
    ]
    assert table["ratio"].to_list() == pytest.approx([1, 1.5, 1, 1.1])
    assert ratio_table(recorded_rounds(["not_there.json"], tmp_path)).empty


def test_the_published_peak_is_that_of_the_same_request():
    assert published_peak(LARGE, FULL_SIZE_MODEL) == round(33.55 * GIB)
    assert published_peak(replace(LARGE, frames=25), FULL_SIZE_MODEL) is None
    assert published_peak(LARGE, SMALL_MODEL) is None
