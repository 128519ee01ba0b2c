"""The largest size that fits where a request does not: a few forecasts, each where the others say that memory ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest

SIZELESS = "encode_prompt"  # takes as much at every size


def largest_size(
    request: I2VRequest,
    peaks: Mapping[str, int],
    room_bytes: int,
    model: str,
    forecast: Callable[[I2VRequest], Forecast],
) -> I2VRequest | None:
    """The largest size below that of a request, at its aspect ratio, whose phases all stay within a limit.

    Args:
        request: Does not stay within it.
        peaks: Of its phases.
        room_bytes: The limit, of allocated memory.
        model: An architecture's name.
        forecast: Forecasts a request.

    Returns:
        ``None`` if no size does.
    """
    if peaks.get(SIZELESS, 0) > room_bytes:
        return None
    architecture = load_architecture(model)
    allowed = runner_of(architecture).size_rule(architecture).sizes((request.width, request.height), request.height)
    sizes = [size for size in allowed if size[0] * size[1] < request.width * request.height]
    if not sizes:
        return None

    def tried(index: int) -> tuple[int, dict[str, int]]:
        width, height = sizes[index]
        found = forecast(replace(request, width=width, height=height))
        return width * height, {phase.phase: phase.peak_bytes for phase in found.phases}

    good, bad = 0, len(sizes)
    below, above = tried(0), (request.width * request.height, dict(peaks))
    if max(below[1].values()) > room_bytes:
        return None
    while bad - good > 1:
        crossing = min(_crossing(below, above, phase, room_bytes) for phase in peaks)
        wanted = sum(width * height <= crossing for width, height in sizes) - 1
        index = min(max(wanted, good + 1), bad - 1)
        found = tried(index)
        if max(found[1].values()) <= room_bytes:
            good, below = index, found
        else:
            bad, above = index, found
    width, height = sizes[good]
    return replace(request, width=width, height=height)


def _crossing(
    below: tuple[int, Mapping[str, int]], above: tuple[int, Mapping[str, int]], phase: str, room_bytes: int
) -> float:
    """The pixels at which a phase reaches the limit, on the straight line between two sizes."""
    low, high = below[1].get(phase, 0), above[1].get(phase, 0)
    if high <= room_bytes or high <= low:
        return above[0]
    return below[0] + (above[0] - below[0]) * (room_bytes - low) / (high - low)
