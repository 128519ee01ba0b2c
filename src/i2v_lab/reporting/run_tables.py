"""What a recorded run says: tidy tables with whole bytes, a sentence or two, and both as people read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from i2v_lab.errors import RecordError
from i2v_lab.profiling.records import GraphRecord, HolderRecord, ModuleRecord, OutOfMemoryRecord, PhaseRecord
from i2v_lab.runs.store import FAILED, Run
from i2v_lab.units import format_bytes

P = TypeVar("P", HolderRecord, ModuleRecord, GraphRecord)

OUTSIDE = "(outside any module)"
ENOUGH = 0.9  # of an autograd graph: who holds that much of it need not be listed with the rest
NARROWEST = 16  # columns, for a name in a table
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


# --- Tidy ---


def phase_table(run: Run) -> pd.DataFrame:
    """One row for each phase, in the order in which they began.

    A phase that ran several times, such as the pieces of a stream, is one row: its maxima, its seconds together, its
    first start and its last end.

    Returns:
        ``phase, parent, times, seconds, start_bytes, peak_bytes, end_bytes, peak_reserved_bytes,
        saved_for_backward_bytes, completed``.
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
    return _frame(rows, PHASE_COLUMNS)


def holders_table(run: Run, phase: str | None = None, top: int = 10) -> pd.DataFrame:
    """The largest storages that were alive at a phase's peak, the largest first.

    Args:
        run: A run whose live storages were followed; without them the table is empty.
        phase: Which one; that of the run's peak by default.
        top: At most so many.

    Returns:
        ``nbytes, category, dtype, shape, module``.

    Raises:
        RecordError: There is no such phase, or ``top`` is not positive.
    """
    if top < 1:
        raise RecordError(f"top={top} is not positive; use a number such as 10", top=top)
    holders = sorted(_at_the_peak(run, HolderRecord, phase), key=lambda record: record.nbytes, reverse=True)
    return _frame(
        [{name: getattr(record, name) for name in HOLDER_COLUMNS} for record in holders[:top]], HOLDER_COLUMNS
    )


def modules_table(run: Run, phase: str | None = None, depth: int = 2) -> pd.DataFrame:
    """What each module held at a phase's peak, rolled up: a module counts for its ancestor at ``depth``.

    Args:
        run: A run whose live storages were followed; without them the table is empty.
        phase: Which one; that of the run's peak by default.
        depth: How many parts of a path to keep: 2 keeps ``video_decoder.up_blocks``.

    Returns:
        ``module, category, nbytes``, the largest first. ``nbytes`` adds up to the phase's peak.

    Raises:
        RecordError: There is no such phase, or ``depth`` is not positive.
    """
    if depth < 1:
        raise RecordError(f"depth={depth} is not positive; use 1 for whole components, 2 for their parts", depth=depth)
    totals: Counter[tuple[str, str]] = Counter()
    for record in _at_the_peak(run, ModuleRecord, phase):
        totals[_roll_up(record.module, depth), record.category] += record.nbytes
    rows = [
        {"module": module, "category": category, "nbytes": nbytes}
        for (module, category), nbytes in sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    ]
    return _frame(rows, MODULE_COLUMNS)


