"""Profilers and monitors as tables."""

from __future__ import annotations

import torch

from i2v_lab import PhaseProfiler, VramMonitor
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.runs.store import RunWriter, read_run


def test_the_table_of_a_profiler_is_that_of_its_run(tmp_path):
    with RunWriter(tmp_path / "run", {}) as writer, PhaseProfiler("cpu", on_record=writer.append) as profiler:
        assert profiler.to_frame().empty
        columns = profiler.to_frame().dtypes
        with profiler.phase("multiply"):
            product = torch.ones(16, 16) @ torch.ones(16, 16)
        with profiler.phase("add"):
            assert len(profiler.to_frame()) == 1, "the phases that have ended"
            del product
    frame = profiler.to_frame()
    assert frame["phase"].tolist() == ["multiply", "add"]
    assert frame["peak_bytes"].tolist() == [3072, 1024]
    assert frame["peak_reserved_bytes"].isna().all()
    assert (frame.dtypes == columns).all()
    assert frame.equals(read_run(tmp_path / "run").to_frame())
    assert [PhaseRecord(**row) for row in frame.astype(object).where(frame.notna(), None).to_dict("records")] == (
        profiler.phases
    )


def test_the_table_of_a_monitor_has_its_samples():
    monitor = VramMonitor("cpu")
    assert monitor.to_frame().empty
    with monitor:
        kept = torch.zeros(1024)
        monitor.monitor.sample()
    frame = monitor.to_frame()
    assert len(frame) == len(monitor.monitor.samples)
    assert frame["allocated_bytes"].iloc[-1] >= kept.nbytes
    assert frame["reserved_bytes"].dtype == "Int64"
    assert frame["time_s"].is_monotonic_increasing
