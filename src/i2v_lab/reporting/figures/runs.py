"""Figures of recorded runs."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2v_lab.errors import RecordError
from i2v_lab.profiling.records import TimelineRecord
from i2v_lab.reporting.figures.style import CATEGORIES, STYLE, byte_scale, phase_label, short_name
from i2v_lab.runs.store import Run

NO_TIMELINE = "No timeline: live storages are tracked in forecasts and in runs on a CPU."


def timeline_figure(run: Run, other: Run | None = None) -> Figure:
    """Live tensor storages by category over a run, with its phases.

    Args:
        run: Drawn as stacked areas.
        other: Its total is a dashed line; each of its phases is stretched to the length that it has in ``run``.

    Raises:
        RecordError: A run has no timeline: it ran on CUDA, or without attribution.
    """
    table = _timeline(run)
    scale, unit = byte_scale(float(_total(table).max()))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.stackplot(
            table["time_s"],
            *(table[column] / scale for column in CATEGORIES),
            labels=[label for label, _ in CATEGORIES.values()],
            colors=[colour for _, colour in CATEGORIES.values()],
            linewidth=0,
            step="post",
        )
        top = float(_total(table).max())
        if other is not None:
            second = _timeline(other)
            top = max(top, float(_total(second).max()))
            axes.plot(
                _stretched(second, table),
                _total(second) / scale,
                color="#000000",
                linewidth=1.4,
                linestyle="--",
                drawstyle="steps-post",
                label=f"all of {short_name(other.folder.name)}",
            )
        _mark_phases(axes, table, top / scale)
        axes.set_ylim(0, top / scale * 1.32)
        axes.set_xlim(0, float(table["time_s"].max()))
        clock = run.metadata.get("clock")  # of the card that a forecast's seconds were predicted for
        unknown = run.is_forecast and not clock
        predicted = f"predicted time on {clock} (s)" if clock else "time (s)"
        axes.set_xlabel("progress of the run (this forecast has no clock)" if unknown else predicted)
        if unknown:
            axes.set_xticks([])
        axes.set_ylabel(f"live tensor storages ({unit})")
        axes.set_title(f"Live tensor storages by category: {short_name(run.folder.name)}", loc="left", fontsize=11)
        axes.legend(loc="upper left", frameon=False, ncols=5, fontsize=8, bbox_to_anchor=(0, 1.0))
    return figure


def _timeline(run: Run) -> pd.DataFrame:
    table = run.frame("timeline")
    if table.empty:
        raise RecordError(
            f"run '{run.folder}' has no timeline; profile it on a CPU, where live storages are tracked, with --profile",
            run=str(run.folder),
        )
    if run.is_forecast and not run.metadata.get("clock"):
        table["time_s"] = [float(moment) for moment in range(len(table))]
    return table


def has_timeline(run: Run) -> bool:
    """Whether live storages were tracked, so that :func:`timeline_figure` has something to draw."""
    return bool(run.of(TimelineRecord))


def _total(table: pd.DataFrame) -> pd.Series:
    return table[list(CATEGORIES)].sum(axis=1)


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


def _mark_phases(axes: Axes, table: pd.DataFrame, top: float) -> None:
    """A line at the start of each phase; its name above it where there is room."""
    end_s = float(table["time_s"].max())
    for phase, rows in table.groupby("phase", sort=False):
        start, end = float(rows["time_s"].min()), float(rows["time_s"].max())
        axes.axvline(start, color="#666666", linewidth=0.7, linestyle=":")
        if (end - start) / end_s > 0.09:
            axes.text(
                (start + end) / 2,
                top * 1.03,
                phase_label(str(phase)),
                fontsize=7.5,
                va="bottom",
                ha="center",
                color="#333333",
            )