def difference_table(run: Run, other: Run) -> pd.DataFrame:
    """Peaks and seconds of two runs, phase by phase, and how the second differs from the first.

    Returns:
        ``phase, peak_bytes, other_peak_bytes, difference_bytes, seconds, other_seconds, difference_s``. What only one
        run has is missing in the other, and so is the difference.
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
    return _frame(rows, DIFFERENCE_COLUMNS)


def peak_phase(run: Run) -> PhaseRecord | None:
    """The phase with the highest peak, the first of equals; ``None`` if no phase has ended."""
    return max(run.of(PhaseRecord), key=lambda record: record.peak_bytes, default=None)


# --- Sentences ---


def headline(run: Run) -> str:
    """What to know first, one sentence a line: how the run ended, what did not fit, its peak, and what that is made of.

    Example:
        ``peak 56.3 MiB in decode_video; 34.6 MiB (61 %) of it are an autograd graph, held by video_decoder.up_blocks``
    """
    sentences = []
    if not run.finished:
        sentences.append(f"unfinished: the run was stopped, or still goes on; {len(run.records)} records so far")
    if run.status == FAILED:
        sentences.append(f"failed: {run.metadata.get('error', 'no reason given')}")
    sentences += _out_of_memory(run)
    peak = peak_phase(run)
    if peak is None:
        sentences.append("no phase has ended, so there is no peak")
    else:
        sentences.append(f"peak {format_bytes(peak.peak_bytes)} in {peak.phase}; {_graph(run, peak)}")
    return "\n".join(sentences)


def difference_headline(run: Run, other: Run) -> str:
    """How the second run's peak and time differ from the first's, in one sentence."""
    first, second = peak_phase(run), peak_phase(other)
    if first is None or second is None:
        return "no difference can be told: a run without a phase that ended has no peak"
    change = second.peak_bytes - first.peak_bytes
    ratio = f" ({100 * change / first.peak_bytes:+.0f} %)" if first.peak_bytes else ""
    seconds, other_seconds = _whole_seconds(run), _whole_seconds(other)
    return (
        f"peak {format_bytes(second.peak_bytes)} instead of {format_bytes(first.peak_bytes)}: "
        f"{_signed_bytes(change)}{ratio}; {other_seconds:.2f} s instead of {seconds:.2f} s"
    )


def _graph(run: Run, peak: PhaseRecord) -> str:
    modules = _at_the_peak(run, ModuleRecord, None)
    saved = [record for record in modules if record.category == "saved"]
    graph_bytes = sum(record.nbytes for record in saved)
    most_bytes = peak.saved_for_backward_bytes
    if graph_bytes:
        share = f" ({100 * graph_bytes / peak.peak_bytes:.0f} %)" if peak.peak_bytes else ""
        return f"{format_bytes(graph_bytes)}{share} of it are an autograd graph, held by {_names(saved)}"
    if modules and most_bytes:
        return f"no autograd graph at that moment, but one of {format_bytes(most_bytes)} at another in that phase"
    if most_bytes:
        graphs = _at_the_peak(run, GraphRecord, None)
        held = f", held by {_names(graphs)}" if graphs else ""
        return f"an autograd graph grew to {format_bytes(most_bytes)} in that phase{held}"
    if most_bytes is None and not modules:
        return "nobody looked for an autograd graph"
    return "no autograd graph"


def _names(records: list[Any]) -> str:
    """Who holds most of it: one name if that says nearly all, up to three with their shares otherwise."""
    totals: Counter[str] = Counter()
    for record in records:
        totals[_roll_up(record.module, 2)] += record.nbytes
    total = sum(totals.values())
    named: list[tuple[str, int]] = []
    for module, nbytes in sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:3]:
        named.append((module, nbytes))
        if sum(share for _, share in named) >= ENOUGH * total:
            break
    if len(named) == 1 and named[0][1] >= ENOUGH * total:
        return named[0][0] or "code outside any module"
    parts = []
    for module, nbytes in named:
        itself = " itself" if any(path.startswith(f"{module}.") for path in totals) else ""
        name = f"{module}{itself}" if module else "code outside any module"
        parts.append(f"{name} ({100 * nbytes / total:.0f} %)")
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _out_of_memory(run: Run) -> list[str]:
    sentences = []
    previous: tuple[Any, ...] | None = None
    for record in run.of(OutOfMemoryRecord):
        same = (record.module, record.asked_bytes, record.message)
        if same == previous:  # the phases around it say it again
            continue
        previous = same
        place = f" in {record.phase}" if record.phase else ""
        place += f", at {record.module}" if record.module else ""
        asked = "an unknown size" if record.asked_bytes is None else format_bytes(record.asked_bytes)
        cap = f", with a cap of {format_bytes(record.cap_bytes)}" if record.cap_bytes is not None else ""
        sentences.append(
            f"out of memory{place}: {asked} asked for while {format_bytes(record.alive_bytes)} were alive{cap}"
        )
    return sentences


# --- As people read them ---


def rich_table(table: pd.DataFrame, title: str, *, bold: str | None = None) -> Table:
    """Any table of this module for a terminal: bytes with their unit, numbers to the right, paths in full.

    Columns that are empty in every row, and those that say the usual (once, completed), are left out.

    Args:
        table: Tidy.
        title: Above it.
        bold: The phase whose row is bold.
    """
    shown = Table(title=Text(title), title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    shown.collapse_padding = True  # eight columns of bytes fit a terminal of 80
    columns = [name for name in table.columns if _worth_showing(name, table[name])]
    depths = _depths(table) if "parent" in table else {}
    for name in columns:
        right = pd.api.types.is_numeric_dtype(table[name]) and table[name].dtype != bool
        width = max((len(str(value)) for value in table[name]), default=0) if name in ("phase", "module") else 0
        shown.add_column(
            Text(_heading(name)),
            justify="right" if right else "left",
            no_wrap=right,  # what does not fit is taken from the words
            overflow="fold",
            min_width=min(width, NARROWEST) or None,
        )
    for values in table.to_dict("records"):
        cells = [_cell(str(name), values[name]) for name in columns]
        if depths:
            cells[columns.index("phase")] = "  " * depths[values["phase"], values["parent"]] + str(values["phase"])
        style = "bold" if bold is not None and values.get("phase") == bold else ""
        shown.add_row(*(Text(cell) for cell in cells), style=style)
    return shown


def _heading(name: str) -> str:
    special = {
        "nbytes": "bytes",
        "saved_for_backward_bytes": "graph",
        "peak_reserved_bytes": "reserved",
        "other_peak_bytes": "other\npeak",
        "other_seconds": "other\nseconds",
        "difference_bytes": "change",
        "difference_s": "change",
        "median_error": "median\nerror",
        "worst_error": "worst\nerror",
        "share_under": "share\nunder",
        "corrected_median_error": "corrected,\nmedian",
        "corrected_worst_error": "corrected,\nworst",
        "median_reserved_error": "reserved,\nmedian",
        "worst_reserved_error": "reserved,\nworst",
    }
    return special.get(name, name.removesuffix("_bytes").replace("_", " "))


def _worth_showing(name: str, column: pd.Series[Any]) -> bool:
    if name == "parent":
        return False  # shown by indentation
    if name == "times":
        return bool((column > 1).any())
    if name == "completed":
        return not column.all()
    return not len(column) or not bool(column.isna().all())


def _cell(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(str(size) for size in value) or "scalar"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if pd.isna(value):
        return "n/a"
    if name == "difference_bytes":
        return _signed_bytes(int(value))
    if name.endswith("bytes"):
        return format_bytes(int(value))
    if name.endswith("error"):
        return f"{100 * value:+.2f} %"
    if name.startswith("share_"):
        return f"{100 * value:.0f} %"
    if name == "difference_s":
        return f"{value:+.2f} s"
    if name.endswith("seconds"):
        return f"{value:.2f} s"
    return str(value) or (OUTSIDE if name == "module" else "")


def _signed_bytes(n_bytes: int) -> str:
    return f"+{format_bytes(n_bytes)}" if n_bytes > 0 else format_bytes(n_bytes)


def _depths(phases: pd.DataFrame) -> dict[tuple[str, str | None], int]:
    """How deep each phase lies inside of others that are in the table; an outer phase comes before its inner ones."""
    depths: dict[tuple[str, str | None], int] = {}
    by_name: dict[str, int] = {}
    for row in phases.to_dict("records"):
        depth = by_name.get(row["parent"], -1) + 1
        by_name.setdefault(row["phase"], depth)
        depths[row["phase"], row["parent"]] = depth
    return depths


# --- Arithmetic ---


def _at_the_peak(run: Run, kind: type[P], phase: str | None) -> list[P]:
    """What was written down for the moment of a phase's peak; of a phase that ran several times, the highest one."""
    phases = run.of(PhaseRecord)
    if phase is not None and all(record.phase != phase for record in phases):
        known = ", ".join(dict.fromkeys(record.phase for record in phases)) or "none has ended"
        raise RecordError(f"phase={phase!r} is not in run '{run.folder}'; use one of: {known}", phase=phase)
    same = [record for record in phases if phase is None or record.phase == phase]
    peak = max(same, key=lambda record: record.peak_bytes, default=None)
    if peak is None:
        return []
    records = list(run.records)
    if sum(record.phase == peak.phase for record in phases) > 1:  # a phase's details follow it at once
        start = next(index for index, record in enumerate(records) if record is peak) + 1
        rest = records[start:]
        stop = next((index for index, record in enumerate(rest) if isinstance(record, PhaseRecord)), len(rest))
        records = rest[:stop]
    return [record for record in records if isinstance(record, kind) and record.phase == peak.phase]


def _by_phase(run: Run) -> dict[str, tuple[int, float]]:
    table = phase_table(run)
    grouped = table.groupby("phase", sort=False).agg(peak=("peak_bytes", "max"), seconds=("seconds", "sum"))
    return {str(phase): (int(row["peak"]), float(row["seconds"])) for phase, row in grouped.iterrows()}


def _merged(first: list[str], second: list[str]) -> list[str]:
    """All of ``first``, and what only ``second`` has after the phase that it follows there."""
    merged = list(first)
    previous = -1
    for name in second:
        if name in merged:
            previous = merged.index(name)
        else:
            previous += 1
            merged.insert(previous, name)
    return merged


def _whole_seconds(run: Run) -> float:
    return sum(record.seconds for record in run.of(PhaseRecord) if record.parent is None)


def _roll_up(module: str, depth: int) -> str:
    return ".".join(module.split(".")[:depth])


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _frame(rows: list[dict[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    series = {name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in columns.items()}
    return pd.DataFrame(series)
