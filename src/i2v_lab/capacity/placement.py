"""``--vram-budget`` and ``--memory auto``: solves for the fastest placement whose forecast stays within a budget.

A few forecasts say what every phase takes where all weights are streamed, and what each block would take if it stayed.
From there the peak of a phase grows by the bytes of the blocks that stay, so that how many can is arithmetic, for each
component on its own: no two of them are on the device in the phases that bound them. A forecast of the result verifies
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from i2v_lab.capacity.cards import FITS, NO, judge
from i2v_lab.capacity.fit import TILINGS, FitSearch, OnForecast
from i2v_lab.errors import DeviceUnavailable
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy, Technique, Techniques
from i2v_lab.placement import STREAMED_COMPONENTS, Placement
from i2v_lab.profiling.records import Forecast, HostMemoryRecord
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import FULL_SIZE_MODEL
from i2v_lab.units import format_bytes

FRAGMENTATION_BYTES = 256 * 2**20
"""Reserved and not allocated with expandable segments: up to 0.27 GiB on an H100, 0.12 of which nothing could use."""
KERNEL_BYTES = 128 * 2**20
"""Of kernels that are loaded when they first run, beside the context that forecasts assume: up to 0.1 GiB there."""

DENOISE = ("denoise_stage_1", "upsample_latent", "denoise_stage_2")
DECODE = "decode_video"
# The phases in which the blocks of a component that stay are on the device.
PHASES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("encode_prompt",),
    "embeddings_processor": ("encode_prompt",),
    "transformer": DENOISE,
    "video_decoder": (DECODE,),
}  # of the video encoder, which runs for two stills, no block stays: it is beside the transformer in upsample_latent
SMALLER_CHUNKS = (4096, 2048, 1024)  # tokens, where the transformer's own number is too large
MOST_VERIFIED = 6  # forecasts of a result, each with fewer blocks than the one before


@dataclass(frozen=True)
class Fixed:
    """What a user decides about a placement.

    Attributes:
        techniques: All of them; ``None`` leaves them to the solver.
        resident_blocks: By component.
        prefetch: As in a placement, like the following; ``None`` leaves it to the solver.
        chunk_tokens: Likewise.
        tiling: Whether the request's tiles stay as they are.
    """

    techniques: Techniques | None = None
    resident_blocks: Mapping[str, int] = field(default_factory=dict)
    prefetch: int | None = None
    chunk_tokens: int | None = None
    tiling: bool = False

    @property
    def placed(self) -> bool:
        """Whether anything but the tiles is fixed."""
        return self.techniques is not None or bool(self.resident_blocks) or bool(self.numbers)

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers that are fixed."""
        values = {"prefetch": self.prefetch, "chunk_tokens": self.chunk_tokens}
        return {name: value for name, value in values.items() if value is not None}


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
class Resolution:
    """The outcome for a request and a budget.

    Attributes:
        request: With the chosen policy or placement, and tiling; everything else is unchanged.
        forecast: Of that request.
        reason: One sentence on why it was chosen.
        memory_bytes: The budget.
        allocatable_bytes: Of it, less the CUDA context and the margins: the most that is allocated.
        cap_bytes: What the caching allocator may reserve.
        components: Where the blocks of each component are; empty where nothing is streamed.
        streamed: Forecast of the same with no block kept; ``None`` where nothing is streamed.
    """

    request: I2VRequest
    forecast: Forecast
    reason: str
    memory_bytes: int
    allocatable_bytes: int
    cap_bytes: int
    components: tuple[ComponentPlacement, ...] = ()
    streamed: Forecast | None = None


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
) -> Resolution:
    """Solve for the fastest placement within a budget.

    ``resident`` and ``lean`` are taken where they fit; otherwise every component keeps as many blocks on the device as
    fit in its own phases. Where nothing stays and a phase is still too large, fewer blocks are prefetched, then chunks
    and tiles are smaller.

    Args:
        request: Its memory policy and placement are replaced.
        memory_bytes: Available to the process, the CUDA context included.
        model: An architecture's name.
        device: ``cuda``, which need not exist, or ``cpu``.
        on_forecast: Called with every request that is tried, its forecast and its verdict.
        fixed: What the user decides.

    Raises:
        DeviceUnavailable: No placement fits. Fields: ``needed_bytes``, the smallest budget, ``memory_bytes``, and
            ``nearest``, the largest request with the same aspect ratio and number of frames that fits.

    Example:
        >>> request = I2VRequest(image="stills/lighthouse.png", width=1024, height=768)
        >>> resolution = resolve_memory(request, 12 * 2**30)  # doctest: +SKIP
        >>> resolution.request.placement.resident("transformer")  # doctest: +SKIP
        30
    """
    solver = _Solver(request, memory_bytes, model, device, on_forecast, fixed or Fixed())
    return solver.solve()


