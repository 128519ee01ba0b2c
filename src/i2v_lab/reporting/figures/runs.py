"""Charts of recorded runs: their live bytes over time, and what holds their peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from i2v_lab.errors import RecordError
from i2v_lab.profiling.records import ModuleRecord
from i2v_lab.reporting.figures.chart import INK, POINTER, TABLE, WIDTH, Chart, described, exact_bytes
from i2v_lab.reporting.figures.style import CATEGORIES, byte_scale, phase_label, short_name
from i2v_lab.runs.store import Run
from i2v_lab.units import GIB, KIB, MIB

MOMENTS = 80  # of one phase, at most: what a wide screen can show of it
TOP = 10  # bars of modules; the others share one more
OUTLINE: Any = {"stroke": INK, "strokeWidth": 0.5, "strokeOpacity": 0.6}  # dark colours have an edge in a dark theme
VALUE = 105  # pixels of a value beside a bar
LETTER, BREAK = 6.5, "|"  # of a phase's name: pixels, and what divides its lines


def timeline_figure(run: Run, other: Run | None = None) -> Chart:
    """Live tensor storages by category over a run, with its phases.

    Args:
        run: Drawn as stacked areas: of each phase at most :data:`MOMENTS` moments, the highest of equal parts of it.
        other: Its total is a line; each of its phases is stretched to the length that it has in ``run``.

    Raises:
        RecordError: A run has no timeline: it ran on CUDA, or without attribution.
    """
    first = _moments(run)
    first = first.assign(run=short_name(run.folder.name), axis_s=first["time_s"])
    parts, beside = [first], ""
    if other is not None:
        second = _moments(other)
        beside = f"all of {short_name(other.folder.name)}"
        parts.append(second.assign(run=beside, axis_s=_stretched(second, first)))
    table = pd.concat(parts, ignore_index=True)
    table = table.assign(total_bytes=table[list(CATEGORIES)].sum(axis=1))
    table = table[["run", "phase", "time_s", "axis_s", *CATEGORIES, "total_bytes"]]
    own, end_s = str(first["run"].iloc[0]), float(table["axis_s"].max())
    clock = run.metadata.get("clock")  # of the card that a forecast's seconds were predicted for
    unknown = run.is_forecast and not clock
    title = "progress of the run (this forecast has no clock)" if unknown else "time (s)"
    x = alt.X(
        "axis_s:Q",
        title=f"predicted time on {clock} (s)" if run.is_forecast and clock else title,
        scale=alt.Scale(domain=[0, end_s], nice=False),
        axis=alt.Axis(grid=False, tickCount=8, labels=not unknown, ticks=not unknown),
    )
    label = f"Live tensor storages by category: {own}"
    return described(
        alt.layer(
            *_phase_marks(),
            *_areas(x, table, own, beside),
            _pointed_moments(x, own, end_s, unknown),
            data=alt.NamedData(name=TABLE),
            title=alt.TitleParams(label, anchor="start", fontWeight="normal", fontSize=13, color=INK),
            width=WIDTH,
            height=300,
        ),
        {TABLE: table, "phases": _phases(run, first)},
        f"{label}{', and ' * bool(beside)}{beside}",
        zooms={"x": "axis_s"},
    )


def _moments(run: Run) -> pd.DataFrame:
    """The highest moments of a run, at whole numbers where a forecast has no clock."""
    table = run.frame("timeline")
    if table.empty:
        raise RecordError(
            f"run '{run.folder}' has no timeline; profile it on a CPU, where live storages are tracked, with --profile",
            run=str(run.folder),
        )
    if run.is_forecast and not run.metadata.get("clock"):
        table["time_s"] = [float(moment) for moment in range(len(table))]
    place = table.groupby("phase", sort=False).cumcount()
    count = table.groupby("phase", sort=False)["phase"].transform("size")
    part = place * MOMENTS // count.clip(lower=MOMENTS)
    highest = table[list(CATEGORIES)].sum(axis=1).groupby([table["phase"], part]).idxmax()
    ends = [table.index[0], table.index[-1]]
    return table.loc[sorted({*highest, *ends})].reset_index(drop=True)


def _stretched(table: pd.DataFrame, onto: pd.DataFrame) -> pd.Series:
    """The times of ``table``, each phase stretched to the span that it has in ``onto``."""
    times = table["time_s"].astype(float).copy()
    for phase, rows in table.groupby("phase", sort=False):
        target = onto[onto["phase"] == phase]["time_s"]
        if target.empty:
            continue
        start, length = rows["time_s"].min(), max(float(rows["time_s"].max() - rows["time_s"].min()), 1e-9)
        times[rows.index] = target.min() + (rows["time_s"] - start) / length * (target.max() - target.min())
    return times


def _phases(run: Run, moments: pd.DataFrame) -> pd.DataFrame:
    """Where each phase begins and ends, and the module that holds most at its peak."""
    held: Counter[tuple[str, str]] = Counter()
    for record in run.of(ModuleRecord):
        held[record.phase, record.module or "outside any module"] += record.nbytes
    rows = []
    for phase, part in moments.groupby("phase", sort=False):
        module, nbytes = max(
            ((module, nbytes) for (of, module), nbytes in held.items() if of == phase),
            key=lambda each: each[1],
            default=("not recorded", None),
        )
        label = phase_label(str(phase)).replace("\n", BREAK)
        start_s, end_s = float(part["time_s"].min()), float(part["time_s"].max())
        rows.append(
            {"phase": phase, "label": label, "letters": max(map(len, label.split(BREAK)))}
            | {"start_s": start_s, "middle_s": (start_s + end_s) / 2, "end_s": end_s}
            | {"module": module, "module_bytes": nbytes}
        )
    return pd.DataFrame(rows).astype({"module_bytes": "Int64"})


def _phase_marks() -> list[alt.Chart]:
    """A line at the start of each phase, and above the plot its name, where there is room for it."""
    base = alt.Chart(alt.NamedData(name="phases"))
    seen = "domain('x')"
    room = f"(datum.end_s - datum.start_s) / ({seen}[1] - {seen}[0]) * width"
    inside = f"datum.middle_s > {seen}[0] && datum.middle_s < {seen}[1]"
    fits = alt.condition(f"{inside} && {room} > {LETTER} * datum.letters", alt.Text("label:N"), alt.value(""))
    names = base.mark_text(baseline="bottom", fontSize=11, lineBreak=BREAK, lineHeight=12, clip=False, aria=False)
    lines = base.mark_rule(clip=True, strokeDash=[1, 3], aria=False).encode(x=alt.X("start_s:Q"))
    return [lines, names.encode(x=alt.X("middle_s:Q"), y=alt.value(-16), text=fits)]


def _areas(x: alt.X, table: pd.DataFrame, own: str, beside: str) -> list[alt.Chart]:
    """The categories of one run stacked, and the total of another as a line; each can be hidden by the legend."""
    scale, unit = byte_scale(float(table["total_bytes"].max()))
    names = [label for label, _ in CATEGORIES.values()] + [beside] * bool(beside)
    colours = [colour for _, colour in CATEGORIES.values()] + [INK] * bool(beside)
    colour = alt.Color(
        "series:N", title=None, scale=alt.Scale(domain=names, range=colours), legend=alt.Legend(columns=5, offset=30)
    )
    title = f"live tensor storages ({unit})"
    shown = _shown_series(names)
    zoom = alt.selection_interval(
        name="zoom", bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey || event.metaKey]"
    )
    cases = [f"datum.field == '{field}' ? '{name}'" for field, (name, _) in CATEGORIES.items()]
    words = f"{' : '.join(cases)} : ''"
    areas = (
        alt.Chart()
        .transform_filter(alt.datum.run == own)
        .transform_fold(list(CATEGORIES), as_=["field", "bytes"])
        .transform_calculate(series=words, amount=f"datum.bytes / {scale}")
        .transform_filter(shown)
        .mark_area(interpolate="step-after", clip=True, aria=False, **OUTLINE)
        .encode(
            x=x,
            y=alt.Y("amount:Q", stack="zero", title=title),
            color=colour,
            order=alt.Order("field:N", sort="descending"),
        )
        .add_params(shown, zoom)
    )
    if not beside:
        return [areas]
    line = (
        alt.Chart()
        .transform_filter(alt.datum.run == beside)
        .transform_calculate(series="datum.run", amount=f"datum.total_bytes / {scale}")
        .transform_filter(shown)
        .mark_line(interpolate="step-after", strokeWidth=1.4, strokeDash=[5, 3], clip=True, aria=False)
        .encode(x=x, y=alt.Y("amount:Q", title=title), color=colour)
    )
    return [areas, line]


def _pointed_moments(x: alt.X, own: str, end_s: float, unknown: bool) -> alt.Chart:
    """What a pointer over the chart shows: the moment under it."""
    pointed = alt.selection_point(name="pointed", on="pointerover", clear="pointerout", empty=False)
    lines: dict[str, Any] = {"phase": "phase", "seconds": "time"}
    calculated = {"seconds": "format(datum.time_s, '.2f') + ' s'", "all_bytes": exact_bytes("total_bytes")}
    for field, (label, _) in CATEGORIES.items():
        calculated[f"all_{field}"], lines[f"all_{field}"] = exact_bytes(field), label
    lines |= {"all_bytes": "all", "module": "most at the phase's peak", "held": "that module"}
    if unknown:
        del lines["seconds"]
    return (
        alt.Chart(name=POINTER)
        .transform_filter(alt.datum.run == own)
        .transform_window(next_s="lead(axis_s)", sort=[alt.SortField("axis_s")])
        .transform_lookup(
            "phase", from_=alt.LookupData(alt.NamedData(name="phases"), "phase", ["module", "module_bytes"])
        )
        .transform_calculate(
            until_s=f"isValid(datum.next_s) ? datum.next_s : {end_s!r}",
            held=f"isValid(datum.module_bytes) ? {exact_bytes('module_bytes')} : 'not recorded'",
            **calculated,
        )
        .mark_rect(clip=True, aria=False)
        .encode(
            x=x,
            x2="until_s:Q",
            y=alt.value(0),
            y2=alt.value("height"),
            color=alt.value(INK),
            opacity=alt.condition(pointed, alt.value(0.18), alt.value(0)),
            tooltip=[alt.Tooltip(f"{field}:N", title=title) for field, title in lines.items()],
        )
        .add_params(pointed)
    )


def modules_figure(table: pd.DataFrame) -> Chart:
    """Bytes saved for backward by module, the largest at the top.

    Args:
        table: ``module, saved_bytes, share``; the modules after the first :data:`TOP` share one bar.
    """
    shares = table.assign(category="saved", nbytes=table["saved_bytes"])
    return _module_bars(table, shares, "saved for backward", "Bytes saved for backward by module")


def holders_figure(table: pd.DataFrame, phase: str = "") -> Chart:
    """Bytes at a phase's peak by module, each bar divided by category, the largest at the top.

    Args:
        table: Of :func:`~i2v_lab.reporting.run_tables.modules_table`.
        phase: Its name.
    """
    where = f"at the peak of {short_name(phase).replace('_', ' ')}" if phase else "at the peak"
    return _module_bars(table, table, f"live {where}", f"What is live {where}, by module", phase)


def _shown_series(names: Sequence[str]) -> alt.Parameter:
    """Which series are drawn: all at first; a click on one in the legend hides or shows it."""
    return alt.selection_point(
        name="shown",
        fields=["series"],
        bind="legend",
        toggle="true",
        clear=False,
        empty=False,
        value=[{"series": name} for name in names],
    )


def _module_bars(table: pd.DataFrame, rows: pd.DataFrame, title: str, label: str, phase: str = "") -> Chart:
    totals = rows.groupby("module", sort=False)["nbytes"].sum().sort_values(ascending=False, kind="stable")
    others = f"{len(totals) - TOP} others"
    names = {module: module or "outside any module" for module in totals.index[:TOP]}
    bars = rows.assign(module=rows["module"].map(lambda module: names.get(module, others)))
    bars = bars.groupby(["module", "category"], sort=False)["nbytes"].sum().reset_index()
    bars = bars.assign(
        series=bars["category"].map(lambda category: CATEGORIES[f"{category}_bytes"][0]),
        phase=phase,
        share=bars["nbytes"] / max(1, int(totals.sum())),
        all_bytes=bars.groupby("module")["nbytes"].transform("sum"),
    )
    order = [*names.values(), others]
    largest = float(bars["all_bytes"].max())
    scale, unit = byte_scale(largest)
    # With room for the value beside the longest bar.
    longest = alt.ExprRef(f"{largest / scale!r} * width / max(40, width - {VALUE})")
    room = alt.Scale(domainMin=0, domainMax=longest, nice=False)
    kinds = [name for name, _ in CATEGORIES.values() if name in set(bars["series"])]
    colours = dict(CATEGORIES.values())
    shown = _shown_series(kinds)
    y = alt.Y("module:N", title=None, sort=order)
    drawn = (
        alt.Chart()
        .transform_filter(shown)
        .transform_calculate(
            amount=f"datum.nbytes / {scale}",
            words=exact_bytes("nbytes"),
            part="format(datum.share, '.1%')",
            whole=exact_bytes("all_bytes"),
        )
        .mark_bar(aria=False, **OUTLINE)
        .encode(
            x=alt.X(
                "amount:Q", title=f"{title} ({unit})", stack="zero", scale=room, axis=alt.Axis(tickCount=6, grid=False)
            ),
            y=y,
            color=alt.Color("series:N", title=None, scale=alt.Scale(domain=kinds, range=[colours[k] for k in kinds])),
            order=alt.Order("series:N", sort="descending"),
            tooltip=[
                alt.Tooltip("module:N"),
                *([alt.Tooltip("phase:N")] if phase else []),
                alt.Tooltip("series:N", title="category"),
                alt.Tooltip("words:N", title="bytes"),
                alt.Tooltip("part:N", title="of all"),
                alt.Tooltip("whole:N", title="the module, all categories"),
            ],
        )
        .add_params(shown)
    )
    values = (
        alt.Chart()
        .transform_filter(shown)
        .transform_aggregate(total="sum(nbytes)", part="sum(share)", groupby=["module"])
        .transform_calculate(amount=f"datum.total / {scale}", words=_short("total", "part"))
        .mark_text(align="left", dx=5, fontSize=11, aria=False)
        .encode(x="amount:Q", y=y, text="words:N")
    )
    chart = alt.layer(drawn, values, data=alt.NamedData(name="bars"), width=WIDTH, height=24 * bars["module"].nunique())
    return described(chart, {TABLE: table, "bars": bars}, label)


def _short(field: str, share: str) -> str:
    """A Vega expression for bytes as :func:`~i2v_lab.units.format_bytes` has them, and a share."""
    value = f"datum.{field}"
    size = f"format({value}, 'd') + ' B'"
    for unit, name, digits in ((KIB, "KiB", 1), (MIB, "MiB", 1), (GIB, "GiB", 2)):
        size = f"({value} >= {unit} ? format({value} / {unit}, '.{digits}f') + ' {name}' : {size})"
    return f"{size} + ', ' + format(datum.{share}, '.0%')"
