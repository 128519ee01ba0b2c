"""Memory policies and others' pipelines side by side: what each takes of a card, and which cards that opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from i2v_lab.capacity.cards import FITS, context_bytes, gpu_table, judge
from i2v_lab.events import Phase
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.profiling.records import Forecast, OutOfMemoryRecord, PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.implementations import OTHERS, Implementation, forecast_others, to_other
from i2v_lab.runs.recorded import find_capped, find_of, find_together, seconds_of
from i2v_lab.runs.sources import Observation, as_run
from i2v_lab.runs.spec import Experiment
from i2v_lab.runs.store import Run
from i2v_lab.studies.published import to_size
from i2v_lab.studies.techniques import has_techniques, phase_peaks, under

POLICIES = (MemoryPolicy.RESIDENT, MemoryPolicy.LEAN, MemoryPolicy.STREAMED)


def policy_experiments(request: I2VRequest, model: str, sizes: Sequence[str]) -> list[Experiment]:
    """The request at each size under each policy."""
    policies = POLICIES if has_techniques(model) else POLICIES[:1]
    resized = [replace(request, width=width, height=height) for width, height in map(to_size, sizes)]
    return [under(one, model, policy) for one in resized for policy in policies]


def policies_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """Every phase's peak under each policy.

    Args:
        observations: Of :func:`policy_experiments`.

    Returns:
        One row for each size, policy and phase: ``size, policy, phase, peak_bytes``, and from ``data/measured``, where
        there is such a run, ``recorded_bytes`` and the ``error`` of the peak against it.
    """
    rows = []
    for each, kept in zip(observations, find_together([each.experiment for each in observations]), strict=True):
        request, measured = each.experiment.request, phase_peaks(kept)
        for phase, peak_bytes in phase_peaks(each.run).items():
            there = measured.get(phase)
            rows.append(
                {
                    "size": f"{request.width}x{request.height}",
                    "policy": request.memory.value,
                    "phase": phase,
                    "peak_bytes": peak_bytes,
                    "recorded_bytes": there,
                    "error": None if there is None else peak_bytes / there - 1,
                }
            )
    columns = ["size", "policy", "phase", "peak_bytes", "recorded_bytes", "error"]
    return pd.DataFrame(rows, columns=columns).astype({"recorded_bytes": "Int64", "error": "Float64"})


def phases_by_policy(policies: pd.DataFrame, size: str) -> pd.DataFrame:
    """:func:`policies_table` at one size, as people compare it.

    Returns:
        One row for each phase: ``phase``, then for each policy its peak as ``<policy>_bytes``.
    """
    part = policies[policies["size"] == size]
    wide = part.pivot(index="phase", columns="policy", values="peak_bytes").reindex(part["phase"].unique())
    return wide.reindex(columns=part["policy"].unique()).add_suffix("_bytes").reset_index()


def cards_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """The cards that each policy opens.

    Args:
        observations: Of :func:`policy_experiments`.

    Returns:
        One row for each size and policy: ``size, policy, needed_bytes`` (reserved, with the CUDA context), ``cards``
        (of ``data/gpus.csv`` that take it) and ``of``, ``smallest_card`` and its ``memory_bytes``.
    """
    cards = gpu_table().sort_values("memory_bytes", kind="stable")
    context, rows = context_bytes(), []
    for each in observations:
        if each.run is None:
            continue
        forecast = Forecast(each.run.records, context, 0.0)
        fits = [judge(forecast, "", int(size)).verdict == FITS for size in cards["memory_bytes"]]
        taking = cards[fits]
        smallest = None if taking.empty else taking.iloc[0]
        request = each.experiment.request
        rows.append(
            {
                "size": f"{request.width}x{request.height}",
                "policy": request.memory.value,
                "needed_bytes": forecast.peak_reserved_bytes + context,
                "cards": len(taking),
                "of": len(cards),
                "smallest_card": "none" if smallest is None else str(smallest["gpu"]),
                "memory_bytes": None if smallest is None else int(smallest["memory_bytes"]),
            }
        )
    columns = ["size", "policy", "needed_bytes", "cards", "of", "smallest_card", "memory_bytes"]
    return pd.DataFrame(rows, columns=columns).astype({"memory_bytes": "Int64"})


def capped_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """What became of each policy where the allocator was held to as much as a small card has, as recorded.

    Args:
        observations: Of :func:`policy_experiments`.

    Returns:
        One row for each such run, of each experiment the highest cap first: ``size, policy, cap_bytes, status, phase``
        (that which held the peak, or ran out of memory), ``peak_bytes, reserved_bytes, seconds``.
    """
    rows = []
    for each in observations:
        request = each.experiment.request
        for run in find_capped(each.experiment):
            peaks, failures = phase_peaks(run), run.of(OutOfMemoryRecord)
            top = max(peaks, key=lambda phase: peaks[phase], default="")
            rows.append(
                {
                    "size": f"{request.width}x{request.height}",
                    "policy": request.memory.value,
                    "cap_bytes": int(run.metadata["vram_cap_bytes"]),
                    "status": "out of memory" if failures else run.status,
                    "phase": failures[0].phase if failures else top,
                    "peak_bytes": peaks.get(top),
                    "reserved_bytes": _reserved(run),
                    "seconds": seconds_of(run),
                }
            )
    columns = ["size", "policy", "cap_bytes", "status", "phase", "peak_bytes", "reserved_bytes", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def pipelines_table(observations: Sequence[Observation], size: str, others: Sequence[str] = ()) -> pd.DataFrame:
    """Our policies and others' pipelines for the same request: what each takes, by forecast and measured.

    Others' are always forecast, and looked up on the card that ours were measured on. diffusers' is LTX-2 in bfloat16,
    not LTX-2.3, and its decoder does not tile.

    Args:
        observations: Of :func:`policy_experiments`.
        size: The one to compare at, such as ``1024x768``.
        others: Which of :class:`~i2v_lab.runs.implementations.Implementation` beside ours; all of them if empty.

    Returns:
        One row for each: ``pipeline, peak_bytes, peak_phase, denoise_bytes`` (of stage 2), ``decode_bytes``, then
        ``measured_bytes, measured_reserved_bytes, measured_seconds`` from ``data/measured`` and the ``error`` of the
        forecast; missing where there is no such run.
    """
    width, height = to_size(size)
    observations = [
        each
        for each in observations
        if (each.experiment.request.width, each.experiment.request.height) == (width, height)
    ]
    resident = observations[0].experiment
    kept = find_together([each.experiment for each in observations])
    card = next((str(run.metadata["device_name"]) for run in kept if run), "")
    rows = [
        _pipeline_row(f"{Implementation.OURS}, {each.experiment.request.memory}", each.run, run)
        for each, run in zip(observations, kept, strict=True)
    ]
    if has_techniques(resident.model):  # the others are pipelines of the same generation
        beside = [to_other(name) for name in others or OTHERS]
        found = forecast_others([(each, resident) for each in beside])
        for each, forecast in zip(beside, found, strict=True):
            rows.append(_pipeline_row(each.value, as_run(resident, forecast), find_of(each, resident, card)))
    whole = dict.fromkeys(["peak_bytes", "denoise_bytes", "decode_bytes", "measured_bytes"], "Int64")
    return pd.DataFrame(rows).astype(
        {**whole, "measured_reserved_bytes": "Int64", "measured_seconds": "Float64", "error": "Float64"}
    )


def _pipeline_row(name: str, run: Run | None, measured: Run | None) -> dict[str, Any]:
    peaks, there = phase_peaks(run), max(phase_peaks(measured).values(), default=None)
    top = max(peaks, key=lambda phase: peaks[phase], default="")
    whole = [phase for phase in measured.of(PhaseRecord) if phase.parent is None] if measured else []
    return {
        "pipeline": name,
        "peak_bytes": peaks.get(top),
        "peak_phase": top,
        "denoise_bytes": peaks.get(Phase.DENOISE_STAGE_2),
        "decode_bytes": peaks.get(Phase.DECODE_VIDEO),
        "measured_bytes": there,
        "measured_reserved_bytes": _reserved(measured) if measured else None,
        "measured_seconds": sum(phase.seconds for phase in whole) if whole else None,
        "error": None if there is None or not peaks else peaks[top] / there - 1,
    }


def _reserved(run: Run) -> int | None:
    """The most that the allocator held."""
    held = [phase.peak_reserved_bytes for phase in run.of(PhaseRecord) if phase.peak_reserved_bytes is not None]
    return max(held, default=None)
