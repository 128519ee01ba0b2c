"""Forecasts of whole generations: against real runs, against what was measured on a GPU, and as commands."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from i2v_lab.capacity import fit as fit_module
from i2v_lab.capacity.calibration import calibrate
from i2v_lab.capacity.cards import Fit, gpu_memory_bytes, gpu_table, judge, judge_all
from i2v_lab.capacity.fit import TILINGS, FitSearch
from i2v_lab.cli.app import app
from i2v_lab.errors import ForecastError, I2VLabError, InvalidImage, InvalidRequest, RecordError, UnknownModel
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx2.components import memoizable_modules
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.pipeline.ltx2.weights import skeleton_weights
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.fake.workspaces import load_workspaces
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import Forecast, PhaseRecord, StepRecord
from i2v_lab.request import DecodeScope, I2VRequest, Quantization, Tiling, Variant
from i2v_lab.runs.forecast import forecast_request, forecast_specs
from i2v_lab.runs.sources import forecast_sweep
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import read_run
from i2v_lab.studies.accuracy import accuracy_table, measured_table, other_versions, summary_table

GIB = 2**30
STILL = "stills/lighthouse.png"
EXAMPLES = int(os.environ.get("I2V_LAB_EXAMPLES", "2"))  # 200 take an hour on one core
SMALL = I2VRequest(image=STILL, width=64, height=64, frames=9, fps=120)

tilings = st.builds(
    lambda px, over_px, frames, over_frames: Tiling(px, min(over_px, px - 32), frames, min(over_frames, frames - 8)),
    st.sampled_from([64, 96, 128]),
    st.sampled_from([0, 32, 64]),
    st.sampled_from([16, 24, 32]),
    st.sampled_from([0, 8, 16]),
)
requests = st.builds(
    I2VRequest,
    image=st.sampled_from([STILL, "stills/tower.png"]),
    prompt=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40),
    negative_prompt=st.sampled_from(["", "blurry"]),
    width=st.sampled_from([64, 128, 192]),
    height=st.sampled_from([64, 128]),
    frames=st.sampled_from([9, 17, 25]),
    fps=st.sampled_from([60.0, 120.0]),
    seed=st.integers(0, 2**63 - 1),
    variant=st.sampled_from(Variant),
    quantization=st.sampled_from(Quantization),
    tiling=st.none() | tilings,
    decode_scope=st.sampled_from([DecodeScope.NO_GRAD, DecodeScope.ESCAPED]),
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 10,
    phases=[Phase.generate],  # an example takes ten seconds: too long to look for simpler ones
    suppress_health_check=list(HealthCheck),
)
@given(requests)
def test_a_forecast_of_the_tiny_model_on_the_cpu_is_what_a_real_run_measures(tiny, request_):
    real_request = replace(request_, image=str(data_dir() / request_.image))
    with PhaseProfiler("cpu") as profiler:
        generation = TwoStagePipeline(tiny, "cpu", sinks=[profiler])(real_request)  # whose sound stays until the end
        for _ in generation.video:
            pass
    found = forecast_request(request_, "ltx-2.3-tiny", device="cpu")
    for real, fake in zip(profiler.phases, found.phases, strict=True):
        assert fake.phase == real.phase
        assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=1e-3), real
        assert fake.saved_for_backward_bytes == pytest.approx(real.saved_for_backward_bytes, rel=1e-3), real
    graph = found.phases[-1].saved_for_backward_bytes
    assert (graph == 0) is (request_.decode_scope is DecodeScope.NO_GRAD)


@pytest.mark.parametrize("variant", list(Variant))
def test_memoization_changes_no_byte(variant):
    request = replace(
        SMALL, image=str(data_dir() / STILL), width=128, frames=17, variant=variant, tiling=Tiling(64, 32)
    )
    weights = skeleton_weights(load_architecture("ltx-2.3-tiny"))
    found = []
    for memoize in (None, memoizable_modules(load_architecture("ltx-2.3-tiny"))):
        with forecasting("cuda", memoize=memoize, workspaces=load_workspaces()) as profiler:
            for _ in TwoStagePipeline(weights, "cuda", sinks=[profiler])(request).video:
                pass
        found.append(
            [(p.phase, p.start_bytes, p.peak_bytes, p.end_bytes, p.peak_reserved_bytes) for p in profiler.phases]
        )
    assert found[0] == found[1]


# --- Full size --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size(_cache) -> dict[str, Forecast]:
    """1024x768, 97 frames at 22B, without and with the defect."""
    asked = I2VRequest(image=STILL, width=1024, height=768, frames=97)
    specs = [RunSpec(request=asked).with_request(decode_scope=scope) for scope in ("no_grad", "escaped")]
    found = forecast_specs(specs, jobs=1, progress=False)
    return dict(zip(("no_grad", "escaped"), found, strict=True))


def test_at_full_size_every_phase_is_within_1_percent_of_what_was_measured(full_size):
    measured = measured_table()
    measured = measured[measured["run"].isin(["1024x768x97_1", "1024x768x97_escaped_1"])]
    table = accuracy_table(measured)
    assert len(table) == 14
    assert table["error"].abs().max() < 0.01
    assert table["error"].abs().median() < 1e-3
    summary = summary_table(table).set_index("phase")
    assert list(summary.index)[-1] == "all"
    assert summary.loc["all", "runs"] == 14
    assert summary.loc["decode_video", "worst_error"] < 1e-3


def test_measured_runs_are_those_of_the_own_pipelines_of_one_model_or_of_diffusers_models_too():
    own, every = measured_table(), measured_table(diffusers=True)
    wan = measured_table("wan-2.2-ti2v-5b")
    assert set(own["model"]) == {"ltx-2.3-22b"}
    assert set(wan["model"]) == {"wan-2.2-ti2v-5b"}
    assert len(wan) == (every["model"] == "wan-2.2-ti2v-5b").sum() > 0
    assert (every["model"] == "ltx-2.3-22b").sum() == len(own)  # and none of ltx-pipelines


def test_versions_that_runs_had_and_that_are_not_installed_are_named_once():
    here = {"torch": version("torch"), "no such package": "1.0", "python": "2.7", "i2v-lab": "0.0.1", "av": None}
    runs = [here, {**here, "torch": "1.0"}, {**here, "torch": "0.9"}, {**here, "torch": "1.0"}]
    assert other_versions(pd.DataFrame({"versions": runs})) == {"torch": ["0.9", "1.0"]}


def test_at_full_size_every_phase_of_streamed_is_within_3_percent_of_what_was_measured():
    measured = measured_table()
    table = accuracy_table(measured[measured["run"] == "1024x768x97_streamed"])
    assert len(table) == 7
    assert table["error"].abs().max() < 0.03


def test_components_measured_alone_are_within_2_percent(full_size):
    isolated = json.loads((data_dir() / "measured" / "components-h200.json").read_text())["rows"]
    for row in pd.DataFrame(isolated).itertuples():
        found = full_size["escaped" if row.autograd else "no_grad"]
        if row.phase == "decode_video":
            peak_bytes = next(phase.peak_bytes for phase in found.phases if phase.phase == row.phase)
        else:  # measured without the loading, which the phase's peak includes
            steps = [record for record in found.records if isinstance(record, StepRecord)]
            peak_bytes = max(r.peak_bytes for r in steps if r.phase == row.phase and r.step > 1)
        assert peak_bytes / GIB == pytest.approx(row.peak_allocated_gib, rel=0.02), row


def test_the_defect_is_named_and_refuses_every_card_below_100_gib(full_size):
    escaped = full_size["escaped"]
    assert escaped.peak.phase == "decode_video"
    assert escaped.peak.saved_for_backward_bytes > 0.95 * escaped.peak.peak_bytes
    verdicts = {fit.gpu: fit.verdict for fit in judge_all(escaped) if fit.memory_bytes < 100 * GIB}
    assert set(verdicts.values()) == {"no"}
    assert full_size["no_grad"].peak.phase == "encode_prompt"  # the text encoder sets the floor
    assert {fit.gpu: fit.verdict for fit in judge_all(full_size["no_grad"])}["RTX 5090"] == "fits"


# --- Cache and sweeps -------------------------------------------------------------------------------------------------


def test_a_forecast_known_already_needs_no_torch(full_size):
    code = (
        "import sys; from i2v_lab.cli.app import app\n"
        "app(['forecast', '--width', '1024', '--height', '768', '--frames', '97', '--json'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout)["peak_bytes"] == full_size["no_grad"].peak.peak_bytes


def test_the_seed_does_not_matter_and_everything_that_does_is_told_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("I2V_LAB_CACHE", str(tmp_path))
    calls: list[RunSpec] = []
    record = PhaseRecord("call", None, 0, 1, 0, None, 1, 0, 0.0, 0.0, True)

    def compute(spec: RunSpec, device: str) -> tuple[tuple[PhaseRecord, ...], int]:
        calls.append(spec)
        return (record,), 0

    monkeypatch.setattr("i2v_lab.runs.forecast._compute", compute)
    assert forecast_request(SMALL).records == (record,)
    assert forecast_request(replace(SMALL, seed=3)).records == (record,)
    assert len(calls) == 1
    others = [
        replace(SMALL, frames=17),
        replace(SMALL, prompt="a"),
        replace(SMALL, fps=60),
        replace(SMALL, image="stills/tower.png"),
    ]
    for other in others:
        forecast_request(other)
    forecast_request(SMALL, "ltx-2.3-tiny")
    forecast_request(SMALL, device="cpu")
    assert len(calls) == 7
    for file in (tmp_path / "forecasts").iterdir():
        file.write_text(file.read_text()[: random.randrange(100)])
    forecast_request(SMALL)
    assert len(calls) == 8  # a damaged file is computed again


def test_a_sweep_is_a_tidy_table_in_the_order_asked_for(capfd):
    table = forecast_sweep([replace(SMALL, frames=17), replace(SMALL, tiling=None)], "ltx-2.3-tiny", jobs=2)
    assert list(table["frames"].unique()) == [17, 9]
    assert len(table) == 14
    assert table[table["frames"] == 9]["tile_px"].isna().all()
    assert table[table["frames"] == 17]["tile_px"].eq(768).all()
    assert (table["peak_bytes"] >= table["start_bytes"]).all()
    assert "forecasts: 100%" in capfd.readouterr().err


def test_what_is_wrong_with_a_request_is_said_before_torch_is_needed(tmp_path):
    with pytest.raises(UnknownModel):
        forecast_request(SMALL, "nothing")
    with pytest.raises(InvalidImage, match="does not exist"):
        forecast_request(replace(SMALL, image=str(tmp_path / "none.png")), "ltx-2.3-tiny")


def test_an_error_in_another_process_arrives_whole(tmp_path):
    with pytest.raises(InvalidImage, match="does not exist; check the path"):
        forecast_specs(
            [RunSpec(request=replace(SMALL, image=str(tmp_path / "none.png")), model="ltx-2.3-tiny")],
            jobs=1,
            progress=False,
        )
    assert ForecastError("x", operator="y").fields == {"operator": "y"}


# --- Cards ------------------------------------------------------------------------------------------------------------


def _found(allocated: int, reserved: int, context: int = 0) -> Forecast:
    return Forecast((PhaseRecord("p", None, 0, allocated, 0, reserved, allocated, 0, 0.0, 0.0, True),), context, 0.0)


def test_a_card_fits_what_is_reserved_with_a_margin_and_is_tight_for_what_is_allocated():
    assert judge(_found(90, 100, 5), "card", 111) == Fit("card", 111, "fits")  # 6 % above the reserved bytes
    assert judge(_found(90, 100, 5), "card", 110).verdict == "tight"
    assert judge(_found(90, 100, 5), "card", 95).verdict == "tight"
    assert judge(_found(90, 100, 5), "card", 94).verdict == "no"


def test_every_card_has_a_size_that_its_source_gives():
    table = gpu_table()
    assert table["gpu"].is_unique
    assert set(table["kind"]) == {"consumer", "workstation", "data-centre"}
    for row in table.itertuples():
        number, unit = row.source.split()[:2]
        if unit in ("GiB", "MiB"):
            stated = float(number) * (GIB if unit == "GiB" else 2**20)
            stated *= 0.98 if "less 2 %" in row.source else 1
            assert row.memory_bytes == pytest.approx(stated, abs=1), row.gpu
    assert gpu_memory_bytes(" rtx 5090") == 33672543600
    with pytest.raises(InvalidRequest, match=r"gpu='GTX 1' is not in data/gpus.csv; use one of: RTX 4050 Laptop 6GB, "):
        gpu_memory_bytes("GTX 1")


# --- The largest that fits --------------------------------------------------------------------------------------------


@pytest.fixture
def simple_law(monkeypatch) -> list[I2VRequest]:
    """In the place of forecasts, a law whose answers can be told by hand: a byte for each pixel, frame and tile."""
    tried: list[I2VRequest] = []

    def law(request: I2VRequest, model: str) -> Forecast:
        tried.append(request)
        tile = request.tiling.tile_px * request.tiling.tile_frames if request.tiling else 10**6
        return _found(allocated=1, reserved=request.width * request.height * request.frames + tile)

    monkeypatch.setattr(fit_module, "forecast_request", law)
    return tried


@given(budget=st.integers(0, 3 * 10**8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_search_finds_the_last_size_and_the_most_frames_that_fit(simple_law, budget):
    request = I2VRequest(image=STILL, width=640, height=448, frames=17)
    tile = 768 * 80
    sizes = [(max(1, round(h * 4 / 3 / 64)) * 64, h) for h in range(64, 2177, 64)]
    fitting = [(w, h) for w, h in sizes if (w * h * 17 + tile) * 106 // 100 <= budget]
    largest = FitSearch(budget).largest_size(request)
    assert (largest.request and (largest.request.width, largest.request.height)) == (fitting[-1] if fitting else None)
    assert largest.at_the_bound is (len(fitting) == len(sizes))
    counts = [n for n in range(1, 258, 8) if (640 * 448 * n + tile) * 106 // 100 <= budget]
    most = FitSearch(budget).most_frames(request)
    assert (most.request and most.request.frames) == (counts[-1] if counts else None)


def test_the_search_leaves_out_what_the_model_refuses(simple_law):
    """One frame of 64x64 is a single latent position, which the tiny upsampler cannot normalize."""
    request = I2VRequest(image=STILL, width=64, height=64)
    search = FitSearch(10**9, "ltx-2.3-tiny")
    assert [each.frames for each in search.by_frames(request)][:2] == [9, 17]
    assert [each.frames for each in search.by_frames(replace(request, width=640, height=448))][:2] == [1, 9]
    assert search.by_size(replace(request, frames=1))[0].width > 64
    assert FitSearch(1, "ltx-2.3-tiny").most_frames(request).request is None
    assert simple_law[-1].frames == 9


def test_the_search_takes_few_steps(simple_law):
    FitSearch(10**7).largest_size(I2VRequest(image=STILL, frames=17))
    assert len(simple_law) <= 7


def test_the_first_tiling_that_fits_is_taken_and_none_is_the_first(simple_law):
    request = I2VRequest(image=STILL, width=64, height=64, frames=1)
    assert FitSearch(10**7).fastest_tiling(request).request.tiling is None
    enough = (64 * 64 + 768 * 80) * 106 // 100
    assert FitSearch(enough).fastest_tiling(request).request.tiling == TILINGS[2]
    assert FitSearch(enough - 1).fastest_tiling(request).request.tiling == TILINGS[3]
    assert FitSearch(1).fastest_tiling(request).request is None


# --- Commands ---------------------------------------------------------------------------------------------------------

TINY = ["--model", "ltx-2.3-tiny", "--width", "64", "--height", "64", "--frames", "9", "--fps", "120"]


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_forecast_prints_one_json_object(tmp_path):
    report = json.loads(_run("forecast", *TINY, "--vram-cap-gib", "0.5", "--json", "--profile", str(tmp_path / "run")))
    assert report["model"] == "ltx-2.3-tiny"
    assert I2VRequest.from_json(report["request"]) == SMALL
    assert [phase["phase"] for phase in report["phases"]] == [
        "encode_prompt",
        "encode_image",
        "denoise_stage_1",
        "upsample_latent",
        "denoise_stage_2",
        "decode_audio",
        "decode_video",
    ]
    assert report["peak_bytes"] == max(phase["peak_bytes"] for phase in report["phases"])
    unknown = {"predicted_seconds": None, "predicted_measured": None}
    assert report["fits"][0] == {"gpu": "cap of 0.5 GiB", "memory_bytes": GIB // 2, "verdict": "no", **unknown}
    assert {fit["verdict"] for fit in report["fits"][1:]} == {"fits"}
    run = read_run(tmp_path / "run")
    assert (run.status, run.metadata["device"]) == ("complete", "forecast")
    assert run.frame("phase")["peak_bytes"].max() == report["peak_bytes"]


def test_a_forecast_prints_no_lines_of_a_real_allocator(monkeypatch, capfd):
    monkeypatch.setenv("I2V_LAB_VRAM", "1")
    forecast_request(SMALL, "ltx-2.3-tiny")
    assert "[vram]" not in capfd.readouterr().err


def test_forecast_as_text_names_the_peak_its_holders_and_the_cards():
    text = _run("forecast", *TINY)
    assert text.startswith("ltx-2.3-tiny, 64x64, 9 frames, distilled, fp8-cast, decode no_grad\npeak ")
    assert "Live at the peak, in " in text
    assert "RTX PRO 6000 Blackwell" in text
    assert "for the CUDA context" in text
    assert "--vram-budget" not in text
    assert "\nno: as it is; --vram-budget" in _run("forecast", *TINY, "--vram-cap-gib", "0.5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["forecast", "--width", "500"], "width=500 is not a multiple of 64; use 448 or 512"),
        (["forecast", "--frames", "24"], "frames=24 is not 8k+1; use 17 or 25"),
        (["forecast", "--vram-cap-gib", "0"], "vram_cap_gib=0.0 is not above 0; use the card's GiB"),
        (["fit", "--gpu", "24GiB", "--width", "64"], "width=64 and height=None belong together; give both or neither"),
        (["fit", "--gpu", "24GiB", "--aspect", "wide"], "aspect='wide' is not two numbers; write it as 4:3"),
    ],
)
def test_commands_refuse_bad_options_in_one_line(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, I2VLabError)
    assert (result.exception.exit_status, str(result.exception)) == (2, message)


def test_fit_says_what_fits_and_what_does_not(simple_law):
    answer = json.loads(_run("fit", "--memory", "resident", "--gpu", "0.01GiB", "--frames", "17", "--json"))
    assert (answer["sought"], answer["request"]["width"], answer["request"]["height"]) == ("size", 832, 640)
    text = _run("fit", "--memory", "resident", "--gpu", "0.01 GiB", "--width", "640", "--height", "448")
    assert text.startswith("640x448, 33 frames, tiles of 768 px x 80 frames fits 0.01 GiB (10.2 MiB): ")
    small = ["--model", "ltx-2.3-tiny", "--width", "64", "--height", "64", "--frames", "9"]  # then placed, by forecasts
    result = CliRunner().invoke(app, ["fit", "--memory", "resident", "--gpu", "0.00001GiB", *small])
    assert result.exit_code == 1
    assert result.stdout.startswith("nothing fits 0.00001GiB (10.5 KiB): with --memory resident the smallest request ")


def test_accuracy_says_so_where_nothing_was_measured(tmp_path):
    none_of_it = ["--model", "ltx-2.5-tiny-diffusers"]  # of which the package has no run
    for words in (
        *([str(tmp_path), *rest] for rest in ([], ["--time"], ["--json"])),
        none_of_it,
        ["--time", *none_of_it],
    ):
        result = CliRunner().invoke(app, ["accuracy", *words])
        assert type(result.exception) is RecordError
        assert result.exception.exit_status == 2
        assert result.output == "", "nothing is announced that is refused"
    assert type(CliRunner().invoke(app, ["accuracy", "--model", "nothing"]).exception) is UnknownModel


# --- Calibration ------------------------------------------------------------------------------------------------------


def test_the_committed_model_is_what_calibration_makes_of_the_committed_measurements(tmp_path):
    out = tmp_path / "workspaces.json"
    assert _run("calibrate", "--out", str(out)).splitlines()[-1] == f"wrote {out}"
    assert json.loads(out.read_text()) == json.loads((data_dir() / "workspaces.json").read_text())


def test_calibration_finds_the_law_behind_measurements_with_outliers(tmp_path):
    sizes = [(2**20 * (10 + i), 2**20 * (5 + i % 7), 2**20 * (1 + i % 3)) for i in range(60)]
    table = pd.DataFrame(sizes, columns=["input_bytes", "output_bytes", "weight_bytes"])
    table["workspace_bytes"] = table["input_bytes"] + 2 * table["output_bytes"] + 3 * table["weight_bytes"]
    table.loc[::5, "workspace_bytes"] += 2**24
    table = table.assign(contiguous=True, grouped=False)
    source = tmp_path / "gpu.json"
    source.write_text(json.dumps({"gpu": "g", "torch": "t", "cudnn": 1, "cublas_bytes": 2, "context_bytes": 3}))
    table.to_csv(source.with_suffix(".csv"), index=False)
    list(calibrate(source, tmp_path / "model.json"))
    model = json.loads((tmp_path / "model.json").read_text())
    assert (model["input_factor"], model["output_factor"], model["weight_factor"]) == (1, 2, 3)
    with pytest.raises(RecordError, match="cannot be read"):
        list(calibrate(tmp_path / "none.json"))
    table.drop(columns="grouped").to_csv(source.with_suffix(".csv"), index=False)
    with pytest.raises(RecordError, match="lack columns: grouped"):
        list(calibrate(source, tmp_path / "model.json"))
