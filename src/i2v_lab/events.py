"""What a pipeline tells the outside while it runs: typed events, sent to any number of sinks.

This is the seam between ``pipeline`` (which emits) and ``profiling``, progress bars and loggers (which listen); neither
side imports the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import entry_points
from typing import Any, Protocol


class Phase(StrEnum):
    """The phases of a two-stage generation, in the order in which they run."""

    ENCODE_PROMPT = "encode_prompt"
    ENCODE_IMAGE = "encode_image"
    DENOISE_STAGE_1 = "denoise_stage_1"
    UPSAMPLE_LATENT = "upsample_latent"
    DENOISE_STAGE_2 = "denoise_stage_2"
    DECODE_AUDIO = "decode_audio"
    DECODE_VIDEO = "decode_video"


@dataclass(frozen=True)
class PhaseStarted:
    """A phase is about to build its first component.

    Attributes:
        phase: Which one.
    """

    phase: Phase


@dataclass(frozen=True)
class PhaseEnded:
    """A phase has released its last component, whether it succeeded or failed.

    Attributes:
        phase: Which one.
        seconds: Its duration on a monotonic clock. For ``decode_video`` this includes what the consumer did between
            two chunks, since the phase stays open while the stream is being consumed.
        completed: False if it ended by an error or because the consumer stopped early.
        error: What it ended by, if by an error. Sinks must not keep it.
    """

    phase: Phase
    seconds: float
    completed: bool
    error: BaseException | None = None


@dataclass(frozen=True)
class StepEnded:
    """A denoising step, or the decoding of one chunk of frames, is done.

    Attributes:
        phase: The phase it belongs to.
        step: 1 for the first.
        steps: How many there will be.
    """

    phase: Phase
    step: int
    steps: int


@dataclass(frozen=True)
class ComponentBuilt:
    """A component's weights are on the device.

    Attributes:
        phase: The phase that built it.
        name: ``text_encoder``, ``transformer``, ``video_decoder``, ...
        module: The ``torch.nn.Module``. Sinks must not keep it.
    """

    phase: Phase
    name: str
    module: Any


@dataclass(frozen=True)
class ComponentReleased:
    """A component's weights have been let go of.

    Attributes:
        phase: The phase that built it.
        name: As in :class:`ComponentBuilt`.
        page_locked_bytes: The most page-locked host memory that its offloaded weights took; 0 where it has none.
        pageable_bytes: Of a component whose weights are streamed, the largest block that was read from its file at
            once, through pageable memory.
        resident_bytes: Of such a component, what it would take on the device if 0, 1, ... of its blocks stayed there;
            empty where not all of them are streamed.
    """

    phase: Phase
    name: str
    page_locked_bytes: int = 0
    pageable_bytes: int = 0
    resident_bytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Note:
    """Something was done to an input or to the result that the user should know of.

    Attributes:
        phase: In which.
        topic: What it was done to: ``prompt``, ``negative_prompt``, ``image`` or ``sound``.
        count: How much of it: tokens that were dropped, samples that were replaced, stills that were not used.
        text: One line for the user.
    """

    phase: Phase
    topic: str
    count: int
    text: str


Event = PhaseStarted | PhaseEnded | StepEnded | ComponentBuilt | ComponentReleased | Note


class EventSink(Protocol):
    """Anything that can be called with an event."""

    def __call__(self, event: Event, /) -> None:
        """Take note of ``event``. Runs in the pipeline's thread, between two pieces of its work."""


def broadcast(sinks: Sequence[EventSink]) -> EventSink:
    """One sink that passes every event on to all of ``sinks``, in order.

    Example:
        >>> seen = []
        >>> broadcast([seen.append])(PhaseStarted(Phase.ENCODE_PROMPT))
        >>> seen[0].phase.value
        'encode_prompt'
    """

    def emit(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return emit


VRAM_VARIABLE = "I2V_LAB_VRAM"
SINK_GROUP = "i2v_lab.sinks"


def environment_sinks(device: Any) -> list[EventSink]:
    """The sinks that the environment asks for: with ``I2V_LAB_VRAM=1`` those of entry point group ``i2v_lab.sinks``.

    Args:
        device: The run's device, given to each entry point.
    """
    if os.environ.get(VRAM_VARIABLE, "0") in ("", "0"):
        return []
    return [sink(device) for sink in installed_sinks()]


def installed_sinks() -> list[Callable[[Any], EventSink]]:
    """What makes the sinks of entry point group ``i2v_lab.sinks``; in a forecast, where nothing is to be read, none."""
    return [point.load() for point in entry_points(group=SINK_GROUP)]
