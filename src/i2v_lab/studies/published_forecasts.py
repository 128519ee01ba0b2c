"""Forecasts beside the peaks that others published, and why a row has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.errors import I2VLabError, InvalidRequest, shown
from i2v_lab.memory_settings import MemorySettings
from i2v_lab.pipeline.contract.architectures import Architecture, load_architecture, model_names
from i2v_lab.profiling.records import Forecast
from i2v_lab.runs.forecast import forecast_spec, forecast_specs
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.studies.published_memory import PublishedPeak, read_published

TOLERANCE = 0.05
WITHIN, EXPLAINED, NOT_EXPLAINED, NOT_COMPARED = "within 5 %", "explained", "not explained", "not compared"
LAYERWISE = "layerwise-fp8"
TABLE_COLUMNS = [
    "id",
    "model",
    "pipeline",
    "run",
    "quantity",
    "published_bytes",
    "forecast_bytes",
    "error",
    "status",
    "reason",
    "versions",
    "source",
]


def published_spec(peak: PublishedPeak) -> RunSpec:
    """The run of this project that a published peak is compared with.

    Raises:
        InvalidRequest: There is none: the model is none of this project's, its size is not stated, a setting has no
            field in a request, or the model does not support it.

    Example:
        >>> peaks = {peak.id: peak for peak in read_published()}
        >>> published_spec(peaks["blog-hunyuanvideo-offload"]).name
        '768x512x121_50steps_offload-model_default-bfloat16'
    """
    if peak.model not in model_names():
        raise _no_run(peak, "model", f"{peak.model} is no model here")
    unknown = [name for name in ("width", "height", "frames") if getattr(peak, name) is None]
    if unknown:
        raise _no_run(peak, unknown[0], f"{', '.join(unknown)} not stated")
    if peak.batch != 1:
        raise _no_run(peak, "batch", f"batch of {peak.batch}, where a request here is one video")
    architecture = load_architecture(peak.model)
    size = {"width": peak.width, "height": peak.height, "frames": peak.frames}
    request = make_request(peak.model, **size, steps=peak.steps, settings=_settings(peak, architecture))
    return RunSpec(request=request, model=peak.model)


def _settings(peak: PublishedPeak, architecture: Architecture) -> MemorySettings:
    dtypes = {} if not peak.dtype else dict.fromkeys(architecture.dtypes or ("default",), peak.dtype)
    values: dict[str, Any] = {"offload": peak.offload or "none"}
    for item in filter(None, (item.strip() for item in peak.other.split(";"))):
        name, _, value = item.partition("=")
        if name.startswith("dtypes."):
            dtypes[name.removeprefix("dtypes.")] = value
        elif name == "offload_stream" and value in ("true", "false"):
            values[name] = value == "true"
        elif name == "offload_blocks" and value.isdecimal():
            values[name] = int(value)
        else:
            raise _no_run(peak, "other", f"{item} is no setting here")
    if peak.quantization not in ("", LAYERWISE):
        raise _no_run(peak, "quantization", f"{peak.quantization} is no setting here")
    values |= {"vae_tiling": peak.vae_tiling == "yes", "vae_slicing": peak.vae_slicing == "yes"}
    values["layerwise_casting"] = peak.quantization == LAYERWISE
    own = architecture.dtypes
    values["dtypes"] = {name: dtype for name, dtype in dtypes.items() if own.get(name, own.get("default")) != dtype}
    return MemorySettings(**values)


def _no_run(peak: PublishedPeak, column: str, words: str) -> InvalidRequest:
    return InvalidRequest(words, **{"id": peak.id, column: getattr(peak, column)})


def counted_bytes(quantity: str, forecast: Forecast) -> int:
    """What a forecast says of a published quantity.

    Args:
        quantity: ``reserved`` is the allocator's reserved peak; ``nvidia-smi`` and ``minimum card`` are that and the
            CUDA context; ``allocated``, and a quantity that is not stated, are the allocated peak.
        forecast: Of the same run.
    """
    if quantity in ("allocated", "not stated"):
        return forecast.peak.peak_bytes
    return forecast.peak_reserved_bytes + (0 if quantity == "reserved" else forecast.context_bytes)


def published_table(path: Path | None = None, ids: Sequence[str] = (), models: Sequence[str] = ()) -> pd.DataFrame:
    """Every published peak with its forecast, or with the reason why there is none.

    No row is left out because it disagrees: one that differs by more than 5 % has its reason, or is ``not explained``.

    Args:
        path: As in :func:`~i2v_lab.studies.published_memory.read_published`, and so are the errors.
        ids: These rows alone; all of them if empty.
        models: Rows of these models alone; of all if empty.

    Returns:
        One row for each peak, in the order of the file: ``id, model, pipeline, run`` (the spec's name), ``quantity,
        published_bytes, forecast_bytes, error`` (relative to the published peak, negative where the forecast is
        below), ``status`` (``within 5 %``, ``explained``, ``not explained``, ``not compared``), ``reason`` (of the
        file, after why it is not compared), ``versions, source``.

    Raises:
        InvalidRequest: One of ``ids`` is none of the file's.
    """
    peaks = read_published(path)
    unknown = sorted(set(ids) - {peak.id for peak in peaks})
    if unknown:
        raise InvalidRequest(f"id={unknown[0]!r} is in no row of published peaks; use one of them", id=unknown[0])
    asked = [peak for peak in peaks if (not ids or peak.id in ids) and (not models or peak.model in models)]
    specs: dict[str, RunSpec] = {}
    whys: dict[str, str] = {}
    for peak in asked:
        try:
            specs[peak.id] = published_spec(peak)
        except I2VLabError as error:
            whys[peak.id] = str(error)
    forecasts = _forecasts(specs, whys)
    rows = []
    for peak in asked:
        run = specs[peak.id].name if peak.id in specs else ""
        row = {"run": run, "published_bytes": peak.peak_bytes}
        row |= {name: getattr(peak, name) for name in ("id", "model", "pipeline", "quantity", "versions", "source")}
        rows.append(row | _comparison(peak, forecasts.get(peak.id), whys.get(peak.id, "")))
    table = pd.DataFrame(rows, columns=TABLE_COLUMNS)
    return table.astype({"published_bytes": "Int64", "forecast_bytes": "Int64", "error": "Float64"})


def _forecasts(specs: Mapping[str, RunSpec], whys: dict[str, str]) -> dict[str, Forecast]:
    """The forecasts that there are; ``whys`` gets the others, whatever a pipeline raises."""
    found: dict[str, Forecast] = {}
    with suppress(Exception):  # on all cores; which of them fails is told one by one
        forecast_specs(list(specs.values()))
    for name, spec in specs.items():
        try:
            found[name] = forecast_spec(spec)
        except Exception as error:
            own = isinstance(error, I2VLabError)
            whys[name] = str(error) if own else f"no forecast: {type(error).__name__}: {shown(str(error))}"
    return found


def _comparison(peak: PublishedPeak, forecast: Forecast | None, why: str) -> dict[str, Any]:
    if forecast is None:
        reason = "; ".join(filter(None, (why, peak.reason)))
        return {"forecast_bytes": None, "error": None, "status": NOT_COMPARED, "reason": reason}
    forecast_bytes = counted_bytes(peak.quantity, forecast)
    error = forecast_bytes / peak.peak_bytes - 1
    explained = peak.reason and not peak.reason.startswith(NOT_EXPLAINED)
    status = WITHIN if abs(error) <= TOLERANCE else EXPLAINED if explained else NOT_EXPLAINED
    return {"forecast_bytes": forecast_bytes, "error": error, "status": status, "reason": peak.reason}


def published_summary(table: pd.DataFrame) -> pd.DataFrame:
    """How the forecasts of each published quantity differ.

    Args:
        table: Of :func:`published_table`.

    Returns:
        ``quantity, peaks, compared, within`` (at most 5 % off), ``median_error, worst_error`` (of absolute errors;
        missing where nothing is compared); the last row, ``all``, is over all quantities.
    """
    parts = [(str(name), part) for name, part in table.groupby("quantity", sort=False)]
    rows = []
    for name, part in [*parts, ("all", table)]:
        errors = part["error"].dropna().abs()
        rows.append(
            {
                "quantity": name,
                "peaks": len(part),
                "compared": len(errors),
                "within": int((errors <= TOLERANCE).sum()),
                "median_error": errors.median() if len(errors) else None,
                "worst_error": errors.max() if len(errors) else None,
            }
        )
    return pd.DataFrame(rows)
