"""Consoles for a terminal: what they print is text, never markup or emoji, and what steers a terminal is escaped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from i2v_lab.display import printable

TABLE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, where rich would assume 80, if ``COLUMNS`` does not say."""


class PlainConsole(Console):
    r"""A console that prints paths, names and prompts verbatim, and control characters in them escaped.

    Every text passes :func:`~i2v_lab.display.printable` last, that of tables, bars and status lines too; rich's own
    codes for colours and for the cursor are added after that.

    Args:
        stderr: Print on stderr instead of stdout.
        width: In columns; the terminal's by default.

    Example:
        >>> PlainConsole().print("[bold]a[/bold] \x1b[31m :bug:")
        [bold]a[/bold] \x1b[31m :bug:
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with the text of every segment escaped."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape a string before rich measures it, so that columns stay aligned."""
        return super().render_str(printable(text), **options)


def wide_console() -> PlainConsole:
    """Return a :class:`PlainConsole` as wide as the terminal or ``COLUMNS`` says, else ``TABLE_WIDTH`` columns."""
    columns = os.environ.get("COLUMNS", "")
    asked = columns.isdecimal() and int(columns) > 0
    return PlainConsole(width=None if asked or sys.stdout.isatty() else TABLE_WIDTH)
