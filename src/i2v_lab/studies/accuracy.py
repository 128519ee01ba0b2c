"""How far forecasts are from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.paths import data_dir
from i2v_lab.request import I2VRequest
from i2v_lab.store import read_run
from i2v_lab.studies.experiments import DEFAULT_STILL
from i2v_lab.studies.forecasts import forecast_many


def measured_table(folder: Path | None = None) -> pd.DataFrame:
    """All runs measured on a GPU below a folder, ``data/measured`` by default.

    Returns:
        One row for each run and phase that completed: ``gpu, run, model, phase, peak_bytes, peak_reserved_bytes``, and
        ``request``, an :class:`~i2v_lab.request.I2VRequest`.
    """
    rows: list[dict[str, Any]] = []
    for metadata in sorted((folder or data_dir() / "measured").rglob("metadata.json")):
        run = read_run(metadata.parent)
        if not str(run.metadata["device"]).startswith("cuda"):
            continue
        request = I2VRequest.from_json({**run.metadata["request"], "image": DEFAULT_STILL})
        asked = {"gpu": run.metadata["device_name"], "run": metadata.parent.name, "model": run.metadata["model"]}
        phases = run.frame("phase")
        for phase in phases[phases["completed"]].itertuples():
            measured = {"peak_bytes": phase.peak_bytes, "peak_reserved_bytes": phase.peak_reserved_bytes}
            rows.append({**asked, "phase": phase.phase, **measured, "request": request})
    return pd.DataFrame(rows)


def accuracy_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Each measured phase beside its forecast.

    Returns:
        ``measured`` without its requests, and ``forecast_bytes, error, forecast_reserved_bytes, reserved_error``;
        errors are relative, negative where the forecast is under the truth.
    """
    forecasts = {}
    for model, part in measured.drop_duplicates(["gpu", "run"]).groupby("model"):
        found = forecast_many(list(part["request"]), str(model))
        for gpu, run, forecast in zip(part["gpu"], part["run"], found, strict=True):
            forecasts.update({(gpu, run, phase.phase): phase for phase in forecast.phases})
    table = measured.drop(columns="request")
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
