"""What one process generates and how its video is consumed: the same experiment, forecast, measured or looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any

from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy, Technique, Techniques, to_techniques
from i2v_lab.request import DecodeScope, I2VRequest, Tiling

if TYPE_CHECKING:
    from i2v_lab.pipeline.contract.generation import Generation
    from i2v_lab.profiling.phase_profiler import PhaseProfiler

FULL_SIZE_MODEL = "ltx-2.3-22b"
SMALL_MODEL = "ltx-2.3-tiny"
DEFAULT_STILL = "stills/lighthouse.png"
# What a request has that no byte depends on: the still is scaled, the prompt filled up to 1,024 tokens.
WITHOUT_BYTES = ("image", "prompt", "negative_prompt", "seed", "pixel_multiple")


class Consumer(StrEnum):
    """What is done with the lazy stream that a pipeline returns.

    ``plain`` takes every chunk in the grad mode that Python starts in, which is with grad enabled. ``guarded`` does the
    same through :func:`~i2v_lab.profiling.guard.guard_stream`. ``left_open`` stops before the last chunk, or
    after the only one, and keeps the stream, as a preview or an interrupted notebook cell does.
    """

    PLAIN = "plain"
    GUARDED = "guarded"
    LEFT_OPEN = "left_open"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One process.

    Attributes:
        request: What to generate.
        model: An architecture's name.
        generations: How many times, one after another.
        consumer: How each video is consumed.
        techniques: What stands in for those of the request's memory policy, by name.

    Raises:
        InvalidRequest: ``generations`` is not above 0, or a technique is unknown or lacks what it needs.
        ValueError: There is no such consumer.

    Example:
        >>> request = I2VRequest(image="still.png", width=1024, height=768, frames=97, decode_scope="escaped")
        >>> Experiment(request=request, generations=3).name
        '1024x768x97_escaped_3times'
    """

    request: I2VRequest
    model: str = FULL_SIZE_MODEL
    generations: int = 1
    consumer: Consumer = Consumer.PLAIN
    techniques: Techniques | None = None

    def __post_init__(self) -> None:
        if self.techniques is not None:
            object.__setattr__(self, "techniques", to_techniques(self.techniques))
        object.__setattr__(self, "consumer", Consumer(self.consumer))
        if self.generations < 1:
            raise InvalidRequest(f"generations={self.generations} is not above 0; use 1 or more")

    @property
    def name(self) -> str:
        """A short name for folders and axes: what differs from the defaults; not unique over models."""
        request = self.request
        parts = [f"{request.width}x{request.height}x{request.frames}"]
        if request.tiling != Tiling():
            parts += _tiling_name(request.tiling)
        if request.decode_scope is not DecodeScope.NO_GRAD:
            parts.append(request.decode_scope.value)
        parts += [value for value in (request.variant.value, request.quantization.value) if value in ("dev", "bf16")]
        if request.memory is not MemoryPolicy.RESIDENT:
            parts.append(request.memory.value)
        if self.techniques is not None:
            parts += _techniques_name(self.techniques)
        if self.consumer is not Consumer.PLAIN:
            parts.append(self.consumer.value)
        if self.generations > 1:
            parts.append(f"{self.generations}times")
        return "_".join(parts)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; :meth:`from_json` reads them back."""
        values = {**asdict(self), "request": self.request.to_json(), "consumer": self.consumer.value}
        techniques = values.pop("techniques")
        return values if techniques is None else {**values, "techniques": sorted(techniques)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Experiment:
        """Build an experiment from what :meth:`to_json` returned."""
        request = I2VRequest.from_json(values["request"])
        return cls(**{**values, "request": request, "consumer": Consumer(values["consumer"])})

    def like(self) -> str:
        """Equal for experiments whose memory is equal, whatever their still, prompt and seed."""
        request = {name: value for name, value in self.request.to_json().items() if name not in WITHOUT_BYTES}
        return repr(sorted({**self.to_json(), "request": sorted(request.items())}.items()))

    def with_request(self, **changes: Any) -> Experiment:
        """The same with another request."""
        return replace(self, request=replace(self.request, **changes))


def _techniques_name(techniques: Techniques) -> list[str]:
    rest = frozenset(Technique) - techniques
    few = min(techniques, rest, key=len)
    names = [technique.value for technique in sorted(few)] or ["nothing"]
    return ["all_but", *names] if few is rest else names


def _tiling_name(tiling: Tiling | None) -> list[str]:
    if tiling is None:
        return ["untiled"]
    usual = (tiling.tile_overlap_px, tiling.tile_overlap_frames) == (
        Tiling().tile_overlap_px,
        Tiling().tile_overlap_frames,
    )
    overlap = [] if usual else [f"overlap{tiling.tile_overlap_px}x{tiling.tile_overlap_frames}"]
    return [f"tile{tiling.tile_px}x{tiling.tile_frames}", *overlap]


def perform(
    experiment: Experiment,
    pipeline: Callable[[I2VRequest], Generation],
    profiler: PhaseProfiler,
    consume: Callable[[Generation, Iterable[Any]], None],
) -> None:
    """Generate as often as asked for, and let ``consume`` have each video.

    Args:
        experiment: What to do.
        pipeline: With ``profiler`` among its sinks.
        profiler: Already active.
        consume: Given each generation and the chunks it may take; must take all of them.
    """
    left_open = []
    try:
        for number in range(1, experiment.generations + 1):
            generation = pipeline(experiment.request)
            if experiment.consumer is Consumer.LEFT_OPEN:
                left_open.append(generation.video)
                consume(generation, islice(generation.video, max(1, generation.video.chunks - 1)))
            else:
                with generation.video as stream:
                    consume(generation, _guarded(stream) if experiment.consumer is Consumer.GUARDED else stream)
                    del stream
            del generation
            profiler.generation_ended(number)
    finally:
        for stream in reversed(left_open):  # the last to open a phase is the first to end it
            stream.close()


def _guarded(stream: Iterator[Any]) -> Iterator[Any]:
    from i2v_lab.profiling.guard import guard_stream

    return guard_stream(stream)
