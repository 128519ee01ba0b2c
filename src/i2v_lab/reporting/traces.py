"""A run for the viewers that people know: Perfetto, and torch's memory_viz.

Perfetto and ``chrome://tracing`` read the trace event format
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU): JSON, times in microseconds.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from i2v_lab.files import write_atomically, write_text
from i2v_lab.profiling.records import HolderRecord, ModuleRecord, PhaseRecord, StepRecord, TimelineRecord
from i2v_lab.reporting.run_tables import records_at_peak
from i2v_lab.runs.store import Run

PROCESS = 1
PHASES, STEPS, FIRST_MODULE = 1, 2, 3  # threads of the trace
MODULES = 20  # at most, those that hold the most
CATEGORIES = ("weight", "saved", "activation", "other")


def perfetto_trace(run: Run) -> dict[str, Any]:
    """A run as a trace: phases and steps as slices, bytes by category as a counter, in microseconds.

    A module has no time of its own in the records: for each phase at whose peak it holds memory, it has a slice as long
    as the phase, whose arguments say how many bytes of which category. Without live storages the counter has the bytes
    at the start and the end of each phase, and its peak is an argument.

    Args:
        run: A run or a forecast.

    Returns:
        The JSON object, with ``traceEvents``.

    Example:
        >>> phase = PhaseRecord("decode_video", None, 0, 9, 0, None, 9, 0, 0.5, 0.25, True)
        >>> events = perfetto_trace(Run(Path("runs/a"), {}, (phase,), "complete"))["traceEvents"]
        >>> [(event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
        [(500000.0, 250000.0)]
    """
    phases = run.of(PhaseRecord)
    events = [_named("process_name", 0, str(run.metadata.get("model") or run.folder.name))]
    events += [_named("thread_name", PHASES, "phases"), _named("thread_name", STEPS, "steps")]
    events += [_slice(each.phase, "phase", PHASES, each.start_s, each.seconds, _phase_values(each)) for each in phases]
    events += _steps(run)
    events += _modules(run)
    events += _counters(run)
    facts = ("model", "device", "device_name", "started_at", "versions")
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {name: run.metadata[name] for name in facts if run.metadata.get(name) is not None},
    }


def write_perfetto(run: Run, path: Path) -> Path:
    """Write :func:`perfetto_trace` for https://ui.perfetto.dev, and return ``path``."""
    return write_text(path, json.dumps(perfetto_trace(run), allow_nan=False))


def memory_viz_snapshot(run: Run) -> dict[str, Any]:
    """The holders of every phase's peak as a snapshot of torch's allocator, for https://pytorch.org/memory_viz.

    Addresses are made up, one segment a phase: its largest storages, each an allocation whose stack is the operator,
    the module and the phase. What is smaller than those that the records have is one more block.
    """
    segments, traces, address = [], [], 2**30
    for number, phase in enumerate(dict.fromkeys(each.phase for each in run.of(PhaseRecord))):
        peak = max((each for each in run.of(PhaseRecord) if each.phase == phase), key=lambda each: each.peak_bytes)
        holders = [(each.nbytes, _frames(each)) for each in records_at_peak(run, HolderRecord, phase) if each.nbytes]
        rest = peak.peak_bytes - sum(size for size, _ in holders)
        if rest > 0:
            holders.append((rest, [_frame("what the records do not name"), _frame(phase)]))
        if not holders:
            continue
        start, blocks, time_us = address, [], int(1e6 * max(0.0, peak.start_s))
        end_us = int(1e6 * max(0.0, peak.start_s + peak.seconds))
        for size, frames in holders:
            sizes = {"size": size, "requested_size": size}
            blocks.append({"address": address, "state": "active_allocated", "frames": frames, **sizes})
            for action, moment in (("alloc", time_us), ("free_requested", end_us), ("free_completed", end_us)):
                entry = {"addr": address, "size": size, "stream": 0, "frames": frames}
                traces.append({"action": action, "time_us": moment, **entry})
            address += size
        total = address - start
        segments.append(
            {
                "address": start,
                "total_size": total,
                "allocated_size": total,
                "active_size": total,
                "requested_size": total,
                "stream": 0,
                "device": 0,
                "segment_type": "large",
                "segment_pool_id": (0, number),
                "is_expandable": False,
                "frames": [_frame(phase)],
                "blocks": blocks,
            }
        )
        address = -(-address // 2**21) * 2**21
    return {"segments": segments, "device_traces": [sorted(traces, key=lambda entry: entry["time_us"])]}


def write_memory_viz(run: Run, path: Path) -> Path:
    """Write :func:`memory_viz_snapshot`, and return ``path``."""
    return write_atomically(path, lambda part: part.write_bytes(pickle.dumps(memory_viz_snapshot(run), protocol=4)))


EXPORTS = {"perfetto": write_perfetto, "memory_viz": write_memory_viz}


def _us(seconds: float) -> float:
    return round(max(0.0, seconds) * 1e6, 3)  # a record may precede the profiler's clock by a moment


def _named(kind: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": PROCESS, "tid": thread, "args": {"name": name}}


def _slice(
    name: str, category: str, thread: int, start_s: float, seconds: float, values: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": _us(start_s), "dur": _us(seconds)}
    return {"ph": "X", "name": name, "cat": category, "pid": PROCESS, "tid": thread, **times, "args": values}


def _counter(name: str, time_s: float, values: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": PROCESS, "tid": 0, "ts": _us(time_s), "args": values}


def _phase_values(phase: PhaseRecord) -> dict[str, Any]:
    names = ("start_bytes", "peak_bytes", "end_bytes", "peak_reserved_bytes", "saved_for_backward_bytes", "completed")
    return {name: getattr(phase, name) for name in names if getattr(phase, name) is not None}


def _steps(run: Run) -> Iterable[dict[str, Any]]:
    """Steps follow one another from the start of their phase, whose record comes after theirs."""
    pending: defaultdict[str, list[StepRecord]] = defaultdict(list)
    for record in run.records:
        if isinstance(record, StepRecord):
            pending[record.phase].append(record)
        elif isinstance(record, PhaseRecord):
            start_s = record.start_s
            for step in pending.pop(record.phase, ()):
                name = f"{step.phase} {step.step}/{step.steps}"
                yield _slice(name, "step", STEPS, start_s, step.seconds, {"peak_bytes": step.peak_bytes})
                start_s += step.seconds


def _modules(run: Run) -> Iterable[dict[str, Any]]:
    held: dict[tuple[int, str], dict[str, int]] = {}
    totals: Counter[str] = Counter()
    phases, last = run.of(PhaseRecord), -1
    for record in run.records:
        if isinstance(record, PhaseRecord):
            last += 1
        elif isinstance(record, ModuleRecord) and record.module and last >= 0:
            held.setdefault((last, record.module), {})[f"{record.category}_bytes"] = record.nbytes
            totals[record.module] = max(totals[record.module], sum(held[last, record.module].values()))
    for thread, (module, _) in enumerate(totals.most_common(MODULES), start=FIRST_MODULE):
        yield _named("thread_name", thread, f"{module} (at the peak of each phase)")
        for (number, name), values in held.items():
            if name == module:
                phase = phases[number]
                yield _slice(module, "module", thread, phase.start_s, phase.seconds, {**values, "phase": phase.phase})


def _counters(run: Run) -> list[dict[str, Any]]:
    timeline = run.of(TimelineRecord)
    events = [
        _counter("live bytes", each.time_s, {name: getattr(each, f"{name}_bytes") for name in CATEGORIES})
        for each in timeline
    ]
    for phase in [] if timeline else run.of(PhaseRecord):
        for time_s, nbytes in ((phase.start_s, phase.start_bytes), (phase.start_s + phase.seconds, phase.end_bytes)):
            events.append(_counter("allocated bytes", time_s, {"allocated": nbytes}))
    events += [
        _counter("peak reserved bytes", phase.start_s, {"reserved": phase.peak_reserved_bytes})
        for phase in run.of(PhaseRecord)
        if phase.peak_reserved_bytes is not None
    ]
    return sorted(events, key=lambda event: float(event["ts"]))


def _frames(holder: HolderRecord) -> list[dict[str, Any]]:
    """Innermost first, as torch has them."""
    shape = "x".join(map(str, holder.shape))
    named = [f"{holder.category} {shape} {holder.dtype}", holder.operator, holder.module, holder.phase]
    return [_frame(name) for name in named if name]


def _frame(name: str) -> dict[str, Any]:
    return {"name": name, "filename": "i2v-lab", "line": 0}
