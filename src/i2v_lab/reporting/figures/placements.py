"""Figures of placements: the fastest one on each GPU, and time against memory."""

from __future__ import annotations

from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from i2v_lab.reporting.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, SKY, STYLE, YELLOW
from i2v_lab.units import GIB, format_bytes

COLOUR_MAP = "cividis_r"  # light is fast; of the same order with every kind of colour blindness
NOT_KNOWN = "#eeeeee"  # a cell without predicted seconds
TICKS_GIB = (2, 4, 8, 16, 32, 64, 128, 256)
TICKS_S = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
MARKS = (("s", ORANGE), ("^", GREEN), ("D", PINK), ("v", YELLOW), ("P", SKY), ("X", GREY))  # of third parties
CURVE, HOLLOW = "this package, fastest placement within each budget", "hollow: measured"
WARM = "the same, in a warm generation"
CLOSE = 1.6  # of the slowest placement: what a panel of the curve alone shows


def card_map_figure(table: pd.DataFrame) -> Figure:
    """The fastest placement of each request on each GPU: predicted seconds, and what stays on the device.

    Args:
        table: Of :func:`~i2v_lab.studies.card_map.card_table`; GPUs in the order of the rows.
    """
    gpus = list(dict.fromkeys(table["gpu"]))
    keys = set(zip(table["width"], table["height"], table["frames"], strict=True))
    requests = sorted(keys, key=lambda key: (key[0] * key[1], key))
    seconds = table["predicted_seconds"].dropna().astype(float)
    scale = LogNorm(seconds.min(), 1.01 * seconds.max()) if len(seconds) else None
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(3.4 + 1.3 * len(requests), 1.3 + 0.38 * len(gpus)), layout="constrained")
        axes = figure.add_subplot()
        for row in table.to_dict("records"):
            x, y = requests.index((row["width"], row["height"], row["frames"])), gpus.index(row["gpu"])
            known = scale is not None and not pd.isna(row["predicted_seconds"])
            face = mpl.colormaps[COLOUR_MAP](scale(float(row["predicted_seconds"]))) if known and scale else NOT_KNOWN
            axes.add_patch(Rectangle((x - 0.49, y - 0.47), 0.98, 0.94, facecolor=face, linewidth=0))
            style: Any = {"ha": "center", "va": "center", "color": _ink(face)}
            axes.text(x, y - 0.18, _time(row), fontsize=9, fontweight="bold" if known else "normal", **style)
            axes.text(x, y + 0.23, _kept(row), fontsize=7.5, **style)
        first = table.drop_duplicates("gpu").set_index("gpu")
        axes.set_yticks(range(len(gpus)), [_card(gpu, first.loc[gpu]) for gpu in gpus], fontsize=8.5)
        axes.set_xticks(range(len(requests)), [f"{w}x{h}\n{count} frames" for w, h, count in requests], fontsize=8.5)
        axes.set(xlim=(-0.52, len(requests) - 0.48), ylim=(len(gpus) - 0.5, -0.5))
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        words = "In bold: predicted seconds, light where few. Below: what stays on the GPU."
        if (first["rates"] == "published").any():
            words += "\nFrom published rates, not measured, where a GPU is not marked."
        figure.supxlabel(words, fontsize=8.5)
    return figure


def _card(gpu: str, row: Any) -> str:
    return f"{gpu}, {format_bytes(int(row['memory_bytes']))}{', rates measured' if row['rates'] == 'measured' else ''}"


