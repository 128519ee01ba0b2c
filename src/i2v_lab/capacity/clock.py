"""A clock for a forecast: at how many predicted seconds of a run on a card each of its events is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace

from i2v_lab.capacity.device_profile import REFERENCE, DeviceProfile, device_profile
from i2v_lab.capacity.time_model import phase_times, segment
from i2v_lab.profiling.records import CostRecord, Forecast, PhaseRecord, StepRecord, TimelineRecord
from i2v_lab.runs.store import Run

Point = tuple[float, float]  # seconds of the forecast, and of a run


def on_clock(forecast: Forecast, device: DeviceProfile) -> Forecast:
    """The same forecast with the times of a run on a card, in place of those at which it was computed.

    Phases, steps and the moments of the timeline get them. Between the ends of steps and phases, which are predicted,
    moments keep the share that they had of the time between.

    Args:
        forecast: With the costs of its operators.
        device: Of which card.

    Example:
        >>> from i2v_lab.capacity.device_profile import device_profile
        >>> phase = PhaseRecord("decode_video", None, 0, 2**30, 0, 2**30, 2**30, 0, 0.0, 0.1, True)
        >>> moments = [TimelineRecord("decode_video", time_s, 0, 0, 0, 0) for time_s in (0.0, 0.05, 0.1)]
        >>> costs = CostRecord("decode_video", 1, (("view", "", 1000000, 0, 0),))
        >>> clocked = on_clock(Forecast((*moments, costs, phase), 0, 0.1), device_profile("H100 80GB"))
        >>> [round(each.time_s, 1) for each in clocked.records[:3]]
        [0.0, 1.3, 2.7]
    """
    points = list(_points(forecast, device))
    times = iter(phase_times(forecast, device))
    steps: dict[str, list[float]] = {}
    pending: list[CostRecord] = []
    records = []
    for record in forecast.records:
        if isinstance(record, CostRecord):
            pending.append(record)
        elif isinstance(record, PhaseRecord):
            time = next(times)
            steps.setdefault(record.phase, []).extend(_segments(pending, device))
            pending = []
            record = replace(record, start_s=_at(points, record.start_s), seconds=time.seconds)
        elif isinstance(record, TimelineRecord):
            record = replace(record, time_s=_at(points, record.time_s))
        records.append(record)
    records = [_step(each, steps) if isinstance(each, StepRecord) else each for each in records]
    return replace(forecast, records=tuple(records))


def run_on_clock(run: Run, gpu: str = REFERENCE) -> Run:
    """A forecast in the form of a run with the clock of a card; any other run, and one with a clock, is as it was.

    Args:
        run: Without costs of operators it keeps the times at which it was computed.
        gpu: Name of the card.
    """
    if not run.is_forecast or run.metadata.get("clock") or not run.of(CostRecord):
        return run
    device = device_profile(gpu)
    records = on_clock(Forecast(run.records, context_bytes=0, seconds=0.0), device).records
    return replace(run, records=records, metadata={**run.metadata, "clock": device.name})


def _segments(costs: list[CostRecord], device: DeviceProfile) -> list[float]:
    return [segment(each.rows, device).seconds for each in costs for _ in range(each.repeats)]


def _step(record: StepRecord, segments: dict[str, list[float]]) -> StepRecord:
    """With the seconds of the segment that ended with it, the next of its phase."""
    found = segments.get(record.phase)
    return replace(record, seconds=found.pop(0)) if found else record


def _points(forecast: Forecast, device: DeviceProfile) -> Iterator[Point]:
    """The beginnings and ends of phases at the top level, and the ends of their steps, in order."""
    ended_s = 0.0
    costs: list[CostRecord] = []
    steps: list[StepRecord] = []
    times = iter(phase_times(forecast, device))
    for record in forecast.records:
        if isinstance(record, CostRecord):
            costs.append(record)
        elif isinstance(record, StepRecord):
            steps.append(record)
        elif isinstance(record, PhaseRecord):
            time = next(times)
            if record.parent is None:
                yield record.start_s, ended_s
                own = [each for each in steps if each.phase == record.phase]
                yield from _steps(record, ended_s, own, costs, device)
                ended_s += time.seconds
                yield record.start_s + record.seconds, ended_s
                steps = []
            costs = []


def _steps(
    phase: PhaseRecord, begun_s: float, steps: list[StepRecord], costs: list[CostRecord], device: DeviceProfile
) -> Iterator[Point]:
    """The ends of a phase's steps, where each has a segment of its own, the last of the phase's seconds after it."""
    at_s, segments = phase.start_s + phase.seconds - sum(each.seconds for each in steps), _segments(costs, device)
    if len(segments) < len(steps):
        return
    for step, seconds in zip(steps, segments, strict=False):
        at_s += step.seconds
        begun_s += seconds
        yield at_s, begun_s


def _at(points: list[Point], time_s: float) -> float:
    """Seconds of a run at a moment of its forecast, between the points around it."""
    index = bisect_right(points, (time_s, float("inf")))
    if not points or index == 0:
        return 0.0
    before = points[index - 1]
    if index == len(points):
        return before[1]
    after = points[index]
    share = (time_s - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 1.0
    return before[1] + share * (after[1] - before[1])
