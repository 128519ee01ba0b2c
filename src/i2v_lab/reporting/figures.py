"""Figures in one style: colour-blind safe, units on the axes, lines labelled where they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from i2v_lab.reporting.files import write_atomically
from i2v_lab.reporting.tables import WORDS
from i2v_lab.units import GIB, MIB, format_bytes

# Okabe and Ito's palette, told apart with every common kind of colour blindness.
COLOURS = {"escaped": "#D55E00", "no_grad": "#0072B2"}
# A ring and a square that fits into it: where two lines coincide, both markers can be seen.
MARKERS: dict[str, Any] = {
    "escaped": {"marker": "o", "markersize": 10, "markerfacecolor": "white", "markeredgewidth": 2},
    "no_grad": {"marker": "s", "markersize": 5},
}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "svg.hashsalt": "i2v-lab",
    "svg.fonttype": "path",
}


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as SVG and PNG; the same figure gives the same SVG, byte for byte."""
    with mpl.rc_context(STYLE):
        svg = write_atomically(folder / f"{name}.svg", lambda part: figure.savefig(part, metadata={"Date": None}))
        png = write_atomically(folder / f"{name}.png", lambda part: figure.savefig(part, dpi=160))
    return [svg, png]


def boundaries_figure(phases: pd.DataFrame) -> Figure:
    """Peak so far at each phase boundary, one line a scope: where a run's memory was needed.

    Args:
        phases: Rows with ``decode_scope, phase, peak_so_far_bytes``, in the order of the phases.
    """
    scale, unit = (GIB, "GiB") if phases["peak_so_far_bytes"].max() >= GIB else (MIB, "MiB")
    names = [str(phase) for phase in phases["phase"].unique()]
    last = phases.groupby("decode_scope", sort=False)["peak_so_far_bytes"].last()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        axes = figure.add_subplot()
        top = float(phases["peak_so_far_bytes"].max())
        apart = last.max() - last.min() > 0.12 * top  # else the labels would lie on one another
        for scope in phases["decode_scope"].unique():
            shift = 0 if apart else 16 if scope == last.index[0] else -16
            values = phases[phases["decode_scope"] == scope]["peak_so_far_bytes"] / scale
            colour = COLOURS.get(scope, "#000000")
            axes.plot(range(len(names)), values, color=colour, linewidth=2, **MARKERS.get(scope, {"marker": "^"}))
            axes.annotate(
                f"{WORDS.get(scope, scope)}\n{format_bytes(int(last[scope]))}",
                (len(names) - 1, values.iloc[-1]),
                xytext=(10, shift),
                textcoords="offset points",
                va="center",
                color=colour,
                fontweight="bold",
            )
        axes.set_xticks(range(len(names)), [name.replace("_", "\n", 1).replace("_", " ") for name in names])
        axes.set_xlim(-0.3, len(names) + 0.5)
        axes.set_ylim(0, top / scale * 1.15)
        axes.set_ylabel(f"peak so far ({unit})")
        axes.set_xlabel("after phase")
        axes.set_title("Peak so far after each phase", loc="left", fontsize=11)
    return figure
