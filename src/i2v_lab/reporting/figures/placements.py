"""Charts of placements: the fastest one on each GPU, and time against memory."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from i2v_lab.reporting.figures.chart import INK, TABLE, WIDTH, Chart, described, exact_bytes
from i2v_lab.reporting.figures.style import BLUE, GREY
from i2v_lab.units import GIB, format_bytes

NOT_KNOWN = "#bbbbbb"  # a cell without predicted seconds
SHAPES = ("square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")  # of third parties
PALE_BLUE = "rgba(0, 114, 178, 0.45)"
CURVE, WARM = "fastest placement within each budget", "the same, in a warm generation"
MEASURED = "measured"
NAMES, CELL = 150, 125  # pixels of GPUs' names and of a request, at least
DARK = 0.55  # of the logarithmic scale of colours
GAP = alt.Scale(paddingInner=0.03)
SECONDS = "format(datum.seconds, datum.seconds < 10 ? '.1f' : ',.0f') + ' s'"


def card_map_figure(table: pd.DataFrame) -> Chart:
    """The fastest placement of each request on each GPU: predicted seconds, and what stays on the device.

    Args:
        table: Of :func:`~i2v_lab.studies.card_map.card_table`; GPUs in the order of the rows.
    """
    requests = table.assign(voxels=table["width"] * table["height"])
    requests = requests.sort_values(["voxels", "width", "height", "frames"], kind="stable")
    columns = list(dict.fromkeys(_request(row) for row in requests.to_dict("records")))
    rows: list[dict[Any, Any]] = table.to_dict("records")
    cells = pd.DataFrame([_cell(row) for row in rows])
    known = cells["seconds"].dropna().astype(float)
    least, most = (float(known.min()), 1.01 * float(known.max())) if len(known) else (1.0, 2.0)
    scale = alt.Scale(type="log", scheme="cividis", reverse=True, domain=[least, most])
    legend = alt.Legend(title="predicted seconds", direction="horizontal", gradientLength=220, tickCount=4)
    # White where the colour's luminance is below the one at which black has as much contrast.
    dark = f"isValid(datum.seconds) && log(datum.seconds / {least!r}) > {DARK} * log({most / least!r})"
    ink = alt.condition(dark, alt.value("#ffffff"), alt.value("#000000"))
    # Of two lines, the size and the frames.
    axis = _bare(orient="top", labelAngle=0, labelPadding=20, labelExpr="split(datum.label, ', ')")
    y = alt.Y("card:N", sort=list(dict.fromkeys(cells["card"])), title=None, scale=GAP, axis=_bare())
    x = alt.X("request:N", sort=columns, title=None, scale=GAP, axis=axis)
    base = alt.Chart()
    tooltip = [
        alt.Tooltip("card:N", title="GPU"),
        alt.Tooltip("request:N", title="request"),
        alt.Tooltip("name:N", title="placement"),
        alt.Tooltip("time:N", title="predicted time"),
        alt.Tooltip("peak:N", title="peak"),
        alt.Tooltip("phase:N", title="in phase"),
        alt.Tooltip("needed:N", title="needed with context"),
        alt.Tooltip("rates:N", title="rates"),
    ]
    told = base.transform_calculate(
        peak=_or_unknown("peak_bytes", exact_bytes("peak_bytes")), needed=exact_bytes("needed_bytes")
    )
    filled = [
        told.transform_filter("isValid(datum.seconds)")
        .mark_rect(aria=False)
        .encode(x=x, y=y, color=alt.Color("seconds:Q", scale=scale, legend=legend), tooltip=tooltip),
        told.transform_filter("!isValid(datum.seconds)")
        .mark_rect(aria=False)
        .encode(x=x, y=y, color=alt.value(NOT_KNOWN), tooltip=tooltip),
    ]
    upper = base.mark_text(dy=-6, fontSize=12, aria=False).encode(x=x, y=y, text="time:N", color=ink)
    lower = base.mark_text(dy=8, fontSize=10, aria=False).encode(x=x, y=y, text="kept:N", color=ink)
    words = "Predicted seconds, and what stays on the GPU"
    title = alt.TitleParams(words, anchor="start", fontWeight="normal", fontSize=13, color=INK, subtitleColor=INK)
    if (table["rates"] == "published").any():
        title.subtitle = "From published rates, not measured, where a GPU is not marked."
    layers = alt.layer(*filled, upper, lower, data=alt.NamedData(name="cells"), title=title)
    chart = layers.properties(width=WIDTH, height=32 * cells["card"].nunique())
    label = f"Fastest placement of each request on each GPU. {words}"
    return described(chart, {TABLE: table, "cells": cells}, label, least_width=NAMES + CELL * len(columns))


def _bare(**options: Any) -> alt.Axis:
    return alt.Axis(ticks=False, domain=False, **options)


def _request(row: dict[Any, Any]) -> str:
    return f"{row['width']}x{row['height']}, {row['frames']} frames"


def _cell(row: dict[Any, Any]) -> dict[str, Any]:
    """What a cell says of a pair of a request and a GPU."""
    none, seconds = row["placement"] == "none", row["predicted_seconds"]
    unknown = pd.isna(seconds)
    rates = ", rates measured" if row["rates"] == "measured" else ""
    return {
        "card": f"{row['gpu']}, {format_bytes(int(row['memory_bytes']))}{rates}",
        "request": _request(row),
        "seconds": None if none or unknown else float(seconds),
        "time": "no placement" if none else "time not known" if unknown else f"{seconds:,.0f} s",
        "name": row["name"],
        "kept": f"needs {format_bytes(int(row['needed_bytes']))}"
        if none
        else str(row["name"]).replace(" resident", ""),
        "peak_bytes": row.get("peak_bytes"),
        "phase": str(row.get("peak_phase") or "").replace("_", " "),
        "needed_bytes": row["needed_bytes"],
        "rates": row["rates"],
    }


def _or_unknown(field: str, words: str) -> str:
    return f"isValid(datum['{field}']) ? {words} : 'not known'"


def frontier_figure(table: pd.DataFrame) -> Chart:
    """Seconds against peak memory: the fastest placements, a line, beside third-party pipelines and measured runs.

    Both scales are logarithmic. Each size has a line style; a click in a legend hides a series or a size.

    Args:
        table: Of :func:`~i2v_lab.studies.frontier.frontier_table`.
    """
    known = table[table["seconds"].notna() & table["peak_bytes"].notna()]
    sizes = list(dict.fromkeys(known["size"]))
    pipelines = list(dict.fromkeys(known[known["kind"] == "pipeline"]["name"]))
    curve = known["kind"] == "placement"
    named = known["name"].where(known["name"].isin(pipelines), CURVE)
    points = known.assign(series=named, of=known["kind"].map({MEASURED: MEASURED}).fillna("predicted"))
    warm = points[curve & known["warm_seconds"].notna()]
    warm = warm.assign(seconds=warm["warm_seconds"], series=WARM)
    points = pd.concat([points, warm], ignore_index=True)
    columns = ["size", "kind", "series", "of", "name", "peak_bytes", "peak_phase", "seconds", "gpu", "rates"]
    points = points[[name for name in columns if name in points]]
    return described(
        _frontier(points, sizes, pipelines),
        {TABLE: table, "points": points},
        "Seconds against peak memory",
        zooms={"x": "gib", "y": "seconds"},
    )


def _frontier(points: pd.DataFrame, sizes: list[str], pipelines: list[str]) -> Any:
    series = [CURVE] * (CURVE in set(points["series"])) + [WARM] * (WARM in set(points["series"])) + pipelines
    shapes = ["circle"] * (len(series) - len(pipelines)) + [SHAPES[n % len(SHAPES)] for n in range(len(pipelines))]
    colours = [{CURVE: BLUE, WARM: PALE_BLUE}.get(name, GREY) for name in series]
    x = alt.X(
        "gib:Q",
        title="peak allocated (GiB); hollow: measured",
        scale=alt.Scale(type="log", base=2, nice=False, padding=12),
        axis=alt.Axis(format="~g", tickCount=8),
    )
    y = alt.Y(
        "seconds:Q",
        title="seconds",
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=alt.Axis(format=",~g", tickCount=6),
    )
    legend = alt.Legend(columns=3, symbolStrokeWidth=2)
    colour = alt.Color(
        "series:N", title=None, sort=series, scale=alt.Scale(domain=series, range=colours), legend=legend
    )
    shape = alt.Shape("series:N", title=None, sort=series, scale=alt.Scale(domain=series, range=shapes), legend=legend)
    styles = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]
    dash = alt.StrokeDash(
        "size:N",
        title="size",
        sort=sizes,
        legend=alt.Legend(symbolType="stroke", orient="bottom"),
        scale=alt.Scale(domain=sizes, range=[styles[place % len(styles)] for place in range(len(sizes))]),
    )
    shown = _shown("shown", "series", series)
    shown_sizes = _shown("sizes", "size", sizes)
    zoom = alt.selection_interval(name="zoom", bind="scales", zoom="wheel![event.ctrlKey || event.metaKey]")
    base = (
        alt.Chart()
        .transform_filter(shown)
        .transform_filter(shown_sizes)
        .transform_calculate(gib=f"datum.peak_bytes / {GIB}", words=exact_bytes("peak_bytes"), time=SECONDS)
    )
    lines = base.transform_filter("datum.kind == 'placement'").mark_line(clip=True, aria=False)
    tooltip = [
        alt.Tooltip(f"{field}:N", title=title)
        for field, title in {
            "series": "series",
            "name": "name",
            "size": "size",
            "words": "peak",
            "peak_phase": "in phase",
            "time": "time",
            "of": "time is",
            "gpu": "on",
        }.items()
        if field in points or field in ("words", "time")
    ]
    drawn: dict[str, Any] = {"clip": True, "opacity": 1, "aria": False}
    predicted = base.transform_filter(f"datum.of != '{MEASURED}'").mark_point(filled=True, size=70, **drawn)
    measured = base.transform_filter(f"datum.of == '{MEASURED}'").mark_point(size=80, strokeWidth=1.6, **drawn)
    channels: dict[str, Any] = {"x": x, "y": y, "color": colour, "shape": shape, "tooltip": tooltip}
    return alt.layer(
        lines.encode(x=x, y=y, color=colour, strokeDash=dash).add_params(shown_sizes),
        predicted.encode(**channels).add_params(shown, zoom),
        measured.encode(**channels),
        data=alt.NamedData(name="points"),
        width=WIDTH,
        height=420,
    )


def _shown(name: str, field: str, values: list[str]) -> alt.Parameter:
    """A click on a legend's entry hides it, another shows it again."""
    value = [{field: each} for each in values]
    return alt.selection_point(
        name=name, fields=[field], bind="legend", toggle="true", clear=False, empty=False, value=value
    )
