"""Charts in a page: the SVG first, in its place the same for a pointer by a script, and the table behind it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from i2v_lab.display import printable
from i2v_lab.reporting.figures.chart import MIME, SCHEMA, TABLE, VEGA_LITE

TEMPLATES = Path(__file__).parent / "templates"


@cache
def chart_scripts() -> tuple[str, str]:
    """Vega, Vega-Lite and Vega-Embed in one script of 0.9 MB, and ours, which draws with them."""
    import vl_convert

    bundle: Callable[..., str] = vl_convert.javascript_bundle  # its types lack the default of the first argument
    return bundle(vl_version=VEGA_LITE), (TEMPLATES / "charts.js").read_text(encoding="utf-8")


def chart_style() -> str:
    """The style of charts, in a page that has some."""
    return (TEMPLATES / "charts.css").read_text(encoding="utf-8")


def behind_chart(spec: Mapping[str, Any]) -> str:
    """What is behind the SVG of a chart in a page: its description for the script, and its table.

    Args:
        spec: Of :class:`~i2v_lab.reporting.figures.chart.Chart`, as a notebook keeps it.

    Returns:
        HTML: a ``script`` element that is data, which a browser does not run, and a folded table.
    """
    text = data_block({**spec, "$schema": SCHEMA})
    table = folded_table(spec["datasets"][TABLE], spec["usermeta"]["columns"], str(spec["usermeta"]["label"]))
    return f'<script type="application/json">{text}</script>\n{table}'


def behind_figure(csv_file: Path, label: str) -> str:
    """The table behind a figure that is no chart, from the CSV beside it; empty if there is none.

    Args:
        csv_file: Which may be missing.
        label: What the figure shows.

    Raises:
        OSError: The file cannot be read.
    """
    if not csv_file.is_file():
        return ""
    with csv_file.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return folded_table(list(rows), list(rows.fieldnames or []), label)


def folded_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], label: str) -> str:
    """A table that is folded until somebody wants it, and that a keyboard can open and scroll.

    Args:
        rows: By name of the column.
        columns: Their names, in order.
        label: What it is of, for screen readers.
    """
    if not columns:
        return ""
    return (
        '<details class="behind"><summary>The table behind this figure</summary>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {escape(label)}">'
        f"{data_table(rows, columns)}</div></details>"
    )


def data_block(value: Any) -> Markup:
    r"""A value as JSON for a ``script`` element, in which nothing ends the element.

    Example:
        >>> data_block({"a": "</script>"})
        Markup('{"a":"\\u003c/script>"}')
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))  # noqa: S704 - has no markup


def place_of(number: int) -> str:
    """Where what is behind a chart will stand: no prose of the page, so neither searched nor explained.

    Example:
        >>> place_of(1)
        '<!-- behind chart 1 -->'
    """
    return f"<!-- behind chart {number} -->"


def with_charts(body: str, behind: Sequence[str]) -> str:
    """Put what is behind the charts of a page in its places.

    Args:
        body: HTML with :func:`place_of` for every chart.
        behind: Of :func:`behind_chart`, in the order of the numbers.
    """
    for number, html in enumerate(behind):
        body = body.replace(place_of(number), html, 1)
    return body


def data_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as an HTML table, as the CSV beside the figure has them: whole bytes, nothing where nothing is known.

    Args:
        rows: By name of the column.
        columns: Their names, in the order of the table; the first is the heading of each row.

    Example:
        >>> data_table([{"peak_bytes": 1073741824, "phase": "decode_video"}], ["phase", "peak_bytes"])[-77:]
        '<tr><th scope="row">decode_video</th><td>1073741824</td></tr></tbody></table>'
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{_cell(row[columns[0]])}</th>'
        f"{''.join(f'<td>{_cell(row[name])}</td>' for name in columns[1:])}</tr>"
        for row in rows
    )
    return f'<table class="data"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: Any) -> str:
    return "" if value is None else escape(printable(str(value), lines=False))


def is_chart(data: Mapping[str, Any]) -> bool:
    """Whether an output of a notebook is a chart of this package."""
    return "usermeta" in data.get(MIME, {})
