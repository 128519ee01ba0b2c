"""Many forecasts as one table: each different request once, on as many workers as there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from i2v_lab.capacity.cards import judge_all
from i2v_lab.capacity.device_profile import device_profile
from i2v_lab.capacity.time_model import predicted_seconds
from i2v_lab.errors import I2VLabError
from i2v_lab.profiling.records import Forecast
from i2v_lab.runs.forecast import cache_path, cached_forecast, forecast_spec
from i2v_lab.runs.spec import RunSpec
from i2v_lab.scale.dispatch import Task, dispatch
from i2v_lab.scale.workers import Workers

COLUMNS = (
    "peak_bytes",
    "peak_phase",
    "peak_reserved_bytes",
    "context_bytes",
    "host_page_locked_bytes",
    "host_pageable_bytes",
    "predicted_seconds",
    "smallest_card",
    "error",
)


def forecast_rows(
    specs: Sequence[RunSpec],
    gpu: str,
    workers: Workers | None,
    folder: Path,
    ended: Callable[[RunSpec, str], None] = lambda spec, error: None,
) -> list[dict[str, Any]]:
    """Forecast many runs: equal ones once, and those not at all that are in the cache.

    Args:
        specs: In the order of the result.
        gpu: Seconds are those on this card.
        workers: Where; in this process if there are none.
        folder: That all workers share, for their temporary keys.
        ended: Called for every different run that has been forecast, with its error or an empty text.

    Returns:
        One mapping of :data:`COLUMNS` for each run. A forecast that failed has its ``error``, and ``None`` elsewhere.

    Raises:
        WorkersUnavailable: No workers can be started.
    """
    keys = [str(cache_path(spec)) for spec in specs]
    different = dict(zip(keys, specs, strict=True))
    rows: dict[str, dict[str, Any]] = {}

    def done(key: str, row: dict[str, Any]) -> None:
        rows[key] = row
        ended(different[key], row["error"] or "")

    tasks = []
    for key, spec in different.items():
        cached = cached_forecast(spec)
        if cached is not None:
            done(key, _row(cached, gpu))
        elif workers is None:
            done(key, _forecast_here(spec.to_json(), gpu))
        else:
            tasks.append(Task(key, _forecast_here, (spec.to_json(), gpu)))
    if workers is not None:
        for each in dispatch(workers, tasks, folder, ahead=2 * workers.count):
            done(each.task.name, each.value or _failed(each.error))
    return [rows[key] for key in keys]


def _forecast_here(spec: Mapping[str, Any], gpu: str) -> dict[str, Any]:
    try:
        return _row(forecast_spec(RunSpec.from_json(spec)), gpu)
    except I2VLabError as error:
        return _failed(error)


def _failed(error: Exception | None) -> dict[str, Any]:
    return {**dict.fromkeys(COLUMNS), "error": " ".join(str(error).split()) or type(error).__name__}


def _row(result: Forecast, gpu: str) -> dict[str, Any]:
    fitting = [fit for fit in judge_all(result) if fit.verdict == "fits"]
    smallest = min(fitting, key=lambda fit: fit.memory_bytes, default=None)
    values = (
        result.peak.peak_bytes,
        result.peak.phase,
        result.peak_reserved_bytes,
        result.context_bytes,
        result.page_locked_bytes,
        result.pageable_bytes,
        predicted_seconds(result, device_profile(gpu)),
        None if smallest is None else smallest.gpu,
        None,
    )
    return dict(zip(COLUMNS, values, strict=True))
