"""The candidates for a memory budget: what each way to place LTX-2's components takes and how long, by arithmetic.

The phases of a generation share little device memory, so their components are placed in three groups, each on its own:
text, the transformer, the video autoencoder. Of each group a few forecasts are the bases: as upstream has it, without
avoidable activations, and with all weights streamed. From the last the peak of a phase grows by the bytes of the blocks
that stay, and its seconds go over to those of the second. Nothing else is forecast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise

from i2v_lab.capacity.device_profile import DeviceProfile
from i2v_lab.capacity.time_model import Segment, segment
from i2v_lab.memory_policy import Technique, Techniques
from i2v_lab.placement import STREAMED_COMPONENTS, Placement
from i2v_lab.profiling.records import CostRecord, CostRow, Forecast, HostMemoryRecord, PhaseRecord, StepRecord
from i2v_lab.request import I2VRequest

ENCODE_PROMPT, ENCODE_IMAGE, DECODE_VIDEO = "encode_prompt", "encode_image", "decode_video"
DENOISE, UPSAMPLE = ("denoise_stage_1", "denoise_stage_2"), "upsample_latent"
TRANSFORMER = "transformer"
UNSPLIT = 0.008  # of what stays on a card: ends of segments beside weights, which were up to 0.0063 on an H200


@dataclass(frozen=True)
class Group:
    """Components that are placed together.

    Attributes:
        techniques: That concern them.
        streaming: Of these, the one that streams their weights.
        phases: In which they are alone, besides ``upsample_latent``, which has the transformer and the video encoder.
    """

    techniques: Techniques
    streaming: Technique
    phases: tuple[str, ...]

    @property
    def components(self) -> tuple[str, ...]:
        """Those whose weights can be streamed."""
        return STREAMED_COMPONENTS[self.streaming]


TEXT = Group(
    frozenset({Technique.TEXT_ONLY, Technique.FEATURE_CHUNKS, Technique.STREAMED_TEXT}),
    Technique.STREAMED_TEXT,
    (ENCODE_PROMPT,),
)
DENOISING = Group(
    frozenset({Technique.SHARED_MODULATIONS, Technique.TOKEN_CHUNKS, Technique.STREAMED_TRANSFORMER}),
    Technique.STREAMED_TRANSFORMER,
    DENOISE,
)
AUTOENCODER = Group(
    frozenset({Technique.BLEND_IN_PLACE, Technique.ROW_BANDS, Technique.STREAMED_VAE}),
    Technique.STREAMED_VAE,
    (ENCODE_IMAGE, DECODE_VIDEO),
)
GROUPS = (TEXT, DENOISING, AUTOENCODER)


class Base:
    """A request that was forecast, and its seconds on a card.

    Args:
        request: What was forecast.
        forecast: Its forecast.
        device: The card's rates.
    """

    def __init__(self, request: I2VRequest, forecast: Forecast, device: DeviceProfile) -> None:
        self.request, self.forecast, self.device = request, forecast, device
        self.placement = request.placed
        self.mixed: dict[tuple[int, str, float, bool], float] = {}  # seconds that were computed already
        self.phases: dict[str, PhaseRecord] = {phase.phase: phase for phase in forecast.phases}
        self.hosts: list[HostMemoryRecord] = [r for r in forecast.records if isinstance(r, HostMemoryRecord)]

    @cached_property
    def resident_bytes(self) -> dict[str, tuple[int, ...]]:
        """What 0, 1, ... blocks of each streamed component take on the device if they stay."""
        return {record.component: record.resident_bytes for record in self.hosts}

    @cached_property
    def costs(self) -> dict[str, list[tuple[CostRow, ...]]]:
        """The segments of each phase, one after another."""
        found: dict[str, list[tuple[CostRow, ...]]] = {}
        for record in self.forecast.records:
            if isinstance(record, CostRecord):
                found.setdefault(record.phase, []).extend([record.rows] * record.repeats)
        return found

    @cached_property
    def segments(self) -> dict[str, list[Segment]]:
        """Seconds of these."""
        own: dict[tuple[CostRow, ...], Segment] = {}
        for rows in (rows for segments in self.costs.values() for rows in segments):
            if rows not in own:
                own[rows] = segment(rows, self.device)
        return {phase: [own[rows] for rows in segments] for phase, segments in self.costs.items()}

    def first_step_bytes(self, phase: str) -> int:
        """The peak of the first step, in which a component that the phase built has not been prefetched; or 0."""
        if not any((one.component, one.phase) == (TRANSFORMER, phase) for one in self.hosts):
            return 0
        steps = [r for r in self.forecast.records if isinstance(r, StepRecord) and (r.phase, r.step) == (phase, 1)]
        return max((step.peak_bytes for step in steps), default=0)

    def later_bytes(self, phase: str) -> int:
        """The peak of the other steps; of the phase, where no first one is set apart."""
        steps = [r for r in self.forecast.records if isinstance(r, StepRecord) and r.phase == phase and r.step > 1]
        if not steps or not self.first_step_bytes(phase):
            return self.phases[phase].peak_bytes
        return max(step.peak_bytes for step in steps)


def mixed_seconds(streamed: Base, whole: Base, phase: str, share: float, prefetch: int) -> float:
    """Predicted seconds of a phase of which a share of the streamed bytes stays on the device.

    Args:
        streamed: Where none stays.
        whole: Where all do.
        phase: Its name.
        share: From 0 to 1.
        prefetch: Blocks that are copied ahead; without any, no copy overlaps with computation.
    """
    key = (id(whole), phase, share, prefetch > 0)
    if key not in streamed.mixed:
        segments = streamed.segments.get(phase, [])
        if share:
            segments = [_mixed(a, b, share) for a, b in zip(segments, whole.segments.get(phase, []), strict=True)]
        built = streamed.device.host_s["build"] if any(one.weight_bytes for one in segments) else 0.0
        seconds = (
            one.seconds if prefetch else replace(one, overlapped_s=0).seconds + one.overlapped_s for one in segments
        )
        streamed.mixed[key] = built + sum(seconds)
    return streamed.mixed[key]


def _mixed(streamed: Segment, whole: Segment, share: float) -> Segment:
    values = {
        one.name: (1 - share) * getattr(streamed, one.name) + share * getattr(whole, one.name)
        for one in fields(Segment)
    }
    return Segment(**values)


def mixed_costs(streamed: Base, whole: Base, phase: str, share: float) -> list[tuple[CostRow, ...]]:
    """The segments of such a phase: of the operators that only one of the two has, the share, in whole numbers."""
    if not share:
        return streamed.costs.get(phase, [])
    result = []
    for a, b in zip(streamed.costs.get(phase, []), whole.costs.get(phase, []), strict=True):
        counts: dict[tuple[str, str, int, int], float] = {}
        for rows, weight in ((a, 1 - share), (b, share)):
            for kind, dtype, count, flops, nbytes in rows:
                key = (kind, dtype, flops, nbytes)
                counts[key] = counts.get(key, 0.0) + weight * count
        rounded = {key: round(count) for key, count in counts.items()}
        result.append(tuple((key[0], key[1], n, key[2], key[3]) for key, n in sorted(rounded.items()) if n))
    return result


@dataclass(frozen=True)
class Part:
    """One way to place a group.

    Attributes:
        group: Which one.
        base: Its forecast.
        whole: That of the same with all blocks on the device; ``base`` itself where nothing is streamed.
        counts: Blocks that stay, by component.
        prefetch: ``None`` where nothing is streamed.
        shares: By phase, the part of the streamed bytes that stays.
        peaks: Of its phases, in bytes.
        shared_bytes: What it takes of ``upsample_latent``.
        seconds: Of its phases; of the autoencoder's, ``upsample_latent`` is one.
        streamed_bytes: Of the blocks that are streamed.
    """

    group: Group
    base: Base
    whole: Base
    counts: tuple[tuple[str, int], ...]
    prefetch: int | None
    shares: Mapping[str, float]
    peaks: Mapping[str, int]
    shared_bytes: int
    seconds: float
    streamed_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The highest of its peaks."""
        return max(self.peaks.values())

    @property
    def techniques(self) -> Techniques:
        """Those of its group that are on."""
        return self.base.placement.techniques & self.group.techniques

    @property
    def order(self) -> tuple[float, int, int]:
        """Parts in ascending order of this: the fastest first; of equally fast ones the one that streams least."""
        return self.seconds, self.streamed_bytes, len(self.techniques)


