"""Small pictures as SVG text, for what changes while somebody looks: drawn in milliseconds, in the page's own colours.

Figures that are kept are matplotlib's, in :mod:`~i2v_lab.reporting.figures.runs`; these take a tenth of their time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

from i2v_lab.profiling.records import ModuleRecord, PhaseRecord, TimelineRecord
from i2v_lab.reporting.figures.runs import CATEGORIES
from i2v_lab.reporting.figures.style import BLUE, GREEN, ORANGE, YELLOW, byte_scale
from i2v_lab.runs.store import Run
from i2v_lab.units import MIB, format_bytes

WIDTH = 720
LEFT, RIGHT = 128, 88  # of the bars: for names and for values
ROW = 22
RESERVE, CONTEXT = ("held in reserve", "#CCCCCC"), ("CUDA context", "#777777")
FONT = 'font-family="system-ui,sans-serif" font-size="12" fill="currentColor"'
HALO = ' style="paint-order:stroke;stroke:var(--jp-layout-color0,Canvas);stroke-width:3px"'  # where a line crosses


@dataclass(frozen=True)
class Line:
    """A line that bars are held against: where, and what it says."""

    nbytes: int
    label: str


def phase_bars(run: Run, context_bytes: int = 0, line: Line | None = None, other: Run | None = None) -> str:
    """Peak of each phase as a stacked bar.

    Args:
        run: Its modules make the parts of a bar. Where nobody followed them there are two: the most that an autograd
            graph held in the phase, and the rest.
        context_bytes: What the CUDA context takes besides, in every phase.
        line: Such as the end of a card.
        other: A second run, whose bars lie below those of the first.
    """
    runs = [run] if other is None else [run, other]
    segments = {index: _segments(each, context_bytes) for index, each in enumerate(runs)}
    phases = list(dict.fromkeys(phase for rows in segments.values() for phase in rows))
    if not phases:
        return _sentence("No phase has ended, so there is no peak to show.")
    longest = max(sum(nbytes for _, _, nbytes in row) for rows in segments.values() for row in rows.values())
    whole = max(longest, line.nbytes if line else 0) * 1.02 or 1
    room = WIDTH - LEFT - RIGHT
    top = 26 if line else 6
    parts: list[str] = []
    values: list[str] = []
    legend: dict[str, str] = {}
    row_height = ROW if other is None else 2 * ROW - 10
    for place, phase in enumerate(phases):
        y = top + place * row_height
        parts.append(_text(LEFT - 8, y + row_height / 2 - 1, phase.replace("_", " "), "end"))
        for index, rows in segments.items():
            height = ROW - 6 if other is None else ROW - 9
            bar_y = y + index * (height + 1)
            x = float(LEFT)
            for label, colour, nbytes in rows.get(phase, []):
                width = nbytes / whole * room
                legend.setdefault(label, colour)
                fade = ' fill-opacity="0.55"' if index else ""
                title = f"{phase}: {label}, {format_bytes(nbytes)}"
                parts.append(
                    f'<rect x="{x:.1f}" y="{bar_y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}"{fade}>'
                    f"<title>{escape(title)}</title></rect>"
                )
                x += width
            if phase in rows:
                total = sum(nbytes for _, _, nbytes in rows[phase])
                values.append(_text(x + 5, bar_y + height / 2, format_bytes(total), more=HALO))
    bottom = top + len(phases) * row_height
    if line is not None:
        x = LEFT + line.nbytes / whole * room
        parts.append(
            f'<line x1="{x:.1f}" y1="18" x2="{x:.1f}" y2="{bottom}" stroke="currentColor" stroke-dasharray="5 3" '
            'stroke-width="1.5" class="card"/>'
        )
        parts.append(_text(x, 9, line.label, "end" if x > WIDTH / 2 else "start"))
    parts += [*values, _legend(list(legend.items()), bottom + 14)]
    words = f"Peak of each phase of {run.folder.name}" + (f" and of {other.folder.name}" if other else "")
    return _svg(parts, bottom + 24, words)


def _segments(run: Run, context_bytes: int) -> dict[str, list[tuple[str, str, int]]]:
    """For each phase its parts, from left to right: label, colour, bytes; they add up to what it takes from a card."""
    peaks: dict[str, PhaseRecord] = {}
    for record in run.of(PhaseRecord):
        if record.parent is None and record.peak_bytes >= getattr(peaks.get(record.phase), "peak_bytes", 0):
            peaks[record.phase] = record
    alive: Counter[tuple[str, str]] = Counter()
    for module in run.of(ModuleRecord):
        alive[module.phase, f"{module.category}_bytes"] += module.nbytes
    rows = {}
    for phase, record in peaks.items():
        known = sum(alive[phase, category] for category in CATEGORIES)
        # What the allocator rounds up belongs to no module; a phase that ran several times has the parts of all.
        scale = record.peak_bytes / known if known else 0.0
        row = [(label, colour, round(alive[phase, name] * scale)) for name, (label, colour) in CATEGORIES.items()]
        if not known:
            saved = min(record.saved_for_backward_bytes or 0, record.peak_bytes)
            row = [(*CATEGORIES["saved_bytes"], saved), ("allocated", BLUE, record.peak_bytes - saved)]
        if record.peak_reserved_bytes is not None:
            row.append((*RESERVE, max(0, record.peak_reserved_bytes - record.peak_bytes)))
        if context_bytes:
            row.append((*CONTEXT, context_bytes))
        rows[phase] = [part for part in row if part[2]]
    return rows


def timeline(run: Run, other: Run | None = None) -> str:
    """Live bytes by category over a run; a second run's total lies over it as a line, phase by phase.

    A run on CUDA has none: its storages are not followed.
    """
    ours, theirs = _moments(run), _moments(other) if other else []
    if not ours or (other is not None and not theirs):
        return _sentence("No timeline: live storages are followed by forecasts and by runs on a CPU.")
    top = max(sum(values) for _, values in [*ours, *theirs]) or 1
    scale, unit = byte_scale(top)
    left, bottom, height = 52, 168, 140
    phases = list(dict.fromkeys(phase for phase, _ in ours))
    room = WIDTH - left - 8
    places = _places([phase for phase, _ in ours], phases, left, room)
    parts = []
    below = [0.0] * len(ours)
    for index, (label, colour) in enumerate(CATEGORIES.values()):
        above = [base + values[index] for base, (_, values) in zip(below, ours, strict=True)]
        outline = [f"{x:.1f},{bottom - v / top * height:.1f}" for x, v in zip(places, above, strict=True)]
        outline += [
            f"{x:.1f},{bottom - v / top * height:.1f}" for x, v in zip(reversed(places), reversed(below), strict=True)
        ]
        parts.append(f'<polygon points="{" ".join(outline)}" fill="{colour}"><title>{label}</title></polygon>')
        below = above
    if theirs:
        marks = _places([phase for phase, _ in theirs], phases, left, room)
        points = " ".join(
            f"{x:.1f},{bottom - sum(v) / top * height:.1f}" for x, (_, v) in zip(marks, theirs, strict=True)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5" stroke-dasharray="5 3"/>'
        )
    for number, phase in enumerate(phases):
        x = left + number * room / len(phases)
        parts.append(
            f'<line x1="{x:.1f}" y1="{bottom - height}" x2="{x:.1f}" y2="{bottom}" stroke="currentColor" '
            'stroke-opacity="0.35" stroke-dasharray="2 3"/>'
        )
        parts.append(_text(x + room / len(phases) / 2, bottom + 12, phase.replace("_", " "), "middle", 10.5))
    for share in (0.5, 1.0):
        label = f"{top * share / scale:.3g} {unit}" if share == 1 else f"{top * share / scale:.3g}"
        parts.append(_text(left - 4, bottom - share * height, label, "end", 10.5))
    legend = [(label, colour) for label, colour in CATEGORIES.values()]
    parts.append(_legend(legend, bottom + 32, f"dashed: all of {other.folder.name}" if other else ""))
    return _svg(parts, bottom + 42, f"Live bytes over {run.folder.name}, phase by phase, by category")


def _moments(run: Run) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (moment.phase, tuple(getattr(moment, name) for name in CATEGORIES))
        for moment in run.of(TimelineRecord)
        if moment.phase
    ]


def _places(phases: Sequence[str], columns: Sequence[str], left: float, room: float) -> list[float]:
    """Where moments lie: every phase has a column of one width, since a forecast has no clock."""
    counts, seen = Counter(phases), Counter[str]()
    width = room / len(columns)
    places = []
    for phase in phases:
        column = columns.index(phase) if phase in columns else len(columns) - 1
        places.append(left + width * (column + seen[phase] / max(1, counts[phase] - 1) * 0.98))
        seen[phase] += 1
    return places


@dataclass(frozen=True)
class Curve:
    """One quantity over time; ``None`` where it is not known."""

    label: str
    colour: str
    values: Sequence[int | None]
    filled: bool = False


def over_time(times_s: Sequence[float], curves: Sequence[Curve], marks: Sequence[tuple[float, str]], words: str) -> str:
    """Curves over seconds, with phases marked where they began.

    Args:
        times_s: When each value was read, rising.
        curves: Each with a value for every time.
        marks: ``(seconds, phase)``.
        words: What the picture shows, for those who do not see it.
    """
    known = [curve for curve in curves if any(value is not None for value in curve.values)]
    top = max((value for curve in known for value in curve.values if value is not None), default=0) or MIB
    scale, unit = byte_scale(top)
    first = times_s[0] if times_s else 0.0
    span = max((times_s[-1] - first) if times_s else 0.0, 1.0)
    left, bottom, height = 60, 150, 118
    room = WIDTH - left - 10
    parts = []
    for curve in known:
        points = [
            (left + (t - first) / span * room, bottom - value / top * height)
            for t, value in zip(times_s, curve.values, strict=True)
            if value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        if curve.filled:
            ends = f"{points[0][0]:.1f},{bottom} {path} {points[-1][0]:.1f},{bottom}"
            parts.append(f'<polygon points="{ends}" fill="{curve.colour}" fill-opacity="0.35"/>')
        parts.append(f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="1.8"/>')
        if len(points) == 1:  # which makes no line
            parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="4" fill="{curve.colour}"/>')
    shown = -1e9
    for moment, phase in marks:
        x = left + (moment - first) / span * room
        if not left - 1 <= x <= WIDTH:
            continue
        parts.append(
            f'<line x1="{x:.1f}" y1="{bottom - height - 14}" x2="{x:.1f}" y2="{bottom}" stroke="currentColor" '
            f'stroke-opacity="0.4" stroke-dasharray="2 3" class="mark"><title>{escape(phase)}</title></line>'
        )
        if x - shown > 90:
            side, shift = ("end", -3) if x > WIDTH - 90 else ("start", 3)
            parts.append(_text(x + shift, bottom - height - 10, phase.replace("_", " "), side, 10))
            shown = x
    for share in (0.0, 0.5, 1.0):
        label = f"{top * share / scale:.3g}" + (f" {unit}" if share == 1 else "")
        parts.append(_text(left - 5, bottom - share * height, label, "end", 10.5))
    parts.append(_text(left, bottom + 12, f"{first:.0f} s", "start", 10.5))
    parts.append(_text(WIDTH - 10, bottom + 12, f"{first + span:.0f} s", "end", 10.5))
    now = [
        (f"{curve.label} {format_bytes(next(v for v in reversed(curve.values) if v is not None))}", curve.colour)
        for curve in known
    ]
    parts.append(_legend(now, bottom + 30))
    return _svg(parts, bottom + 40, words)


def table_html(table: pd.DataFrame) -> str:
    """A table as people read it, in the page's own style."""
    return str(table.to_html(border=0, escape=True))


def verdict_colour(verdict: str) -> str:
    """Green, amber or red-brown, as on the map of cards."""
    return {"fits": GREEN, "tight": YELLOW}.get(verdict, ORANGE)


def _svg(parts: Sequence[str], height: float, words: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(words)}" style="width:100%;max-width:{WIDTH}px;height:auto;display:block" {FONT}>'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, words: str, anchor: str = "start", size: float = 12, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" dominant-baseline="middle"{more}>'
        f"{escape(words)}</text>"
    )


def _legend(entries: Sequence[tuple[str, str]], y: float, last: str = "") -> str:
    parts, x = [], 8.0
    for label, colour in entries:
        parts.append(f'<rect x="{x:.1f}" y="{y - 6:.1f}" width="11" height="11" fill="{colour}"/>')
        parts.append(_text(x + 15, y, label, size=11))
        x += 30 + 6.2 * len(label)
    if last:
        parts.append(_text(x + 4, y, last, size=11))
    return "".join(parts)


def _sentence(words: str) -> str:
    return f"<p><em>{escape(words)}</em></p>"
