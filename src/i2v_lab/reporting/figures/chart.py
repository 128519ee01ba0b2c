"""Charts that answer a pointer: one Vega-Lite description for each, and its SVG and PNG, drawn without a browser."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.display import printable
from i2v_lab.files import write_atomically, write_text
from i2v_lab.units import GIB

MIME = "application/vnd.vegalite.v5+json"  # the newest that JupyterLab 4 has a renderer for; ours is valid in 5 and 6
JUPYTER_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"  # a name; nothing is loaded from there
VEGA_LITE = "6.1"
SCHEMA = f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE}.0.json"
TABLE = "table"  # the data set that is the figure's table; others are made of it
POINTER = "pointer"  # begins the names of layers that are there for a pointer alone
WIDTH = 640  # pixels of the plot in a file; a page gives the chart its own width
INK = "currentColor"  # of the page, so that text reads in a light and in a dark theme
FIXED: Mapping[str, str] = {}  # no axis that zooms
CONFIG: Mapping[str, Any] = {
    "background": "transparent",
    "font": "DejaVu Sans, Verdana, sans-serif",
    "view": {"stroke": None},
    "axis": {
        **{f"{part}Color": INK for part in ("label", "title", "tick", "domain", "grid")},
        "gridOpacity": 0.16,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 260,
        "titlePadding": 8,
    },
    "legend": {
        "labelColor": INK,
        "labelFontSize": 12,
        "labelLimit": 320,
        "symbolType": "square",
        "symbolStrokeWidth": 2,
        "orient": "top",
        "direction": "horizontal",
        "columns": 4,
        "titleColor": INK,
        "titleFontWeight": "normal",
        "titleFontSize": 12,
        "symbolSize": 130,
    },
    "text": {"color": INK, "fontSize": 12},
    "rule": {"color": INK},
}


@dataclass(frozen=True)
class Chart:
    """A figure with its data.

    In JupyterLab it is interactive: a pointer over it shows exact bytes, a wheel with Ctrl zooms along the time, a
    double click resets, a click in the legend hides a series. Elsewhere it is an SVG or a PNG.

    Attributes:
        spec: Vega-Lite, with its data; ``usermeta`` has the ``label``, the ``columns`` of the table in
            their order, the fields by which axes it ``zooms``, and the ``least_width`` in pixels.

    Example:
        >>> table = pd.DataFrame({"phase": ["decode_video"], "peak_bytes": [2**30]})
        >>> bars = {"mark": "bar", "encoding": {"x": {"field": "peak_bytes", "type": "quantitative"}}}
        >>> chart = described(bars, {TABLE: table}, "Peak of each phase")
        >>> chart.label, chart.svg()[:4], chart.table["peak_bytes"].tolist()
        ('Peak of each phase', '<svg', [1073741824])
    """

    spec: Mapping[str, Any]

    @property
    def label(self) -> str:
        """What it shows, for screen readers."""
        return str(self.spec["usermeta"]["label"])

    @property
    def table(self) -> pd.DataFrame:
        """The table behind it, with whole bytes."""
        return pd.DataFrame(self.spec["datasets"][TABLE], columns=self.spec["usermeta"]["columns"])

    def svg(self) -> str:
        """An SVG document, the same text for the same data; its text has the colour of what is around it."""
        import vl_convert

        svg = str(vl_convert.vegalite_to_svg(still(self.spec), vl_version=VEGA_LITE, allowed_base_urls=[]))
        # Vega numbers what has an id through the whole process.
        ids = {name: f"part-{place}" for place, name in enumerate(dict.fromkeys(re.findall(r' id="(\w+)"', svg)))}
        return re.sub(r'( id="|url\(#)(\w+)', lambda found: found[1] + ids.get(found[2], found[2]), svg)

    def png(self) -> bytes:
        """A PNG on white, of 2 pixels for each of the SVG's."""
        import vl_convert

        spec = still(self.spec)
        spec["config"] = {**spec["config"], "background": "white"}
        return bytes(vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2, allowed_base_urls=[]))

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write ``<name>.svg`` and ``<name>.png``.

        Returns:
            The paths of both, SVG first.

        Raises:
            OSError: The folder cannot be written.
        """
        png = self.png()
        written = write_text(folder / f"{name}.svg", self.svg())
        return [written, write_atomically(folder / f"{name}.png", lambda part: part.write_bytes(png))]

    def interactive(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Data and metadata of an output of a cell that JupyterLab draws with its own Vega, without a network."""
        # As SVG, which takes the theme's colour, and without links to a website.
        options = {
            "renderer": "svg",
            "logLevel": 1,
            "actions": {"export": True, "source": False, "compiled": False, "editor": False},
        }
        return {MIME: {**self.spec, "$schema": JUPYTER_SCHEMA}}, {MIME: {"embed_options": options}}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = self.interactive()
        png = base64.b64encode(self.png()).decode()
        return {**data, "image/svg+xml": self.svg(), "image/png": png, "text/plain": self.label}, metadata


def described(
    description: Any,
    tables: Mapping[str, pd.DataFrame],
    label: str,
    *,
    zooms: Mapping[str, str] = FIXED,
    least_width: int = 0,
) -> Chart:
    """A chart from its description and its data.

    Args:
        description: An Altair chart, or Vega-Lite as a dictionary; it names its data sets.
        tables: By the names of the data sets; :data:`TABLE` is the one that is shown as the figure's table.
        label: What the figure shows, in one line.
        zooms: The field of each axis that does, by ``x`` and ``y``; none by default.
        least_width: Pixels that it needs; on a narrower screen it scrolls.
    """
    spec: dict[str, Any] = dict(description if isinstance(description, Mapping) else description.to_dict())
    datasets = {name: _records(table) for name, table in tables.items()}
    columns = [str(name) for name in tables[TABLE].columns]  # a notebook sorts the names of a row
    usermeta = {
        "columns": columns,
        "label": printable(label, lines=False),
        "zooms": dict(zooms),
        "least_width": least_width,
    }
    config = {name: dict(part) if isinstance(part, Mapping) else part for name, part in CONFIG.items()}
    own = {"$schema": SCHEMA, "config": config, "datasets": datasets, "usermeta": usermeta}
    return Chart({"data": {"name": TABLE}, **spec, **own})


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON has them: whole numbers exact, ``None`` for what is not known, no control characters."""
    names = [str(name) for name in table.columns]
    return [dict(zip(names, map(_json_value, row), strict=True)) for row in table.itertuples(index=False, name=None)]


def _json_value(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value, lines=False)
    if value is None or pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value  # of NumPy


def still(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A description without what only a pointer can use, for paper."""
    drawn = {name: part for name, part in spec.items() if name != "usermeta"}
    if "layer" in spec:
        drawn["layer"] = [layer for layer in spec["layer"] if not layer.get("name", "").startswith(POINTER)]
    used = json.dumps({name: part for name, part in drawn.items() if name != "datasets"})
    drawn["datasets"] = {name: rows for name, rows in spec["datasets"].items() if f'{{"name": "{name}"}}' in used}
    return drawn


def exact_bytes(field: str) -> str:
    """A Vega expression for bytes in GiB with two decimals and as they are.

    Example:
        >>> exact_bytes("peak_bytes")
        "format(datum['peak_bytes'] / 1073741824, '.2f') + ' GiB (' + format(datum['peak_bytes'], ',') + ' bytes)'"
    """
    value = f"datum['{field}']"
    return f"format({value} / {GIB}, '.2f') + ' GiB (' + format({value}, ',') + ' bytes)'"
