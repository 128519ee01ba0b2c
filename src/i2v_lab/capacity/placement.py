"""``--memory auto``: chooses the fastest memory policy and tiling whose forecast fits, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from i2v_lab.capacity.cards import FITS, NO, judge
from i2v_lab.capacity.fit import TILINGS, FitSearch, OnForecast
from i2v_lab.errors import DeviceUnavailable
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import FULL_SIZE_MODEL
from i2v_lab.units import format_bytes

FASTEST_FIRST = (MemoryPolicy.RESIDENT, MemoryPolicy.LEAN, MemoryPolicy.STREAMED)
DECODE = "decode_video"
EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment reduces fragmentation"


@dataclass(frozen=True)
class Resolution:
    """The outcome for a request with ``memory="auto"``.

    Attributes:
        request: With the chosen policy and tiling; everything else is unchanged.
        forecast: Of that request.
        reason: One sentence on why it was chosen.
    """

    request: I2VRequest
    forecast: Forecast
    reason: str


def resolve_memory(
    request: I2VRequest,
    memory_bytes: int,
    model: str = FULL_SIZE_MODEL,
    device: str = "cuda",
    on_forecast: OnForecast = lambda *_: None,
) -> Resolution:
    """Choose a memory policy, and a finer tiling where only decoding does not fit.

    Policies are tried in descending order of speed; the first whose peak reserved memory fits is chosen. If there is
    none, the one with the lowest peak allocated memory is, if that fits: the allocator then has to release cached
    blocks during the run.

    Args:
        request: With ``memory="auto"``.
        memory_bytes: Available to the process, the CUDA context included.
        model: An architecture's name.
        device: ``cuda``, which need not exist, or ``cpu``.
        on_forecast: Called with every request that is tried, its forecast and its verdict.

    Raises:
        DeviceUnavailable: None fits. Fields: ``needed_bytes``, ``memory_bytes``, and ``nearest``, the largest request
            with the same aspect ratio and number of frames that fits.

    Example:
        >>> request = I2VRequest(image="stills/lighthouse.png", width=1024, height=768, memory="auto")
        >>> resolve_memory(request, 24 * 2**30).request.memory.value  # doctest: +SKIP
        'lean'
    """
    tried: list[tuple[I2VRequest, Forecast, str]] = []
    for one in _candidates(request, tried, memory_bytes):
        forecast = forecast_request(one, model, device)
        verdict = judge(forecast, "", memory_bytes).verdict
        on_forecast(one, forecast, verdict)
        tried.append((one, forecast, verdict))
        if verdict == FITS:
            return Resolution(one, forecast, _reason(tried, memory_bytes))
    tried.sort(key=lambda each: each[1].peak.peak_bytes, reverse=True)
    smallest, forecast, verdict = tried[-1]
    if verdict != NO:
        return Resolution(smallest, forecast, _reason(tried, memory_bytes))
    raise _refusal(smallest, forecast, memory_bytes, model, on_forecast)


def _candidates(
    request: I2VRequest, tried: list[tuple[I2VRequest, Forecast, str]], memory_bytes: int
) -> Iterator[I2VRequest]:
    """Requests to try; the forecast of each is appended to ``tried`` before the next is generated."""
    for policy in FASTEST_FIRST:
        asked = replace(request, memory=policy)
        yield asked
        forecast, verdict = tried[-1][1:]
        available_bytes = memory_bytes - forecast.context_bytes
        rest = [phase for phase in forecast.phases if phase.phase != DECODE]
        finer = (replace(asked, tiling=tiling) for tiling in TILINGS if _is_finer(tiling, request.tiling))
        if all((phase.peak_reserved_bytes or phase.peak_bytes) <= available_bytes for phase in rest):
            yield from finer
        elif policy is FASTEST_FIRST[-1] and all(phase.peak_bytes <= available_bytes for phase in rest):
            while verdict == NO and (coarsest := next(finer, None)):
                yield coarsest  # until one fits tightly
                verdict = tried[-1][2]


def _is_finer(tiling: Tiling | None, than: Tiling | None) -> bool:
    if tiling is None or than is None:
        return tiling is not None
    return tiling.tile_px < than.tile_px and tiling.tile_frames < than.tile_frames


def _reason(tried: list[tuple[I2VRequest, Forecast, str]], memory_bytes: int) -> str:
    request, forecast, verdict = tried[-1]
    others = {
        str(one.memory): f"{one.memory} needs {format_bytes(other.peak.peak_bytes)} in {other.peak.phase}"
        for one, other, _ in tried[:-1]
        if one.memory is not request.memory
    }
    tiling = request.tiling
    tiles = f", tiles of {tiling.tile_px} px and {tiling.tile_frames} frames" if tiling else ""
    need = f"{format_bytes(forecast.peak.peak_bytes)} in {forecast.peak.phase}"
    tight = (
        "" if verdict == FITS else f", tightly: the allocator has to release cached blocks during the run; {EXPANDABLE}"
    )
    return "; ".join(
        [f"memory={request.memory}{tiles}: {need} of {format_bytes(memory_bytes)}{tight}", *others.values()]
    )


def _refusal(
    smallest: I2VRequest, forecast: Forecast, memory_bytes: int, model: str, on_forecast: OnForecast
) -> DeviceUnavailable:
    peak = forecast.peak
    need_bytes = peak.peak_bytes + forecast.context_bytes
    search = FitSearch(memory_bytes, model, on_forecast, tightly=True)
    nearest = search.largest_size(smallest, (smallest.width, smallest.height), smallest.height).request
    remedy = (
        f"{nearest.width}x{nearest.height} with {nearest.frames} frames fits"
        if nearest
        else "no size fits; use a larger GPU"
    )
    return DeviceUnavailable(
        f"{smallest.width}x{smallest.height} with {smallest.frames} frames needs {format_bytes(need_bytes)} in "
        f"{peak.phase} even with memory={smallest.memory}; {format_bytes(memory_bytes)} are available; {remedy}",
        needed_bytes=need_bytes,
        memory_bytes=memory_bytes,
        nearest=nearest.to_json() if nearest else None,
    )
