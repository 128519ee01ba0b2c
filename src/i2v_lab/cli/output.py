"""Consoles for the output of commands: nothing in it is interpreted as markup or emoji."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

TABLE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, where rich would assume 80."""


def plain_console(*, width: int | None = None) -> Console:
    """Return a console on stdout that prints paths, names and prompts verbatim.

    Args:
        width: In columns; the terminal's by default.
    """
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, width=width)


def wide_console() -> Console:
    """Return a :func:`plain_console` that is ``TABLE_WIDTH`` columns wide unless stdout is a terminal."""
    return plain_console(width=None if sys.stdout.isatty() else TABLE_WIDTH)


def log(line: str) -> None:
    """Print one line on stderr at once."""
    print(line, file=sys.stderr, flush=True)
