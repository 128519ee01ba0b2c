"""Figures of the studies, each drawn from a tidy table with whole bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from i2v_lab.reporting.figures.style import (
    COLOURS,
    GREY,
    LABEL,
    MARKERS,
    ON_GRID,
    PHASE_COLOURS,
    PUBLISHED,
    STYLE,
    byte_scale,
    phase_label,
)
from i2v_lab.reporting.tables import WORDS
from i2v_lab.units import format_bytes

TILES_ACROSS = 3  # layouts beside each other, where there are so many
TileLayout = tuple[str, tuple[int, int, int], Any]


def tile_figure(layouts: Sequence[TileLayout]) -> Figure:
    """The tiles of one frame, and their groups over the frames; overlapping pixels are decoded more than once.

    Args:
        layouts: ``(name, (width, height, frames), grid)``; the grid's ``rows``, ``columns`` and ``groups`` are
            intervals in pixels and frames.
    """
    with mpl.rc_context(STYLE):
        across = min(len(layouts), TILES_ACROSS)
        down = -(-len(layouts) // across)
        figure = Figure(figsize=(2.6 * across, 3.4 * down), layout="constrained")
        grid = figure.subplots(2 * down, across, squeeze=False, height_ratios=[3, 1] * down)
        for place, (name, (width, height, frames), tiles) in enumerate(layouts):
            row, column = 2 * (place // across), place % across
            plane, time = grid[row][column], grid[row + 1][column]
            rows, columns, groups = tiles.rows, tiles.columns, tiles.groups
            for top, bottom in rows:
                for left, right in columns:
                    plane.add_patch(_tile(left, top, right - left, bottom - top))
            plane.set(xlim=(-0.02 * width, 1.02 * width), ylim=(1.02 * height, -0.02 * height), aspect="equal")
            count = len(rows) * len(columns) * len(groups)
            plane.set_title(f"{_two_lines(name)}\n{count} tile{'s' * (count > 1)}", fontsize=9, loc="left")
            for level, (start, stop) in enumerate(groups):
                time.add_patch(_tile(start, level % 2 * 0.5, stop - start, 0.45))
            time.set(xlim=(-0.02 * frames, 1.02 * frames), ylim=(-0.1, 1.05), yticks=[])
            time.spines["left"].set_visible(False)
            for axes in (plane, time):
                axes.grid(visible=False)
                axes.tick_params(labelsize=8)
            time.set_xlabel("frame", fontsize=8)
            plane.set_xlabel("pixel", fontsize=8)
        for axes in grid.reshape(down, 2, across).swapaxes(1, 2).reshape(-1, 2)[len(layouts) :].flat:
            axes.set_visible(False)
    return figure


def _two_lines(name: str) -> str:
    return name.replace(", overlap", "\noverlap")


def _tile(left: float, top: float, width: float, height: float) -> Rectangle:
    return Rectangle((left, top), width, height, facecolor=GREY, alpha=0.28, edgecolor=GREY, linewidth=0.8)


def tiling_figure(table: pd.DataFrame, line_bytes: int | None = None, line_label: str = "") -> Figure:
    """The decoder's peak by tiling, inside and outside ``no_grad``.

    Args:
        table: ``tiling, decode_scope, decode_peak_bytes, status, published_bytes, published_outcome, published_note``.
        line_bytes: Memory of a card, drawn as a line; none by default.
        line_label: The card.
    """
    names = list(dict.fromkeys(table["tiling"]))
    scale, unit = byte_scale(float(table["decode_peak_bytes"].max()))
    with mpl.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(7.6, 0.95 * len(names) + 1.1), layout="constrained")
        axes = figure.add_subplot()
        largest = float(table["decode_peak_bytes"].max()) / scale
        for offset, scope in ((-0.2, "escaped"), (0.2, "no_grad")):
            for row in table[table["decode_scope"] == scope].to_dict("records"):
                if pd.isna(row["decode_peak_bytes"]):
                    continue
                place, value = names.index(row["tiling"]) + offset, row["decode_peak_bytes"] / scale
                failed = row["status"] != "complete"
                axes.barh(place, value, height=0.36, color=COLOURS[scope], alpha=0.45 if failed else 1)
                theirs, end = row["published_bytes"], value
                if scope == "escaped" and not pd.isna(theirs):
                    style = PUBLISHED | ({"marker": "x"} if row["published_outcome"] != "complete" else {})
                    axes.plot(theirs / scale, place, **style)
                    if abs(theirs / scale - value) < 0.03 * largest:  # its marker is not to be hidden by the label
                        end = max(value, theirs / scale) + 0.012 * largest
                words = f" {format_bytes(int(row['decode_peak_bytes']))}, {WORDS[scope]}"
                axes.text(end, place, words + (", out of memory" if failed else ""), va="center", fontsize=8.5, **LABEL)
        if line_bytes is not None and 0.2 * largest < line_bytes / scale < 1.4 * largest:
            axes.axvline(line_bytes / scale, color="#000000", linewidth=1, linestyle="--")
            axes.text(line_bytes / scale, -0.62, f" {line_label}", fontsize=8.5, va="bottom", **LABEL)
        axes.set_yticks(range(len(names)), [_two_lines(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.75)
        axes.set_xlim(0, largest * 1.42)
        axes.set_xlabel(f"peak while the video is decoded ({unit})")
        _published_legend(figure, table, failed=True)
    return figure


def _published_legend(figure: Figure, table: pd.DataFrame, failed: bool = False) -> None:
    known = table[table["published_bytes"].notna()]
    handles: list[Any] = []
    if (known["published_outcome"] == "complete").any():
        handles.append(Line2D([], [], **PUBLISHED, label="published, whole run"))
    ended = known[known["published_outcome"] == "out of memory"]
    if failed and len(ended):
        words = "\n".join(
            ["published, out of memory at that size", *dict.fromkeys(filter(None, ended["published_note"]))]
        )
        handles.append(Line2D([], [], **(PUBLISHED | {"marker": "x"}), label=words))
    if handles:
        figure.legend(handles=handles, frameon=False, fontsize=8.5, loc="outside upper left", ncols=2)


def boundaries_figure(phases: pd.DataFrame) -> Figure:
    """Peak so far at each phase boundary, one line for each decode scope.

    Args:
        phases: Rows with ``decode_scope, phase, peak_so_far_bytes``, in the order of the phases; and, if there is a
            published run, ``published_so_far_bytes``.
    """
    scale, unit = byte_scale(float(phases["peak_so_far_bytes"].max()))
    runs = [part for _, part in phases.groupby("decode_scope", sort=False)]
    names = [str(phase) for phase in max(runs, key=len)["phase"]]  # one may run several times
    last = phases.groupby("decode_scope", sort=False)["peak_so_far_bytes"].last()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        axes = figure.add_subplot()
        top = float(phases["peak_so_far_bytes"].max())
        apart = last.max() - last.min() > 0.12 * top  # else the labels would overlap
        for scope in phases["decode_scope"].unique():
            shift = 0 if apart else 16 if scope == last.index[0] else -16
            values = phases[phases["decode_scope"] == scope]["peak_so_far_bytes"].astype(float) / scale
            colour = COLOURS.get(scope, "#000000")
            axes.plot(range(len(values)), values, color=colour, linewidth=2, **MARKERS.get(scope, {"marker": "^"}))
            axes.annotate(
                f"{WORDS.get(scope, scope)}\n{format_bytes(int(last[scope]))}",
                (len(values) - 1, values.iloc[-1]),
                xytext=(10, shift),
                textcoords="offset points",
                va="center",
                color=colour,
                fontweight="bold",
                **LABEL,
            )
        if "published_so_far_bytes" in phases:
            known = phases[phases["published_so_far_bytes"].notna()]
            if len(known):
                places = [names.index(phase) for phase in known["phase"]]
                axes.plot(places, known["published_so_far_bytes"].astype(float) / scale, **PUBLISHED)
                handle = Line2D([], [], **PUBLISHED, label="published, outside no_grad")
                axes.legend(handles=[handle], **ON_GRID, fontsize=9, loc="upper left")
        axes.set_xticks(range(len(names)), [phase_label(name) for name in names])
        axes.set_xlim(-0.3, len(names) + 0.5)
        axes.set_ylim(0, top / scale * 1.15)
        axes.set_ylabel(f"peak so far ({unit})")
        axes.set_xlabel("after phase")
    return figure


def flatness_figure(phases: pd.DataFrame, runs: pd.DataFrame, over: str, label: str) -> Figure:
    """Peak of each phase over one quantity; a ring marks the phase with the highest.

    Args:
        phases: ``phase, peak_bytes, decides`` and the quantity.
        runs: ``published_bytes, published_outcome`` and the quantity.
        over: The quantity's column, such as ``megapixels``.
        label: Of its axis.
    """
    scale, unit = byte_scale(float(phases["peak_bytes"].max()))
    tall = phases.groupby("phase")["peak_bytes"].max()
    names = [name for name in tall.index if tall[name] > 0.04 * tall.max()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.add_subplot()
        ends: list[tuple[float, str]] = []
        for name in names:
            part = phases[phases["phase"] == name].sort_values(over)
            values = part["peak_bytes"].astype(float) / scale
            colour = PHASE_COLOURS.get(str(name), GREY)
            axes.plot(part[over], values, color=colour, linewidth=1.8, marker="o", markersize=4)
            decides = part["decides"].to_numpy(bool)
            axes.plot(part[over][decides], values[decides], "o", color=colour, markersize=10, mfc="none", mew=2)
            ends.append((float(values.iloc[-1]), str(name)))
        ceiling = float(phases["peak_bytes"].max()) / scale
        right = float(phases[over].max())
        ends.sort()
        places = _spread([value for value, _ in ends], 0.062 * ceiling)
        for (value, name), place in zip(ends, places, strict=True):
            axes.annotate(
                f"{name.replace('_', ' ')}, {value:.2f}",
                (right, value),
                xytext=(right + 0.03 * (right - float(phases[over].min())), place),
                color=PHASE_COLOURS.get(name, GREY),
                fontsize=9,
                va="center",
                fontweight="bold",
                **LABEL,
            )
        known = runs[runs["published_bytes"].notna()]
        if len(known):
            axes.plot(known[over], known["published_bytes"].astype(float) / scale, **PUBLISHED)
            ceiling = max(ceiling, float(known["published_bytes"].max()) / scale)
            _published_legend(figure, runs)
        left = float(phases[over].min())
        axes.set_xlim(left - 0.05 * (right - left), right + 0.42 * (right - left) if right > left else right + 1)
        ticks = sorted(set(phases[over]))
        axes.set_xticks(ticks, [f"{round(value, 2):g}" for value in ticks], fontsize=8.5)
        axes.set_ylim(0, ceiling * 1.15)
        axes.set_xlabel(label)
        axes.set_ylabel(f"peak of the phase ({unit})")
    return figure


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions of labels beside ascending ``values``, at least ``gap`` apart."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap) if places else value)
    return places


def leak_figure(table: pd.DataFrame) -> Figure:
    """Bytes still allocated after each generation in one process, one panel for each way of consuming the stream.

    Args:
        table: ``decode_scope, consumer, generation, allocated_bytes``.
    """
    scale, unit = byte_scale(float(table["allocated_bytes"].max()))
    consumers = list(dict.fromkeys(table["consumer"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.7 * len(consumers) + 0.4, 3.3), layout="constrained")
        panels = figure.subplots(1, len(consumers), sharey=True, squeeze=False)[0]
        top = float(table["allocated_bytes"].max()) / scale
        for axes, consumer in zip(panels, consumers, strict=True):
            part = table[table["consumer"] == consumer]
            last = part.groupby("decode_scope", sort=False)["allocated_bytes"].last() / scale
            apart = last.max() - last.min() > 0.15 * top
            for index, scope in enumerate(last.index):
                rows = part[part["decode_scope"] == scope]
                values = rows["allocated_bytes"] / scale
                axes.plot(rows["generation"], values, color=COLOURS[scope], linewidth=2, **MARKERS[scope])
                ended_early = rows["generation"].iloc[-1] <= part["generation"].max() / 2
                axes.annotate(
                    f"{WORDS[scope]}\n{format_bytes(int(rows['allocated_bytes'].iloc[-1]))}",
                    (rows["generation"].iloc[-1], values.iloc[-1]),
                    xytext=(8 if ended_early else -6, 12 if apart or index else 44),
                    textcoords="offset points",
                    ha="left" if ended_early else "right",
                    color=COLOURS[scope],
                    fontsize=9,
                    fontweight="bold",
                    **LABEL,
                )
            axes.set_title(f"each stream {WORDS[consumer]}", fontsize=10, loc="left")
            axes.set_xticks(sorted(set(part["generation"])))
            axes.set_xlabel("generation")
            axes.set_ylim(-0.04 * top, top * 1.6)
        panels[0].set_ylabel(f"still allocated ({unit})")
    return figure


def accuracy_figure(table: pd.DataFrame) -> Figure:
    """The error of every phase's forecast, on a symmetric logarithmic scale: from 0.001 % to 3 %.

    Args:
        table: ``phase, error``, relative.
    """
    names = list(dict.fromkeys(table["phase"]))
    with mpl.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(7.2, 0.4 * len(names) + 1.1), layout="constrained")
        axes = figure.add_subplot()
        random = np.random.default_rng(0)
        for place, name in enumerate(names):
            errors = 100 * table[table["phase"] == name]["error"].to_numpy(float)
            heights = place + random.uniform(-0.22, 0.22, len(errors))
            axes.plot(errors, heights, "o", color=PHASE_COLOURS.get(str(name), GREY), alpha=0.7, markersize=4.5)
        axes.set_xscale("symlog", linthresh=0.01, linscale=0.6)
        ticks = [-3, -1, -0.1, -0.01, 0, 0.01, 0.1, 1, 3]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlim(-4, 4)
        axes.minorticks_off()
        axes.axvline(0, color="#000000", linewidth=0.8)
        axes.axvspan(-1, 1, color=GREY, alpha=0.12, linewidth=0)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("error of the forecast peak, relative to the measured one (%; shaded: within 1 %)")
    return figure
