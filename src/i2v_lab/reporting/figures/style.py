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
# More, of Tol's palettes.
INDIGO, WINE, PETROL, BROWN, OLIVE, FOREST, TEAL, MAGENTA, LEMON, VIOLET, LILAC, ASH = (
    "#332288",
    "#882255",
    "#00677F",
    "#7F5A00",
    "#999933",
    "#117733",
    "#44AA99",
    "#EE3377",
    "#F0E442",
    "#8C6BB1",
    "#C9B8E0",
    "#999999",
)
MEANINGS = {
    ORANGE: "the retained graph: saved for backward, decoded outside no_grad",
    BLUE: "decoded inside no_grad; this package's placements",
    TEAL: "decoded outside no_grad, through guard_stream",
    SKY: "activations",
    INDIGO: "weights",
    ASH: "what is none of these: other storages, other processes",
    WINE: "encode_prompt",
    PETROL: "encode_image",
    YELLOW: "denoise_stage_1",
    PINK: "upsample_latent",
    BROWN: "denoise_stage_2",
    OLIVE: "decode_audio",
    FOREST: "decode_video",
    GREEN: "fits",
    LEMON: "tight",
    MAGENTA: "the limit: the budget, and what exceeds it",
    VIOLET: "allocated, of any kind",
    LILAC: "reserved by the allocator",
    GREY: "no meaning: a place or a shape says what it is",
}
"""What each colour says, in every figure; hatches tell memory policies apart, and shapes third-party pipelines."""
ALLOCATED, RESERVED, OTHERS, LIMIT = VIOLET, LILAC, ASH, MAGENTA
# Fields of a timeline's records: label and colour.
CATEGORIES = {
    "saved_bytes": ("saved for backward", ORANGE),
    "activation_bytes": ("activations", SKY),
    "weight_bytes": ("weights", INDIGO),
    "other_bytes": ("other", ASH),
}
VERDICT_COLOURS = {"fits": GREEN, "tight": LEMON, "no": MAGENTA}
COLOURS = {"escaped": ORANGE, "no_grad": BLUE, "escaped, guarded": TEAL}
PHASE_COLOURS = {
    "encode_prompt": WINE,
    "encode_image": PETROL,
    "denoise_stage_1": YELLOW,
    "upsample_latent": PINK,
    "denoise_stage_2": BROWN,
    "decode_audio": OLIVE,
    "decode_video": FOREST,
}
# On top of lines and of the grid, so that neither strikes a label through.
LABEL: Any = {"zorder": 5, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.0}}
ON_GRID: Any = {"facecolor": "white", "edgecolor": "none", "framealpha": 1.0}  # of a legend
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
