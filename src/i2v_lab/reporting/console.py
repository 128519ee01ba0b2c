"""Consoles for a terminal: what they print is text, never markup or emoji, and what steers a terminal is escaped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from i2v_lab.display import printable

TABLE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, where rich would assume 80, if ``COLUMNS`` does not say."""


LEAST_WORDS, MOST_WORD = 12, 16
"""Columns that a cell of words is folded to at least; or its longest word, up to the second."""


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


class TerminalTable(Table):
    """A table of which a narrow terminal loses nothing: where its columns do not fit, each row is a few lines.

    Columns of words may be folded; numbers, which are aligned right, stay whole.

    Example:
        >>> table = TerminalTable("phase", "peak", "time", box=None)
        >>> table.add_row("decode_video_in_chunks", "30.1 MiB", "4.71 s")
        >>> PlainConsole(width=24).print(table)
        decode_video_in_chunks
          peak: 30.1 MiB
          time: 4.71 s
    """

    def __init__(self, *headers: str, **options: Any) -> None:
        super().__init__(*headers, **options)
        self._rows: list[tuple[list[Text], StyleType]] = []

    def add_row(self, *cells: Any, style: StyleType | None = None, end_section: bool = False) -> None:
        """As :meth:`rich.table.Table.add_row`; a cell is a text."""
        self._rows.append(([_text(cell) for cell in cells], style or ""))
        super().add_row(*cells, style=style, end_section=end_section)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for column in self.columns:
            column.overflow = "fold"
        if self._least_width() <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title is not None:
            yield _text(self.title)
        headings = [" ".join(_text(column.header).plain.split()) for column in self.columns]
        for cells, style in self._rows:
            first, *others = cells or [Text()]
            yield Text(first.plain, style=style or "bold", overflow="fold")
            for heading, cell in zip(headings[1:], others, strict=False):
                if cell.plain:
                    line = Text.assemble(f"{heading}: ", cell, style=style, overflow="fold")
                    yield Padding(line, (0, 0, 0, 2), expand=False)  # what is folded is indented as well

    def _least_width(self) -> int:
        widths = []
        for index, column in enumerate(self.columns):
            texts = [_text(column.header).plain, *(cells[index].plain for cells, _ in self._rows if index < len(cells))]
            longest = max(cell_len(line) for text in texts for line in [*text.splitlines(), ""])
            is_whole = column.no_wrap or column.justify == "right"
            word = min(max(cell_len(word) for text in texts for word in [*text.split(), ""]), MOST_WORD)
            widths.append(longest if is_whole else min(longest, max(LEAST_WORDS, word, column.min_width or 0)))
        around = 2 if self.box is not None or self.pad_edge else 0
        between = 1 if self.box is None or self.collapse_padding else 3
        return sum(widths) + between * (len(widths) - 1) + around


def _text(cell: Any) -> Text:
    return cell if isinstance(cell, Text) else Text(printable("" if cell is None else str(cell)))


def wide_console() -> PlainConsole:
    """Return a :class:`PlainConsole` as wide as the terminal or ``COLUMNS`` says, else ``TABLE_WIDTH`` columns."""
    columns = os.environ.get("COLUMNS", "")
    asked = columns.isdecimal() and int(columns) > 0
    return PlainConsole(width=None if asked or sys.stdout.isatty() else TABLE_WIDTH)
