"""One spec, three sources: forecast, measured here, recorded; and what a consumer does with a stream."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from i2v_lab.errors import I2VLabError, InvalidRequest, RecordError, UnknownModel
from i2v_lab.paths import data_dir
from i2v_lab.profiling.records import GenerationRecord, OutOfMemoryRecord, PhaseRecord
from i2v_lab.request import DecodeScope, I2VRequest, Tiling
from i2v_lab.runs.forecast import forecast_spec
from i2v_lab.runs.measure import is_result, measure, run_folder
from i2v_lab.runs.provenance import run_metadata
from i2v_lab.runs.recorded import recorded_runs, seconds_of, spec_of
from i2v_lab.runs.sources import choose_model, device_of, missing, observe, phases_frame, runs_frame, to_source
from i2v_lab.runs.spec import DEFAULT_STILL, FULL_SIZE_MODEL, SMALL_MODEL, Consumer, RunSpec
from i2v_lab.runs.store import RunWriter, read_run

SMALL = I2VRequest(image=DEFAULT_STILL, width=64, height=64, frames=9, fps=120)
ESCAPED = replace(SMALL, decode_scope=DecodeScope.ESCAPED)
FULL = I2VRequest(image=DEFAULT_STILL, width=1024, height=768, frames=97)


def test_a_spec_has_a_name_and_survives_json():
    odd = RunSpec(
        request=replace(ESCAPED, tiling=Tiling(64, 32, 16, 8), variant="dev", quantization="bf16"),
        model=SMALL_MODEL,
        generations=3,
        consumer=Consumer.LEFT_OPEN,
    )
    assert odd.name == "64x64x9_tile64x16_overlap32x8_escaped_dev_bf16_left_open_3times"
    assert RunSpec(request=replace(SMALL, tiling=None)).name == "64x64x9_untiled"
    assert RunSpec.from_json(json.loads(json.dumps(odd.to_json()))) == odd


def test_specs_have_one_memory_key_exactly_if_their_memory_is_equal():
    asked = RunSpec(request=FULL)
    for change in ({"image": "other.png"}, {"prompt": "a"}, {"negative_prompt": "b"}, {"seed": 3}):
        assert asked.with_request(**change).memory_key() == asked.memory_key()
    for change in ({"frames": 25}, {"tiling": None}, {"decode_scope": "escaped"}, {"fps": 30}, {"variant": "dev"}):
        assert asked.with_request(**change).memory_key() != asked.memory_key()
    for metering in ({"profiler": "boundaries"}, {"vram_cap_bytes": 2**30}, {"write_video": False}):
        assert replace(asked, **metering).memory_key() == asked.memory_key()
    for change in (
        {"generations": 2},
        {"consumer": "left_open"},
        {"runner": "ltx-pipelines"},
        {"techniques": ["text_only"]},
    ):
        assert replace(asked, **change).memory_key() != asked.memory_key()
    assert run_folder(Path("a"), asked) == run_folder(Path("a"), replace(asked))
    assert run_folder(Path("a"), asked) != run_folder(Path("a"), asked.with_request(seed=3))


# --- Forecast: what a consumer does with a stream ---


def _left(request: I2VRequest, consumer: Consumer, generations: int = 1) -> tuple[list[int], int]:
    """Allocated after each generation of the tiny model on an imagined CPU, and the largest graph."""
    asked = RunSpec(request=request, model=SMALL_MODEL, generations=generations, consumer=consumer)
    forecast = forecast_spec(asked, device="cpu")
    records = [record for record in forecast.records if isinstance(record, GenerationRecord)]
    assert [record.generation for record in records] == list(range(1, generations + 1))
    return [record.allocated_bytes for record in records], max(p.saved_for_backward_bytes for p in forecast.phases)


def test_a_stream_that_is_consumed_leaves_nothing_and_a_guarded_one_has_no_graph():
    (plain,), graph = _left(ESCAPED, Consumer.PLAIN)
    (guarded,), no_graph = _left(ESCAPED, Consumer.GUARDED)
    assert plain == guarded < 1024
    assert graph > no_graph == 0


def test_streams_left_open_are_closed_from_the_last_to_the_first():
    asked = RunSpec(request=ESCAPED, model=SMALL_MODEL, generations=2, consumer=Consumer.LEFT_OPEN)
    last, first = (p for p in forecast_spec(asked, device="cpu").phases if p.phase == "decode_video")
    assert first.start_s < last.start_s
    assert last.start_s + last.seconds <= first.start_s + first.seconds


def test_a_stream_left_open_keeps_the_same_again_for_each_generation_and_more_with_a_graph():
    (first, second), _ = _left(ESCAPED, Consumer.LEFT_OPEN, generations=2)
    (fixed,), _ = _left(SMALL, Consumer.LEFT_OPEN)
    assert second == pytest.approx(2 * first, rel=0.01)
    assert first > 1.2 * fixed > 1e6


# --- Measured here ---


@pytest.fixture(scope="module")
def measured(_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    asked = RunSpec(request=ESCAPED, model=SMALL_MODEL)
    return asked, folder, observe([asked], "measure", folder, "cpu", progress=False)


def test_a_measured_run_is_reused(measured):
    asked, folder, (observation,) = measured
    run = observation.run
    assert run.folder == run_folder(folder, asked)
    assert (run.folder / "video.mp4").stat().st_size > 1000
    before = run.metadata["started_at"], (run.folder / "video.mp4").stat().st_mtime_ns
    again = measure(asked, run.folder, "cpu")
    assert (again.metadata["started_at"], (run.folder / "video.mp4").stat().st_mtime_ns) == before
    assert spec_of(again) == asked
    with pytest.raises(RecordError, match="holds more than a run") as refused:
        (folder / "notes").mkdir()
        (folder / "notes" / "notes.txt").write_text("mine")
        measure(asked, folder / "notes", "cpu")
    assert refused.value.fields == {"folder": folder / "notes"}


def test_real_and_forecast_give_the_same_table(measured):
    asked, _, observations = measured
    real = phases_frame(observations)
    fake = forecast_spec(asked, device="cpu")
    assert real["peak_bytes"].to_list() == pytest.approx([phase.peak_bytes for phase in fake.phases], rel=1e-3)
    assert list(real["phase"]) == [phase.phase for phase in fake.phases]
    assert real["seconds"].gt(0).all()
    assert real["generation"].eq(1).all()
    guessed = observe([asked], "forecast", Path("nowhere"), progress=False)
    table = phases_frame(guessed)
    assert list(table.columns) == list(real.columns)
    assert (table.dtypes == real.dtypes).all()
    assert table["seconds"].isna().all()
    assert (device_of(observations), device_of(guessed)) == ("cpu", "forecast")
    whole = runs_frame(guessed).iloc[0]
    assert whole["peak_bytes"] == table["peak_bytes"].max()
    assert whole["saved_for_backward_bytes"] == table["saved_for_backward_bytes"].max() > 0


def test_a_run_that_fails_in_another_way_says_why(tmp_path):
    asked = RunSpec(request=replace(SMALL, image=str(tmp_path / "none.png")), model=SMALL_MODEL)
    with pytest.raises(I2VLabError, match=r"64x64x9: image '.*none.png' does not exist; check the path"):
        measure(asked, tmp_path / "run", "cpu")


# --- Recorded ---


def _write(folder: Path, spec: RunSpec, seconds: float, *, error: str = "") -> None:
    metadata = run_metadata("cpu", spec=spec)
    phase = PhaseRecord("decode_video", None, 0, 100, 0, None, 100, 0, 0.0, seconds, not error)
    try:
        with RunWriter(folder, metadata) as writer:
            writer.append(phase)
            if error:
                writer.append(OutOfMemoryRecord("decode_video", "decoder", 5, 90, None, error))
                raise MemoryError(error)
    except MemoryError:
        pass


def test_of_several_records_the_one_with_the_median_time_is_found(tmp_path):
    asked = RunSpec(request=SMALL, model=SMALL_MODEL)
    for name, seconds in (("a", 9.0), ("b", 1.0), ("c", 3.0)):
        _write(tmp_path / name, asked.with_request(image="elsewhere.png", seed=7), seconds)
    # With any of these the median would be another.
    _write(tmp_path / "d", replace(asked, vram_cap_bytes=2**30), 30.0)
    _write(tmp_path / "e", replace(asked, generations=2), 2.0)
    _write(tmp_path / "f", replace(asked, profiler="boundaries"), 30.0)
    _write(tmp_path / "g", replace(asked, runner="ltx-pipelines"), 30.0)
    found = recorded_runs(tmp_path)
    assert seconds_of(found.find(asked)) == 3.0
    assert found.find(asked.with_request(frames=17)) is None
    assert [seconds_of(run) for run in found.find_capped(asked)] == [30.0]
    assert found.find_capped(asked.with_request(frames=17)) == []


def test_a_run_out_of_memory_is_a_result_and_one_that_merely_failed_is_not(tmp_path):
    asked = RunSpec(request=SMALL, model=SMALL_MODEL)
    _write(tmp_path / "a", asked, 1.0, error="out of memory")
    assert recorded_runs(tmp_path).find(asked).status == "failed"
    with pytest.raises(ValueError, match="wrong"), RunWriter(tmp_path / "b", {"model": "m"}):
        raise ValueError("wrong")
    assert not is_result(read_run(tmp_path / "b"))


def test_what_is_recorded_is_looked_up_and_what_is_not_is_missing():
    known, unknown = RunSpec(request=FULL), RunSpec(request=replace(FULL, width=64, height=64))
    found = observe([known, unknown], "recorded", Path("nowhere"), progress=False)
    assert missing(found) == ["64x64x97"]
    assert device_of(found) == "NVIDIA H200"
    table = runs_frame(found)
    measured = read_run(data_dir() / "measured" / "nvidia-h200" / "1024x768x97_1").frame("phase")
    assert table["peak_bytes"].to_list() == [measured["peak_bytes"].max()]
    assert table["seconds"].to_list() == table["recorded_seconds"].to_list()
    assert phases_frame(found[1:]).empty


# --- Which ---


def test_sources_and_models_by_name():
    with pytest.raises(InvalidRequest, match="use forecast or measure or recorded") as refused:
        to_source("guess")
    assert refused.value.fields == {"source": "guess"}
    assert choose_model("auto", "forecast") == choose_model("auto", "recorded") == FULL_SIZE_MODEL
    assert choose_model("auto", "measure", "cpu") == SMALL_MODEL
    assert choose_model("auto", "measure", "cuda") == FULL_SIZE_MODEL
    assert choose_model(SMALL_MODEL, "forecast") == SMALL_MODEL
    with pytest.raises(UnknownModel):
        choose_model("nothing", "forecast")
