"""The fastest placement of a request within the memory of each of several GPUs, without a forecast for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from i2v_lab.capacity.device_profile import device_profile, has_profile
from i2v_lab.capacity.fit import lighter
from i2v_lab.capacity.placement import Budgets, Resolution, needed_bytes
from i2v_lab.capacity.time_model import predicted_seconds
from i2v_lab.errors import DeviceUnavailable, ForecastError
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.placement import STREAMED_COMPONENTS
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import FAILS_ON_A_CARD
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import RunSpec

NONE, RESIDENT, PARTIAL, WHOLE = "none", "resident", "partial", "nothing streamed"
UNSTREAMED = (RESIDENT, "lean", WHOLE)
PUBLISHED, MEASURED = "published", "measured"  # rates
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


def base_specs(request: I2VRequest, model: str) -> list[RunSpec]:
    """The runs from whose forecasts every placement of a request is computed."""
    if not runner_of(load_architecture(model)).techniques:
        return [RunSpec(request=request, model=model)]
    return [RunSpec(request=replace(request, memory=policy, placement=None), model=model) for policy in POLICIES]


def best_placements(request: I2VRequest, model: str, budgets: Sequence[tuple[str, int]]) -> list[Placed]:
    """The fastest placement of a request on each GPU.

    For LTX-2 they are solved (:class:`~i2v_lab.capacity.placement.Budgets`). For other models each GPU has the first of
    the memory settings, in descending order of speed, whose reserved memory fits.

    Args:
        request: What to generate; its memory policy and placement are replaced.
        model: An architecture's name.
        budgets: GPUs, whose rates predict the seconds, and the bytes that the process may take on each.
    """
    if runner_of(load_architecture(model)).techniques:
        first = Budgets(request, model)
        cards = {gpu: first.on(gpu) for gpu, _ in budgets}
        return [_solved(cards[gpu].resolve(nbytes, explain=False), request, gpu) for gpu, nbytes in budgets]
    found: dict[int, Placed] = {}
    for name, forecast in _settings(request, model):
        for index, budget in enumerate(budgets):
            before = found.get(index)
            if before is None or before.placement == NONE:
                tried = _as_it_is(name, forecast, *budget)
                if before is None or tried.placement != NONE or tried.needed_bytes < before.needed_bytes:
                    found[index] = tried
        if all(placed.placement != NONE for placed in found.values()):
            break
    return [found[index] for index in range(len(budgets))]


def _as_it_is(name: str, forecast: Forecast, gpu: str, memory_bytes: int) -> Placed:
    need_bytes, peak = forecast.peak_reserved_bytes + forecast.context_bytes, forecast.peak
    fits = need_bytes <= memory_bytes
    seconds = seconds_on(forecast, gpu) if fits else None
    return Placed(
        name if fits else NONE,
        name if fits else NONE,
        None,
        None,
        peak.peak_bytes if fits else None,
        peak.phase if fits else "",
        need_bytes,
        seconds,
    )


def _settings(request: I2VRequest, model: str) -> Iterator[tuple[str, Forecast]]:
    for each in (request, *lighter(request, model)):
        try:
            yield each.settings.name or RESIDENT, forecast_request(each, model)
        except ForecastError as error:  # memory settings that fail on a card
            if error.fields.get("cause") != FAILS_ON_A_CARD:
                raise


def _solved(found: Resolution | DeviceUnavailable, asked: I2VRequest, gpu: str) -> Placed:
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
    )


def seconds_on(forecast: Forecast, gpu: str, *, warm: bool = False) -> float | None:
    """Predicted seconds of a process's first generation, or of a warm one; ``None`` on a GPU without known rates."""
    if not has_profile(gpu):
        return None
    return predicted_seconds(forecast, device_profile(gpu), first=not warm, warm=warm)


def rates_of(gpu: str) -> str:
    """Where the rates behind predicted seconds on a GPU are from: ``measured``, ``published``, or empty."""
    if not has_profile(gpu):
        return ""
    return MEASURED if device_profile(gpu).measured else PUBLISHED
