"""Peaks and durations of a run's phases, without the phase around everything that timed runs have."""

from __future__ import annotations

from i2v_lab.profiling.records import PhaseRecord, peak_phase
from i2v_lab.runs.execute import WHOLE
from i2v_lab.runs.store import Run


def pipeline_phases(run: Run | None) -> list[PhaseRecord]:
    """The phases of the pipeline itself, in the order of their records; none without a run."""
    return [phase for phase in run.of(PhaseRecord) if phase.phase != WHOLE] if run else []


def run_peak(run: Run | None) -> PhaseRecord | None:
    """The phase with the highest peak; ``None`` if no phase is recorded."""
    return peak_phase(pipeline_phases(run))


def phase_peaks(run: Run | None) -> dict[str, int]:
    """Peak bytes by phase; the maximum where a phase ran several times."""
    peaks: dict[str, int] = {}
    for phase in pipeline_phases(run):
        peaks[phase.phase] = max(peaks.get(phase.phase, 0), phase.peak_bytes)
    return peaks


def phase_seconds(run: Run | None) -> dict[str, float]:
    """Seconds by phase; the sum where a phase ran several times."""
    seconds: dict[str, float] = {}
    for phase in pipeline_phases(run):
        seconds[phase.phase] = seconds.get(phase.phase, 0.0) + phase.seconds
    return seconds


def peak_reserved_bytes(run: Run | None) -> int | None:
    """The most that the caching allocator reserved; ``None`` where there was no such allocator."""
    reserved = [phase.peak_reserved_bytes for phase in run.of(PhaseRecord)] if run else []
    return max((value for value in reserved if value is not None), default=None)
