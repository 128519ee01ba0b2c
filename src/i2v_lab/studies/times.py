"""The seconds beside the bytes of every table: measured where a run was, predicted for a card where it is forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from i2v_lab.capacity.cards import card_name
from i2v_lab.capacity.clock import run_on_clock
from i2v_lab.capacity.device_profile import device_profile
from i2v_lab.runs.sources import Observation, device_of

GPU = "H200"  # the card of the recorded runs: the run with the graph retained fits it


def timed(observations: Sequence[Observation], gpu: str = GPU) -> list[Observation]:
    """The same observations, each forecast with the seconds that its phases are predicted to take on a GPU.

    Seconds are of the first generation in a process, without reading weights from a disk and without encoding the
    video. Measured runs are as they were.

    Args:
        observations: Of :func:`~i2v_lab.runs.sources.observe`.
        gpu: Name of a card whose rates are known.

    Raises:
        InvalidRequest: There is no such card, or no published peaks of it.

    Example:
        >>> timed([])
        []
    """
    return [replace(each, run=each.run and run_on_clock(each.run, gpu)) for each in observations]


def time_heading(observations: Sequence[Observation], *, device: bool = True) -> str:
    """The heading of a column of seconds: whether they are measured or predicted, and on what.

    Args:
        observations: Of :func:`timed`; all from one source.
        device: Name the device: where several columns are of one, the others need not.

    Example:
        >>> time_heading([])
        'time'
    """
    runs = [each.run for each in observations if each.run is not None]
    if not runs:
        return "time"
    clocks = {str(run.metadata.get("clock") or "") for run in runs if run.is_forecast}
    if not clocks:
        return f"time, measured on {device_of(observations)}" if device else "time, measured"
    if not device:
        return "time, predicted" if clocks - {""} else "time"
    caveat = "" if all(device_profile(clock).measured for clock in clocks if clock) else " by published rates"
    return (
        f"time, predicted for {' and '.join(map(card_name, sorted(clocks - {''})))}{caveat}"
        if clocks - {""}
        else "time"
    )