@dataclass
class _Solver:
    asked: I2VRequest
    memory_bytes: int
    model: str
    device: str
    on_forecast: OnForecast
    fixed: Fixed
    room_bytes: int = 0
    passed_over: list[str] = field(default_factory=list)

    def solve(self) -> Resolution:
        whole: Forecast | None = None
        if not self.fixed.placed:
            for policy in (MemoryPolicy.RESIDENT, MemoryPolicy.LEAN):
                request, whole = self._forecast(replace(self.asked, memory=policy, placement=None))
                if whole.peak.peak_bytes <= self.room_bytes:
                    return self._resolution(request, whole)
        base, streamed = self._smallest()
        return self._keep_blocks(base, streamed, whole)

    def _forecast(self, request: I2VRequest) -> tuple[I2VRequest, Forecast]:
        placement = request.placement
        if placement is not None and placement.policy is not None:
            request = replace(request, memory=placement.policy, placement=None)
        forecast = forecast_request(request, self.model, self.device)
        self.room_bytes = allocatable_bytes(self.memory_bytes, forecast.context_bytes, self.device)
        fits = forecast.peak.peak_bytes <= self.room_bytes
        self.on_forecast(request, forecast, FITS if fits else NO)
        if not fits:
            peak = forecast.peak
            self.passed_over.append(f"{_named(request)} needs {format_bytes(peak.peak_bytes)} in {peak.phase}")
        return request, forecast

    def _too_large(self, forecast: Forecast) -> list[str]:
        return [phase.phase for phase in forecast.phases if phase.peak_bytes > self.room_bytes]

    # --- Everything streamed ---

    def _smallest(self) -> tuple[I2VRequest, Forecast]:
        """The request with everything streamed that may be, with the largest chunks and tiles that fit."""
        techniques = self.fixed.techniques
        placement = Placement(
            techniques=TECHNIQUES[MemoryPolicy.STREAMED] if techniques is None else techniques, **self.fixed.numbers
        )
        request = replace(self.asked, memory=MemoryPolicy.RESIDENT, placement=placement)
        smaller, finer = self._smaller_placements(placement), self._finer_tilings()
        forecast = self._forecast(request)[1]
        while over := self._too_large(forecast):
            if DECODE in over and (tiling := next(finer, None)) is not None:
                request = replace(request, tiling=tiling)
            elif set(over) & set(DENOISE) and (placement := next(smaller, placement)) is not request.placement:
                request = replace(request, placement=placement)
            else:
                raise self._refusal(request, forecast)
            forecast = self._forecast(request)[1]
        return request, forecast

    def _smaller_placements(self, placement: Placement) -> Iterator[Placement]:
        if self.fixed.prefetch is None and Technique.STREAMED_TRANSFORMER in placement.techniques:
            placement = replace(placement, prefetch=0)
            yield placement
        if self.fixed.chunk_tokens is None and Technique.TOKEN_CHUNKS in placement.techniques:
            for tokens in SMALLER_CHUNKS:
                yield replace(placement, chunk_tokens=tokens)

    def _finer_tilings(self) -> Iterator[Tiling]:
        if not self.fixed.tiling:
            yield from (tiling for tiling in TILINGS if tiling is not None and _is_finer(tiling, self.asked.tiling))

    # --- Blocks that stay ---

    def _keep_blocks(self, base: I2VRequest, streamed: Forecast, whole: Forecast | None) -> Resolution:
        assert base.placement is not None
        before = {phase.phase: phase.peak_bytes for phase in streamed.phases}
        sizes = {r.component: r.resident_bytes for r in streamed.records if isinstance(r, HostMemoryRecord)}
        techniques = base.placement.techniques - self._not_streamed(whole)
        names = [name for technique in techniques for name in STREAMED_COMPONENTS.get(technique, ())]
        counts = dict.fromkeys(names, 0)
        for name, phases in PHASES.items():
            if name in counts:
                room = self.room_bytes - max(before[phase] for phase in phases)
                counts[name] = sum(nbytes <= room for nbytes in sizes[name]) - 1
        counts |= self.fixed.resident_blocks
        for _ in range(MOST_VERIFIED):
            placement = replace(base.placement, techniques=techniques, resident_blocks=tuple(counts.items()))
            request, forecast = self._forecast(replace(base, placement=placement))
            over = self._too_large(forecast)
            if not over:
                components = tuple(self._component(name, counts[name], sizes[name], forecast) for name in sorted(names))
                return replace(self._resolution(request, forecast, components), streamed=streamed)
            fewer = {name for name in counts if counts[name] and set(PHASES.get(name, ())) & set(over)}
            fewer -= set(self.fixed.resident_blocks)
            if not fewer:
                raise self._refusal(request, forecast)
            excess = {phase.phase: phase.peak_bytes - self.room_bytes for phase in forecast.phases}
            for name in fewer:
                own, most = sizes[name], max(excess[phase] for phase in PHASES[name])
                counts[name] = sum(nbytes <= own[counts[name]] - max(most, 1) for nbytes in own) - 1
                counts[name] = max(0, counts[name])
        raise self._refusal(request, forecast)

    def _not_streamed(self, whole: Forecast | None) -> Techniques:
        """Streaming that is not needed, as the component fits whole beside the activations of ``lean``."""
        if whole is None:
            return frozenset()
        peaks = {phase.phase: phase.peak_bytes for phase in whole.phases}
        phases = {Technique.STREAMED_TEXT: ("encode_prompt",), Technique.STREAMED_TRANSFORMER: DENOISE}
        fits = {one for one, names in phases.items() if all(peaks[name] <= self.room_bytes for name in names)}
        return frozenset(fits)

    def _component(self, name: str, count: int, sizes: tuple[int, ...], forecast: Forecast) -> ComponentPlacement:
        phases = [phase for phase in forecast.phases if phase.phase in PHASES.get(name, ("encode_image",))]
        tightest = max(phases, key=lambda phase: phase.peak_bytes)
        following = sizes[count + 1] - sizes[count] if count + 1 < len(sizes) else None
        return ComponentPlacement(
            name,
            count,
            len(sizes) - 1,
            sizes[count],
            sizes[-1] - sizes[count],
            tightest.phase,
            self.room_bytes - tightest.peak_bytes,
            following,
        )

    # --- Outcomes ---

    def _resolution(
        self, request: I2VRequest, forecast: Forecast, components: tuple[ComponentPlacement, ...] = ()
    ) -> Resolution:
        verdict = judge(forecast, "", self.memory_bytes).verdict
        tight = (
            ""
            if verdict == FITS or self.device != "cuda"
            else ", tightly: without PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True it may fragment"
        )
        need = f"{format_bytes(forecast.peak.peak_bytes)} in {forecast.peak.phase}"
        reason = "; ".join(
            [f"{_named(request)}: {need} of {format_bytes(self.memory_bytes)}{tight}", *dict.fromkeys(self.passed_over)]
        )
        cap = cap_bytes(self.memory_bytes, forecast.context_bytes, self.device)
        return Resolution(request, forecast, reason, self.memory_bytes, self.room_bytes, cap, components)

    def _refusal(self, smallest: I2VRequest, forecast: Forecast) -> DeviceUnavailable:
        peak = forecast.peak
        need_bytes = needed_bytes(peak.peak_bytes, forecast.context_bytes, self.device)
        available = self.room_bytes + forecast.context_bytes  # as a search without the margin counts it
        search = FitSearch(available, self.model, self.on_forecast, tightly=True)
        nearest = search.largest_size(smallest, (smallest.width, smallest.height), smallest.height).request
        remedy = (
            f"{nearest.width}x{nearest.height} with {nearest.frames} frames fits"
            if nearest
            else "no size fits; use a larger GPU"
        )
        return DeviceUnavailable(
            f"{smallest.width}x{smallest.height} with {smallest.frames} frames needs {format_bytes(need_bytes)} in "
            f"{peak.phase} even with {_named(smallest)}; {format_bytes(self.memory_bytes)} are available; {remedy}",
            needed_bytes=need_bytes,
            memory_bytes=self.memory_bytes,
            nearest=nearest.to_json() if nearest else None,
        )


def _is_finer(tiling: Tiling, than: Tiling | None) -> bool:
    return than is None or (tiling.tile_px < than.tile_px and tiling.tile_frames < than.tile_frames)


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
