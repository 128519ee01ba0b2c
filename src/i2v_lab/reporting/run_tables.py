"""Tidy tables of recorded runs, with whole bytes and seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pandas as pd

from i2v_lab.errors import RecordError
from i2v_lab.profiling.records import (
    GraphRecord,
    HolderRecord,
    ModuleRecord,
    OperatorRecord,
    PhaseRecord,
    peak_phase,
)
from i2v_lab.runs.store import Run

P = TypeVar("P", HolderRecord, ModuleRecord, OperatorRecord, GraphRecord)

PHASE_COLUMNS = {
    "phase": "str",
    "parent": "object",
    "times": "int64",
    "seconds": "float64",
    "start_bytes": "int64",
    "peak_bytes": "int64",
    "end_bytes": "int64",
    "peak_reserved_bytes": "Int64",
    "saved_for_backward_bytes": "Int64",
    "completed": "bool",
}
HOLDER_COLUMNS = {"nbytes": "int64", "category": "str", "dtype": "str", "shape": "object", "module": "str"}
MODULE_COLUMNS = {"module": "str", "category": "str", "nbytes": "int64"}
DIFFERENCE_COLUMNS = {
    "phase": "str",
    "peak_bytes": "Int64",
    "other_peak_bytes": "Int64",
    "difference_bytes": "Int64",
    "seconds": "Float64",
    "other_seconds": "Float64",
    "difference_s": "Float64",
}


def phase_table(run: Run) -> pd.DataFrame:
    """One row for each phase, in the order in which they began.

    A phase that ran several times, such as the chunks of a stream, is one row: its maxima, the sum of its seconds, its
    first start and its last end.

    Returns:
        ``phase, parent, times, seconds, start_bytes, peak_bytes, end_bytes, peak_reserved_bytes,
        saved_for_backward_bytes, completed``.

    Example:
        >>> phase_table(read_run("runs/no_grad"))["peak_bytes"].max()  # doctest: +SKIP
        31561000
    """
    together: dict[tuple[str, str | None], list[PhaseRecord]] = {}
    for record in sorted(run.of(PhaseRecord), key=lambda record: (record.start_s, -record.seconds)):
        together.setdefault((record.phase, record.parent), []).append(record)
    rows = [
        {
            "phase": phase,
            "parent": parent,
            "times": len(records),
            "seconds": sum(record.seconds for record in records),
            "start_bytes": records[0].start_bytes,
            "peak_bytes": max(record.peak_bytes for record in records),
            "end_bytes": records[-1].end_bytes,
            "peak_reserved_bytes": _most(record.peak_reserved_bytes for record in records),
            "saved_for_backward_bytes": _most(record.saved_for_backward_bytes for record in records),
            "completed": all(record.completed for record in records),
        }
        for (phase, parent), records in together.items()
    ]
    return typed_frame(rows, PHASE_COLUMNS)


def holders_table(run: Run, phase: str | None = None, top: int = 10) -> pd.DataFrame:
    """The largest storages that were allocated at a phase's peak, the largest first.

    Args:
        run: A run that was profiled with live storages; the table is empty without them.
        phase: Which one; that of the run's peak by default.
        top: Rows at most.

    Returns:
        ``nbytes, category, dtype, shape, module``.

    Raises:
        RecordError: There is no such phase, or ``top`` is not positive.

    Example:
        >>> holders_table(read_run("runs/no_grad"), "decode_video", top=3)["nbytes"].sum()  # doctest: +SKIP
        18454938
    """
    if top < 1:
        raise RecordError(f"top={top} is not positive; use a number such as 10", top=top)
    holders = sorted(records_at_peak(run, HolderRecord, phase), key=lambda record: record.nbytes, reverse=True)
    return typed_frame(
        [{name: getattr(record, name) for name in HOLDER_COLUMNS} for record in holders[:top]], HOLDER_COLUMNS
    )


def modules_table(run: Run, phase: str | None = None, depth: int = 2) -> pd.DataFrame:
    """Bytes by module and category at a phase's peak, each module counted for its ancestor at ``depth``.

    Args:
        run: A run that was profiled with live storages; the table is empty without them.
        phase: Which one; that of the run's peak by default.
        depth: How many parts of a path to keep: 2 keeps ``video_decoder.up_blocks``.

    Returns:
        ``module, category, nbytes``, the largest first. ``nbytes`` adds up to the phase's peak.

    Raises:
        RecordError: There is no such phase, or ``depth`` is not positive.

    Example:
        >>> modules_table(read_run("runs/no_grad"), depth=1)["module"].tolist()  # doctest: +SKIP
        ['video_decoder', '']
    """
    if depth < 1:
        raise RecordError(f"depth={depth} is not positive; use 1 for whole components, 2 for their parts", depth=depth)
    totals: Counter[tuple[str, str]] = Counter()
    for record in records_at_peak(run, ModuleRecord, phase):
        totals[module_prefix(record.module, depth), record.category] += record.nbytes
    rows = [
        {"module": module, "category": category, "nbytes": nbytes}
        for (module, category), nbytes in sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    ]
    return typed_frame(rows, MODULE_COLUMNS)


def difference_table(run: Run, other: Run) -> pd.DataFrame:
    """Peaks and seconds of two runs, phase by phase, and how the second differs from the first.

    Returns:
        ``phase, peak_bytes, other_peak_bytes, difference_bytes, seconds, other_seconds, difference_s``. Missing
        where only one run has the phase.

    Example:
        >>> difference_table(read_run("runs/escaped"), read_run("runs/no_grad"))["phase"].tolist()  # doctest: +SKIP
        ['encode_prompt', 'denoise_stage_1', 'decode_video']
    """
    ours, theirs = _by_phase(run), _by_phase(other)
    rows: list[dict[str, Any]] = []
    for phase in _merged(list(ours), list(theirs)):
        (peak, seconds), (other_peak, other_seconds) = ours.get(phase, (None, None)), theirs.get(phase, (None, None))
        rows.append(
            {
                "phase": phase,
                "peak_bytes": peak,
                "other_peak_bytes": other_peak,
                "difference_bytes": None if peak is None or other_peak is None else other_peak - peak,
                "seconds": seconds,
                "other_seconds": other_seconds,
                "difference_s": None if seconds is None or other_seconds is None else other_seconds - seconds,
            }
        )
    return typed_frame(rows, DIFFERENCE_COLUMNS)


def records_at_peak(run: Run, kind: type[P], phase: str | None = None) -> list[P]:
    """The records of one kind that belong to a phase's peak; of a phase that ran several times, to the highest one.

    Args:
        run: The run.
        kind: Such as :class:`~i2v_lab.profiling.records.ModuleRecord`.
        phase: Which phase; that of the run's peak by default.

    Raises:
        RecordError: There is no such phase.
    """
    phases = run.of(PhaseRecord)
    if phase is not None and all(record.phase != phase for record in phases):
        known = ", ".join(dict.fromkeys(record.phase for record in phases)) or "none has ended"
        raise RecordError(f"phase={phase!r} is not in run '{run.folder}'; use one of: {known}", phase=phase)
    peak = peak_phase(record for record in phases if phase is None or record.phase == phase)
    if peak is None:
        return []
    records = list(run.records)
    if sum(record.phase == peak.phase for record in phases) > 1:  # a phase's details are written right after it
        start = next(index for index, record in enumerate(records) if record is peak) + 1
        rest = records[start:]
        stop = next((index for index, record in enumerate(rest) if isinstance(record, PhaseRecord)), len(rest))
        records = rest[:stop]
    return [record for record in records if isinstance(record, kind) and record.phase == peak.phase]


def module_prefix(module: str, depth: int) -> str:
    """The first ``depth`` parts of a module's path.

    Example:
        >>> module_prefix("video_decoder.up_blocks.1.conv", 2)
        'video_decoder.up_blocks'
    """
    return ".".join(module.split(".")[:depth])


def _by_phase(run: Run) -> dict[str, tuple[int, float]]:
    table = phase_table(run)
    grouped = table.groupby("phase", sort=False).agg(peak=("peak_bytes", "max"), seconds=("seconds", "sum"))
    return {str(phase): (int(row["peak"]), float(row["seconds"])) for phase, row in grouped.iterrows()}


def _merged(first: list[str], second: list[str]) -> list[str]:
    """All names of ``first``; one that only ``second`` has comes after the one that it follows there."""
    merged = list(first)
    previous = -1
    for name in second:
        if name in merged:
            previous = merged.index(name)
        else:
            previous += 1
            merged.insert(previous, name)
    return merged


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def typed_frame(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    """Rows as a table whose columns have these types, whether there are rows or not."""
    series = {name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in columns.items()}
    return pd.DataFrame(series)
