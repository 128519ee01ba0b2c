"""The fastest placement of a request within the memory of each of several GPUs, without a forecast for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from i2v_lab.capacity.candidates import DECODE_VIDEO
from i2v_lab.capacity.cards import fitting_bytes
from i2v_lab.capacity.device_profile import REFERENCE, device_profile, has_profile
from i2v_lab.capacity.placement import Budgets, Resolution, needed_bytes
from i2v_lab.capacity.time_model import seconds_on
from i2v_lab.errors import DeviceUnavailable, ForecastError, InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import Offload
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import check_request, runner_of
from i2v_lab.placement import STREAMED_COMPONENTS
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import FAILS_ON_A_CARD
from i2v_lab.runs.forecast import cached_forecast, forecast_spec, is_cached
from i2v_lab.runs.provenance import usable_cores
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.workers import end_on_interrupt, worker_context

NONE, RESIDENT, PARTIAL, WHOLE = "none", "resident", "partial", "nothing streamed"
UNSTREAMED = (RESIDENT, "lean", WHOLE)
PUBLISHED, MEASURED = "published", "measured"  # rates
OFFLOADS = (Offload.NONE, Offload.MODEL, Offload.SEQUENTIAL)
Forecasts = Callable[[Sequence[RunSpec]], Sequence[Forecast | None]]
T = TypeVar("T")
POLICIES = (MemoryPolicy.RESIDENT, MemoryPolicy.LEAN, MemoryPolicy.STREAMED)


@dataclass(frozen=True)
class Placed:
    """A request on one GPU.

    Attributes:
        placement: ``resident``, ``lean`` or ``streamed``; ``partial``: some of the weights are streamed; ``nothing
            streamed``: some of the techniques of ``lean``; of a model without these, its memory settings; ``none``
            where nothing fits.
        name: The same in a few words, with the tiles where they are finer than the request's.
        resident_blocks: Blocks of the transformer that stay on the device; ``None`` where it is not streamed.
        blocks: How many there are; likewise.
        peak_bytes: The most that is allocated; ``None`` where nothing fits.
        peak_phase: In which phase.
        needed_bytes: The smallest memory for that, with the CUDA context and margins; where nothing fits, of what needs
            the least.
        predicted_seconds: Of the first generation of a process on that GPU; ``None`` where no rates of it are known or
            nothing fits.
        warm_seconds: Likewise of a later one, which finds streamed blocks in page-locked memory.
        host_bytes: Of the weights that wait in host memory; ``None`` where nothing fits or it is not known.
        request: With that placement or those settings; ``None`` where nothing fits.
    """

    placement: str
    name: str
    resident_blocks: int | None
    blocks: int | None
    peak_bytes: int | None
    peak_phase: str
    needed_bytes: int
    predicted_seconds: float | None
    warm_seconds: float | None = None
    host_bytes: int | None = None
    request: I2VRequest | None = None


def base_specs(request: I2VRequest, model: str) -> list[RunSpec]:
    """The runs from whose forecasts every placement of a request is computed."""
    if not runner_of(load_architecture(model)).techniques:
        return [RunSpec(request=request, model=model)]
    return [RunSpec(request=replace(request, memory=policy, placement=None), model=model) for policy in POLICIES]


def needed_specs(request: I2VRequest, model: str, memory_bytes: int = 0) -> list[RunSpec]:
    """The runs whose forecasts :func:`best_placements` takes, the lightest last: not those with tiles.

    Args:
        request: As there.
        model: An architecture's name.
        memory_bytes: That the process may take; where it is known that the request fits as it is, no other is needed.
    """
    specs = base_specs(request, model)
    if not specs[0].runner_spec.settings:
        return specs
    resident = cached_forecast(specs[0])
    if resident is not None and fitting_bytes(resident) <= memory_bytes:
        return specs
    return [replace(specs[0], request=each) for each in _offloaded(specs[0], *OFFLOADS)]


def best_placements(request: I2VRequest, model: str, budgets: Sequence[tuple[str, int]]) -> list[Placed]:
    """The fastest placement of a request on each GPU.

    For LTX-2 they are solved (:class:`~i2v_lab.capacity.placement.Budgets`). For other models each GPU has, of the
    memory settings that fit it (:func:`~i2v_lab.capacity.cards.fitting_bytes`), those that are predicted to be fastest.

    Args:
        request: What to generate; its memory policy and placement are replaced.
        model: An architecture's name.
        budgets: GPUs, whose rates predict the seconds, and the bytes that the process may take on each.
    """
    if runner_of(load_architecture(model)).techniques:
        first = Budgets(request, model)
        cards = {gpu: first.on(gpu) for gpu, _ in budgets}
        return [placed_of(cards[gpu].resolve(nbytes, explain=False), request, gpu) for gpu, nbytes in budgets]
    tried = settings_tried(request, model, min((nbytes for _, nbytes in budgets), default=0))
    return [fastest_settings(tried, gpu, nbytes) for gpu, nbytes in budgets]


def settings_tried(
    request: I2VRequest, model: str, memory_bytes: int, forecasts: Forecasts | None = None
) -> dict[I2VRequest, Forecast]:
    """The forecasts from which the fastest memory settings are taken: of the request alone where it fits as it is.

    Args:
        request: What to generate; without settings but for a quantization and dtypes.
        model: An architecture's name.
        memory_bytes: That the process may take.
        forecasts: As :func:`forecasts_that_run`, which it is by default.

    Raises:
        ForecastError: It fails on a card under all of them.
        InvalidRequest: Its components do not have its settings.
    """
    spec = RunSpec(request=request, model=model)
    tried = settings_forecasts([request], model, forecasts)
    if tried and fitting_bytes(tried[request]) <= memory_bytes:
        return tried
    return settings_ways(spec, forecasts) or {request: forecast_spec(spec)}  # which raises why none runs


def settings_ways(spec: RunSpec, forecasts: Forecasts | None = None) -> dict[I2VRequest, Forecast]:
    """The forecasts of a run under the memory settings that matter to it, on all cores.

    They are :data:`OFFLOADS`, and what is offloaded with tiles where decoding has the peak. Group offload
    with a stream, a little faster than ``sequential``, is not among them: its forecast takes minutes.

    Args:
        spec: Without settings but for a quantization and dtypes, which are kept.
        forecasts: As :func:`forecasts_that_run`, which it is by default.

    Returns:
        The requests with their forecasts; those that its model lacks or that fail on a card are left out.
    """
    found = settings_forecasts(_offloaded(spec, *OFFLOADS), spec.model, forecasts)
    if spec.runner_spec.settings and OFFLOADS[-1] not in {each.settings.offload for each in found}:
        found |= settings_forecasts(_offloaded(spec, Offload.GROUP_LEAF), spec.model, forecasts)
    return found | settings_forecasts(_tiled(found), spec.model, forecasts)


def least_forecast(request: I2VRequest, model: str) -> Forecast:
    """The forecast of a request under the settings of :func:`settings_ways` that hold the least, without the others.

    Args:
        request: Without settings but for a quantization and dtypes, which are kept.
        model: An architecture's name.

    Raises:
        ForecastError: It fails on a card under all of them.
    """
    spec = RunSpec(request=request, model=model)
    for offload in (Offload.SEQUENTIAL, Offload.GROUP_LEAF, Offload.MODEL):
        tried = settings_forecasts(_offloaded(spec, offload), model)
        tried |= settings_forecasts(_tiled(tried), model)
        if tried:
            return min(tried.values(), key=fitting_bytes)
    return forecast_spec(spec)


def _offloaded(spec: RunSpec, *offloads: Offload) -> list[I2VRequest]:
    """The request of a run with each of these, without those that its quantized weights cannot be moved by."""
    if not spec.runner_spec.settings:
        return [spec.request] if Offload.NONE in offloads else []
    requests = []
    for offload in offloads:
        with suppress(InvalidRequest):
            requests.append(replace(spec.request, settings=replace(spec.request.settings, offload=offload)))
    return requests


def _tiled(tried: Mapping[I2VRequest, Forecast]) -> list[I2VRequest]:
    """What is offloaded and has its peak where it decodes, with tiles."""
    return [
        replace(one, settings=replace(one.settings, vae_tiling=True))
        for one, forecast in tried.items()
        if forecast.peak.phase == DECODE_VIDEO and one.settings.offloads
    ]


def settings_forecasts(
    requests: Sequence[I2VRequest], model: str, forecasts: Forecasts | None = None
) -> dict[I2VRequest, Forecast]:
    """The forecasts of a model under memory settings, on all cores, without those that it does not have.

    Args:
        requests: Each with its settings. Those that its autoencoder lacks, and those that fail on a card, are left out.
        model: An architecture's name.
        forecasts: As :func:`forecasts_that_run`, which it is by default.
    """
    architecture, specs = load_architecture(model), []
    for request in requests:
        try:
            check_request(architecture, request)
        except InvalidRequest:  # an autoencoder that does not tile
            continue
        specs.append(RunSpec(request=request, model=model))
    found = (forecasts or forecasts_that_run)(specs)
    return {spec.request: each for spec, each in zip(specs, found, strict=True) if each is not None}


def forecasts_that_run(specs: Sequence[RunSpec]) -> list[Forecast | None]:
    """The forecasts of many runs, on all cores; ``None`` for what fails on a card."""
    todo = [spec for spec in specs if not is_cached(spec)]
    failed = {spec for spec, runs in zip(todo, on_all_cores(_runs, todo), strict=True) if not runs}
    return [None if spec in failed else forecast_that_runs(spec) for spec in specs]


def forecasts_in_turn(specs: Sequence[RunSpec]) -> list[Forecast | None]:
    """As :func:`forecasts_that_run`, on one core, which is what a worker has."""
    return [forecast_that_runs(spec) for spec in specs]


def on_all_cores(work: Callable[[RunSpec], T], specs: Sequence[RunSpec]) -> list[T]:
    """What a function returns of each run, in their order; the runs are shared out to a process a core.

    Args:
        work: At the top of a module, or partial of such; its results can be pickled.
        specs: What it is called with.
    """
    if len(specs) < 2:
        return [work(spec) for spec in specs]
    with ProcessPoolExecutor(min(usable_cores(), len(specs)), worker_context(), end_on_interrupt) as pool:
        return list(pool.map(work, specs))


def _runs(spec: RunSpec) -> bool:
    return forecast_that_runs(spec) is not None


def forecast_that_runs(spec: RunSpec, forecast: Callable[[RunSpec], Forecast] = forecast_spec) -> Forecast | None:
    """The forecast of a run; ``None`` for what fails on a card, and for settings that its components do not have."""
    try:
        return forecast(spec)
    except ForecastError as error:
        if error.fields.get("cause") != FAILS_ON_A_CARD:
            raise
    except InvalidRequest:
        if spec.request.settings.is_default:
            raise
    return None


def fastest_settings(tried: Mapping[I2VRequest, Forecast], gpu: str, memory_bytes: int) -> Placed:
    """Of the memory settings that fit a GPU, those that are predicted to be fastest.

    Args:
        tried: Of :func:`settings_forecasts`; of equally fast ones the first is taken.
        gpu: Whose rates count; those of :data:`~i2v_lab.capacity.device_profile.REFERENCE` where it has none.
        memory_bytes: That the process may take.
    """
    fit = [request for request, each in tried.items() if fitting_bytes(each) <= memory_bytes]
    if not fit:
        return Placed(NONE, NONE, None, None, None, "", min(fitting_bytes(each) for each in tried.values()), None)
    card = device_profile(gpu if has_profile(gpu) else REFERENCE).name
    request = min(fit, key=lambda each: seconds_on(tried[each], card) or 0.0)
    forecast, name = tried[request], request.settings.name or RESIDENT
    return Placed(
        name,
        name,
        None,
        None,
        forecast.peak.peak_bytes,
        forecast.peak.phase,
        fitting_bytes(forecast),
        seconds_on(forecast, gpu),
        seconds_on(forecast, gpu, warm=True),
        waiting_bytes(request, tried),
        request,
    )


def waiting_bytes(request: I2VRequest, tried: Mapping[I2VRequest, Forecast]) -> int | None:
    """Bytes of the weights that wait on the CPU: all of them, as they are on the device where nothing is offloaded.

    Args:
        request: With its settings.
        tried: Forecasts of the same under other settings.

    Returns:
        ``None`` where no forecast tells.
    """
    if not request.settings.offloads:
        return 0
    whole = [each for one, each in tried.items() if not one.settings.offloads]
    return whole[0].phases[0].start_bytes if whole else None


def placed_of(found: Resolution | DeviceUnavailable, asked: I2VRequest, gpu: str) -> Placed:
    """What was solved for a budget, in a few words and numbers.

    Args:
        found: Of :meth:`~i2v_lab.capacity.placement.Budgets.resolve`.
        asked: The request, whose tiles are compared.
        gpu: Whose rates predict the seconds.
    """
    if isinstance(found, DeviceUnavailable):
        return Placed(NONE, NONE, None, None, None, "", int(found.fields["needed_bytes"]), None)
    request, peak = found.request, found.forecast.peak
    streams = request.placed.techniques & set(STREAMED_COMPONENTS)
    kept = next((one for one in found.components if one.component == "transformer"), None)
    placement = str(request.placed.policy or (PARTIAL if streams else WHOLE))
    name = placement
    if placement == PARTIAL:
        name = f"{f'{kept.resident_blocks} of {kept.blocks}' if kept else 'all transformer'} blocks resident"
    if request.tiling is not None and request.tiling != asked.tiling:
        name += f", tiles of {request.tiling.tile_px} px"
    return Placed(
        placement,
        name,
        kept.resident_blocks if kept else None,
        kept.blocks if kept else None,
        peak.peak_bytes,
        peak.phase,
        needed_bytes(peak.peak_bytes, found.forecast.context_bytes),
        found.seconds if has_profile(gpu) else None,
        seconds_on(found.forecast, gpu, warm=True),
        found.forecast.page_locked_bytes + found.forecast.pageable_bytes,
        request,
    )


def rates_of(gpu: str) -> str:
    """Where the rates behind predicted seconds on a GPU are from: ``measured``, ``published``, or empty."""
    if not has_profile(gpu):
        return ""
    return MEASURED if device_profile(gpu).measured else PUBLISHED
