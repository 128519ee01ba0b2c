"""What a recorded run, or two of them, says in a sentence or two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from i2v_lab.profiling.records import GraphRecord, ModuleRecord, NoteRecord, OutOfMemoryRecord, PhaseRecord, peak_phase
from i2v_lab.reporting.run_tables import module_prefix, records_at_peak
from i2v_lab.runs.store import FAILED, Run
from i2v_lab.units import format_bytes, format_percent, format_seconds

MOST = 0.9  # of the bytes: the modules that hold so much need no others named beside them
OUTSIDE = "code outside any module"


def headline(run: Run) -> str:
    """A run in a few lines, a sentence each: how it ended, what did not fit, its peak, what holds it, and notes.

    Example:
        ``peak 56.3 MiB in decode_video; 34.6 MiB (61 %) of it saved for backward by video_decoder.up_blocks``
    """
    sentences = []
    if not run.finished:
        sentences.append(f"unfinished: the run was stopped or is still in progress; {len(run.records)} records so far")
    if run.status == FAILED:
        sentences.append(f"failed: {run.metadata.get('error', 'no reason recorded')}")
    sentences += _out_of_memory(run)
    peak = peak_phase(run.of(PhaseRecord))
    if peak is None:
        sentences.append("no phase has ended, so there is no peak")
    else:
        sentences.append(f"peak {format_bytes(peak.peak_bytes)} in {peak.phase}; {_saved_for_backward(run, peak)}")
    sentences += [note.text for note in run.of(NoteRecord)]
    return "\n".join(sentences)


def difference_headline(run: Run, other: Run) -> str:
    """How the second run's peak and time differ from the first's, in one sentence.

    Example:
        ``peak 30.1 MiB instead of 56.3 MiB: -26.2 MiB (-47 %); 4.71 s instead of 4.90 s, of one run each``
    """
    first, second = peak_phase(run.of(PhaseRecord)), peak_phase(other.of(PhaseRecord))
    if first is None or second is None:
        return "no comparison: a run in which no phase has ended has no peak"
    change = second.peak_bytes - first.peak_bytes
    ratio = f" ({format_percent(change / first.peak_bytes, signed=True)})" if first.peak_bytes else ""
    return (
        f"peak {format_bytes(second.peak_bytes)} instead of {format_bytes(first.peak_bytes)}: "
        f"{format_bytes(change, signed=True)}{ratio}; {_difference_in_time(run, other)}"
    )


def _difference_in_time(run: Run, other: Run) -> str:
    """Seconds of both, which say nothing of each other where one ran on another device, or did not run."""
    if any(each.is_forecast and not each.metadata.get("clock") for each in (run, other)):
        return "no comparison of times: a forecast without the clock of a card has none"
    names = ("clock", "device_name", "device")
    devices = [
        next((str(each.metadata[name]) for name in names if each.metadata.get(name)), "a device that is not recorded")
        for each in (run, other)
    ]
    if devices[0] != devices[1]:
        return f"no comparison of times: one is of {devices[0]}, the other of {devices[1]}"
    return f"{format_seconds(_total_seconds(other))} instead of {format_seconds(_total_seconds(run))}, of one run each"


def _saved_for_backward(run: Run, peak: PhaseRecord) -> str:
    modules = records_at_peak(run, ModuleRecord)
    saved = [record for record in modules if record.category == "saved"]
    saved_bytes = sum(record.nbytes for record in saved)
    most_bytes = peak.saved_for_backward_bytes
    if saved_bytes:
        share = f" ({format_percent(saved_bytes / peak.peak_bytes)})" if peak.peak_bytes else ""
        return f"{format_bytes(saved_bytes)}{share} of it saved for backward by {_module_shares(saved)}"
    if modules and most_bytes:
        return f"nothing saved for backward at the peak, but up to {format_bytes(most_bytes)} elsewhere in that phase"
    if most_bytes:
        graphs = records_at_peak(run, GraphRecord)
        by = f" by {_module_shares(graphs)}" if graphs else ""
        return f"up to {format_bytes(most_bytes)} saved for backward in that phase{by}"
    if most_bytes is None and not modules:
        return "tensors saved for backward were not tracked"
    return "nothing saved for backward"


def _module_shares(records: Sequence[ModuleRecord | GraphRecord]) -> str:
    """The modules that hold most of it: one name if that is nearly all, up to three with their shares otherwise."""
    totals: Counter[str] = Counter()
    for record in records:
        totals[module_prefix(record.module, 2)] += record.nbytes
    total = sum(totals.values())
    named: list[tuple[str, int]] = []
    for module, nbytes in sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:3]:
        named.append((module, nbytes))
        if sum(share for _, share in named) >= MOST * total:
            break
    if len(named) == 1 and named[0][1] >= MOST * total:
        return named[0][0] or OUTSIDE
    parts = []
    for module, nbytes in named:
        itself = " itself" if any(path.startswith(f"{module}.") for path in totals) else ""
        name = f"{module}{itself}" if module else OUTSIDE
        parts.append(f"{name} ({format_percent(nbytes / total)})")
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _out_of_memory(run: Run) -> list[str]:
    sentences = []
    previous: tuple[Any, ...] | None = None
    for record in run.of(OutOfMemoryRecord):
        same = (record.module, record.asked_bytes, record.message)
        if same == previous:  # every phase around a failed allocation records it
            continue
        previous = same
        place = f" in {record.phase}" if record.phase else ""
        place += f", at {record.module}" if record.module else ""
        requested = "an unknown size" if record.asked_bytes is None else format_bytes(record.asked_bytes)
        cap = f", with a cap of {format_bytes(record.cap_bytes)}" if record.cap_bytes is not None else ""
        sentences.append(
            f"out of memory{place}: {requested} requested with {format_bytes(record.alive_bytes)} allocated{cap}"
        )
    return sentences


def _total_seconds(run: Run) -> float:
    return sum(record.seconds for record in run.of(PhaseRecord) if record.parent is None)