def _ink(face: Any) -> str:
    """Black or white, whichever has more contrast."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(face)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]  # as WCAG 2.1 defines it
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def _time(row: dict[Any, Any]) -> str:
    if row["placement"] == "none":
        return "no placement"
    if pd.isna(row["predicted_seconds"]):
        return "time not known"
    return f"{row['predicted_seconds']:,.0f} s"


def _kept(row: dict[Any, Any]) -> str:
    if row["placement"] == "none":
        return f"needs {format_bytes(int(row['needed_bytes']))}"
    return str(row["name"]).replace(" resident", "")


def frontier_figure(table: pd.DataFrame) -> Figure:
    """Seconds against peak memory: the fastest placements, a line, beside third-party pipelines and measured runs.

    Above, the placements and what is nearly as fast, from 0; below, everything, on logarithmic scales.

    Args:
        table: Of :func:`~i2v_lab.studies.frontier.frontier_table`; one column of panels for each size.
    """
    known = table[table["seconds"].notna() & table["peak_bytes"].notna()]
    sizes = list(dict.fromkeys(known["size"]))
    pipelines = list(dict.fromkeys(known[known["kind"] == "pipeline"]["name"]))
    marks = {name: MARKS[index % len(MARKS)] for index, name in enumerate(pipelines)}
    with mpl.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure = Figure(figsize=(max(5.2, 4.3 * len(sizes)), 7.4), layout="constrained")
        panels = figure.subplots(2, max(1, len(sizes)), squeeze=False)
        handles: dict[str, Any] = {}
        for column, size in enumerate(sizes):
            part = known[known["size"] == size]
            curve = part[part["kind"] == "placement"]
            base = curve if len(curve) else part[part["kind"] == "measured"]
            top = CLOSE * float((base if len(base) else part)["seconds"].max())
            near, whole = panels[0][column], panels[1][column]
            for axes, rows in ((near, part[part["seconds"] <= top]), (whole, part)):
                handles |= _points(axes, rows, marks)
                _logarithmic_memory(axes, part)
            near.set_ylim(0, top)
            _name_measured(near, part[part["seconds"] <= top], marks, top)
            near.set_title(size, fontsize=10, loc="left")
            whole.set_yscale("log")
            least = float(part[["seconds", "warm_seconds"]].min(axis=None))
            low, high = 0.75 * least, 1.4 * float(part["seconds"].max())
            ticks = [tick for tick in TICKS_S if low <= tick <= high]
            whole.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            whole.set_ylim(low, high)
            whole.minorticks_off()
            whole.set_xlabel("peak of allocated memory (GiB)")
        for axes, words in zip(panels[:, 0], ("seconds", "seconds, logarithmic"), strict=True):
            axes.set_ylabel(words)
        legend: Any = {"loc": "outside upper left", "ncols": 2, "frameon": False, "fontsize": 9}
        order = [name for name in (CURVE, WARM, *pipelines, HOLLOW) if name in handles]
        if order:
            figure.legend(handles=[handles[name] for name in order], labels=order, **legend)
    return figure


def _points(axes: Axes, rows: pd.DataFrame, marks: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Draw one panel, predicted points filled and measured ones hollow; returns what its legend needs, by label."""
    handles: dict[str, Any] = {}
    for (kind, name), points in rows.assign(of=rows["name"].where(rows["name"].isin(marks), "")).groupby(
        ["kind", "of"]
    ):
        marker, colour = marks.get(str(name), ("o", BLUE))
        style: Any = {"color": colour, "marker": marker, "markersize": 7, "linestyle": ""}
        if kind == "measured":
            style |= {"markerfacecolor": "none", "markersize": 9, "markeredgewidth": 1.5, "zorder": 4}
        elif kind == "placement":
            style |= {"markersize": 3.5, "linestyle": "-", "zorder": 3}
        x, y = points["peak_bytes"].astype(float) / GIB, points["seconds"].astype(float)
        (line,) = axes.plot(x, y, **style)
        if kind == "placement":
            handles[CURVE] = line
            (handles[WARM],) = axes.plot(x, points["warm_seconds"].astype(float), color=BLUE, linestyle=":")
        elif name:
            handles[str(name)] = Line2D([], [], color=colour, marker=marker, markersize=7, linestyle="")
        if kind == "measured":
            hollow: Any = {"marker": "o", "markerfacecolor": "none", "markersize": 9, "linestyle": ""}
            handles[HOLLOW] = Line2D([], [], color="#000000", **hollow)
    return handles


def _name_measured(axes: Axes, rows: pd.DataFrame, marks: dict[str, tuple[str, str]], top: float) -> None:
    """Label measured placements, towards the middle of a panel that ends at ``top``, so that none overlap."""
    named = rows[(rows["kind"] == "measured") & ~rows["name"].isin(marks)].sort_values("seconds")
    peaks = named["peak_bytes"].astype(float) / GIB
    middle = float(np.sqrt(np.prod(axes.get_xlim())))
    for side, part in (("left", named[peaks < middle]), ("right", named[peaks >= middle])):
        place = 0.0
        for row in part.to_dict("records"):
            place = max(float(row["seconds"]), place + 0.055 * top)
            axes.annotate(
                str(row["name"]),
                (row["peak_bytes"] / GIB, place),
                xytext=(9 if side == "left" else -9, 0),
                textcoords="offset points",
                fontsize=8,
                ha=cast(Any, side),
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
            )


def _logarithmic_memory(axes: Axes, part: pd.DataFrame) -> None:
    low, high = 0.75 * float(part["peak_bytes"].min()) / GIB, 1.45 * float(part["peak_bytes"].max()) / GIB
    axes.set_xscale("log")
    ticks = [tick for tick in TICKS_GIB if low <= tick <= high]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)
