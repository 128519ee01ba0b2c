"""Seconds of forecasts: by what a segment waits for, on cards that were measured and on others."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch
from test_operator_costs import CASES, rows_of
from typer.testing import CliRunner

from i2v_lab.capacity.cards import card_name, gpu_table
from i2v_lab.capacity.clock import on_clock, run_on_clock
from i2v_lab.capacity.device_profile import (
    DeviceProfile,
    Rate,
    derived_profile,
    device_profile,
    has_profile,
    measured_profile,
    profile_from_json,
    profile_to_json,
)
from i2v_lab.capacity.rate_measurement import RateMeasurement, rate_cases
from i2v_lab.capacity.time_calibration import calibrate_time
from i2v_lab.capacity.time_model import (
    phase_times,
    predicted_seconds,
    seconds_from_files,
    video_seconds,
)
from i2v_lab.cli.app import app
from i2v_lab.cli.fit import _predicted
from i2v_lab.errors import DeviceUnavailable, InvalidRequest, RecordError
from i2v_lab.paths import data_dir, user_devices_dir
from i2v_lab.profiling.records import CostRecord, Forecast, HostMemoryRecord, PhaseRecord, StepRecord, TimelineRecord
from i2v_lab.runs.forecast import forecast_spec
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.runs.store import Run, RunWriter, read_run
from i2v_lab.studies.time_accuracy import runs_table, time_summary, time_table

DEVICE = DeviceProfile(
    name="a card",
    source="made up",
    operators={
        "pointwise": Rate(0.0, None, 100.0),
        "matmul": Rate(1.0, 10.0, None),
        "matmul float32": Rate(0.0, 1.0, None),
        "flash attention 64": Rate(0.0, 1.0, None),
        "flash attention 256": Rate(0.0, 5.0, None),
    },
    copies={
        "copy to device, page-locked": Rate(0.0, None, 10.0),
        "copy to host, page-locked": Rate(0.0, None, 10.0),
        "copy to host, pageable": Rate(0.5, None, 10.0),
    },
    host_s={"matmul": 2.0, "view": 0.5, "weight": 0.25, "module": 1.0, "build": 8.0, "operator": 1.0},
    once_s={"first convolution": 3.0, "other": 4.0},
    load={"lock": 20.0},
)


def forecast(*records):
    return Forecast(records, 0, 0.0)


def phase(name="a", parent=None):
    return PhaseRecord(name, parent, 0, 1, 0, 1, 1, 0, 0.0, 0.1, True)


def seconds(*rows, repeats=1):
    return predicted_seconds(forecast(CostRecord("a", repeats, rows), phase()), DEVICE)


SEGMENTS = {
    "the device": ([("matmul", "bfloat16", 2, 100, 9)], 2 * (1 + 10)),
    "copies to the host, whose memory is locked, behind kernels": (
        [("copy to host, page-locked", "", 1, 0, 300), ("matmul", "bfloat16", 1, 100, 0)],
        30 + 11 + 15,
    ),
    "the host": ([("pointwise", "bfloat16", 4, 0, 10), ("view", "", 2, 0, 0)], 4 + 1),
    "another dtype": ([("matmul", "float32", 1, 100, 0)], 100),
    "a kind that is not known": ([("efficient attention 384 masked", "float32", 1, 50, 0)], 10),
    "page-locked copies": ([("copy to device, page-locked", "", 1, 0, 300), ("matmul", "bfloat16", 1, 100, 0)], 30),
    "compute above copies": ([("copy to device, page-locked", "", 1, 0, 30), ("matmul", "bfloat16", 1, 100, 0)], 11),
    "pageable copies": ([("copy to host, pageable", "", 2, 0, 100), ("matmul", "bfloat16", 1, 100, 0)], 11 + 21),
    "first uses": ([("first convolution", "", 2, 0, 0), ("first kernel", "", 1, 0, 0)], 6 + 4),
    "a build": ([("weight", "bfloat16", 4, 0, 7), ("module", "", 3, 0, 0)], 8 + 1 + 3),
}


@pytest.mark.parametrize("case", SEGMENTS)
def test_a_segment_lasts_as_long_as_what_it_waits_for(case):
    rows, expected = SEGMENTS[case]
    assert seconds(*rows) == pytest.approx(expected)


def test_segments_follow_each_other_and_nested_phases_count_once():
    step = CostRecord("inner", 3, (("matmul", "bfloat16", 1, 100, 0),))
    rest = CostRecord("outer", 1, (("pointwise", "bfloat16", 1, 0, 500),))
    records = forecast(step, phase("inner", "outer"), rest, phase("outer"), phase("idle"))
    times = phase_times(records, DEVICE)
    assert [(time.phase, time.parent, time.seconds) for time in times] == [
        ("inner", "outer", 33),
        ("outer", None, 38),
        ("idle", None, 0),
    ]
    assert (times[1].device_s, times[1].host_s) == (38, 7)
    assert predicted_seconds(records, DEVICE) == 38


def test_a_card_that_was_not_measured_has_the_measured_efficiencies_of_its_published_peaks():
    base, other = device_profile("NVIDIA H100 80GB HBM3"), device_profile("rtx4090")
    assert base == measured_profile()
    assert other.rate("matmul", "bfloat16").flops_per_s == pytest.approx(
        base.rate("matmul", "bfloat16").flops_per_s * 165.2 / 989
    )
    assert other.rate("matmul", "float32").flops_per_s == pytest.approx(
        base.rate("matmul", "float32").flops_per_s * 82.6 / 67
    )
    assert other.rate("pointwise", "bfloat16").bytes_per_s == pytest.approx(
        base.rate("pointwise", "bfloat16").bytes_per_s * 1008 / 3352
    )
    assert other.rate("strided pointwise", "float32").bytes_per_s < 1008e9  # limited by instructions on the H100
    flash, cudnn = (other.rate(f"{kernel} attention 128", "bfloat16") for kernel in ("flash", "cudnn"))
    assert flash == cudnn  # torch prefers flash attention there
    assert other.copy_seconds(2**30, page_locked=True) > base.copy_seconds(2**30, page_locked=True)
    assert other.copy_seconds(2**30, page_locked=False) == base.copy_seconds(2**30, page_locked=False)
    assert (base.measured, base.caveat) == (True, "")
    assert (other.measured, other.caveat) == (False, "not measured: from published rates")


def test_a_card_that_was_measured_is_close_to_what_the_rates_of_another_say_of_it():
    measured, derived = device_profile("H200"), derived_profile("H200")
    assert (measured.measured, derived.measured) == (True, False)
    assert measured.operators.keys() == derived.operators.keys()
    for kind in ("matmul", "cudnn attention 128", "convolution 3d", "pointwise", "strided pointwise", "layer norm"):
        of = [profile.rate(kind, "bfloat16").seconds(10**12, 10**8) for profile in (measured, derived)]
        assert of[0] == pytest.approx(of[1], rel=0.15), kind


def test_the_profile_that_a_user_measured_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = user_devices_dir()
    assert folder.is_relative_to(tmp_path)
    assert not has_profile("A card of tomorrow")
    folder.mkdir(parents=True)
    for name in ("NVIDIA H200", "NVIDIA GeForce RTX 4090", "A card of tomorrow"):
        profile = dataclasses.replace(DEVICE, name=name)
        (folder / f"{name}.json").write_text(json.dumps(profile_to_json(profile)))
    for gpu in ("H200", "rtx 4090", "A card of tomorrow"):
        assert has_profile(gpu)
        assert device_profile(gpu).host_s == DEVICE.host_s
    assert device_profile("H100 80GB") == measured_profile()
    (folder / "NVIDIA H200.json").write_text("{")
    with pytest.raises(RecordError) as refused:
        device_profile("H200")
    assert refused.value.fields["path"] == folder / "NVIDIA H200.json"


def test_every_row_of_published_peaks_is_of_a_card_in_the_tables_and_names_its_source():
    with (data_dir() / "devices" / "peaks.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        assert card_name(row["gpu"]) == row["gpu"]
        assert "PCIe" in row["source"]
        tensor, float32, memory, link = (
            float(row[name]) for name in ("tensor_tflops", "float32_tflops", "memory_gb_s", "link_gb_s")
        )
        assert tensor > float32 > 5
        assert memory > 5 * link > 50
    assert {*gpu_table()["gpu"]} - {row["gpu"] for row in rows} == {"T4"}


@pytest.mark.parametrize(
    "gpu", ["24GiB", "RTX 9999", "Tesla T4", "Instinct MI300X", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"]
)
def test_a_card_without_published_peaks_is_refused(gpu):
    with pytest.raises(InvalidRequest) as refused:
        device_profile(gpu)
    assert refused.value.fields["gpu"] == gpu


def test_every_kind_of_operator_has_a_rate_or_a_cost_of_the_host():
    records = [record for call, _ in CASES.values() for record in rows_of(call)]
    for gpu in ("H100 80GB", "RTX 4090"):
        times = phase_times(forecast(*[CostRecord("a", 1, r.rows) for r in records], phase()), device_profile(gpu))
        assert 0 < times[0].device_s < times[0].host_s < times[0].seconds < 10


def test_a_profile_is_what_its_json_was():
    values = json.loads(json.dumps(profile_to_json(DEVICE)))
    assert profile_from_json(values) == DEVICE
    for damaged in ({}, {**values, "operators": {"pointwise": 3}}, {**values, "load": None}):
        with pytest.raises(RecordError):
            profile_from_json(damaged)


TINY = ["--model", "ltx-2.3-tiny", "--width", "64", "--height", "64", "--frames", "9"]


def test_forecasts_on_the_command_line_have_seconds_on_the_card_that_is_named():
    def values(*more):
        result = CliRunner().invoke(app, ["forecast", *TINY, "--json", *more])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    on_h100, on_l4 = values(), values("--gpu", "NVIDIA L4")
    assert on_h100["predicted_on"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert on_l4["predicted_on"]["gpu"] == "L4"
    total = sum(each["predicted_seconds"] for each in on_h100["phases"])
    assert on_h100["predicted_seconds"] == pytest.approx(total)
    assert 0 < total <= on_l4["predicted_seconds"]
    fits = {each["gpu"]: each["predicted_seconds"] for each in on_h100["fits"]}
    assert fits["L4"] == pytest.approx(on_l4["predicted_seconds"])
    assert fits["T4"] is None
    assert on_h100["peak_bytes"] == on_l4["peak_bytes"]


def test_a_card_that_is_not_known_is_refused_before_anything_runs():
    result = CliRunner().invoke(app, ["forecast", "--gpu", "RTX 9999"])
    assert isinstance(result.exception, InvalidRequest)


def _rows(kind, cases, rate, **values):
    """Measurements of operators that take exactly what a rate says."""
    for case, flops, nbytes in cases:
        yield {"kind": kind, "host_s": 1e-9, "first_s": 1.0, **values, **case, "seconds": rate.seconds(flops, nbytes)}


def test_rates_are_fitted_to_measured_operators(tmp_path):
    matmul, pointwise = Rate(2e-6, 5e14, 2e12), Rate(1e-6, None, 3e12)
    sizes = [(1, 4096, 4096), (64, 64, 64), (4096, 64, 4096), (4096, 4096, 4096), (8192, 4096, 128)]
    linears = [
        ({"m": m, "k": k, "n": n, "bias": False}, 2 * m * k * n, 2 * (m * k + k * n + m * n)) for m, k, n in sizes
    ]
    adds = [({"what": "pow", "elements": 512 * rows}, 0, 4 * 512 * rows) for rows in (1, 2**19, 2**20)]
    launched = ("F.linear", "nn.Conv2d", "sdpa", "nn.LayerNorm", "view", "empty", "add")
    copied = ("to device, pageable", "to device, page-locked", "to host, new", "to host, page-locked")
    rows = [
        {"kind": "device", "name": "NVIDIA T9 1GB", "torch": "2", "cudnn": 9},
        *_rows("linear", linears, matmul, dtype="bf16"),
        *_rows("memory", adds, pointwise, dtype="bf16"),
        *({"kind": "launch", "what": what, "host_s": 1e-5} for what in launched),
        *({"kind": "copy", "what": what, "bytes": b, "seconds": 1e-5 + b / 1e9} for what in copied for b in (8, 10**9)),
        *({"kind": "copy", "what": what, "bytes": 10**9, "seconds": 3.0} for what in copied),  # of another host
        {"kind": "lock", "what": "cudaHostRegister", "bytes": 10, "seconds": 0.5},
        *({"kind": "file", "what": f"read {how}", "bytes": 10, "seconds": 2} for how in ("warm by threads", "cold")),
        {"kind": "encode", "width": 2, "height": 3, "frames": 4, "seconds": 12},
        {"kind": "convolution", "first_s": 3, "seconds": 1},
        {"kind": "attention", "kernel": "CUDNN_ATTENTION", "first_s": 5, "seconds": 1},
    ]
    source, out = tmp_path / "rates.jsonl", tmp_path / "device.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = list(calibrate_time(source, out))
    assert lines[-1] == f"wrote {out}"
    profile = profile_from_json(json.loads(out.read_text()))
    assert profile.name == "NVIDIA T9 1GB"
    fitted = profile.operators["matmul"]
    assert fitted.latency_s == pytest.approx(2e-6, rel=0.01)
    assert (fitted.flops_per_s, fitted.bytes_per_s) == pytest.approx((5e14, 2e12), rel=0.01)
    assert profile.operators["pointwise"].bytes_per_s == pytest.approx(3e12, rel=0.01)
    assert profile.once_s["first cudnn attention"] == 4
    assert profile.load == {"read": 5, "disk": 5, "lock": 20, "encoded_pixels": 2}
    assert profile.copy_seconds(10**9, page_locked=False) == pytest.approx(2.0, rel=0.01)
    assert profile.copy_seconds(10**9, page_locked=True) == pytest.approx(1.0, rel=0.01)
    for damaged in (rows[1:], [row for row in rows if row["kind"] != "launch"], [3]):
        source.write_text("".join(json.dumps(row) + "\n" for row in damaged))
        with pytest.raises(RecordError) as refused:
            list(calibrate_time(source, out))
        assert refused.value.fields["path"] == source


def test_the_device_that_is_here_is_measured_and_its_profile_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    cases = [
        {"kind": "linear", "dtype": "f32", "m": 256, "k": 256, "n": 256},
        {"kind": "attention", "dtype": "f32", "kernel": "FLASH_ATTENTION", "b": 1, "h": 1, "l": 4, "s": 4, "e": 8},
        {"kind": "convolution", "dtype": "bf16", "shape": [1, 2, 4, 4], "channels": 2, "kernel": [3, 3]}
        | {"stride": 1, "padding": 1},
        {"kind": "memory", "dtype": "f32", "what": "add", "elements": 512},
        {"kind": "memory", "dtype": "c128", "what": "silu", "elements": 512},  # has no kernel
    ]
    small = RateMeasurement("cpu", cases, 60.0, 2**20, (2**10, 2**20), ((32, 32, 2),))
    *lines, samples, written = calibrate_time(measurement=small)
    folder = user_devices_dir()
    assert (samples, written) == (f"wrote {folder / 'cpu.jsonl'}", f"wrote {folder / 'cpu.json'}")
    assert {path.name for path in folder.iterdir()} == {"cpu.jsonl", "cpu.json"}
    assert lines[0].startswith("measuring cpu:")
    profile = device_profile("cpu")
    assert (profile.name, profile.measured) == ("cpu", True)
    assert profile.load.keys() == {"read", "disk", "lock", "encoded_pixels"}
    assert all(value > 0 for value in (*profile.load.values(), *profile.host_s.values()))
    assert all(value >= 0 for value in profile.once_s.values())
    measured = [json.loads(line) for line in (folder / "cpu.jsonl").read_text().splitlines()]
    product = next(row for row in measured if row["kind"] == "linear")
    assert profile.rate("matmul", "float32").seconds(2 * 256**3, 0) == pytest.approx(product["seconds"] + 4e-6)
    again = tmp_path / "again.json"
    list(calibrate_time(folder / "cpu.jsonl", again))
    assert again.read_text() == (folder / "cpu.json").read_text()


def test_without_a_card_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    if not torch.cuda.is_available():
        result = CliRunner().invoke(app, ["calibrate", "--time"])
        assert isinstance(result.exception, DeviceUnavailable)
        assert list(tmp_path.rglob("*")) == []


def test_operators_of_every_kind_are_measured_before_those_of_one_kind_end():
    cases = rate_cases()
    assert len(cases) > 370
    assert len({json.dumps(case) for case in cases}) == len(cases)
    assert {each["kind"] for each in cases[:8]} >= {"linear", "bmm", "attention", "convolution", "memory"}


def test_a_later_generation_loads_no_libraries_and_a_warm_one_fills_no_host_memory():
    rows = [("copy to host, page-locked", "", 1, 0, 300), ("first kernel", "", 2, 0, 0), ("view", "", 20, 0, 0)]
    records = forecast(CostRecord("a", 2, tuple(rows)), phase())
    for first, warm, each in ((True, False, 30 + 15 + 8), (False, False, 30 + 15), (False, True, 11)):
        (time,) = phase_times(records, DEVICE, first=first, warm=warm)
        assert time.seconds == predicted_seconds(records, DEVICE, first=first, warm=warm) == 2 * each


def test_reading_weights_from_files_overlaps_with_the_phase_that_needs_them():
    device = dataclasses.replace(DEVICE, load={"read": 100.0, "disk": 10.0, "lock": 20.0})
    built = CostRecord("a", 1, (("weight", "bfloat16", 4, 0, 25), ("view", "", 2, 0, 0)))  # 100 bytes, 1 + 1 + 8 s
    streamed = HostMemoryRecord("b", "transformer", 0, 0, (0, 40, 300), 0)
    compute = CostRecord("b", 1, (("view", "", 20, 0, 0), ("weight", "bfloat16", 1, 0, 50)))  # 10.25 + 8 s
    records = forecast(built, phase("a"), compute, streamed, phase("b"), phase("c"))
    times = phase_times(records, device)
    assert [each.read_bytes for each in times] == [100, 300, 0]
    assert [each.seconds for each in times] == [10, 18.25, 0]
    assert seconds_from_files(records, device) == {"page cache": 10 + 18.25, "disk": 10 + 30}


def test_events_of_a_forecast_are_at_predicted_seconds():
    step = CostRecord("a", 1, (("view", "", 4, 0, 0),))  # 2 s
    first = CostRecord("a", 1, (("view", "", 12, 0, 0),))
    inner = CostRecord("b", 1, (("view", "", 2, 0, 0),))
    moments = [TimelineRecord("a", time_s, 0, 0, 0, 0) for time_s in (0.5, 1.0, 1.05, 1.1, 1.5, 3.0)]
    steps = [StepRecord("a", n, 2, 0, seconds) for n, seconds in ((1, 0.5), (2, 0.5))]
    records = (*moments, first, step, *steps, PhaseRecord("a", None, 0, 1, 0, 1, 1, 0, 0.5, 1.0, True), inner)
    nested = PhaseRecord("b", "c", 0, 1, 0, 1, 1, 0, 2.0, 1.0, True)
    records += (nested, PhaseRecord("c", None, 0, 1, 0, 1, 1, 0, 2.0, 2.0, True))
    clocked = on_clock(forecast(*records), DEVICE)
    assert [(each.phase, each.start_s, each.seconds) for each in clocked.phases] == [
        *(("a", 0, 8), ("b", 8, 1), ("c", 8, 1)),
    ]
    assert [each.seconds for each in clocked.records if isinstance(each, StepRecord)] == [6, 2]
    times = [each.time_s for each in clocked.records if isinstance(each, TimelineRecord)]
    assert times == pytest.approx([0, 6, 6.2, 6.4, 8, 8.5])
    assert len(clocked.records) == len(records)


def test_the_timeline_of_a_notebook_has_the_clock_of_the_measured_card(tmp_path):
    costs = CostRecord("a", 1, (("view", "", 10**6, 0, 0),))
    moments = [TimelineRecord("a", time_s, 1, 0, 0, 0) for time_s in (0.5, 1.0, 1.5)]
    run = Run(
        tmp_path,
        {"device": "forecast"},
        (*moments, costs, PhaseRecord("a", None, 0, 1, 0, 1, 1, 0, 0.5, 1.0, True)),
        "complete",
    )
    clocked = run_on_clock(run)
    length_s = 10**6 * measured_profile().host_s["view"]
    assert clocked.metadata["clock"] == measured_profile().name
    assert [each.time_s for each in clocked.of(TimelineRecord)] == pytest.approx([0, length_s / 2, length_s])
    assert run_on_clock(clocked) is clocked
    for other in (
        dataclasses.replace(run, metadata={"device": "cuda"}),
        dataclasses.replace(run, records=(*moments, run.records[-1])),
    ):
        assert run_on_clock(other) is other


def test_a_forecast_that_is_written_has_the_clock_of_its_card(tmp_path):
    folder = tmp_path / "run"
    result = CliRunner().invoke(app, ["forecast", *TINY, "--json", "--gpu", "L4", "--profile", str(folder)])
    values, run = json.loads(result.stdout), read_run(folder)
    assert run.metadata["clock"] == "L4"
    starts = [each["predicted_start_seconds"] for each in values["phases"]]
    assert [each.start_s for each in run.of(PhaseRecord)] == pytest.approx(starts)
    assert [each.seconds for each in run.of(PhaseRecord)] == [each["predicted_seconds"] for each in values["phases"]]
    times = [each.time_s for each in run.of(TimelineRecord)]
    assert times == sorted(times)
    assert 0 < times[-1] <= values["predicted_seconds"]
    assert values["predicted_on"]["measured"] is False


def test_where_seconds_are_printed_cards_that_were_not_measured_are_told_apart():
    def said(gpu):
        return " ".join(CliRunner().invoke(app, ["forecast", *TINY, "--gpu", gpu]).stdout.split())

    printed = {gpu: said(gpu) for gpu in ("H200", "L4")}
    assert "seconds on NVIDIA H200" in printed["H200"]
    assert "seconds on L4 (not measured: from published rates)" in printed["L4"]
    assert "not known" in printed["L4"]  # in the row of the T4
    idle = forecast(CostRecord("a", 1, (("view", "", 10**6, 0, 0),)), phase())
    assert "(not measured: from published rates)" in _predicted(idle, "L4")
    assert "not measured" not in _predicted(idle, "NVIDIA H200")
    assert "is not known" in _predicted(idle, "T4")
    assert [_predicted(idle, size) for size in ("24GiB", "the budget of 8.00 GiB")] == ["", ""]


@pytest.mark.parametrize(("gib", "verdict"), [(24, "fits"), (1, "tight"), (0.5, "no")])
def test_the_verdict_of_the_card_that_is_asked_about_comes_first(monkeypatch, gib, verdict):
    monkeypatch.setattr("i2v_lab.capacity.cards.gpu_memory_bytes", lambda _: int(gib * 2**30))
    needed = json.loads(CliRunner().invoke(app, ["forecast", *TINY, "--gpu", "L4", "--json"]).stdout)["card"]
    if verdict == "tight":  # a byte less than it needs
        monkeypatch.setattr("i2v_lab.capacity.cards.gpu_memory_bytes", lambda _: needed["needed_bytes"] - 1)
        needed = json.loads(CliRunner().invoke(app, ["forecast", *TINY, "--gpu", "L4", "--json"]).stdout)["card"]
    assert needed["verdict"] == verdict
    assert needed["spare_bytes"] == needed["memory_bytes"] - needed["needed_bytes"]
    first = CliRunner().invoke(app, ["forecast", *TINY, "--gpu", "L4"]).stdout.splitlines()[0]
    begins = {"fits": "fits L4 (24.00 GiB) with ", "tight": "fits L4 (", "no": "does not fit L4 (512.0 MiB): needs "}
    assert first.startswith(begins[verdict])
    assert ("tightly" in first) == (verdict == "tight")
    assert ('`i2v-lab fit --gpu "L4" --model ltx-2.3-tiny --width 64' in first) == (verdict == "no")
    plain = CliRunner().invoke(app, ["forecast", *TINY])
    assert plain.stdout.startswith("ltx-2.3-tiny, 64x64")
    assert json.loads(CliRunner().invoke(app, ["forecast", *TINY, "--json"]).stdout)["card"] is None


def _recorded(folder, spec, card, result, **changes):
    metadata = {"device": "cuda", "device_name": card, "spec": spec.to_json()}
    with RunWriter(folder, metadata) as writer:
        for each in result.phases:
            writer.append(dataclasses.replace(each, seconds=2.0, **changes))


def test_predicted_seconds_are_compared_with_recorded_ones(tmp_path):
    request = make_request("ltx-2.3-tiny", width=64, height=64, frames=9)
    spec = RunSpec(request=request, model="ltx-2.3-tiny", write_video=True)
    result = forecast_spec(spec)
    _recorded(tmp_path / "a", spec, "NVIDIA H200", result)
    _recorded(tmp_path / "b", dataclasses.replace(spec, write_video=False), "NVIDIA H100 80GB HBM3", result)
    _recorded(tmp_path / "broken", spec, "NVIDIA H200", result, completed=False)
    _recorded(tmp_path / "unknown", spec, "A card of tomorrow", result)
    times = time_table(tmp_path)
    assert list(times["run"].unique()) == ["a", "b"]
    for run, card, pixels in (("a", "H200", 64 * 64 * 9), ("b", "H100 80GB", 0)):
        device = device_profile(card)
        expected = [time.seconds for time in phase_times(result, device)]
        expected[-1] += video_seconds(pixels, device)
        own = times[times["run"] == run]
        assert own["phase"].tolist() == [each.phase for each in result.phases]
        assert own["predicted_seconds"].tolist() == pytest.approx(expected)
        assert own["error"].tolist() == pytest.approx([seconds / 2 - 1 for seconds in expected])
        derived = [time.seconds for time in phase_times(result, derived_profile(card))]
        derived[-1] += video_seconds(pixels, derived_profile(card))
        assert own["by_peaks_seconds"].tolist() == pytest.approx(derived)
        assert (derived == expected) == (card == "H100 80GB")
    summary = time_summary(times).set_index("what")
    assert summary.loc["runs, NVIDIA H200, by published peaks", "cases"] == 1
    assert "runs, NVIDIA H100 80GB HBM3, by published peaks" not in summary.index
    assert summary.loc["decode_video", "cases"] == 2
    assert summary.loc["runs", "cases"] == 2
    assert summary.loc["runs, NVIDIA H200", "worst_error"] == pytest.approx(
        abs(runs_table(times).set_index("run").loc["a", "error"])
    )
