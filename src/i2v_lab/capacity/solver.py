"""The fastest candidate within a budget, for any number of budgets of one request.

The candidates of a budget are candidates of every larger one, so that predicted time never rises with the budget. It is
counted in steps, and of equally fast placements the one that streams the least is taken. A placement with smaller
chunks or tiles, which only a small budget makes anyone try, keeps no block: the rule would not hold otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from i2v_lab.capacity.candidates import (
    AUTOENCODER,
    DENOISING,
    GROUPS,
    TEXT,
    Base,
    Group,
    Part,
    mixed_seconds,
    parts_of,
    placement_of_parts,
)
from i2v_lab.capacity.computed_forecast import computed_forecast, peaks_of
from i2v_lab.capacity.device_profile import DeviceProfile
from i2v_lab.capacity.fit import TILINGS
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy, Technique, Techniques
from i2v_lab.placement import Placement
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest, Tiling

STREAMING = frozenset(group.streaming for group in GROUPS)
SMALLER_CHUNKS = (4096, 2048, 1024)  # tokens, where the transformer's own number is too large
STEP_S = 0.1  # of predicted seconds: a finer difference between two placements means nothing
PREFETCHES = (1, 0)  # more copies ahead are predicted to take as long


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
    def numbers(self) -> dict[str, Any]:
        """The numbers that are fixed."""
        values = {"prefetch": self.prefetch, "chunk_tokens": self.chunk_tokens}
        return {name: value for name, value in values.items() if value is not None}

    def streams(self, group: Group) -> bool:
        """Whether the weights of a group must be streamed for it to have an effect."""
        streamed = bool(set(self.resident_blocks) & set(group.components))
        return streamed or (group is DENOISING and self.prefetch is not None)


@dataclass(frozen=True)
class Candidate:
    """A placement with what it takes.

    Attributes:
        request: With it, and its tiling.
        parts: One of each group.
        rest: Has the phases of no group.
    """

    request: I2VRequest
    parts: tuple[Part, ...]
    rest: Base

    @cached_property
    def peaks(self) -> dict[str, int]:
        """Of every phase, in bytes."""
        return peaks_of(self.parts, self.rest)

    @property
    def peak_bytes(self) -> int:
        """The highest of them."""
        return max(self.peaks.values())

    @property
    def peak_phase(self) -> str:
        """The first phase that has it."""
        return max(self.peaks, key=self.peaks.__getitem__)

    @cached_property
    def seconds(self) -> float:
        """Predicted, of all phases."""
        grouped = {phase for part in self.parts for phase in part.shares}
        rest = [phase for phase in self.rest.phases if phase not in grouped]
        own = sum(mixed_seconds(self.rest, self.rest, phase, 0.0, 1) for phase in rest)
        return round(own + sum(part.seconds for part in self.parts), 6)

    @cached_property
    def forecast(self) -> Forecast:
        """That of the placement if it is one of the bases, else computed from them."""
        return computed_forecast(self.parts, self.rest)

    @property
    def computed_from(self) -> tuple[I2VRequest, ...]:
        """The requests that its forecast was computed from; none where it was forecast itself."""
        bases = {id(base): base for part in self.parts for base in (part.base, part.whole)}
        if any(base.forecast is self.forecast for base in bases.values()):
            return ()
        return tuple(base.request for base in bases.values())


class Solver:
    """Solves one request for any budget.

    Args:
        asked: Its memory policy and placement are replaced.
        forecast: Forecasts a request.
        device: The rates of the card whose seconds are predicted.
        fixed: What the user decides.
        cuda: Whether streamed blocks are copied ahead.
    """

    def __init__(
        self,
        asked: I2VRequest,
        forecast: Callable[[I2VRequest], Forecast],
        device: DeviceProfile,
        fixed: Fixed,
        *,
        cuda: bool = True,
    ) -> None:
        self.asked, self.device, self.fixed = asked, device, fixed
        self._forecast, self._cuda = forecast, cuda
        self._bases: dict[I2VRequest, Base] = {}
        self._parts: dict[tuple[int, int, bool], list[Part]] = {}
        self._fastest: dict[tuple[str, ...], float] = {}

    # --- Bases ---

    def _base(self, techniques: Techniques, tiling: Tiling | None, **numbers: Any) -> Base:
        """The forecast of a placement that keeps no block; once for each."""
        wanted = self.fixed.numbers | numbers
        if not techniques & {Technique.STREAMED_TRANSFORMER, Technique.STREAMED_VAE}:
            wanted.pop("prefetch", None)
        if Technique.TOKEN_CHUNKS not in techniques:
            wanted.pop("chunk_tokens", None)
        placement = Placement(techniques=techniques, **wanted)
        request = replace(self.asked, memory=MemoryPolicy.RESIDENT, placement=placement, tiling=tiling)
        if placement.policy is not None:
            request = replace(request, memory=placement.policy, placement=None)
        if request not in self._bases:
            self._bases[request] = Base(request, self._forecast(request), self.device)
        return self._bases[request]

    @property
    def _most(self) -> Techniques:
        return TECHNIQUES[MemoryPolicy.STREAMED] if self.fixed.techniques is None else self.fixed.techniques

    @cached_property
    def streamed(self) -> Base:
        """Everything streamed that may be."""
        return self._base(self._most, self.asked.tiling)

    @cached_property
    def whole(self) -> Base:
        """The same techniques without streaming."""
        return self._base(self._most - STREAMING, self.asked.tiling)

    @cached_property
    def _plain(self) -> list[Base]:
        """What is not streamed, in a placement that the user leaves open."""
        if self.fixed.techniques is not None:
            return []
        return [self._base(frozenset(), self.asked.tiling), self.whole]

    @property
    def context_bytes(self) -> int:
        """Of the CUDA context."""
        return self.streamed.forecast.context_bytes

    # --- Parts ---

    def parts(self, group: Group) -> Sequence[Part]:
        """Every way to place a group with the request's own tiles and the default chunks, the fastest first."""
        bases = [] if self.fixed.streams(group) else list(self._plain)
        if group is DENOISING and self.fixed.chunk_tokens is not None:
            bases = [base for base in bases if Technique.TOKEN_CHUNKS in base.placement.techniques]
        found = [part for base in bases for part in self._own(group, base, base)]
        found += self._own(group, self.streamed, self.whole)
        return sorted(self._stepped(group, found), key=lambda part: part.order)

    def _stepped(self, group: Group, parts: Sequence[Part]) -> list[Part]:
        """The parts with their seconds in steps above those of the fastest there is, with any budget."""
        fastest = self._fastest.setdefault(group.phases, min(part.seconds for part in parts))
        steps = [int((part.seconds - fastest) / STEP_S + 1e-6) for part in parts]
        return [replace(part, seconds=fastest + count * STEP_S) for part, count in zip(parts, steps, strict=True)]

    def _own(self, group: Group, base: Base, whole: Base, *, kept: bool = True) -> list[Part]:
        key = (GROUPS.index(group), id(base), kept)
        if key not in self._parts:
            ahead = PREFETCHES if self.fixed.prefetch is None else (self.fixed.prefetch,)
            counts = self.fixed.resident_blocks
            self._parts[key] = list(parts_of(group, base, whole, counts, ahead, cuda=self._cuda, kept=kept))
        return self._parts[key]

    def _smaller(self, group: Group) -> Iterator[Base]:
        """Everything streamed, with smaller chunks or tiles, in ascending order of time."""
        if group is DENOISING and self.fixed.chunk_tokens is None and Technique.TOKEN_CHUNKS in self._most:
            for tokens in SMALLER_CHUNKS:
                yield self._base(self._most, self.asked.tiling, chunk_tokens=tokens)
        if group is AUTOENCODER and not self.fixed.tiling:
            for tiling in TILINGS:
                if tiling is not None and _is_finer(tiling, self.asked.tiling):
                    yield self._base(self._most, tiling)

    def _within(self, group: Group, room_bytes: int) -> list[Part]:
        """The parts of a group that may be considered for a budget, and stay within it; the fastest first."""
        parts = self.parts(group)
        fit = [part for part in parts if part.peak_bytes <= room_bytes]
        if any(part.prefetch != 0 for part in fit) or group is TEXT:
            return fit
        for base in self._smaller(group):
            smaller = self._stepped(group, self._own(group, base, self.whole, kept=False))
            own = [part for part in smaller if part.peak_bytes <= room_bytes]
            fit += own
            if any(part.prefetch != 0 for part in own):
                break
        return sorted(fit, key=lambda part: part.order)

    # --- Outcomes ---

    def solve(self, room_bytes: int) -> Candidate | None:
        """The fastest placement whose phases stay within ``room_bytes`` of allocated memory; ``None`` if none does."""
        text = self._within(TEXT, room_bytes)
        if not text or self._rest_bytes > room_bytes:
            return None
        denoising = self._within(DENOISING, room_bytes)
        if not denoising:  # smaller tiles, whose forecasts take long, do not help
            return None
        autoencoder = self._within(AUTOENCODER, room_bytes)
        best: tuple[tuple[float, ...], Part, Part] | None = None
        for one in denoising:
            if best is not None and one.seconds > best[0][0]:
                break
            for other in autoencoder:
                if one.shared_bytes + other.shared_bytes > room_bytes:
                    continue
                if _goes_with(one, [other]):
                    order = tuple(a + b for a, b in zip(one.order, other.order, strict=True))
                    if best is None or order < best[0]:
                        best = (order, one, other)
                    break
        return None if best is None else self._candidate((text[0], best[1], best[2]))

    def _candidate(self, parts: tuple[Part, ...]) -> Candidate:
        placement = placement_of_parts(parts)
        tiling = parts[2].base.request.tiling
        request = replace(self.asked, memory=MemoryPolicy.RESIDENT, placement=placement, tiling=tiling)
        if placement.policy is not None:
            request = replace(request, memory=placement.policy, placement=None)
        return Candidate(request, parts, self.streamed)

    @property
    def _rest_bytes(self) -> int:
        grouped = {phase for group in GROUPS for phase in group.phases}
        rest = [p.peak_bytes for name, p in self.streamed.phases.items() if name not in {*grouped, "upsample_latent"}]
        return max(rest, default=0)

    def smallest(self) -> Candidate:
        """The placement with the smallest peak; chunks and tiles are made smaller where that helps."""
        text = min(self.parts(TEXT), key=_bytes)
        least = max(text.peak_bytes, self._rest_bytes)  # which no chunk and no tile changes
        chosen = [text]
        for group in (DENOISING, AUTOENCODER):
            parts = [part for part in self.parts(group) if _goes_with(part, chosen)]
            best = min(parts, key=_bytes)
            for base in self._smaller(group) if best.peak_bytes > least else ():
                own = [part for part in self._own(group, base, self.whole, kept=False) if _goes_with(part, chosen)]
                best = min([best, *own], key=_bytes)
                if best.peak_bytes <= least:
                    break
            least = max(least, best.peak_bytes)
            chosen.append(best)
        return self._candidate(tuple(chosen))

    def cheaper(self, than: Candidate) -> Candidate | None:
        """The fastest with a lower peak."""
        return self.solve(than.peak_bytes - 1)

    def faster(self, than: Candidate, room_bytes: int) -> Candidate | None:
        """The one with the lowest peak that is predicted to be faster; ``None`` if none is."""
        every = [part for group in GROUPS for part in self.parts(group)]
        low, high = room_bytes, 2 * max(max(part.peak_bytes, part.shared_bytes) for part in every)
        best = self.solve(high)
        if best is None or not _is_faster(best, than):
            return None
        while high - low > 2**20:
            middle = (low + high) // 2
            found = self.solve(middle)
            if found is not None and _is_faster(found, than):
                high, best = found.peak_bytes, found
            else:
                low = middle
        return best


def _bytes(part: Part) -> tuple[int, int]:
    return part.peak_bytes, part.shared_bytes


def _goes_with(part: Part, others: Sequence[Part]) -> bool:
    """Whether as many blocks are copied ahead as by others, that of text encoding, which copies none, left out."""
    ahead = {other.prefetch for other in (part, *others) if other.group is not TEXT} - {None}
    return len(ahead) <= 1


def _is_faster(candidate: Candidate, than: Candidate) -> bool:
    return candidate.seconds < than.seconds


def _is_finer(tiling: Tiling, than: Tiling | None) -> bool:
    return than is None or (tiling.tile_px < than.tile_px and tiling.tile_frames < than.tile_frames)
