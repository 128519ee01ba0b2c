"""Figures for JupyterLab's views as SVG text, redrawn while a control is moved or a run is watched.

Figures that are saved are others (:mod:`~i2v_lab.reporting.figures.runs`); palette and labels are shared. Three
measurements on two CPU cores, with matplotlib 3.10's SVG backend, one reused figure and fixed margins, decide for text:

- The explorer redraws two figures for each answer: 67 ms with matplotlib (118 to 258 ms at worst), 13 ms here. A
  slider's release to the new picture may take 150 ms in all, of which browser and kernel need 40 to 70 without drawing.
- The monitor redraws four times a second beside a generation in the same process: 35 ms of the interpreter's lock each
  time with matplotlib, 1 ms here.
- Views draw in their own threads and matplotlib's ``rcParams`` are global: two threads that drew in our style for 12 s
  left nine of them changed for the notebook, and every figure of the notebook's own was drawn in that style meanwhile.

The text also takes the page's font and colours, so that it is legible in JupyterLab's dark theme.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from i2v_lab.display import escaped
from i2v_lab.profiling.records import ModuleRecord, PhaseRecord, TimelineRecord, peak_phase
from i2v_lab.reporting.figures.style import ALLOCATED, CATEGORIES, byte_scale
from i2v_lab.runs.store import Run
from i2v_lab.units import MIB, format_bytes

Segment = tuple[str, str, int]  # label, colour, bytes

NO_TIMELINE = "No timeline: live storages are tracked in forecasts and in runs on a CPU."
WIDTH = 720
LEFT, RIGHT = 128, 88  # of the bars: for names and for values
ROW = 22
LETTER = 6.8  # of a value, on average
RESERVED, CONTEXT = ("reserved, not allocated", "#CCCCCC"), ("CUDA context", "#777777")
FONT = 'font-family="system-ui,sans-serif" font-size="12" fill="currentColor"'
EDGE = "stroke:currentColor;stroke-width:.5px;stroke-opacity:.6"  # dark colours have one in a dark theme
COLUMN = 4  # pixels, of what a pointer hits
HALO = ' style="paint-order:stroke;stroke:var(--jp-layout-color0,Canvas);stroke-width:3px"'  # where a line crosses


# --- Bars ---


@dataclass(frozen=True)
class Line:
    """A vertical line over the bars.

    Attributes:
        nbytes: Where.
        label: Above it.
    """

    nbytes: int
    label: str


def phase_bars(run: Run, context_bytes: int = 0, line: Line | None = None, other: Run | None = None) -> str:
    """The peak of each phase as a stacked bar.

    Args:
        run: A bar's segments are the categories of its live storages. Where those were not tracked there are two: the
            most that was saved for backward in the phase, and the rest.
        context_bytes: What the CUDA context takes besides, in every phase.
        line: Such as the memory of a card.
        other: A second run, whose bars are below those of the first.

    Returns:
        An ``svg`` element, or a sentence in HTML if no phase has ended.
    """
    runs = [run] if other is None else [run, other]
    rows = [_segments(each, context_bytes) for each in runs]
    phases = list(dict.fromkeys(phase for each in rows for phase in each))
    if not phases:
        return _sentence("No phase has ended, so there is no peak to show.")
    longest = max(sum(nbytes for _, _, nbytes in row) for each in rows for row in each.values())
    scale = (WIDTH - LEFT - RIGHT) / (max(longest, line.nbytes if line else 0) * 1.02 or 1)
    line_x = LEFT + line.nbytes * scale if line else 0.0
    top = 26 if line else 6
    row_height, bar_height = (ROW, ROW - 6) if other is None else (2 * ROW - 10, ROW - 9)
    parts: list[str] = []
    values: list[str] = []
    most = [_most_of(each) for each in runs]
    for place, phase in enumerate(phases):
        y = top + place * row_height
        parts.append(_text(LEFT - 8, y + row_height / 2 - 1, phase.replace("_", " "), "end"))
        for index, each in enumerate(rows):
            if phase not in each:
                continue
            bar_y = y + index * (bar_height + 1)
            x = float(LEFT)
            for label, colour, nbytes in each[phase]:
                module = most[index].get((phase, label))
                title = f"{phase}: {label}, {_exact(nbytes)}{f'; most of it: {module}' if module else ''}"
                opacity = 0.55 if index else 1.0
                parts.append(_rect(x, bar_y, nbytes * scale, bar_height, colour, title, opacity))
                x += nbytes * scale
            total = sum(nbytes for _, _, nbytes in each[phase])
            value = format_bytes(total)
            beside = x + 5
            if line is not None and beside - 4 < line_x < beside + LETTER * len(value) + 4:
                beside = line_x + 5  # beyond the line, which would strike it through
            values.append(_text(beside, bar_y + bar_height / 2, value, more=HALO))
    bottom = top + len(phases) * row_height
    if line is not None:
        x = line_x
        parts.append(_vertical(x, 18, bottom, 'stroke-width="1.5" stroke-dasharray="5 3" class="card"'))
        parts.append(_text(x, 9, line.label, "end" if x > WIDTH / 2 else "start"))
    legend = {label: colour for each in rows for row in each.values() for label, colour, _ in row}
    parts += [*values, _legend(legend.items(), bottom + 14)]
    words = f"Peak of each phase of {run.folder.name}" + (f" and of {other.folder.name}" if other else "")
    return _svg(parts, bottom + 24, words)


def _segments(run: Run, context_bytes: int) -> dict[str, list[Segment]]:
    """For each outermost phase its segments from left to right; they add up to what it takes from a card."""
    by_phase: defaultdict[str, list[PhaseRecord]] = defaultdict(list)
    for record in run.of(PhaseRecord):
        if record.parent is None:
            by_phase[record.phase].append(record)
    live: Counter[tuple[str, str]] = Counter()
    for module in run.of(ModuleRecord):
        live[module.phase, f"{module.category}_bytes"] += module.nbytes
    segments = {}
    for phase, records in by_phase.items():
        peak = peak_phase(records)
        assert peak is not None
        tracked = sum(live[phase, category] for category in CATEGORIES)
        # The allocator's rounding belongs to no module, and a phase that ran several times has the modules of all.
        scale = peak.peak_bytes / tracked if tracked else 0.0
        row = [(label, colour, round(live[phase, name] * scale)) for name, (label, colour) in CATEGORIES.items()]
        if not tracked:
            saved = min(peak.saved_for_backward_bytes or 0, peak.peak_bytes)
            row = [(*CATEGORIES["saved_bytes"], saved), ("allocated", ALLOCATED, peak.peak_bytes - saved)]
        if peak.peak_reserved_bytes is not None:
            row.append((*RESERVED, max(0, peak.peak_reserved_bytes - peak.peak_bytes)))
        row.append((*CONTEXT, context_bytes))
        segments[phase] = [segment for segment in row if segment[2]]
    return segments


def _most_of(run: Run) -> dict[tuple[str, str], str]:
    """The module with most of each category at each phase's peak, by phase and the category's label."""
    held = sorted(run.of(ModuleRecord), key=lambda record: record.nbytes)
    return {
        (record.phase, CATEGORIES[f"{record.category}_bytes"][0]): record.module or "outside any module"
        for record in held
    }


def _exact(nbytes: int) -> str:
    return f"{format_bytes(nbytes)} ({nbytes:,} bytes)"


# --- Over time ---


def timeline(run: Run, other: Run | None = None) -> str:
    """Live bytes by category over a run, as stacked areas; every phase is equally wide, since a forecast has no clock.

    Args:
        run: Profiled with live storages, which a run on CUDA is not.
        other: A second run, whose total is a dashed line over the first, phase by phase.

    Returns:
        An ``svg`` element, or a sentence in HTML if a run has no timeline.
    """
    first, second = _moments(run), _moments(other) if other else []
    if not first or (other is not None and not second):
        return _sentence(NO_TIMELINE)
    phases = list(dict.fromkeys(phase for phase, _ in first))
    plot = _Plot(left=52, right=8, bottom=168, height=140, top=max(sum(values) for _, values in [*first, *second]) or 1)
    parts = []
    xs = _columns([phase for phase, _ in first], phases, plot)
    below = [0] * len(first)
    for index, (_, colour) in enumerate(CATEGORIES.values()):
        above = [base + values[index] for base, (_, values) in zip(below, first, strict=True)]
        outline = plot.points([*xs, *reversed(xs)], [*above, *reversed(below)])
        parts.append(f'<polygon points="{outline}" fill="{colour}" style="{EDGE}"/>')
        below = above
    if second:
        points = plot.points(_columns([phase for phase, _ in second], phases, plot), [sum(v) for _, v in second])
        parts.append(f'<polyline points="{points}" {LINE} stroke="currentColor" stroke-dasharray="5 3"/>')
    width = plot.width / len(phases)
    for number, phase in enumerate(phases):
        x = plot.left + number * width
        parts.append(_vertical(x, plot.bottom - plot.height, plot.bottom, DOTTED))
        parts.append(_text(x + width / 2, plot.bottom + 12, phase.replace("_", " "), "middle", 10.5))
    parts += _pointed(first, xs, _most_of(run), plot)
    parts += plot.ticks((0.5, 1.0))
    dashed = f"dashed: all of {other.folder.name}" if other else ""
    parts.append(_legend(CATEGORIES.values(), plot.bottom + 32, dashed))
    return _svg(parts, plot.bottom + 42, f"Live bytes over {run.folder.name}, phase by phase, by category")


def _moments(run: Run) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (moment.phase, tuple(getattr(moment, name) for name in CATEGORIES))
        for moment in run.of(TimelineRecord)
        if moment.phase
    ]


def _pointed(
    moments: Sequence[tuple[str, tuple[int, ...]]], xs: Sequence[float], most: dict[tuple[str, str], str], plot: _Plot
) -> list[str]:
    """What a pointer over the timeline is told, in columns that it can hit: the highest moment in each."""
    highest: dict[int, tuple[str, tuple[int, ...]]] = {}
    for x, moment in zip(xs, moments, strict=True):
        column = int((x - plot.left) // COLUMN)
        if column not in highest or sum(moment[1]) > sum(highest[column][1]):
            highest[column] = moment
    parts = []
    for column, (phase, values) in highest.items():
        told = [f"{phase}: {_exact(sum(values))}"]
        for (label, _), nbytes in zip(CATEGORIES.values(), values, strict=True):
            module = most.get((phase, label))
            told.append(f"{label} {_exact(nbytes)}{f', at the peak most in {module}' if module else ''}")
        x = plot.left + column * COLUMN
        parts.append(
            f'<rect class="moment" x="{x:.1f}" y="{plot.bottom - plot.height}" width="{COLUMN}" height="{plot.height}" '
            f'fill="none" pointer-events="all"><title>{escaped("; ".join(told))}</title></rect>'
        )
    return parts


def _columns(phases: Sequence[str], columns: Sequence[str], plot: _Plot) -> list[float]:
    """The x of each moment: spread over its phase's column, and over the last where the first run lacks the phase."""
    counts, seen = Counter(phases), Counter[str]()
    width = plot.width / len(columns)
    xs = []
    for phase in phases:
        column = columns.index(phase) if phase in columns else len(columns) - 1
        xs.append(plot.left + width * (column + seen[phase] / max(1, counts[phase] - 1) * 0.98))
        seen[phase] += 1
    return xs


@dataclass(frozen=True)
class Curve:
    """One quantity over time.

    Attributes:
        label: In the legend.
        colour: Such as ``#0072B2``.
        values: In bytes; ``None`` where it is unavailable.
        filled: Whether the area below it is filled.
    """

    label: str
    colour: str
    values: Sequence[int | None]
    filled: bool = False


def over_time(times_s: Sequence[float], curves: Sequence[Curve], marks: Sequence[tuple[float, str]], words: str) -> str:
    """Curves over seconds, with phases marked where they began.

    Args:
        times_s: When each value was sampled, rising.
        curves: Each with a value for every time.
        marks: ``(seconds, phase)``.
        words: What the figure shows, for screen readers.

    Returns:
        An ``svg`` element.
    """
    known = [curve for curve in curves if any(value is not None for value in curve.values)]
    top = max((value for curve in known for value in curve.values if value is not None), default=0) or MIB
    start = times_s[0] if times_s else 0.0
    span = max((times_s[-1] - start) if times_s else 0.0, 1.0)
    plot = _Plot(left=60, right=10, bottom=150, height=118, top=top)
    parts = []
    for curve in known:
        samples = [(t, value) for t, value in zip(times_s, curve.values, strict=True) if value is not None]
        xs = [plot.left + (t - start) / span * plot.width for t, _ in samples]
        path = plot.points(xs, [value for _, value in samples])
        if curve.filled:
            ends = f"{xs[0]:.1f},{plot.bottom} {path} {xs[-1]:.1f},{plot.bottom}"
            parts.append(f'<polygon points="{ends}" fill="{curve.colour}" fill-opacity="0.35"/>')
        parts.append(f'<polyline points="{path}" {LINE} stroke="{curve.colour}"/>')
        if len(samples) == 1:  # which makes no line
            dot_x, dot_y = path.split(",")
            parts.append(f'<circle cx="{dot_x}" cy="{dot_y}" r="4" fill="{curve.colour}"/>')
    labelled = -1e9
    for moment, phase in marks:
        x = plot.left + (moment - start) / span * plot.width
        if not plot.left - 1 <= x <= WIDTH:
            continue
        parts.append(_vertical(x, plot.bottom - plot.height - 14, plot.bottom, f'{DOTTED} class="mark"', phase))
        if x - labelled > 90:
            side, shift = ("end", -3) if x > WIDTH - 90 else ("start", 3)
            parts.append(_text(x + shift, plot.bottom - plot.height - 10, phase.replace("_", " "), side, 10))
            labelled = x
    parts += plot.ticks((0.0, 0.5, 1.0))
    parts.append(_text(plot.left, plot.bottom + 12, f"{start:.0f} s", "start", 10.5))
    parts.append(_text(WIDTH - plot.right, plot.bottom + 12, f"{start + span:.0f} s", "end", 10.5))
    latest = [(curve, next(value for value in reversed(curve.values) if value is not None)) for curve in known]
    legend = [(f"{curve.label} {format_bytes(value)}", curve.colour) for curve, value in latest]
    parts.append(_legend(legend, plot.bottom + 30))
    return _svg(parts, plot.bottom + 40, words)


