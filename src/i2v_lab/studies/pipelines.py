"""Memory policies and third-party pipelines side by side: what each takes of a card, and which cards that opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.capacity.cards import FITS, context_bytes, gpu_table, judge
from i2v_lab.errors import InvalidRequest
from i2v_lab.events import Phase
from i2v_lab.memory_policy import MemoryPolicy, Technique
from i2v_lab.profiling.records import Forecast, OutOfMemoryRecord, PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.recorded import RecordedRuns, card_of, seconds_of, spec_of
from i2v_lab.runs.sources import Observation, Source, observe
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.runs.store import Run
from i2v_lab.studies.published import to_size
from i2v_lab.studies.techniques import has_techniques, phase_peaks, under

# Models of diffusers of the same generation as LTX-2.3, by its size here.
BESIDE = {"ltx-2.3-22b": "ltx-2-19b", "ltx-2.3-tiny": "ltx-2-tiny"}
THIRD_PARTY = ("ltx-pipelines", "diffusers", "diffusers, model offloading", "diffusers, group offloading")
POLICIES = (MemoryPolicy.RESIDENT, MemoryPolicy.LEAN, MemoryPolicy.STREAMED)


def policy_specs(request: I2VRequest, model: str, sizes: Sequence[str]) -> list[RunSpec]:
    """The request at each size under each policy."""
    policies = POLICIES if has_techniques(model) else POLICIES[:1]
    resized = [replace(request, width=width, height=height) for width, height in map(to_size, sizes)]
    return [under(one, model, policy) for one in resized for policy in policies]


def policies_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """Every phase's peak under each policy.

    Args:
        observations: Of :func:`policy_specs`.

    Returns:
        One row for each size, policy and phase: ``size, policy, phase, peak_bytes``, and of the recorded run, where
        there is one, ``recorded_bytes`` and the ``error`` of the peak against it.
    """
    rows = []
    for each in observations:
        request, measured = each.spec.request, phase_peaks(each.recorded)
        for phase, peak_bytes in phase_peaks(each.run).items():
            there = measured.get(phase)
            rows.append(
                {
                    "size": f"{request.width}x{request.height}",
                    "policy": str(each.spec.policy),
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
        observations: Of :func:`policy_specs`.

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
        request = each.spec.request
        rows.append(
            {
                "size": f"{request.width}x{request.height}",
                "policy": str(each.spec.policy),
                "needed_bytes": forecast.peak_reserved_bytes + context,
                "cards": len(taking),
                "of": len(cards),
                "smallest_card": "none" if smallest is None else str(smallest["gpu"]),
                "memory_bytes": None if smallest is None else int(smallest["memory_bytes"]),
            }
        )
    columns = ["size", "policy", "needed_bytes", "cards", "of", "smallest_card", "memory_bytes"]
    return pd.DataFrame(rows, columns=columns).astype({"memory_bytes": "Int64"})


def capped_table(observations: Sequence[Observation], recorded: RecordedRuns) -> pd.DataFrame:
    """The outcome of each policy where the allocator was capped to as much as a small card has, as recorded.

    Args:
        observations: Of :func:`policy_specs`.
        recorded: Where capped runs are looked up.

    Returns:
        One row for each such run, of each spec the highest cap first: ``size, policy, cap_bytes, status, phase`` (that
        with the highest peak, or that ran out of memory), ``peak_bytes, reserved_bytes, seconds``.
    """
    rows = []
    for each in observations:
        request = each.spec.request
        for run in recorded.find_capped(each.spec):
            peaks, failures = phase_peaks(run), run.of(OutOfMemoryRecord)
            top = max(peaks, key=lambda phase: peaks[phase], default="")
            rows.append(
                {
                    "size": f"{request.width}x{request.height}",
                    "policy": str(each.spec.policy),
                    "cap_bytes": spec_of(run).vram_cap_bytes,
                    "status": "out of memory" if failures else run.status,
                    "phase": failures[0].phase if failures else top,
                    "peak_bytes": peaks.get(top),
                    "reserved_bytes": _reserved(run),
                    "seconds": seconds_of(run),
                }
            )
    columns = ["size", "policy", "cap_bytes", "status", "phase", "peak_bytes", "reserved_bytes", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def third_party_specs(request: I2VRequest, model: str, size: str, names: Sequence[str] = ()) -> dict[str, RunSpec]:
    """The same generation by third-party pipelines: ltx-pipelines as it is, and diffusers at each of its offloadings.

    diffusers runs LTX-2 in bfloat16, not LTX-2.3, and its decoder does not tile.

    Args:
        request: What to generate.
        model: Beside which of this package's models they stand.
        size: Such as ``1024x768``.
        names: Which of :data:`THIRD_PARTY`; all of them if empty.

    Returns:
        By name; empty for a model that has none beside it.

    Raises:
        InvalidRequest: There is no such pipeline.
    """
    for name in names:
        if name not in THIRD_PARTY:
            known = " or ".join(map(repr, THIRD_PARTY))
            raise InvalidRequest(f"pipeline={name!r} is not a third-party pipeline; use {known}", pipeline=name)
    if model not in BESIDE:
        return {}
    width, height = to_size(size)
    plain = under(replace(request, width=width, height=height), model, MemoryPolicy.RESIDENT)
    theirs = make_request(
        BESIDE[model],
        **{
            name: getattr(plain.request, name)
            for name in ("image", "prompt", "seed", "fps", "width", "height", "frames")
        },
    )
    diffusers = RunSpec(request=theirs, model=BESIDE[model])
    specs = {
        "ltx-pipelines": replace(plain, runner="ltx-pipelines"),
        "diffusers": diffusers,
        "diffusers, model offloading": replace(diffusers, techniques=frozenset({Technique.MODEL_OFFLOAD})),
        "diffusers, group offloading": replace(diffusers, techniques=frozenset({Technique.GROUP_OFFLOAD})),
    }
    return {name: spec for name, spec in specs.items() if not names or name in names}


def observe_third_party(
    policies: Sequence[Observation], size: str, names: Sequence[str], runs_dir: Path
) -> dict[str, Observation]:
    """Third-party pipelines for the same request, forecast, with their runs on the card that ours were measured on.

    Args:
        policies: Of :func:`policy_specs`.
        size: Such as ``1024x768``.
        names: As in :func:`third_party_specs`.
        runs_dir: As in :func:`~i2v_lab.runs.sources.observe`.
    """
    first = policies[0].spec
    specs = third_party_specs(first.request, first.model, size, names)
    card = next((card_of(each.recorded) for each in policies if each.recorded), None)
    found = observe(list(specs.values()), Source.FORECAST, runs_dir, card=card)
    return dict(zip(specs, found, strict=True))


def pipelines_table(
    observations: Sequence[Observation], size: str, third_party: Mapping[str, Observation]
) -> pd.DataFrame:
    """Our policies and third-party pipelines for the same request: what each takes, by forecast and measured.

    Args:
        observations: Of :func:`policy_specs`.
        size: The one to compare at, such as ``1024x768``.
        third_party: Of :func:`observe_third_party`.

    Returns:
        One row for each: ``pipeline``; ``model, quantization, tiling`` as the spec has them; ``peak_bytes, peak_phase,
        denoise_bytes`` (of stage 2), ``decode_bytes``; then ``measured_bytes, measured_reserved_bytes,
        measured_seconds`` of the recorded run and the ``error`` of the forecast; missing where there is no such run.
    """
    width, height = to_size(size)
    ours = {
        f"{each.spec.runner_spec.label}, {each.spec.policy}": each
        for each in observations
        if (each.spec.request.width, each.spec.request.height) == (width, height)
    }
    rows = [_pipeline_row(name, each) for name, each in [*ours.items(), *third_party.items()]]
    whole = dict.fromkeys(["peak_bytes", "denoise_bytes", "decode_bytes", "measured_bytes"], "Int64")
    return pd.DataFrame(rows).astype(
        {**whole, "measured_reserved_bytes": "Int64", "measured_seconds": "Float64", "error": "Float64"}
    )


def _pipeline_row(name: str, observation: Observation) -> dict[str, Any]:
    measured, request = observation.recorded, observation.spec.request
    peaks, there = phase_peaks(observation.run), max(phase_peaks(measured).values(), default=None)
    top = max(peaks, key=lambda phase: peaks[phase], default="")
    whole = [phase for phase in measured.of(PhaseRecord) if phase.parent is None] if measured else []
    return {
        "pipeline": name,
        "model": observation.spec.model,
        "quantization": request.quantization.value,
        "tiling": "untiled" if request.tiling is None else f"{request.tiling.tile_px} px",
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
