"""One question, three sources of an answer: forecast, measured here, or recorded; all give the same runs and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from i2v_lab.errors import InvalidRequest
from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture
from i2v_lab.profiling.records import Forecast, PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import forecast_specs, is_quiet
from i2v_lab.runs.measure import measure, run_folder
from i2v_lab.runs.recorded import RecordedRuns, by_generation, recorded_runs, seconds_of
from i2v_lab.runs.spec import FULL_SIZE_MODEL, SMALL_MODEL, RunSpec
from i2v_lab.runs.store import COMPLETE, FORECAST, Run

REQUEST_COLUMNS = ("width", "height", "frames", "variant", "quantization", "decode_scope")
TILE_COLUMNS = ("tile_px", "tile_overlap_px", "tile_frames", "tile_overlap_frames")
PHASE_COLUMNS = {
    "start_bytes": "Int64",
    "peak_bytes": "Int64",
    "end_bytes": "Int64",
    "peak_reserved_bytes": "Int64",
    "peak_so_far_bytes": "Int64",
    "saved_for_backward_bytes": "Int64",
    "seconds": "Float64",
    "completed": "boolean",
}


class Source(StrEnum):
    """Where a study's figures come from.

    ``forecast``: the pipeline under fake tensors, at full size, with no GPU. ``measure``: it runs for real on this
    machine. ``recorded``: runs measured before, in ``data/measured``.
    """

    FORECAST = "forecast"
    MEASURE = "measure"
    RECORDED = "recorded"


@dataclass(frozen=True)
class Observation:
    """A run that was asked for and what is known of it.

    Attributes:
        spec: What was asked.
        source: Where the run is from.
        run: ``None`` if there is no record of it.
        recorded: The run of the same spec among the recorded ones, whatever the source; ``None`` if there is none.
    """

    spec: RunSpec
    source: Source
    run: Run | None
    recorded: Run | None = None


def to_source(name: str) -> Source:
    """A source by its name.

    Raises:
        InvalidRequest: There is no such source.
    """
    try:
        return Source(name)
    except ValueError:
        raise InvalidRequest(f"source={name!r} is unknown; use {' or '.join(Source)}", source=name) from None


def choose_model(name: str, source: str, device: str = "auto") -> str:
    """``auto`` as an architecture's name: the full size, or the tiny one where a CPU has to run it.

    Raises:
        UnknownModel: There is no such architecture.
    """
    if name != "auto":
        return load_architecture(name).name
    if to_source(source) is Source.MEASURE and not _has_cuda(device):
        return SMALL_MODEL
    return FULL_SIZE_MODEL


def small_model_of(name: str) -> str:
    """The tiny architecture that stands in for a model on a CPU: of the same runner, the nearest by name.

    Raises:
        UnknownModel: There is no such architecture.

    Example:
        >>> small_model_of("ltx-2.3-22b"), small_model_of("wan-2.2-ti2v-5b")
        ('ltx-2.3-tiny', 'wan-2.2-ti2v-5b-tiny')
    """
    runner = load_architecture(name).runner
    tiny = [each for each in architecture_names() if "tiny" in each and load_architecture(each).runner == runner]
    return max(tiny, key=lambda each: len(commonprefix([each, name])))  # noqa: RUF071, of names


def _has_cuda(device: str) -> bool:
    if device != "auto":
        return device.startswith("cuda")
    import torch

    return torch.cuda.is_available()


def observe(
    specs: Sequence[RunSpec],
    source: str,
    runs_dir: Path,
    device: str = "auto",
    *,
    recorded: RecordedRuns | None = None,
    card: str | None = None,
    progress: bool = True,
) -> list[Observation]:
    """Answer specs from one source, with the recorded runs of the same specs beside.

    Args:
        specs: In the order of the answer.
        source: A :class:`Source`.
        runs_dir: Where measured runs are stored, so that no notebook repeats what another has done.
        device: Of measured runs.
        recorded: Recorded runs; by default those of ``data/measured``.
        card: Only recorded runs of this card; by default of the one on which most of the specs were measured.
        progress: Show a bar on stderr.

    Raises:
        InvalidRequest: There is no such source.
        I2VLabError: A forecast or a run failed.
    """
    kind = to_source(source)
    beside = (recorded if recorded is not None else recorded_runs()).find_together(specs, card)
    runs: list[Run | None]
    if kind is Source.FORECAST:
        forecasts = forecast_specs(specs, progress=progress)
        runs = [as_run(spec, found) for spec, found in zip(specs, forecasts, strict=True)]
    elif kind is Source.MEASURE:
        bar = tqdm(specs, desc="runs", disable=is_quiet(progress))
        runs = [measure(spec, run_folder(runs_dir, spec), device) for spec in bar]
    else:
        runs = list(beside)
    return [Observation(spec, kind, *found) for spec, *found in zip(specs, runs, beside, strict=True)]


def as_run(spec: RunSpec, forecast: Forecast) -> Run:
    """A forecast in the form of a run that was never on disk."""
    metadata = {
        "device": FORECAST,
        "model": spec.model,
        "runner": spec.runner,
        "request": spec.request.to_json(),
        "spec": spec.to_json(),
        "context_bytes": forecast.context_bytes,
    }
    return Run(Path(spec.name), metadata, forecast.records, COMPLETE)


def has_clock(run: Run) -> bool:
    """Whether a run's seconds are those of a card or a CPU, rather than of computing a forecast."""
    return not run.is_forecast or bool(run.metadata.get("clock"))


