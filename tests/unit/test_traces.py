"""A run as Perfetto and torch's memory_viz read it: checked against the trace event format, and by torch's own code."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch.cuda import _memory_viz
from typer.testing import CliRunner

from i2v_lab import PhaseProfiler, read_run
from i2v_lab.cli.app import app
from i2v_lab.errors import InvalidRequest
from i2v_lab.profiling.records import PhaseRecord, StepRecord, TimelineRecord
from i2v_lab.reporting.traces import memory_viz_snapshot, perfetto_trace
from i2v_lab.runs.store import RunWriter

# Of the trace event format, for the kinds of events that are written: what each must have besides `ph` and `name`.
REQUIRED = {"M": {"pid", "args"}, "X": {"pid", "tid", "ts", "dur"}, "C": {"pid", "ts", "args"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "run"
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    with (
        RunWriter(path, {"model": "net", "device": "cpu"}) as writer,
        PhaseProfiler(on_record=writer.append) as profiler,
    ):
        profiler.component("net", net)
        with profiler.phase("outer"):
            x = torch.ones(32, 64)
            with profiler.phase("inner"):
                kept = net(x)  # noqa: F841
        writer.append(StepRecord("denoise", 1, 1, 5, 0.25))
        writer.append(PhaseRecord("denoise", None, 3, 5, 4, 2**21, 5, None, 7.0, 0.5, True))
    return path


def test_a_trace_has_the_events_of_its_format_and_the_bytes_of_the_records(folder, tmp_path):
    out = tmp_path / "trace.json"
    result = CliRunner().invoke(app, ["show", str(folder), "--export", "perfetto", "--out", str(out)])
    assert result.stderr == f"wrote {out}\n"
    trace = json.loads(out.read_text())
    run = read_run(folder)
    assert trace == json.loads(json.dumps(perfetto_trace(run)))
    for event in trace["traceEvents"]:
        assert REQUIRED[event["ph"]] <= event.keys()
        assert event["name"]
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert all(type(value) is int for value in event["args"].values())
    slices = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}
    for phase in run.of(PhaseRecord):
        shown = slices[phase.phase]
        assert shown["ts"] == pytest.approx(1e6 * phase.start_s, abs=1e-3)
        assert shown["dur"] == pytest.approx(1e6 * phase.seconds, abs=1e-3)
        assert shown["args"]["peak_bytes"] == phase.peak_bytes
    outer, inner = slices["outer"], slices["inner"]
    assert outer["tid"] == inner["tid"]
    assert outer["ts"] <= inner["ts"] <= inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert slices["denoise 1/1"]["ts"] == 7e6
    assert slices["net.0"]["args"]["weight_bytes"] == 4 * (64 * 256 + 256)
    counters = [event["args"] for event in trace["traceEvents"] if event["ph"] == "C" and event["name"] == "live bytes"]
    assert len(counters) == len(run.of(TimelineRecord))
    assert max(sum(values.values()) for values in counters) == max(
        phase.peak_bytes for phase in run.of(PhaseRecord) if phase.phase == "outer"
    )


def test_a_snapshot_is_one_that_the_code_of_torch_reads(folder, tmp_path):
    out = tmp_path / "snapshot.pickle"
    assert CliRunner().invoke(app, ["show", str(folder), "--export", "memory_viz", "--out", str(out)]).exit_code == 0
    snapshot = pickle.loads(out.read_bytes())
    assert snapshot == memory_viz_snapshot(read_run(folder))
    peaks = [phase.peak_bytes for phase in read_run(folder).of(PhaseRecord)]
    assert sorted(segment["allocated_size"] for segment in snapshot["segments"]) == sorted(peaks)
    assert _memory_viz.segsum(snapshot)
    assert "aten.addmm" in json.dumps(snapshot)
    assert _memory_viz.trace(snapshot)


def test_an_export_needs_a_file_and_one_run(folder, tmp_path):
    for words in (
        ["--export", "perfetto"],
        ["--out", str(tmp_path / "x.json")],
        [str(folder), "--export", "perfetto", "--out", str(tmp_path / "x.json")],
    ):
        assert type(CliRunner().invoke(app, ["show", str(folder), *words]).exception) is InvalidRequest
    assert list(tmp_path.iterdir()) == []
