"""Live bytes by category over a phase, from the lives of its storages."""

from __future__ import annotations

import numpy as np

from i2v_lab.profiling.meters.live_storages import CATEGORIES, LiveStorageMeter
from i2v_lab.profiling.records import TimelineRecord

POINTS = 400  # at most, for one phase


def phase_timeline(
    meter: LiveStorageMeter, phase: str, start_tick: int, end_tick: int, origin_s: float
) -> list[TimelineRecord]:
    """The timeline from ``start_tick`` to ``end_tick``, at most ``POINTS`` points.

    The ticks are cut into equal runs, and of each run the moment with the most bytes alive is kept, so that no peak is
    smoothed away.

    Args:
        meter: Has watched the phase, and not forgotten it.
        phase: For the records.
        start_tick: Where the phase began.
        end_tick: Where it ended; the meter may have watched more since.
        origin_s: Zero of the records' time, on ``time.perf_counter``'s clock.
    """
    count = end_tick - start_tick + 1
    changes = np.zeros((len(CATEGORIES), count + 1), dtype=np.int64)
    row = {category: index for index, category in enumerate(CATEGORIES)}

    def add(category: str, nbytes: int, start: int, end: int | None) -> None:
        first = min(max(start - start_tick, 0), count)
        last = count if end is None else min(max(end - start_tick, 0), count)
        changes[row[category], first] += nbytes
        changes[row[category], last] -= nbytes

    for life in meter.lives:
        idle = "activation" if life.module and not life.is_workspace else "other"
        add("weight" if life.is_weight else idle, life.nbytes, life.born, life.died)
        for start, end in [] if life.is_weight else life.saved:
            stop = life.died if end is None else end
            add("saved", life.nbytes, start or 0, stop)
            add(idle, -life.nbytes, start or 0, stop)
    alive = changes[:, :-1].cumsum(axis=1)
    total = alive.sum(axis=0)
    runs = np.array_split(np.arange(count), min(POINTS, count))
    kept = [int(run[np.argmax(total[run])]) for run in runs]
    return [
        TimelineRecord(
            phase,
            meter.time_s(start_tick + index) - origin_s,
            *(int(alive[row[category], index]) for category in CATEGORIES),
        )
        for index in kept
    ]
