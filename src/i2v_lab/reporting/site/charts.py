"""Charts in a page: the SVG first, in its place the same for a pointer by a script, and the table behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from i2v_lab.display import printable
from i2v_lab.reporting.figures.chart import MIME, SCHEMA, TABLE, VEGA_LITE

TEMPLATES = Path(__file__).parent / "templates"


@cache
def chart_scripts() -> tuple[str, str]:
    """Vega, Vega-Lite and Vega-Embed in one script of 0.9 MB, and ours, which draws with them."""
    import vl_convert

    bundle: Callable[..., str] = vl_convert.javascript_bundle  # its types lack the default of the first argument
    return bundle(vl_version=VEGA_LITE), (TEMPLATES / "charts.js").read_text(encoding="utf-8")


def behind_chart(spec: Mapping[str, Any]) -> str:
    """What is behind the SVG of a chart in a page: its description for the script, and its table.

    Args:
        spec: Of :class:`~i2v_lab.reporting.figures.chart.Chart`, as a notebook keeps it.

    Returns:
        HTML: a ``script`` element that is data, which a browser does not run, and a folded table.
    """
    # In a script element nothing but "<" could end it, and JSON has other words for that.
    text = json.dumps({**spec, "$schema": SCHEMA}, separators=(",", ":")).replace("<", "\\u003c")
    label = escape(str(spec["usermeta"]["label"]))
    return (
        f'<script type="application/json">{text}</script>\n'
        f'<details class="behind"><summary>The table behind this figure</summary>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {label}">'
        f"{data_table(spec['datasets'][TABLE])}</div></details>"
    )


def data_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as an HTML table, as the CSV beside the figure has them: whole bytes, nothing where nothing is known.

    Example:
        >>> data_table([{"phase": "decode_video", "peak_bytes": 1073741824}])
        '<table class="data"><thead><tr><th scope="col">phase</th><th scope="col">peak_bytes</th></tr></thead><tbody><tr><th scope="row">decode_video</th><td>1073741824</td></tr></tbody></table>'
    """  # noqa: E501 - the example's result is one line
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{_cell(row.get(names[0]))}</th>'
        + "".join(f"<td>{_cell(row.get(name))}</td>" for name in names[1:])
        + "</tr>"
        for row in rows
    )
    return f'<table class="data"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: Any) -> str:
    return "" if value is None else escape(printable(str(value), lines=False))


def is_chart(data: Mapping[str, Any]) -> bool:
    """Whether an output of a notebook is a chart of this package."""
    return "usermeta" in data.get(MIME, {})
