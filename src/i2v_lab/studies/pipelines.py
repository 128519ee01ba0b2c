"""Memory policies and third-party pipelines compared: the memory each needs, and the GPUs that it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.capacity.cards import FITS, context_bytes, fitting_bytes, gpu_table, judge
from i2v_lab.errors import InvalidRequest
from i2v_lab.events import Phase
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy
from i2v_lab.memory_settings import NO_SETTINGS, MemorySettings, Offload
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.profiling.records import Forecast, OutOfMemoryRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.phases import peak_reserved_bytes, phase_peaks, phase_seconds, run_peak
from i2v_lab.runs.recorded import RecordedRuns, card_of, seconds_of, spec_of
from i2v_lab.runs.sources import Observation, Source, has_clock, observe
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.studies.published import to_size
from i2v_lab.studies.techniques import with_policy
from i2v_lab.studies.times import GPU, timed

# The models of diffusers that are compared with ours: LTX-2.3 as diffusers runs it.
COMPARED_MODELS = {"ltx-2.3-22b": "ltx-2.3-22b-diffusers", "ltx-2.3-tiny": "ltx-2.3-tiny-diffusers"}
THIRD_PARTY = (
    "ltx-pipelines",
    "diffusers",
    "diffusers, model offloading",
    "diffusers, group offloading",
    "diffusers, sequential offloading",
)
OFFLOADED = (
    NO_SETTINGS,
    MemorySettings(offload=Offload.MODEL),
    MemorySettings(offload=Offload.GROUP_LEAF, offload_stream=True),
    MemorySettings(offload=Offload.SEQUENTIAL),
)
POLICIES = (MemoryPolicy.RESIDENT, MemoryPolicy.LEAN, MemoryPolicy.STREAMED)


def policy_specs(request: I2VRequest, model: str, sizes: Sequence[str]) -> list[RunSpec]:
    """The request at each size under each policy that the model's runner supports; for diffusers, its offloading."""
    runner = runner_of(load_architecture(model))
    policies = [policy for policy in POLICIES if TECHNIQUES[policy] <= runner.techniques]
    resized = [replace(request, width=width, height=height) for width, height in map(to_size, sizes)]
    if runner.settings:
        offloaded = [replace(one, settings=settings) for one in resized for settings in OFFLOADED]
        return [with_policy(one, model, MemoryPolicy.RESIDENT) for one in offloaded]
    return [with_policy(one, model, policy) for one in resized for policy in policies]


def policy_name(spec: RunSpec) -> str:
    """The memory policy of a run, or the memory settings that it has instead."""
    return spec.request.settings.name or str(spec.policy)


def policies_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """Every phase's peak under each policy.

    Args:
        observations: Of :func:`policy_specs`.

    Returns:
        One row for each size, policy and phase: ``size, policy, phase, peak_bytes, seconds`` (missing for a forecast
        without the clock of a card), and of the recorded run, where there is one, ``recorded_bytes`` and the ``error``
        of the peak against it.
    """
    rows = []
    for each in observations:
        request, measured = each.spec.request, phase_peaks(each.recorded)
        seconds = phase_seconds(each.run) if each.run and has_clock(each.run) else {}
        for phase, peak_bytes in phase_peaks(each.run).items():
            recorded_bytes = measured.get(phase)
            rows.append(
                {
                    "size": f"{request.width}x{request.height}",
                    "policy": policy_name(each.spec),
                    "phase": phase,
                    "peak_bytes": peak_bytes,
                    "seconds": seconds.get(phase),
                    "recorded_bytes": recorded_bytes,
                    "error": None if recorded_bytes is None else peak_bytes / recorded_bytes - 1,
                }
            )
    columns = ["size", "policy", "phase", "peak_bytes", "seconds", "recorded_bytes", "error"]
    return pd.DataFrame(rows, columns=columns).astype(
        {"seconds": "Float64", "recorded_bytes": "Int64", "error": "Float64"}
    )


def phases_by_policy(policies: pd.DataFrame, size: str) -> pd.DataFrame:
    """:func:`policies_table` at one size, a column of peaks and one of seconds for each policy.

    Args:
        policies: Of :func:`policies_table`.
        size: Such as ``1024x768``.

    Returns:
        One row for each phase: ``phase``, then for each policy its peak as ``<policy>_bytes``, and its seconds as
        ``<policy>_seconds`` where they are known.
    """
    part = policies[policies["size"] == size]
    phases, names = part["phase"].unique(), part["policy"].unique()

    def by_policy(values: str) -> pd.DataFrame:
        return part.pivot(index="phase", columns="policy", values=values).reindex(index=phases, columns=names)

    seconds = by_policy("seconds").dropna(axis="columns", how="all").add_suffix("_seconds")
    return by_policy("peak_bytes").add_suffix("_bytes").join(seconds).reset_index()


def cards_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """The GPUs that each size fits under each policy.

    Args:
        observations: Of :func:`policy_specs`.

    Returns:
        One row for each size and policy: ``size, policy``; ``needed_bytes``, reserved memory with its margin and the
        CUDA context; ``seconds``, as in :func:`policies_table`, of the whole run;
        ``cards``, how many GPUs it fits, ``of`` those in ``data/gpus.csv``; ``smallest_card`` and its ``memory_bytes``.
    """
    cards = gpu_table().sort_values("memory_bytes", kind="stable")
    context, rows = context_bytes(), []
    for each in observations:
        if each.run is None:
            continue
        forecast = Forecast(each.run.records, context, 0.0)
        fits = [judge(forecast, "", int(size)).verdict == FITS for size in cards["memory_bytes"]]
        fitting = cards[fits]
        smallest = None if fitting.empty else fitting.iloc[0]
        request = each.spec.request
        rows.append(
            {
                "size": f"{request.width}x{request.height}",
                "policy": policy_name(each.spec),
                "needed_bytes": fitting_bytes(forecast),
                "seconds": seconds_of(each.run) if has_clock(each.run) else None,
                "cards": len(fitting),
                "of": len(cards),
                "smallest_card": "none" if smallest is None else str(smallest["gpu"]),
                "memory_bytes": None if smallest is None else int(smallest["memory_bytes"]),
            }
        )
    columns = ["size", "policy", "needed_bytes", "seconds", "cards", "of", "smallest_card", "memory_bytes"]
    return pd.DataFrame(rows, columns=columns).astype({"seconds": "Float64", "memory_bytes": "Int64"})


def capped_table(observations: Sequence[Observation], recorded: RecordedRuns) -> pd.DataFrame:
    """Recorded runs whose allocator was capped to the memory of a smaller GPU.

    Args:
        observations: Of :func:`policy_specs`.
        recorded: The recorded runs to search.

    Returns:
        One row for each such run, by spec and descending cap: ``size, policy, cap_bytes, status, phase`` (of the peak,
        or of the out-of-memory error), ``peak_bytes, reserved_bytes, seconds``.
    """
    rows = []
    for each in observations:
        request = each.spec.request
        for run in recorded.find_capped(each.spec):
            peak, failures = run_peak(run), run.of(OutOfMemoryRecord)
            phase = failures[0].phase if failures else peak.phase if peak else ""
            rows.append(
                {
                    "size": f"{request.width}x{request.height}",
                    "policy": policy_name(each.spec),
                    "cap_bytes": spec_of(run).vram_cap_bytes,
                    "status": "out of memory" if failures else run.status,
                    "phase": phase,
                    "peak_bytes": peak.peak_bytes if peak else None,
                    "reserved_bytes": peak_reserved_bytes(run),
                    "seconds": seconds_of(run),
                }
            )
    columns = ["size", "policy", "cap_bytes", "status", "phase", "peak_bytes", "reserved_bytes", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def third_party_specs(request: I2VRequest, model: str, size: str, names: Sequence[str] = ()) -> dict[str, RunSpec]:
    """The same request for third-party pipelines: ltx-pipelines, and diffusers without and with its offloading modes.

    diffusers runs the model in bfloat16 and without tiling.

    Args:
        request: What to generate.
        model: The model of this package that they are compared with.
        size: Such as ``1024x768``.
        names: Some of :data:`THIRD_PARTY`; all of them if empty.

    Returns:
        Specs by name; empty for a model without a counterpart.

    Raises:
        InvalidRequest: A name is not in :data:`THIRD_PARTY`.
    """
    check_third_party(names)
    if model not in COMPARED_MODELS:
        return {}
    width, height = to_size(size)
    plain = with_policy(replace(request, width=width, height=height), model, MemoryPolicy.RESIDENT)
    shared = ("image", "prompt", "seed", "fps", "width", "height", "frames")
    counterpart = make_request(COMPARED_MODELS[model], **{name: getattr(plain.request, name) for name in shared})
    diffusers = RunSpec(request=counterpart, model=COMPARED_MODELS[model])
    specs = {
        "ltx-pipelines": replace(plain, runner="ltx-pipelines"),
        "diffusers": diffusers,
        "diffusers, model offloading": diffusers.with_request(settings=MemorySettings(offload=Offload.MODEL)),
        "diffusers, group offloading": diffusers.with_request(settings=MemorySettings(offload=Offload.GROUP_LEAF)),
        "diffusers, sequential offloading": diffusers.with_request(settings=MemorySettings(offload=Offload.SEQUENTIAL)),
    }
    return {name: spec for name, spec in specs.items() if not names or name in names}


def check_third_party(names: Sequence[str]) -> None:
    """Refuse names that are not in :data:`THIRD_PARTY`.

    Raises:
        InvalidRequest: With the name and the known ones.
    """
    for name in names:
        if name not in THIRD_PARTY:
            known = " or ".join(map(repr, THIRD_PARTY))
            raise InvalidRequest(f"pipeline={name!r} is not a third-party pipeline; use {known}", pipeline=name)


def observe_third_party(
    policies: Sequence[Observation], size: str, names: Sequence[str], runs_dir: Path, gpu: str = GPU
) -> dict[str, Observation]:
    """Forecasts of third-party pipelines for the same request, with their recorded runs on the GPU of our own ones.

    Args:
        policies: Of :func:`policy_specs`.
        size: Such as ``1024x768``.
        names: As in :func:`third_party_specs`.
        runs_dir: As in :func:`~i2v_lab.runs.sources.observe`.
        gpu: As in :func:`~i2v_lab.studies.times.timed`.
    """
    first = policies[0].spec
    specs = third_party_specs(first.request, first.model, size, names)
    card = next((card_of(each.recorded) for each in policies if each.recorded), None)
    found = observe(list(specs.values()), Source.FORECAST, runs_dir, card=card)
    return dict(zip(specs, timed(found, gpu), strict=True))


def pipelines_table(
    observations: Sequence[Observation], size: str, third_party: Mapping[str, Observation]
) -> pd.DataFrame:
    """Our policies and third-party pipelines for the same request, forecast and measured.

    Args:
        observations: Of :func:`policy_specs`.
        size: Such as ``1024x768``.
        third_party: Of :func:`observe_third_party`.

    Returns:
        One row for each: ``pipeline``; ``model, quantization, tiling`` of the spec; ``peak_bytes, peak_phase,
        denoise_bytes`` (stage 2), ``decode_bytes``, ``seconds`` as in :func:`policies_table`; of the recorded run
        ``measured_bytes, measured_reserved_bytes,
        measured_seconds``, and the ``error`` of the forecast; missing without a recorded run.
    """
    width, height = to_size(size)
    ours = {
        f"{each.spec.runner_spec.label}, {policy_name(each.spec)}": each
        for each in observations
        if (each.spec.request.width, each.spec.request.height) == (width, height)
    }
    rows = [_pipeline_row(name, each) for name, each in [*ours.items(), *third_party.items()]]
    whole = dict.fromkeys(["peak_bytes", "denoise_bytes", "decode_bytes", "measured_bytes"], "Int64")
    return pd.DataFrame(rows).astype(
        {
            **whole,
            "measured_reserved_bytes": "Int64",
            "seconds": "Float64",
            "measured_seconds": "Float64",
            "error": "Float64",
        }
    )


def _pipeline_row(name: str, observation: Observation) -> dict[str, Any]:
    measured, request = observation.recorded, observation.spec.request
    peaks, peak, measured_peak = phase_peaks(observation.run), run_peak(observation.run), run_peak(measured)
    return {
        "pipeline": name,
        "model": observation.spec.model,
        "quantization": request.quantization.value,
        "tiling": "untiled" if request.tiling is None else f"{request.tiling.tile_px} px",
        "peak_bytes": peak.peak_bytes if peak else None,
        "peak_phase": peak.phase if peak else "",
        "denoise_bytes": peaks.get(Phase.DENOISE_STAGE_2),
        "decode_bytes": peaks.get(Phase.DECODE_VIDEO),
        "seconds": seconds_of(observation.run) if observation.run and has_clock(observation.run) else None,
        "measured_bytes": measured_peak.peak_bytes if measured_peak else None,
        "measured_reserved_bytes": peak_reserved_bytes(measured),
        "measured_seconds": seconds_of(measured) if measured_peak and measured else None,
        "error": peak.peak_bytes / measured_peak.peak_bytes - 1 if peak and measured_peak else None,
    }
