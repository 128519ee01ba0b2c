"""How small things show themselves in a notebook: the fields of one as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from html import escape
from typing import Any

from i2v_lab.units import format_bytes

LEFT = 'style="text-align:left"'


class HtmlFields:
    """For a dataclass: its fields, with units, where a notebook shows it."""

    def _repr_html_(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        rows = [[name, value_text(name, value)] for name, value in values]
        return table_html([type(self).__name__, ""], rows)


def value_text(name: str, value: Any) -> str:
    """A field's value as people read it; the end of its name says the unit.

    Example:
        >>> value_text("peak_bytes", 3 * 2**20), value_text("seconds", 0.25), value_text("completed", True)
        ('3.0 MiB', '0.25 s', 'yes')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "n/a"
    if isinstance(value, int) and name.endswith(("bytes", "nbytes")):
        return f"{format_bytes(value)}"
    if isinstance(value, float) and (name.endswith("_s") or name == "seconds"):
        return f"{value:.3g} s"
    if name == "shape":
        return " x ".join(map(str, value)) or "scalar"
    return str(value)


def table_html(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table: the first column to the left, the others to the right."""
    top = "".join(f"<th {LEFT if index == 0 else ''}>{escape(head)}</th>" for index, head in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td {LEFT if i == 0 else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
