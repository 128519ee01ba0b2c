"""One style for all figures: colour-blind safe palette, units on the axes, lines labelled where they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.text import Text

from i2v_lab.display import printable
from i2v_lab.files import write_atomically
from i2v_lab.units import GIB, KIB, MIB

# Okabe and Ito's palette, distinguishable with every common kind of colour blindness.
ORANGE, BLUE, SKY, GREEN, YELLOW, PINK, GREY = (
    "#D55E00",
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#777777",
)
# Fields of a timeline's records: label and colour, light to dark, so that the order also shows in greyscale.
CATEGORIES = {
    "saved_bytes": ("saved for backward", ORANGE),
    "activation_bytes": ("activations", SKY),
    "weight_bytes": ("weights", BLUE),
    "other_bytes": ("other", "#999999"),
}
VERDICT_COLOURS = {"fits": GREEN, "tight": YELLOW, "no": ORANGE}
COLOURS = {"escaped": ORANGE, "no_grad": BLUE, "escaped, guarded": GREEN}
PHASE_COLOURS = {
    "encode_prompt": BLUE,
    "encode_image": GREY,
    "denoise_stage_1": YELLOW,
    "upsample_latent": PINK,
    "denoise_stage_2": ORANGE,
    "decode_audio": SKY,
    "decode_video": GREEN,
}
PUBLISHED: Any = {"marker": "D", "color": "#000000", "markersize": 6, "linestyle": "none", "markerfacecolor": "none"}
# A ring and a square that fits into it: both are visible where two lines coincide.
MARKERS: dict[str, Any] = {
    "escaped": {"marker": "o", "markersize": 10, "markerfacecolor": "white", "markeredgewidth": 2},
    "no_grad": {"marker": "s", "markersize": 5},
}
LONGEST_NAME = 40  # characters of a run or a phase: a longer one leaves no room for the axes
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
    "text.parse_math": False,  # a dollar in a name is one
}


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as ``<name>.svg`` and ``<name>.png``; equal figures give byte-identical SVG.

    Returns:
        The paths of both, SVG first.
    """
    _make_printable(figure)
    with mpl.rc_context(STYLE):
        figure.draw_without_rendering()  # with a fixed aspect the constrained layout converges on the second pass
        svg = write_atomically(folder / f"{name}.svg", lambda part: figure.savefig(part, metadata={"Date": None}))
    return [svg, save_png(figure, folder / f"{name}.png")]


def save_png(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    _make_printable(figure)
    with mpl.rc_context(STYLE):
        return write_atomically(path, lambda part: figure.savefig(part, dpi=160))


def _make_printable(figure: Figure) -> None:
    """Escape control characters, which are in no SVG, and lone surrogates, which no font has."""
    for part in figure.findobj(Text):
        text = part.get_text()
        if text != printable(text):
            part.set_text(printable(text))


def byte_scale(largest_bytes: float) -> tuple[int, str]:
    """The divisor and the unit of an axis of bytes.

    Example:
        >>> byte_scale(3 * 2**30), byte_scale(100)
        ((1073741824, 'GiB'), (1, 'B'))
    """
    scales = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
    return next((scale for scale in scales if largest_bytes >= scale[0]), (1, "B"))


def phase_label(phase: str) -> str:
    """A phase's name in two short lines, for an axis."""
    return short_name(phase).replace("_", "\n", 1).replace("_", " ")


def short_name(name: str) -> str:
    """A name of a user or a record, cut where it would leave no room for the figure."""
    shown = printable(name, lines=False)
    return shown if len(shown) <= LONGEST_NAME else f"{shown[: LONGEST_NAME - 1]}…"
