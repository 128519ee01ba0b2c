"""Tidy tables in a terminal."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from i2v_lab.display import printable
from i2v_lab.reporting.console import TerminalTable
from i2v_lab.reporting.tables import cell_text

OUTSIDE = "(outside any module)"
MIN_NAME_WIDTH = 16  # characters; a longer phase or module path is folded, never cut
HEADINGS = {
    "nbytes": "bytes",
    "saved_for_backward_bytes": "graph",
    "peak_reserved_bytes": "reserved",
    "other_peak_bytes": "other\npeak",
    "other_seconds": "other\nseconds",
    "difference_bytes": "change",
    "difference_s": "change",
    "median_error": "median\nerror",
    "worst_error": "worst\nerror",
    "share_under": "share\nunder",
    "corrected_median_error": "corrected,\nmedian",
    "corrected_worst_error": "corrected,\nworst",
    "median_reserved_error": "reserved,\nmedian",
    "worst_reserved_error": "reserved,\nworst",
}


def rich_table(table: pd.DataFrame, title: str, *, bold: str | None = None) -> Table:
    """A tidy table for a terminal: bytes with their unit, numbers aligned right, module paths in full.

    Columns that are empty in every row, and those with the default in every row (``times`` 1, ``completed`` yes), are
    left out. Phases are indented below the phase that they ran inside of.

    Args:
        table: Any table of :mod:`~i2v_lab.reporting.run_tables`, or one whose columns' names say their units.
        title: Above it.
        bold: The phase whose row is bold.

    Example:
        >>> from rich.console import Console
        >>> rows = pd.DataFrame({"phase": ["decode_video"], "peak_bytes": [2**30]})
        >>> Console().print(rich_table(rows, "Phases"))  # doctest: +SKIP
    """
    shown = TerminalTable(
        title=Text(printable(title)), title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    shown.collapse_padding = True  # eight columns of bytes fit a terminal of 80
    columns = [name for name in table.columns if _has_content(name, table[name])]
    depths = _depths(table) if "parent" in table else {}
    for name in columns:
        right = pd.api.types.is_numeric_dtype(table[name]) and table[name].dtype != bool
        width = max((len(str(value)) for value in table[name]), default=0) if name in ("phase", "module") else 0
        shown.add_column(
            Text(HEADINGS.get(name, name.removesuffix("_bytes").replace("_", " "))),
            justify="right" if right else "left",
            no_wrap=right,  # numbers stay whole; what does not fit is folded in the columns of words
            overflow="fold",
            min_width=min(width, MIN_NAME_WIDTH) or None,
        )
    for values in table.to_dict("records"):
        cells = [cell_text(str(name), values[name]) or (OUTSIDE if name == "module" else "") for name in columns]
        if depths:
            cells[columns.index("phase")] = "  " * depths[values["phase"], values["parent"]] + str(values["phase"])
        style = "bold" if bold is not None and values.get("phase") == bold else ""
        shown.add_row(*(Text(printable(cell)) for cell in cells), style=style)
    return shown


def _has_content(name: str, column: pd.Series[Any]) -> bool:
    if name == "parent":
        return False  # shown by indentation
    if name == "times":
        return bool((column > 1).any())
    if name == "completed":
        return not column.all()
    return not len(column) or not bool(column.isna().all())


def _depths(phases: pd.DataFrame) -> dict[tuple[str, str | None], int]:
    """How deep each phase is nested in others of the table; an outer phase comes before its inner ones."""
    depths: dict[tuple[str, str | None], int] = {}
    by_name: dict[str, int] = {}
    for row in phases.to_dict("records"):
        depth = by_name.get(row["parent"], -1) + 1
        by_name.setdefault(row["phase"], depth)
        depths[row["phase"], row["parent"]] = depth
    return depths
