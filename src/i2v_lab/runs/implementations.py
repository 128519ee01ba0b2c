"""Whose pipeline runs: ours, or others' as they are; what theirs would take, and how theirs is run for real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2v_lab.errors import InvalidRequest
from i2v_lab.paths import find_still
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import Known, kept_forecast, kept_forecasts, kept_path
from i2v_lab.runs.spec import FULL_SIZE_MODEL, Experiment

if TYPE_CHECKING:
    import torch

    from i2v_lab.pipeline.ltx2.weights import Weights
    from i2v_lab.profiling.phase_profiler import PhaseProfiler


class Implementation(StrEnum):
    """Whose pipeline, and how its weights are kept off the device; all but ours untouched."""

    OURS = "i2v-lab"
    UPSTREAM = "ltx-pipelines"
    DIFFUSERS = "diffusers"
    DIFFUSERS_MODEL = "diffusers, model offloading"
    DIFFUSERS_GROUP = "diffusers, group offloading"

    @property
    def is_diffusers(self) -> bool:
        """Whether it is one of diffusers' ways."""
        return self.value.startswith("diffusers")


OTHERS = tuple(each for each in Implementation if each is not Implementation.OURS)


def to_other(name: str) -> Implementation:
    """Somebody else's implementation by its name.

    Raises:
        InvalidRequest: There is no such.
    """
    if name not in OTHERS:
        known = " or ".join(repr(each.value) for each in OTHERS)
        raise InvalidRequest(f"pipeline={name!r} is not one of others'; use {known}", pipeline=name)
    return Implementation(name)


def forecast_other(
    implementation: Implementation, request: I2VRequest, model: str = FULL_SIZE_MODEL, device: str = "cuda"
) -> Forecast:
    """What somebody else's two-stage pipeline would record for a request, without a GPU.

    ltx-pipelines' runs with the model's architecture and the request's variant and quantization. diffusers' runs in
    bfloat16 and without guidance, at the size of its default configuration, which is LTX-2's; from the model it takes
    Gemma. Its video decoder does not tile. Kept in the cache by everything that it depends on.

    Args:
        implementation: Whose.
        request: What to generate.
        model: An architecture's name; a small one makes diffusers' small too.
        device: ``cuda`` (there need be none) or ``cpu``.

    Raises:
        ForecastError: It does something that cannot be known without running it.

    Example:
        >>> request = I2VRequest(image="stills/lighthouse.png", width=1024, height=768, frames=97)
        >>> forecast_other(Implementation.UPSTREAM, request).peak.phase  # doctest: +SKIP
        'encode_prompt'
    """
    return _forecast((implementation, Experiment(request=request, model=model), device))


def forecast_others(asked: Sequence[tuple[Implementation, Experiment]], *, progress: bool = True) -> list[Forecast]:
    """:func:`forecast_other` for many, on all cores."""
    whole = [(implementation, experiment, "cuda") for implementation, experiment in asked]
    return kept_forecasts(_forecast, whole, lambda each: _path(*each).exists(), progress=progress)


def _forecast(asked: tuple[Implementation, Experiment, str]) -> Forecast:
    return kept_forecast(_path(*asked), lambda: _work_out(*asked))


def _path(implementation: Implementation, experiment: Experiment, device: str) -> Path:
    here = Path(__file__)
    own = [implementation.value, version("diffusers"), version("ltx-pipelines"), here.read_text()]
    return kept_path(experiment, device, [*own, (here.parent / "profile_call.py").read_text()])


def _work_out(implementation: Implementation, experiment: Experiment, device: str) -> Known:
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.ltx2 import components as ltx2
    from i2v_lab.pipeline.ltx2.weights import skeleton_weights
    from i2v_lab.profiling.fake.forecast import forecasting
    from i2v_lab.profiling.fake.workspaces import load_workspaces

    workspaces = load_workspaces() if device == "cuda" else None
    weights = skeleton_weights(load_architecture(experiment.model))
    request = replace(experiment.request, image=str(find_still(experiment.request.image)))
    if implementation.is_diffusers:
        from i2v_lab.pipeline.diffusers.ltx2 import memoizable_modules

        with forecasting(device, memoize=memoizable_modules(), workspaces=workspaces) as profiler:
            call_diffusers(implementation, weights, experiment.model, device, request, profiler, forecast=True)
    else:
        from i2v_lab.pipeline.ltx2.upstream import UpstreamPipeline

        with forecasting(device, memoize=ltx2.memoizable_modules(), workspaces=workspaces) as profiler:
            for chunk in UpstreamPipeline(weights, device, sinks=[profiler])(request).video:
                del chunk
    return tuple(profiler.records), workspaces.context_bytes if workspaces else 0


def call_diffusers(
    implementation: Implementation,
    weights: Weights,
    model: str,
    device: str | torch.device,
    request: I2VRequest,
    profiler: PhaseProfiler,
    *,
    forecast: bool = False,
) -> Any:
    """Build diffusers' pipelines and generate once, told to a profiler that is active.

    Args:
        implementation: Which of diffusers' ways.
        weights: Whose Gemma is taken, by its dimensions.
        model: A small one makes diffusers' small too.
        device: Where it runs.
        request: What to generate.
        profiler: Gets the phases.
        forecast: Whether nothing is real.

    Returns:
        Video and audio.
    """
    from i2v_lab.pipeline.diffusers.ltx2 import FULL, TINY, Offload, diffusers_ltx2
    from i2v_lab.runs.profile_call import profile_call

    offload = {
        Implementation.DIFFUSERS_MODEL: Offload.MODEL,
        Implementation.DIFFUSERS_GROUP: Offload.GROUP,
    }.get(implementation, Offload.NONE)
    sizes = FULL if model == FULL_SIZE_MODEL else TINY
    pipeline = diffusers_ltx2(weights, sizes, device, offload=offload, forecast=forecast)
    return profile_call(pipeline, request, profiler=profiler).result
