"""The error of forecasts against measured peaks."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.errors import RecordError
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.request import DecodeScope
from i2v_lab.runs.forecast import forecast_specs
from i2v_lab.runs.provenance import versions
from i2v_lab.runs.recorded import by_generation, card_of, recorded_runs, spec_of
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


def measured_table(
    model: str | None = None, *, folder: Path | None = None, runs: int | None = None, diffusers: bool = False
) -> pd.DataFrame:
    """Phases of the runs that were measured on a GPU.

    Excluded are runs of another pipeline than the model's own, runs with a VRAM cap or without full metering, and those
    in ``inference_mode``, which torch refuses before their last phase.

    Args:
        model: Only runs of this architecture.
        folder: With the runs; ``data/measured`` by default.
        runs: At most this many runs, in the order of their paths.
        diffusers: Without ``model``: also runs of diffusers' models, whose memory changes with the versions of
            diffusers and transformers.

    Returns:
        One row for each run, generation and completed phase: ``gpu, run, model, generation, phase, peak_bytes,
        peak_reserved_bytes``, ``versions`` of the distributions it ran with, and ``spec``, an
        :class:`~i2v_lab.runs.spec.RunSpec`.
    """
    rows: list[dict[str, Any]] = []
    compared = [run for run in recorded_runs(folder).runs if _is_comparable(run, model, diffusers)]
    for run in compared[:runs]:
        spec = spec_of(run)
        asked = {"gpu": card_of(run), "run": run.folder.name, "model": spec.model, "versions": run.metadata["versions"]}
        for generation, phase in by_generation(run.of(PhaseRecord)):
            if phase.completed:
                measured = {"peak_bytes": phase.peak_bytes, "peak_reserved_bytes": phase.peak_reserved_bytes}
                place = {"generation": generation, "phase": phase.phase}
                rows.append({**asked, **place, **measured, "spec": spec})
    columns = ["gpu", "run", "model", "versions", "generation", "phase", "peak_bytes", "peak_reserved_bytes", "spec"]
    return pd.DataFrame(rows, columns=columns)


def _is_comparable(run: Run, model: str | None, diffusers: bool) -> bool:
    spec = spec_of(run)
    refused = spec.request.decode_scope is DecodeScope.INFERENCE_MODE
    on_gpu = str(run.metadata["device"]).startswith("cuda")
    own = spec.runner_spec is runner_of(spec.architecture)
    asked = spec.model == model if model else diffusers or not spec.runner_spec.third_party
    return on_gpu and spec.is_reference and own and not refused and asked


def other_versions(measured: pd.DataFrame) -> dict[str, list[str]]:
    """Versions that runs were measured with and that are not installed here, by distribution.

    Args:
        measured: Of :func:`measured_table`.

    Example:
        >>> other_versions(measured_table())  # doctest: +SKIP
        {'transformers': ['5.17.0']}
    """
    recorded = {pair for each in measured["versions"] for pair in each.items()}
    here = versions({name for name, _ in recorded})
    known = {name: here[name] for name in here.keys() - {"python", "i2v-lab"}}
    others = sorted((name, each) for name, each in recorded if each and known.get(name) not in (None, each))
    return {name: [each for _, each in pairs] for name, pairs in groupby(others, key=itemgetter(0))}


def accuracy_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Each measured phase with its forecast.

    Raises:
        RecordError: A phase that no run of its spec has.

    Returns:
        ``measured`` with ``spec`` as the spec's name and without ``versions``, then ``forecast_bytes, error,
        forecast_reserved_bytes, reserved_error``. Errors are relative to the measured peak, negative where the forecast
        is below it.
    """
    keys = [spec.memory_key() for spec in measured["spec"]]
    unique = dict(zip(keys, measured["spec"], strict=True))
    found = forecast_specs(list(unique.values()))
    forecasts = {
        (key, generation, phase.phase): phase
        for key, forecast in zip(unique, found, strict=True)
        for generation, phase in by_generation(forecast.phases)
    }
    table = measured.assign(spec=[spec.name for spec in measured["spec"]]).drop(columns="versions")
    rows = list(zip(keys, table["generation"], table["phase"], strict=True))
    for run, row in zip(table["run"], rows, strict=True):
        if row not in forecasts:
            raise RecordError(
                f"run {run!r} has phase {row[2]!r} in generation {row[1]}, which its spec does not; was it edited?",
                run=run,
                phase=row[2],
            )
    phases = [forecasts[row] for row in rows]
    table["forecast_bytes"] = [phase.peak_bytes for phase in phases]
    table["error"] = _relative(table["forecast_bytes"], table["peak_bytes"])
    table["forecast_reserved_bytes"] = [phase.peak_reserved_bytes for phase in phases]
    table["reserved_error"] = _relative(table["forecast_reserved_bytes"], table["peak_reserved_bytes"])
    return table