# --- SVG ---

LINE = 'fill="none" stroke-width="1.6"'
DOTTED = 'stroke-opacity="0.4" stroke-dasharray="2 3"'


@dataclass(frozen=True)
class _Plot:
    """Where bytes over something are drawn; ``top`` bytes are ``height`` above ``bottom``."""

    left: float
    right: float
    bottom: float
    height: float
    top: int

    @property
    def width(self) -> float:
        return WIDTH - self.left - self.right

    def points(self, xs: Iterable[float], values: Iterable[int]) -> str:
        scale = self.height / self.top
        return " ".join(f"{x:.1f},{self.bottom - value * scale:.1f}" for x, value in zip(xs, values, strict=True))

    def ticks(self, shares: Iterable[float]) -> list[str]:
        scale, unit = byte_scale(self.top)
        return [
            _text(
                self.left - 5,
                self.bottom - share * self.height,
                _number(self.top * share / scale) + (f" {unit}" if share == 1 else ""),
                "end",
                10.5,
            )
            for share in shares
        ]


def _number(value: float) -> str:
    """Three significant digits, and never an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _svg(parts: Sequence[str], height: float, words: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escaped(words)}" style="width:100%;max-width:{WIDTH}px;height:auto;display:block" {FONT}>'
        f"{''.join(parts)}</svg>"
    )


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str, opacity: float) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}" '
        f'fill-opacity="{opacity:g}" style="{EDGE}"><title>{escaped(title)}</title></rect>'
    )


def _vertical(x: float, top: float, bottom: float, style: str, title: str = "") -> str:
    inner = f"<title>{escaped(title)}</title>" if title else ""
    return f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="currentColor" {style}>{inner}</line>'


def _text(x: float, y: float, words: str, anchor: str = "start", size: float = 12, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" dominant-baseline="middle"{more}>'
        f"{escaped(words)}</text>"
    )


def _legend(entries: Iterable[tuple[str, str]], y: float, last: str = "") -> str:
    parts, x = [], 8.0
    for label, colour in entries:
        parts.append(f'<rect x="{x:.1f}" y="{y - 6:.1f}" width="11" height="11" fill="{colour}"/>')
        parts.append(_text(x + 15, y, label, size=11))
        x += 30 + 6.2 * len(label)
    if last:
        parts.append(_text(x + 4, y, last, size=11))
    return "".join(parts)


def _sentence(words: str) -> str:
    return f"<p><em>{escaped(words)}</em></p>"
