"""How a dataclass shows itself in a notebook: its fields as an HTML table, with units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from html import escape

from i2v_lab.units import format_value

LEFT = 'style="text-align:left"'


class HtmlFields:
    """A base class for dataclasses: a notebook shows one as a table of its fields.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Card(HtmlFields):
        ...     memory_bytes: int
        >>> "24.00 GiB" in Card(24 * 2**30)._repr_html_()
        True
    """

    def _repr_html_(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        rows = [[name, format_value(name, value)] for name, value in values]
        return table_html([type(self).__name__, ""], rows)


def table_html(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain HTML table, the first column aligned left and the others right; its text is escaped.

    Args:
        headings: One for each column.
        rows: The cells of each row, as many as there are headings.

    Example:
        >>> table_html(["phase"], [["a < b"]]).count("a &lt; b")
        1
    """
    top = "".join(f"<th {LEFT if index == 0 else ''}>{escape(head)}</th>" for index, head in enumerate(headings))
    body = "".join(
        "<tr>" + "".join(f"<td {LEFT if i == 0 else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