def _relative(forecast: pd.Series[Any], measured: pd.Series[Any]) -> pd.Series[Any]:
    """The error relative to what was measured; NaN where that is nothing, or not known."""
    known = measured.astype("float64")
    return forecast.astype("float64") / known.where(known > 0) - 1


def summary_table(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Errors by phase, and over all phases.

    Args:
        accuracy: Of :func:`accuracy_table`.

    Returns:
        ``phase, runs, median_error, worst_error`` (of absolute errors), ``share_under`` (of forecasts below the
        measured peak), ``median_reserved_error, worst_reserved_error``; the last row, ``all``, is over all phases.
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


def whole_runs(accuracy: pd.DataFrame) -> pd.DataFrame:
    """The peaks of whole runs, the highest of their phases: what decides whether a card fits.

    ``data/accuracy.csv`` is this table of every run in ``data/measured``.

    Args:
        accuracy: Of :func:`accuracy_table`.

    Returns:
        ``gpu, model, run, peak_bytes, forecast_bytes, peak_reserved_bytes, forecast_reserved_bytes``.
    """
    keys = ["gpu", "model", "run"]
    counted = ["peak_bytes", "forecast_bytes", "peak_reserved_bytes", "forecast_reserved_bytes"]
    return accuracy.groupby(keys, as_index=False)[counted].max()


def halves_table(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Hold-out test of a correction: fitted to one half of the specs, evaluated on the other.

    The correction is one factor for each phase, the median of measured over forecast bytes, for allocated and for
    reserved bytes. Every second spec in alphabetical order is in the fitted half, with all its repetitions.

    Args:
        accuracy: Of :func:`accuracy_table`.

    Returns:
        For ``allocated`` and ``reserved`` bytes (``counted``): ``fitted`` and ``judged``, the numbers of specs in the
        halves; ``median_error, worst_error`` of the evaluated half without the correction, and
        ``corrected_median_error, corrected_worst_error`` with it. Empty for fewer than two specs.
    """
    names = sorted(set(accuracy["spec"]))
    fitted, judged = (accuracy[accuracy["spec"].isin(half)] for half in (names[::2], names[1::2]))
    if judged.empty:
        return pd.DataFrame(columns=HALVES_COLUMNS)
    rows = []
    for counted, forecast, measured in (
        ("allocated", "forecast_bytes", "peak_bytes"),
        ("reserved", "forecast_reserved_bytes", "peak_reserved_bytes"),
    ):
        factors = (fitted[measured] / fitted[forecast]).groupby(fitted["phase"]).median()
        plain = (judged[forecast] / judged[measured] - 1).abs()
        corrected = (judged[forecast] * judged["phase"].map(factors).fillna(1) / judged[measured] - 1).abs()
        errors = [plain.median(), plain.max(), corrected.median(), corrected.max()]
        rows.append([counted, len(names[::2]), len(names[1::2]), *errors])
    return pd.DataFrame(rows, columns=HALVES_COLUMNS)
