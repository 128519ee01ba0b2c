"""How far forecasts are from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.paths import data_dir
from i2v_lab.store import Run
from i2v_lab.studies.experiments import Consumer
from i2v_lab.studies.forecasts import forecast_experiments
from i2v_lab.studies.recorded import experiment_of, recorded_runs

SUMMARY_COLUMNS = (
    "phase",
    "runs",
    "median_error",
    "worst_error",
    "share_under",
    "median_reserved_error",
    "worst_reserved_error",
)


def measured_table(model: str | None = None, *, folder: Path | None = None, runs: int | None = None) -> pd.DataFrame:
    """All runs measured on a GPU below a folder, ``data/measured`` by default.

    Those that are apart, below a cap for instance, and those of several generations do not count.

    Args:
        model: Only this one's.
        folder: Where to look.
        runs: Only the first so many.

    Returns:
        One row for each run and phase that completed: ``gpu, run, model, phase, peak_bytes, peak_reserved_bytes``, and
        ``experiment``, an :class:`~i2v_lab.studies.experiments.Experiment`.
    """
    rows: list[dict[str, Any]] = []
    counted = [run for run in recorded_runs(folder) if _counts(run, model)]
    for run in counted[:runs]:
        experiment = experiment_of(run)
        asked = {"gpu": run.metadata["device_name"], "run": run.folder.name, "model": experiment.model}
        phases = run.frame("phase")
        for phase in phases[phases["completed"]].itertuples():
            measured = {"peak_bytes": phase.peak_bytes, "peak_reserved_bytes": phase.peak_reserved_bytes}
            rows.append({**asked, "phase": phase.phase, **measured, "experiment": experiment})
    columns = ["gpu", "run", "model", "phase", "peak_bytes", "peak_reserved_bytes", "experiment"]
    return pd.DataFrame(rows, columns=columns)


def _counts(run: Run, model: str | None) -> bool:
    experiment = experiment_of(run)
    alone = experiment.generations == 1 and experiment.consumer is Consumer.PLAIN and not run.metadata.get("apart")
    return alone and str(run.metadata["device"]).startswith("cuda") and model in (None, experiment.model)


def accuracy_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Each measured phase beside its forecast.

    Returns:
        ``measured`` without its experiments, and ``forecast_bytes, error, forecast_reserved_bytes, reserved_error``;
        errors are relative, negative where the forecast is under the truth.
    """
    runs = measured.drop_duplicates(["gpu", "run"])
    found = forecast_experiments(list(runs["experiment"]))
    forecasts = {
        (gpu, run, phase.phase): phase
        for gpu, run, forecast in zip(runs["gpu"], runs["run"], found, strict=True)
        for phase in forecast.phases
    }
    table = measured.drop(columns="experiment")
    phases = [forecasts[key] for key in zip(table["gpu"], table["run"], table["phase"], strict=True)]
    table["forecast_bytes"] = [phase.peak_bytes for phase in phases]
    table["error"] = table["forecast_bytes"] / table["peak_bytes"] - 1
    table["forecast_reserved_bytes"] = [phase.peak_reserved_bytes for phase in phases]
    table["reserved_error"] = table["forecast_reserved_bytes"] / table["peak_reserved_bytes"] - 1
    return table


def summary_table(accuracy: pd.DataFrame) -> pd.DataFrame:
    """The errors by phase, and of all.

    Returns:
        ``phase, runs, median_error, worst_error`` (of the errors' sizes), ``share_under`` (of forecasts below the
        truth), ``median_reserved_error, worst_reserved_error``; the last row is ``all``.
    """
    if accuracy.empty:
        return pd.DataFrame(columns=SUMMARY_COLUMNS)
    parts = [(str(name), part) for name, part in accuracy.groupby("phase", sort=False)]
    rows = []
    for name, part in [*parts, ("all", accuracy)]:
        error, reserved = part["error"], part["reserved_error"]
        rows.append(
            {
                "phase": name,
                "runs": len(part),
                "median_error": error.abs().median(),
                "worst_error": error.abs().max(),
                "share_under": (error < 0).mean(),
                "median_reserved_error": reserved.abs().median(),
                "worst_reserved_error": reserved.abs().max(),
            }
        )
    return pd.DataFrame(rows)


def reference_table() -> pd.DataFrame:
    """``data/measured/components-h200.json``: components measured alone on the device, before there were runs.

    Returns:
        ``phase, width, height, frames, steps, autograd, peak_allocated_gib``, and the tiling's columns.
    """
    return pd.DataFrame(json.loads((data_dir() / "measured" / "components-h200.json").read_text())["rows"])
