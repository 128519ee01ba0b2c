"""What a notebook and a terminal show of values: fields as an HTML table with units, and text that steers neither."""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import fields
from html import escape
from typing import Any

from i2v_lab.units import format_value

HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode categories of what is acted on, not shown: controls, formats such as bidi overrides, surrogates, breaks."""
JOINERS = "\u200c\u200d"  # of Cf, but letters and emoji are spelt with them
LEFT = 'style="text-align:left"'


def printable(text: str, *, lines: bool = True) -> str:
    r"""Text with control characters, bidi overrides and lone surrogates as backslash escapes.

    A terminal, and a notebook, acts on them: they recolour, move the cursor, retitle the window, fill the clipboard, or
    show a name backwards. Everything that prints text of a user or of a record passes it through this function.

    Args:
        text: Any text.
        lines: Keep line breaks and tabs; else they are escaped too, so that one line stays one line.

    Example:
        >>> print(printable("a\x1b]0;title\x07.mp4"))
        a\x1b]0;title\x07.mp4
        >>> print(printable("two\nlines", lines=False))
        two\nlines
    """
    if text.isascii() and text.isprintable():
        return text
    kept = "\n\t" + JOINERS if lines else JOINERS
    return "".join(
        letter
        if letter in kept or unicodedata.category(letter) not in HIDDEN
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def escaped(text: str) -> str:
    """Text for HTML: markup in it is shown as it is written, and so is what :func:`printable` escapes.

    Example:
        >>> escaped("<b>")
        '&lt;b&gt;'
    """
    return escape(printable(text))


_SHORT = reprlib.Repr()
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = 4
_SHORT.maxstring = _SHORT.maxother = 120


def short_repr(value: Any) -> str:
    """A dataclass in at most a few lines, however much it holds: as dataclasses do it, with long fields shortened.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(repr=False)
        ... class Run(HtmlFields):
        ...     records: tuple[int, ...]
        >>> Run(tuple(range(100_000)))
        Run(records=(0, 1, 2, 3, ...))
    """
    shown = ", ".join(f"{field.name}={_SHORT.repr(getattr(value, field.name))}" for field in fields(value))
    return f"{type(value).__name__}({shown})"


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

    def __repr__(self) -> str:
        return short_repr(self)

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
    top = "".join(f"<th {LEFT if index == 0 else ''}>{escaped(head)}</th>" for index, head in enumerate(headings))
    body = "".join(
        "<tr>" + "".join(f"<td {LEFT if i == 0 else ''}>{escaped(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table class='tex2jax_ignore'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
