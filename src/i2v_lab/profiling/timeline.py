"""A phase's allocated bytes over time, and what they were at its peak, from the allocation records of its storages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.meters.storage_record import CATEGORIES, StorageRecord
from i2v_lab.profiling.records import HolderRecord, ModuleRecord, OperatorRecord, TimelineRecord

POINTS = 400  # maximum for one phase
HOLDERS = 20  # largest storages recorded for a phase's peak


def phase_timeline(
    meter: LiveStorageMeter, phase: str, start_tick: int, end_tick: int, origin_s: float
) -> list[TimelineRecord]:
    """The timeline from ``start_tick`` to ``end_tick``, at most ``POINTS`` points.

    The ticks are divided into equal bins, each represented by its maximum, so that downsampling removes no peak.

    Args:
        meter: Was active during the phase, and has not dropped its records.
        phase: Its name, for the records.
        start_tick: Tick at which the phase began.
        end_tick: Tick at which it ended.
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

    for storage in meter.storages:
        category = storage.unsaved_category
        add(category, storage.nbytes, storage.allocated_at, storage.freed_at)
        for start, end in [] if storage.is_weight else storage.saved:
            stop = storage.freed_at if end is None else end
            add("saved", storage.nbytes, start or 0, stop)
            add(category, -storage.nbytes, start or 0, stop)
    allocated = changes[:, :-1].cumsum(axis=1)
    total = allocated.sum(axis=0)
    bins = np.array_split(np.arange(count), min(POINTS, count))
    selected = [int(each[np.argmax(total[each])]) for each in bins]
    return [
        TimelineRecord(
            phase,
            meter.time_s(start_tick + index) - origin_s,
            *(int(allocated[row[category], index]) for category in CATEGORIES),
        )
        for index in selected
    ]


def peak_breakdown(
    phase: str, storages: Sequence[StorageRecord], tick: int
) -> list[ModuleRecord | OperatorRecord | HolderRecord]:
    """What was allocated at a phase's peak: by module and category, by operator, then the largest storages.

    Args:
        phase: Its name, for the records.
        storages: Those that were live then.
        tick: Of the peak.
    """
    totals: defaultdict[tuple[str, str], int] = defaultdict(int)
    returned: defaultdict[tuple[str, str], int] = defaultdict(int)
    for storage in storages:
        totals[storage.module, storage.category_at(tick)] += storage.nbytes
        if not storage.is_weight:
            returned[storage.module, storage.operator] += storage.nbytes
    records: list[ModuleRecord | OperatorRecord | HolderRecord] = [
        ModuleRecord(phase, module, category, nbytes) for (module, category), nbytes in sorted(totals.items())
    ]
    records += [OperatorRecord(phase, *key, nbytes) for key, nbytes in sorted(returned.items())]
    for storage in sorted(storages, key=lambda storage: storage.nbytes, reverse=True)[:HOLDERS]:
        dtype = str(storage.dtype).removeprefix("torch.")
        category = storage.category_at(tick)
        operator = "" if storage.is_weight else storage.operator
        records.append(HolderRecord(phase, storage.nbytes, storage.shape, dtype, category, storage.module, operator))
    return records
