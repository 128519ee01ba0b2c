"""How a question's request is held: as it says, or the fastest way within the memory that there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from i2v_lab.capacity.cards import FITS, NO, fitting_bytes, judge
from i2v_lab.capacity.placement import Budgets, Resolution, cap_bytes, needed_bytes
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import Offload
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import check_request, runner_of
from i2v_lab.profiling.records import Forecast, PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import cached_forecast, forecast_request
from i2v_lab.runs.spec import RunSpec
from i2v_lab.studies.placed import (
    RESIDENT,
    fastest_settings,
    forecast_that_runs,
    placed_of,
    settings_tried,
    waiting_bytes,
)

EVERYTHING = "everything resident"
Forecaster = Callable[[I2VRequest, str, str], Forecast]


class NotCached(Exception):
    """A forecast that is needed is not in the cache."""


def from_cache(request: I2VRequest, model: str, device: str) -> Forecast:
    """As :func:`~i2v_lab.runs.forecast.forecast_request`, of what was forecast before.

    Raises:
        NotCached: It was not.
    """
    found = cached_forecast(RunSpec(request=request, model=model), device)
    if found is None:
        raise NotCached
    return found


def chooses(model: str) -> bool:
    """Whether there are several ways to hold a model: techniques and placements, or memory settings of diffusers."""
    runner = runner_of(load_architecture(model))
    return runner.settings or MemoryPolicy.AUTO in runner.memory


@dataclass(frozen=True)
class Held:
    """A request as it would run, and what it takes.

    Attributes:
        request: With its memory policy, placement or settings decided.
        forecast: Of that request.
        name: How it is held, in a few words.
        needed_bytes: The smallest memory that it fits, the CUDA context and margins included.
        verdict: ``fits``, ``tight`` or ``no``, of the memory that was asked about.
        cap_bytes: Of that memory, what the caching allocator may reserve.
        host_bytes: Of weights that wait in host memory; ``None`` where it is not known.
        chosen: Whether it was searched for.
    """

    request: I2VRequest
    forecast: Forecast
    name: str
    needed_bytes: int
    verdict: str
    cap_bytes: int
    host_bytes: int | None
    chosen: bool


def as_asked(request: I2VRequest, model: str, device: str = "cuda", forecast: Forecaster = forecast_request) -> Held:
    """A request as it says; its verdict and cap are those of no memory at all, until :func:`within` says of which.

    Args:
        request: With a memory policy other than ``auto``.
        model: An architecture's name.
        device: ``cuda`` or ``cpu``.
        forecast: Where forecasts come from.
    """
    result, runner = forecast(request, model, device), runner_of(load_architecture(model))
    host: int | None = result.page_locked_bytes + result.pageable_bytes
    if request.settings.offloads:
        whole = replace(request, settings=replace(request.settings, offload=Offload.NONE, offload_stream=False))
        known = cached_forecast(RunSpec(request=whole, model=model), device)
        host = waiting_bytes(request, {} if known is None else {whole: known})
    name = request.settings.options or (RESIDENT if runner.settings else str(request.placed.policy or "placed"))
    return Held(request, result, name, fitting_bytes(result), NO, 1, host, chosen=False)


def within(held: Held, memory_bytes: int, device: str) -> Held:
    """A request as it says, beside the memory that the process may take."""
    verdict = judge(held.forecast, "", memory_bytes).verdict
    return replace(held, verdict=verdict, cap_bytes=cap_bytes(memory_bytes, held.forecast.context_bytes, device))


def fastest_placement(budgets: Budgets, request: I2VRequest, memory_bytes: int, gpu: str, device: str) -> Held:
    """The fastest placement within a memory, or the one that needs the least where none is.

    Args:
        budgets: Of the request.
        request: Whose tiles a placement is compared with.
        memory_bytes: That the process may take.
        gpu: The card whose seconds are predicted.
        device: ``cuda`` or ``cpu``.
    """
    found = budgets.resolve(memory_bytes, explain=False)
    if isinstance(found, Resolution):
        placed, result = placed_of(found, request, gpu), found.forecast
        needed = needed_bytes(result.peak.peak_bytes, result.context_bytes, device)
        name = EVERYTHING if placed.name == RESIDENT else placed.name
        held = Held(found.request, result, name, needed, FITS, found.cap_bytes, placed.host_bytes, chosen=True)
        return replace(held, forecast=_capped(result, found.cap_bytes))
    least = budgets.smallest()
    result = least.forecast
    host = result.page_locked_bytes + result.pageable_bytes
    return Held(least.request, result, "everything streamed", int(found.fields["needed_bytes"]), NO, 1, host, True)


def _capped(forecast: Forecast, cap_bytes: int) -> Forecast:
    """What the allocator reserves under a cap, at which it releases cached blocks."""
    records = [
        replace(each, peak_reserved_bytes=min(each.peak_reserved_bytes, cap_bytes))
        if isinstance(each, PhaseRecord) and each.peak_reserved_bytes is not None
        else each
        for each in forecast.records
    ]
    return replace(forecast, records=tuple(records))


def fastest_settings_within(
    request: I2VRequest,
    model: str,
    memory_bytes: int,
    gpu: str,
    device: str = "cuda",
    forecast: Forecaster = forecast_request,
) -> Held:
    """The fastest memory settings of diffusers within a memory, or those that need the least where none are.

    They are the settings that ``fit`` and the answer page try, so that these answer the same.

    Args:
        request: Its offload is replaced, and its tiling where that is tried; other settings are kept.
        model: An architecture's name.
        memory_bytes: That the process may take.
        gpu: The card whose seconds are predicted.
        device: ``cuda`` or ``cpu``.
        forecast: Where forecasts come from.
    """
    check_request(load_architecture(model), request)
    own = replace(request.settings, offload=Offload.NONE, offload_stream=False, offload_blocks=1)

    def forecasts(specs: Sequence[RunSpec]) -> list[Forecast | None]:
        return [forecast_that_runs(each, lambda spec: forecast(spec.request, model, device)) for each in specs]

    tried = settings_tried(replace(request, settings=own), model, memory_bytes, forecasts)
    chosen = fastest_settings(tried, gpu, memory_bytes).request
    fits = chosen is not None
    if chosen is None:
        chosen = min(tried, key=lambda each: fitting_bytes(tried[each]))
    result, host = tried[chosen], waiting_bytes(chosen, tried)
    cap = cap_bytes(memory_bytes, result.context_bytes, device) if fits else 1
    name = chosen.settings.options or EVERYTHING
    return Held(chosen, result, name, fitting_bytes(result), FITS if fits else NO, cap, host, chosen=True)
