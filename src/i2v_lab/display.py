"""How a dataclass shows itself in a notebook: its fields as an HTML table, with units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from html import escape
from typing import TYPE_CHECKING

from i2v_lab.units import format_bytes, format_value

if TYPE_CHECKING:
    from i2v_lab.profiling.records import PhaseRecord

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


def phases_html(phases: Sequence[PhaseRecord], words: str, *, times: bool = True) -> str:
    """A sentence and the phases under it.

    Args:
        phases: In the order of the rows.
        words: The sentence.
        times: Whether their seconds mean anything.
    """
    heads = ["phase", "peak", "left behind", "saved for backward", *(["time"] if times else [])]
    rows = [
        [
            record.phase,
            format_bytes(record.peak_bytes),
            format_bytes(record.end_bytes),
            format_bytes(record.saved_for_backward_bytes),
            *([f"{record.seconds:.2f} s"] if times else []),
        ]
        for record in phases
    ]
    return f"<p>{escape(words)}</p>" + (table_html(heads, rows) if rows else "")