def parts_of(
    group: Group,
    base: Base,
    whole: Base,
    fixed: Mapping[str, int],
    prefetches: Sequence[int],
    *,
    cuda: bool,
    kept: bool,
) -> Iterator[Part]:
    """Every way to place a group by what was forecast.

    Args:
        group: Which one.
        base: Its forecast.
        whole: That with all blocks on the device.
        fixed: Blocks that stay, by component, where the user decides.
        prefetches: Blocks that may be copied ahead.
        cuda: Whether copies are made ahead at all.
        kept: Whether any block may stay, beside those that are fixed.
    """
    if group.streaming not in base.placement.techniques:
        yield _part(group, base, base, {}, None, cuda=cuda)
        return
    for prefetch in prefetches:
        for counts in _counts(group, base, fixed, kept=kept):
            yield _part(group, base, whole, counts, prefetch, cuda=cuda)


def _counts(group: Group, base: Base, fixed: Mapping[str, int], *, kept: bool) -> Iterator[dict[str, int]]:
    options: list[dict[str, int]] = [{}]
    for component in group.components:
        sizes = base.resident_bytes.get(component, (0,))
        most = _small(sizes) if group is TEXT else len(sizes) - 2  # all of them is another base
        numbers = [fixed[component]] if component in fixed else range(max(0, most if kept else 0) + 1)
        options = [{**counts, component: number} for counts in options for number in numbers]
    yield from options


