"""``--vram-budget`` and ``--memory auto``: solves for the fastest placement whose forecast stays within a budget.

The candidates, and what each takes, are computed from a few forecasts (:mod:`i2v_lab.capacity.candidates`), which are
cached: another budget of the same request needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from i2v_lab.capacity.candidates import DECODE_VIDEO, DENOISE, ENCODE_IMAGE, ENCODE_PROMPT, UPSAMPLE
from i2v_lab.capacity.cards import FITS, NO, TIGHT, judge
from i2v_lab.capacity.device_profile import REFERENCE, device_profile, has_profile
from i2v_lab.capacity.fit import OnForecast
from i2v_lab.capacity.largest_size import largest_size
from i2v_lab.capacity.solver import Candidate, Fixed, Solver
from i2v_lab.errors import DeviceUnavailable
from i2v_lab.placement import STREAMED_COMPONENTS
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import FULL_SIZE_MODEL
from i2v_lab.units import format_bytes

FRAGMENTATION_BYTES = 256 * 2**20
"""Reserved and not allocated with expandable segments: up to 0.27 GiB on an H100, 0.12 of which nothing could use."""
KERNEL_BYTES = 128 * 2**20
"""Of kernels that are loaded when they first run, beside the context that forecasts assume: up to 0.1 GiB there."""

# The phases in which the blocks of a component that stay are on the device.
PHASES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": (ENCODE_PROMPT,),
    "embeddings_processor": (ENCODE_PROMPT,),
    "transformer": (DENOISE[0], UPSAMPLE, DENOISE[1]),
    "video_encoder": (ENCODE_IMAGE,),
    "video_decoder": (DECODE_VIDEO,),
}


@dataclass(frozen=True)
class ComponentPlacement:
    """Where the blocks of one component are.

    Attributes:
        component: Its name.
        resident_blocks: How many stay on the device.
        blocks: How many there are.
        resident_bytes: Of those that stay.
        streamed_bytes: Of the others, copied to the device whenever it runs.
        phase: Of the phases that bound it, the one with the least free room.
        free_bytes: What is free there.
        next_bytes: What one more block would take; ``None`` where all stay.
    """

    component: str
    resident_blocks: int
    blocks: int
    resident_bytes: int
    streamed_bytes: int
    phase: str
    free_bytes: int
    next_bytes: int | None


@dataclass(frozen=True)
class Alternative:
    """A placement that was not chosen.

    Attributes:
        name: What it is called in a sentence.
        memory_bytes: The smallest budget for it.
        peak_bytes: Its highest phase.
        peak_phase: Which one that is.
        seconds: Predicted.
    """

    name: str
    memory_bytes: int
    peak_bytes: int
    peak_phase: str
    seconds: float


@dataclass(frozen=True)
class Resolution:
    """The outcome for a request and a budget.

    Attributes:
        request: With the chosen policy or placement, and tiling; everything else is unchanged.
        forecast: Of that request.
        computed_from: What the forecasts that it was computed from are called; empty where it was forecast itself.
        reason: One sentence on why it was chosen.
        memory_bytes: The budget.
        allocatable_bytes: Of it, less the CUDA context and the margins: the most that is allocated.
        cap_bytes: What the caching allocator may reserve.
        seconds: Predicted on ``gpu``.
        gpu: The card whose rates were taken.
        components: Where the blocks of each component are; empty where nothing is streamed.
        cheaper: The fastest that takes less; ``None`` if this is the smallest.
        faster: The smallest that is predicted to be faster, and does not fit; ``None`` if none is.
    """

    request: I2VRequest
    forecast: Forecast
    computed_from: tuple[str, ...]
    reason: str
    memory_bytes: int
    allocatable_bytes: int
    cap_bytes: int
    seconds: float
    gpu: str
    components: tuple[ComponentPlacement, ...] = ()
    cheaper: Alternative | None = None
    faster: Alternative | None = None


def allocatable_bytes(memory_bytes: int, context_bytes: int, device: str = "cuda") -> int:
    """The highest peak of allocated bytes within a budget: without the CUDA context and the margins.

    Example:
        >>> allocatable_bytes(2**30, 0) // 2**20, allocatable_bytes(2**30, 0, "cpu") // 2**20
        (640, 1024)
    """
    return max(0, memory_bytes - needed_bytes(0, context_bytes, device))


def needed_bytes(peak_bytes: int, context_bytes: int, device: str = "cuda") -> int:
    """The smallest budget for a peak of allocated bytes: the reverse of :func:`allocatable_bytes`.

    Example:
        >>> needed_bytes(640 * 2**20, 0) // 2**20
        1024
    """
    margin_bytes = FRAGMENTATION_BYTES + KERNEL_BYTES if device == "cuda" else 0
    return peak_bytes + context_bytes + margin_bytes


def cap_bytes(memory_bytes: int, context_bytes: int, device: str = "cuda") -> int:
    """What the caching allocator may reserve within a budget: the highest peak and the margin for fragmentation."""
    margin_bytes = FRAGMENTATION_BYTES if device == "cuda" else 0
    return max(1, allocatable_bytes(memory_bytes, context_bytes, device) + margin_bytes)


def resolve_memory(
    request: I2VRequest,
    memory_bytes: int,
    model: str = FULL_SIZE_MODEL,
    device: str = "cuda",
    on_forecast: OnForecast = lambda *_: None,
    fixed: Fixed | None = None,
    gpu: str = REFERENCE,
) -> Resolution:
    """Solve for the fastest placement within a budget.

    Args:
        request: Its memory policy and placement are replaced.
        memory_bytes: Available to the process, the CUDA context included.
        model: An architecture's name.
        device: ``cuda``, which need not exist, or ``cpu``.
        on_forecast: Called with every request that is forecast, its forecast and its verdict.
        fixed: What the user decides.
        gpu: The card whose seconds are predicted; those of :data:`REFERENCE` where none of its rates are known.

    Raises:
        DeviceUnavailable: No placement fits. Fields: ``needed_bytes``, the smallest budget, ``memory_bytes``, and
            ``nearest``, the largest request with the same aspect ratio and number of frames that fits.

    Example:
        >>> request = I2VRequest(image="stills/lighthouse.png", width=1024, height=768)
        >>> resolution = resolve_memory(request, 12 * 2**30)  # doctest: +SKIP
        >>> resolution.request.placement.resident("transformer")  # doctest: +SKIP
        31
    """
    budgets = Budgets(request, model, device, on_forecast, fixed, gpu)
    found = budgets.resolve(memory_bytes)
    if isinstance(found, Resolution):
        return found
    nearest = budgets.nearest(memory_bytes)
    raise found if nearest is None else budgets.refusal(memory_bytes, nearest)


class Budgets:
    """Resolves one request for any number of budgets: its forecasts are made once.

    Args:
        request: As for :func:`resolve_memory`, like the others.
        model: An architecture's name.
        device: ``cuda`` or ``cpu``.
        on_forecast: Called with every request that is forecast; the verdict is of the last budget.
        fixed: What the user decides.
        gpu: The card whose seconds are predicted.
        forecast: Forecasts a request of a model for a device; one that raises leaves nothing behind.

    Example:
        >>> budgets = Budgets(I2VRequest(image="stills/lighthouse.png", width=1024, height=768))
        >>> [budgets.resolve(gib * 2**30).seconds for gib in (8, 12, 16)]  # doctest: +SKIP
        [10.9, 10.7, 10.6]
    """

    def __init__(
        self,
        request: I2VRequest,
        model: str = FULL_SIZE_MODEL,
        device: str = "cuda",
        on_forecast: OnForecast = lambda *_: None,
        fixed: Fixed | None = None,
        gpu: str = REFERENCE,
        forecast: Callable[[I2VRequest, str, str], Forecast] | None = None,
    ) -> None:
        self._forecast_with = forecast or forecast_request
        self.gpu = gpu if has_profile(gpu) else REFERENCE
        self._model, self._device, self._on_forecast, self._memory_bytes = model, device, on_forecast, 0
        self._forecasts: dict[I2VRequest, Forecast] = {}
        self._solver = Solver(
            request, self._forecast, device_profile(self.gpu), fixed or Fixed(), cuda=device == "cuda"
        )

    def on(self, gpu: str) -> Budgets:
        """The same request with the seconds of another card, which shares the forecasts."""
        fixed = self._solver.fixed
        other = Budgets(
            self._solver.asked, self._model, self._device, self._on_forecast, fixed, gpu, self._forecast_with
        )
        other._forecasts = self._forecasts
        return other

    def _forecast(self, request: I2VRequest) -> Forecast:
        if request not in self._forecasts:
            self._forecasts[request] = self._forecast_with(request, self._model, self._device)
        forecast = self._forecasts[request]
        fits = needed_bytes(forecast.peak.peak_bytes, forecast.context_bytes, self._device) <= self._memory_bytes
        self._on_forecast(request, forecast, FITS if fits else NO)
        return forecast

    def _room_bytes(self, memory_bytes: int) -> int:
        self._memory_bytes = memory_bytes
        return allocatable_bytes(memory_bytes, self._solver.context_bytes, self._device)

    def resolve(self, memory_bytes: int, *, explain: bool = True) -> Resolution | DeviceUnavailable:
        """The fastest placement within a budget, or the error that says what the smallest budget is.

        Args:
            memory_bytes: The budget.
            explain: Look for the alternatives too.
        """
        self._memory_bytes = memory_bytes
        room = self._room_bytes(memory_bytes)
        found = self._solver.solve(room)
        if found is None:
            return self.refusal(memory_bytes, None)
        cheaper = self._solver.cheaper(found) if explain else None
        faster = self._solver.faster(found, room) if explain else None
        return Resolution(
            found.request,
            found.forecast,
            tuple(_named(base) for base in found.computed_from),
            self._reason(found, memory_bytes, faster),
            memory_bytes,
            room,
            cap_bytes(memory_bytes, self._solver.context_bytes, self._device),
            found.seconds,
            self.gpu,
            tuple(_components(found, room)),
            self._alternative(cheaper),
            self._alternative(faster),
        )

    def _alternative(self, found: Candidate | None) -> Alternative | None:
        if found is None:
            return None
        need = needed_bytes(found.peak_bytes, self._solver.context_bytes, self._device)
        return Alternative(_named(found.request), need, found.peak_bytes, found.peak_phase, found.seconds)

    def _reason(self, found: Candidate, memory_bytes: int, faster: Candidate | None) -> str:
        verdict = judge(found.forecast, "", memory_bytes).verdict
        tight = (
            ", tightly: without PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True it may fragment"
            if verdict == TIGHT and self._device == "cuda"
            else ""
        )
        need = f"{format_bytes(found.peak_bytes)} in {found.peak_phase}"
        words = f"{_named(found.request)}: {need} of {format_bytes(memory_bytes)}{tight}"
        if faster is None:
            return words
        over = f"{_named(faster.request)} needs {format_bytes(faster.peak_bytes)} in {faster.peak_phase}"
        return f"{words}; {over}"

    def smallest(self) -> Candidate:
        """The placement with the smallest peak."""
        return self._solver.smallest()

    def refusal(self, memory_bytes: int, nearest: I2VRequest | None) -> DeviceUnavailable:
        """The error for a budget that is too small.

        Args:
            memory_bytes: The budget.
            nearest: The largest request that fits.
        """
        least, asked = self._solver.smallest(), self._solver.asked
        need = needed_bytes(least.peak_bytes, self._solver.context_bytes, self._device)
        remedy = "no size fits; use a larger GPU"
        if nearest is not None:
            remedy = f"{nearest.width}x{nearest.height} with {nearest.frames} frames fits"
        return DeviceUnavailable(
            f"{asked.width}x{asked.height} with {asked.frames} frames needs {format_bytes(need)} in {least.peak_phase} "
            f"even with {_named(least.request)}; {format_bytes(memory_bytes)} are available; {remedy}",
            needed_bytes=need,
            memory_bytes=memory_bytes,
            nearest=nearest.to_json() if nearest else None,
        )

    def nearest(self, memory_bytes: int) -> I2VRequest | None:
        """The largest request with the same aspect ratio and number of frames that fits; ``None`` if none does."""
        room, least = self._room_bytes(memory_bytes), self._solver.smallest()
        return largest_size(least.request, least.peaks, room, self._model, self._forecast)


def _components(found: Candidate, room_bytes: int) -> Sequence[ComponentPlacement]:
    placed = []
    for part in found.parts:
        for name, count in part.counts:
            sizes = part.base.resident_bytes[name]
            tightest = max(PHASES[name], key=found.peaks.__getitem__)
            following = sizes[count + 1] - sizes[count] if count + 1 < len(sizes) else None
            left = sizes[-1] - sizes[count]
            free = room_bytes - found.peaks[tightest]
            placed.append(
                ComponentPlacement(name, count, len(sizes) - 1, sizes[count], left, tightest, free, following)
            )
    return sorted(placed, key=lambda one: one.component)


def _named(request: I2VRequest) -> str:
    """What a request's memory is called in a sentence, with its tiles."""
    tiling, placement = request.tiling, request.placement
    tiles = f", tiles of {tiling.tile_px} px and {tiling.tile_frames} frames" if tiling else ""
    if placement is None or placement.policy is not None:
        return f"memory={request.memory if placement is None else placement.policy}{tiles}"
    kept: dict[str, Any] = {**dict(placement.resident_blocks), **placement.numbers}
    streamed = [names for one, names in STREAMED_COMPONENTS.items() if one in placement.techniques]
    what = f"streamed: {', '.join(name for names in streamed for name in names)}" if streamed else "nothing streamed"
    return f"placement ({'; '.join([what, *(f'{name}={value}' for name, value in kept.items())])}){tiles}"
