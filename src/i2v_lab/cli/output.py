"""Consoles for the output of commands: nothing in it is interpreted as markup or emoji."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from i2v_lab.errors import OutputError

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


def require_writable(path: Path, option: str) -> None:
    """Make sure, before anything runs, that a file or a folder can be made at a path; leaves nothing behind.

    Args:
        path: May not exist yet, nor its parents.
        option: The command-line option that named it, for the message.

    Raises:
        OutputError: With the ``path``, also under the option's name.
    """
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # too long a name, or a loop of links
        folder = path.absolute()
        while not os.path.lexists(folder):
            folder = folder.parent
        if folder.is_file() and folder == path.absolute():
            folder = folder.parent  # the file is replaced
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"{option} '{path}' cannot be written ({reason}); choose another", **_named(path, option)
        ) from error


def require_file(path: Path, option: str) -> None:
    """:func:`require_writable` for a path that must not be a folder.

    Raises:
        OutputError: With the ``path``, also under the option's name.
    """
    require_writable(path, option)
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise OutputError(f"{option} '{path}' is a folder or a device; name a file", **_named(path, option))


def require_folder(path: Path, option: str) -> None:
    """:func:`require_writable` for a path that must not be a file.

    Raises:
        OutputError: With the ``path``, also under the option's name.
    """
    require_writable(path, option)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{option} '{path}' is a file; name a folder", **_named(path, option))


def require_new_folder(path: Path) -> None:
    """Make sure that a run can be recorded in a folder: it can be made, or is empty.

    Raises:
        OutputError: With the ``path``, also under the option's name.
    """
    require_folder(path, "--profile")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"--profile '{path}' is not empty; name a new folder", **_named(path, "--profile"))


def _named(path: Path, option: str) -> dict[str, Path]:
    return {"path": path, option.removeprefix("--"): path}


def log(line: str) -> None:
    """Print one line on stderr at once."""
    print(line, file=sys.stderr, flush=True)
