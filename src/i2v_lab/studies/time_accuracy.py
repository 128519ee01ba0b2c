"""The error of predicted seconds against measured runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.capacity.device_profile import DeviceProfile, derived_profile, device_profile, has_peaks
from i2v_lab.capacity.time_model import phase_times, video_seconds
from i2v_lab.events import Phase
from i2v_lab.profiling.records import Forecast, PhaseRecord
from i2v_lab.runs.execute import WHOLE
from i2v_lab.runs.forecast import forecast_specs
from i2v_lab.runs.phases import pipeline_phases
from i2v_lab.runs.recorded import card_of, recorded_runs, spec_of
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import Run

COLUMNS = ["gpu", "run", "model", "generation", "phase", "seconds", "predicted_seconds", "error", "by_peaks_seconds"]


def time_table(folder: Path | None = None, *, model: str | None = None, runs: int | None = None) -> pd.DataFrame:
    """Phases of measured runs with their predicted seconds.

    Excluded are runs on cards without published peaks, below a VRAM cap, with a phase that did not complete, and with
    other phases than their forecast.

    Args:
        folder: With the runs; ``data/measured`` by default.
        model: Only runs of this architecture.
        runs: At most this many runs, in the order of their paths.

    Returns:
        One row for each run, generation and phase: ``gpu, run, model, generation, phase, seconds, predicted_seconds,
        error``, relative to what was measured, negative where the prediction is below it, and ``by_peaks_seconds``:
        predicted as for a card that nobody measured, by its published peaks; of the card that others are derived from
        the same as predicted.
    """
    measured = comparable_runs(folder, model)[:runs]
    forecasts = forecast_specs([spec for _, spec, _ in measured])
    rows: list[dict[str, Any]] = []
    for (run, spec, phases), forecast in zip(measured, forecasts, strict=True):
        predicted = _predicted(spec, forecast, device_profile(card_of(run)))
        by_peaks = _predicted(spec, forecast, derived_profile(card_of(run)))
        if [name for name, _ in predicted] != [phase.phase for phase in phases]:
            continue
        begun: Counter[str] = Counter()
        for (name, seconds), (_, derived), phase in zip(predicted, by_peaks, phases, strict=True):
            begun[name] += 1
            row = [card_of(run), run.folder.name, spec.model, begun[name], name, phase.seconds, seconds]
            rows.append(dict(zip(COLUMNS, [*row, seconds / phase.seconds - 1, derived], strict=True)))
    return pd.DataFrame(rows, columns=COLUMNS)


def comparable_runs(
    folder: Path | None = None, model: str | None = None
) -> list[tuple[Run, RunSpec, list[PhaseRecord]]]:
    """The measured runs whose seconds can be forecast, with their specs and top-level phases in order of time.

    Args:
        folder: As of :func:`time_table`.
        model: Likewise.
    """
    found = []
    for run in recorded_runs(folder).runs:
        spec, phases = spec_of(run), pipeline_phases(run)
        known = has_peaks(card_of(run)) and spec.is_reference and model in (None, spec.model)
        if known and phases and all(phase.completed for phase in phases):
            top = sorted((each for each in phases if each.parent in (None, WHOLE)), key=lambda each: each.start_s)
            found.append((run, spec, top))
    return found


def _predicted(spec: RunSpec, forecast: Forecast, device: DeviceProfile) -> list[tuple[str, float]]:
    """The top-level phases of a forecast in order, with their seconds; the video that a run wrote included."""
    request = spec.request
    pixels = request.width * request.height * request.frames if spec.write_video else 0
    return [
        (time.phase, time.seconds + (video_seconds(pixels, device) if time.phase == Phase.DECODE_VIDEO else 0.0))
        for time in phase_times(forecast, device)
        if time.parent is None
    ]


def runs_table(times: pd.DataFrame) -> pd.DataFrame:
    """Whole runs of :func:`time_table`: ``gpu, run, seconds, predicted_seconds, by_peaks_seconds, error``."""
    summed = ["seconds", "predicted_seconds", "by_peaks_seconds"]
    sums = times.groupby(["gpu", "run"], sort=False)[summed].sum().reset_index()
    return sums.assign(error=sums["predicted_seconds"] / sums["seconds"] - 1)


def time_summary(times: pd.DataFrame) -> pd.DataFrame:
    """Errors by phase, and of whole runs by card.

    Args:
        times: Of :func:`time_table`.

    Returns:
        ``what, cases, median_error, worst_error, median_bias``: of absolute errors, and with their sign; a row for each
        phase, then one for whole runs on each card, another by its published peaks alone where it was measured too, and
        one for all runs.
    """
    whole = runs_table(times)
    parts = [(str(name), part["error"]) for name, part in times.groupby("phase", sort=False)]
    for name, part in whole.groupby("gpu", sort=False):
        parts.append((f"runs, {name}", part["error"]))
        by_peaks = part["by_peaks_seconds"] / part["seconds"] - 1
        if not by_peaks.equals(part["error"]):
            parts.append((f"runs, {name}, by published peaks", by_peaks))
    parts += [("runs", whole["error"])] if len(whole) else []
    columns = ["what", "cases", "median_error", "worst_error", "median_bias"]
    rows = [[what, len(error), error.abs().median(), error.abs().max(), error.median()] for what, error in parts]
    return pd.DataFrame(rows, columns=columns)
