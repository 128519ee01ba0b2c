"""How far forecasts are from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.paths import data_dir
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.request import DecodeScope
from i2v_lab.runs.forecast import forecast_specs
from i2v_lab.runs.recorded import by_generation, recorded_runs, spec_of
from i2v_lab.runs.store import Run

SUMMARY_COLUMNS = (
    "phase",
    "runs",
    "median_error",
    "worst_error",
    "share_under",
    "median_reserved_error",
    "worst_reserved_error",
)
HALVES_COLUMNS = [
    "counted",
    "fitted",
    "judged",
    "median_error",
    "worst_error",
    "corrected_median_error",
    "corrected_worst_error",
]


def measured_table(model: str | None = None, *, folder: Path | None = None, runs: int | None = None) -> pd.DataFrame:
    """All runs measured on a GPU below a folder, ``data/measured`` by default.

    Runs that are set apart (of another pipeline, below a cap) do not count, nor those in ``inference_mode``, which
    torch refuses before their last phase.

    Args:
        model: Only this one's.
        folder: Where to look.
        runs: Only the first so many.

    Returns:
        One row for each run, generation and phase that completed: ``gpu, run, model, generation, phase, peak_bytes,
        peak_reserved_bytes``, and ``spec``, an :class:`~i2v_lab.runs.spec.RunSpec`.
    """
    rows: list[dict[str, Any]] = []
    counted = [run for run in recorded_runs(folder).runs if _counts(run, model)]
    for run in counted[:runs]:
        spec = spec_of(run)
        asked = {"gpu": run.metadata["device_name"], "run": run.folder.name, "model": spec.model}
        for generation, phase in by_generation(run.of(PhaseRecord)):
            if phase.completed:
                measured = {"peak_bytes": phase.peak_bytes, "peak_reserved_bytes": phase.peak_reserved_bytes}
                place = {"generation": generation, "phase": phase.phase}
                rows.append({**asked, **place, **measured, "spec": spec})
    columns = ["gpu", "run", "model", "generation", "phase", "peak_bytes", "peak_reserved_bytes", "spec"]
    return pd.DataFrame(rows, columns=columns)


def _counts(run: Run, model: str | None) -> bool:
    spec = spec_of(run)
    refused = spec.request.decode_scope is DecodeScope.INFERENCE_MODE
    on_gpu = str(run.metadata["device"]).startswith("cuda")
    own = spec.is_reference and not spec.runner_spec.third_party
    return on_gpu and own and not refused and model in (None, spec.model)


def accuracy_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Each measured phase beside its forecast.

    Returns:
        ``measured`` with its specs' names, and ``forecast_bytes, error, forecast_reserved_bytes,
        reserved_error``; errors are relative, negative where the forecast is under the truth.
    """
    likes = [spec.memory_key() for spec in measured["spec"]]
    different = dict(zip(likes, measured["spec"], strict=True))
    found = forecast_specs(list(different.values()))
    forecasts = {
        (like, generation, phase.phase): phase
        for like, forecast in zip(different, found, strict=True)
        for generation, phase in by_generation(forecast.phases)
    }
    table = measured.assign(spec=[spec.name for spec in measured["spec"]])
    phases = [forecasts[key] for key in zip(likes, table["generation"], table["phase"], strict=True)]
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


def halves_table(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Would a correction fitted to measured runs help? Fitted to one half of the specs, judged on the other.

    The correction is a factor for each phase, of the peak and of the reserved bytes: the median of measured over
    forecast. Experiments are halved by their names' order, every second one; repeats stay together.

    Returns:
        For ``allocated`` and ``reserved`` bytes as ``counted``: ``fitted`` and ``judged``, the numbers of specs,
        then ``median_error, worst_error`` of the judged half as it is forecast, and ``corrected_median_error,
        corrected_worst_error`` with the correction. Empty where there are fewer than two specs.
    """
    names = sorted(set(accuracy["spec"]))
    fitted, judged = (accuracy[accuracy["spec"].isin(half)] for half in (names[::2], names[1::2]))
    if judged.empty:
        return pd.DataFrame(columns=HALVES_COLUMNS)
    rows = []
    for what, forecast, truth in (
        ("allocated", "forecast_bytes", "peak_bytes"),
        ("reserved", "forecast_reserved_bytes", "peak_reserved_bytes"),
    ):
        factors = (fitted[truth] / fitted[forecast]).groupby(fitted["phase"]).median()
        plain = (judged[forecast] / judged[truth] - 1).abs()
        corrected = (judged[forecast] * judged["phase"].map(factors).fillna(1) / judged[truth] - 1).abs()
        errors = [plain.median(), plain.max(), corrected.median(), corrected.max()]
        rows.append([what, len(names[::2]), len(names[1::2]), *errors])
    return pd.DataFrame(rows, columns=HALVES_COLUMNS)


def reference_table() -> pd.DataFrame:
    """``data/measured/components-h200.json``: components measured alone on the device, before there were runs.

    Returns:
        ``phase, width, height, frames, steps, autograd, peak_allocated_gib``, and the tiling's columns.
    """
    return pd.DataFrame(json.loads((data_dir() / "measured" / "components-h200.json").read_text())["rows"])