def _small(sizes: Sequence[int]) -> int:
    """How many blocks come before the embedding and the large projections, whose running sets the peak."""
    steps = [after - before for before, after in pairwise(sizes)]
    return next((index for index, step in enumerate(steps) if step > steps[0]), max(0, len(steps) - 1))


def _part(
    group: Group, base: Base, whole: Base, counts: Mapping[str, int], prefetch: int | None, *, cuda: bool
) -> Part:
    own = {name: base.resident_bytes[name] for name in counts}
    stays = {name: own[name][count] for name, count in counts.items()}
    held = {name: nbytes + int(nbytes * UNSPLIT * cuda) for name, nbytes in stays.items()}
    total = {name: own[name][-1] for name in counts}
    peaks = {}
    for phase in group.phases:
        peaks[phase] = base.phases[phase].peak_bytes
        if group is DENOISING and counts:
            peaks[phase] = held[TRANSFORMER] + _denoise_bytes(
                base, phase, counts[TRANSFORMER], prefetch or 0, cuda=cuda
            )
        elif group is TEXT and counts:
            peaks[phase] = max(
                (one.peak_bytes or 0) + held[one.component] for one in base.hosts if one.component in held
            )
        elif counts:
            peaks[phase] += held["video_encoder" if phase == ENCODE_IMAGE else "video_decoder"]
    upsample = base.phases[UPSAMPLE]
    shared, shares = 0, {}
    if group is DENOISING:
        shared = upsample.start_bytes
        over = whole.phases[UPSAMPLE].start_bytes > shared + total[TRANSFORMER] // 2 if counts else False
        shared += held[TRANSFORMER] if over else 0
        shares = dict.fromkeys(DENOISE, _share(stays, total, TRANSFORMER))
    elif group is AUTOENCODER:
        shared = upsample.peak_bytes - upsample.start_bytes + held.get("video_encoder", 0)
        shares = dict.fromkeys((ENCODE_IMAGE, UPSAMPLE), _share(stays, total, "video_encoder"))
        shares[DECODE_VIDEO] = _share(stays, total, "video_decoder")
    else:
        shares[ENCODE_PROMPT] = _share(stays, total, *group.components)
    seconds = sum(mixed_seconds(base, whole, phase, share, prefetch or 0) for phase, share in shares.items())
    streamed = sum(total.values()) - sum(stays.values())
    ordered = tuple(sorted(counts.items()))
    return Part(group, base, whole, ordered, prefetch, shares, peaks, shared, seconds, streamed)


def _share(held: Mapping[str, int], total: Mapping[str, int], *components: str) -> float:
    nbytes = sum(total.get(name, 0) for name in components)
    return sum(held.get(name, 0) for name in components) / nbytes if nbytes else 0.0


def _denoise_bytes(base: Base, phase: str, count: int, prefetch: int, *, cuda: bool) -> int:
    """The peak of a stage without the blocks that stay: that of the base, with as many in flight as there are then."""
    sizes = base.resident_bytes[TRANSFORMER]
    block = sizes[-1] - sizes[-2]  # of one size, and the last that stay

    def in_flight(ahead: int, kept: int) -> int:
        return block * min(1 + (ahead if cuda else 0), len(sizes) - 1 - kept)

    before = base.placement.prefetch
    first, later = base.first_step_bytes(phase), base.later_bytes(phase)
    later += in_flight(prefetch, count) - in_flight(before, 0)
    first += (in_flight(0, count) - in_flight(0, 0)) if first else 0
    return max(first, later)


def numbers_of(base: Base, techniques: Techniques) -> dict[str, int]:
    """The sizes of chunks of a base that techniques make use of."""
    names = {
        Technique.TOKEN_CHUNKS: "chunk_tokens",
        Technique.FEATURE_CHUNKS: "feature_tokens",
        Technique.ROW_BANDS: "band_bytes",
    }
    found = {name: getattr(base.placement, name) for one, name in names.items() if one in techniques}
    return {name: value for name, value in found.items() if value is not None}


def placement_of_parts(parts: Sequence[Part]) -> Placement:
    """The placement that has its parts from these, one of each group."""
    techniques: Techniques = frozenset().union(*(part.techniques for part in parts))
    numbers: dict[str, int] = {}
    for part in parts:
        numbers |= numbers_of(part.base, part.techniques)
    ahead = {part.prefetch for part in parts if part.prefetch is not None and part.group is not TEXT}
    if ahead:
        numbers["prefetch"] = ahead.pop()
    counts = [pair for part in parts for pair in part.counts]
    return Placement(techniques=techniques, resident_blocks=tuple(counts), **numbers)