def device_of(observations: Sequence[Observation]) -> str:
    """What the runs ran on, in words; ``none`` if there are none."""
    names = {
        str(each.run.metadata.get("device_name") or each.run.metadata["device"]) for each in observations if each.run
    }
    return ", ".join(sorted(names)) or "none"


def missing(observations: Sequence[Observation]) -> list[str]:
    """The names of runs of which there is no record."""
    return [each.spec.name for each in observations if each.run is None]


def phases_frame(observations: Sequence[Observation]) -> pd.DataFrame:
    """Every phase of every run.

    Returns:
        One row for each spec, generation and phase: ``name, source, device, model, width, height, frames,
        variant, quantization, decode_scope, tile_px, tile_overlap_px, tile_frames, tile_overlap_frames, consumer,
        generation, phase, start_bytes, peak_bytes, end_bytes, peak_reserved_bytes, peak_so_far_bytes,
        saved_for_backward_bytes, seconds, completed``. Without tiling the tile columns are missing values; a forecast
        has no seconds, unless it has the clock of a card. Specs without a run have no rows.
    """
    rows = [row for each in observations if each.run for row in _phase_rows(each, each.run)]
    columns = ["name", "source", "device", "model", *REQUEST_COLUMNS, *TILE_COLUMNS, "consumer", "generation", "phase"]
    table = pd.DataFrame(rows, columns=[*columns, *PHASE_COLUMNS])
    return table.astype(PHASE_COLUMNS | dict.fromkeys(TILE_COLUMNS, "Int64"))


def runs_frame(observations: Sequence[Observation]) -> pd.DataFrame:
    """Every run as a whole.

    Returns:
        One row for each spec that has a run: the columns of :func:`phases_frame` up to ``consumer``, then
        ``peak_bytes, peak_phase, saved_for_backward_bytes, seconds, recorded_seconds, status``. ``seconds`` is missing
        for a forecast without the clock of a card; ``recorded_seconds`` is that of the same spec among the recorded
        runs, where there is one. ``peak_bytes`` of a run that failed is the most it reached.
    """
    rows = []
    for each in observations:
        if each.run is None:
            continue
        recorded = each.recorded
        phases = each.run.frame("phase")
        top = max(phases.to_dict("records"), key=lambda phase: phase["peak_bytes"], default=None)
        rows.append(
            {
                **_asked(each, each.run),
                "peak_bytes": None if top is None else int(top["peak_bytes"]),
                "peak_phase": "" if top is None else str(top["phase"]),
                "saved_for_backward_bytes": phases["saved_for_backward_bytes"].max() if len(phases) else None,
                "seconds": seconds_of(each.run) if has_clock(each.run) else None,
                "recorded_seconds": seconds_of(recorded) if recorded and recorded.status == COMPLETE else None,
                "status": each.run.status,
            }
        )
    whole = {"peak_bytes": "Int64", "peak_phase": "str", "saved_for_backward_bytes": "Int64"}
    whole |= {"seconds": "Float64", "recorded_seconds": "Float64", "status": "str"}
    columns = ["name", "source", "device", "model", *REQUEST_COLUMNS, *TILE_COLUMNS, "consumer", *whole]
    return pd.DataFrame(rows, columns=columns).astype(whole | dict.fromkeys(TILE_COLUMNS, "Int64"))


def forecast_sweep(
    requests: Sequence[I2VRequest], model: str = FULL_SIZE_MODEL, *, jobs: int | None = None, progress: bool = True
) -> pd.DataFrame:
    """Many forecasts as one tidy table.

    Args:
        requests: In the order of the table.
        model: An architecture's name.
        jobs: Processes; by default one for each core.
        progress: Show a bar on stderr.

    Returns:
        As :func:`phases_frame`.

    Example:
        >>> frames = [I2VRequest(image="stills/lighthouse.png", frames=count) for count in (25, 97)]
        >>> forecast_sweep(frames).groupby("frames")["peak_bytes"].max()  # doctest: +SKIP
    """
    asked = [RunSpec(request=request, model=model) for request in requests]
    found = forecast_specs(asked, jobs=jobs, progress=progress)
    return phases_frame(
        [Observation(each, Source.FORECAST, as_run(each, one)) for each, one in zip(asked, found, strict=True)]
    )


def _phase_rows(observation: Observation, run: Run) -> list[dict[str, Any]]:
    asked = _asked(observation, run)
    rows = []
    for generation, phase in by_generation(run.of(PhaseRecord)):
        figures = {name: getattr(phase, name) for name in PHASE_COLUMNS}
        if not has_clock(run):
            figures["seconds"] = None
        rows.append({**asked, "generation": generation, "phase": phase.phase, **figures})
    return rows


def _asked(observation: Observation, run: Run) -> dict[str, Any]:
    spec = observation.spec
    request, tiling = spec.request, spec.request.tiling
    return {
        "name": spec.name,
        "source": observation.source.value,
        "device": run.metadata.get("device_name") or run.metadata["device"],
        "model": spec.model,
        **{name: getattr(request, name) for name in ("width", "height", "frames")},
        **{name: getattr(request, name).value for name in ("variant", "quantization", "decode_scope")},
        **{name: getattr(tiling, name) if tiling else None for name in TILE_COLUMNS},
        "consumer": spec.consumer.value,
    }
