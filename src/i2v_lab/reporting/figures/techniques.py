"""Figures of memory techniques: the peak after each of them, and the peaks of phases under each policy."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from i2v_lab.reporting.figures.style import (
    GREY,
    LABEL,
    PHASE_COLOURS,
    PUBLISHED,
    STYLE,
    byte_scale,
    phase_label,
)
from i2v_lab.units import format_bytes

# Hatches, in the order of the policies, or of diffusers' memory settings: a colour would say something else elsewhere.
HATCHES = ("", "//", "..", "xx", "--", "\\\\")


HATCHED: Any = {"facecolor": GREY, "edgecolor": "white", "linewidth": 0}


def waterfall_figure(steps: pd.DataFrame, published_bytes: int | None = None) -> Figure:
    """The run's peak after each technique, in the colour of the phase with the peak.

    At the right, in grey, the peak of the phase that the technique is for before and after it, where another phase has
    the run's peak.

    Args:
        steps: The columns of :func:`~i2v_lab.studies.techniques.steps_table`, in the order of the steps.
        published_bytes: The published study's peak, a mark above the first bar: its set-up differs by more than a
            technique, so that it is no step. Left out by default.
    """
    rows: list[dict[Any, Any]] = steps[steps["peak_bytes"].notna()].to_dict("records")
    largest = float(max([published_bytes or 0, *(row["peak_bytes"] for row in rows)]))
    top = 0 if published_bytes is None else -1
    scale, unit = byte_scale(largest)
    with mpl.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(8.6, 0.4 * (len(rows) - top) + 1.3), layout="constrained")
        axes = figure.add_subplot()
        before = rows[0]["peak_bytes"] / scale
        for place, row in enumerate(rows):
            value = row["peak_bytes"] / scale
            colour = PHASE_COLOURS.get(row["peak_phase"], GREY)
            axes.barh(place, value, height=0.66, color=colour)
            if before > value:  # saved by this step
                axes.barh(place, before - value, left=value, height=0.66, color=colour, alpha=0.22)
            if place:
                axes.plot([before, before], [place - 1 + 0.33, place - 0.33], color="#999999", linewidth=0.8)
            _label(axes, place, row, max(value, before))
            before = value
        names = [row["label"] for row in rows]
        if published_bytes is not None:
            axes.plot(published_bytes / scale, top, **PUBLISHED)
            axes.text(
                published_bytes / scale, top, f"   {format_bytes(published_bytes)}", va="center", fontsize=9, **LABEL
            )
            axes.axhline(top + 0.5, color="#999999", linewidth=0.8, linestyle=":")
            names.insert(0, "published study, in another set-up")
        axes.set_yticks(range(top, len(rows)), names, fontsize=9)
        axes.set_ylim(len(rows) - 0.5, top - 0.6)
        axes.set_xlim(0, largest / scale * 1.24)
        axes.set_xlabel(f"peak of the whole run ({unit})")
        handles = [
            Patch(facecolor=PHASE_COLOURS.get(phase, GREY), label=f"peak in {phase.replace('_', ' ')}")
            for phase in dict.fromkeys(row["peak_phase"] for row in rows if row["peak_phase"])
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure


def _label(axes: Axes, place: int, row: dict[Any, Any], right: float) -> None:
    axes.text(
        right, place, f" {format_bytes(int(row['peak_bytes']))}", va="center", fontsize=9, fontweight="bold", **LABEL
    )
    known = not pd.isna(row["before_bytes"]) and not pd.isna(row["after_bytes"])
    if row["target_phase"] and row["target_phase"] != row["peak_phase"] and known:
        change = f"{format_bytes(int(row['before_bytes']))} to {format_bytes(int(row['after_bytes']))}"
        words = f"{row['target_phase'].replace('_', ' ')}: {change}"
        beside = axes.get_yaxis_transform()
        axes.text(1.01, place, words, transform=beside, va="center", fontsize=7.5, color="#555555")


def policies_figure(table: pd.DataFrame) -> Figure:
    """The peak of every phase under each memory policy, one panel for each size.

    Args:
        table: ``size, policy, phase, peak_bytes, recorded_bytes``; a measured peak is a mark on its bar.
    """
    sizes, policies = list(dict.fromkeys(table["size"])), list(dict.fromkeys(table["policy"]))
    phases = list(dict.fromkeys(table["phase"]))
    scale, unit = byte_scale(float(table["peak_bytes"].max()))
    height = 0.8 / len(policies)
    with mpl.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(7.8, 0.62 * len(phases) + 1.3), layout="constrained")
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        right = float(table["peak_bytes"].max()) / scale * 1.24
        for axes, size in zip(panels, sizes, strict=True):
            for row in table[table["size"] == size].to_dict("records"):
                number = policies.index(row["policy"])
                place = phases.index(row["phase"]) + (number - (len(policies) - 1) / 2) * height
                value = row["peak_bytes"] / scale
                axes.barh(place, value, height=0.9 * height, hatch=HATCHES[number % len(HATCHES)], **HATCHED)
                axes.text(value, place, f" {value:.2f}", va="center", fontsize=7.5, **LABEL)
                if not pd.isna(row["recorded_bytes"]):
                    axes.plot(row["recorded_bytes"] / scale, place, "|", color="#000000", markersize=7)
            axes.set_title(size, fontsize=10, loc="left")
            axes.set_xlim(0, right)
            axes.set_xlabel(f"peak of the phase ({unit})")
        panels[0].set_yticks(
            range(len(phases)), [phase_label(phase).replace("\n", " ") for phase in phases], fontsize=9
        )
        panels[0].set_ylim(len(phases) - 0.5, -0.5)
        handles: list[Any] = [
            Patch(hatch=hatch, label=policy, **HATCHED)
            for policy, hatch in zip(policies, itertools.cycle(HATCHES), strict=False)
        ]
        if table["recorded_bytes"].notna().any():
            handles.append(Line2D([], [], color="#000000", marker="|", linestyle="none", label="measured"))
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure
