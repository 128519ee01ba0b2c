"""Tidy tables as people read them, and as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.display import printable
from i2v_lab.files import write_atomically
from i2v_lab.units import format_value

# Values of fields, in the words of tables, figures and controls.
WORDS = {
    "escaped": "outside no_grad",
    "no_grad": "inside no_grad",
    "escaped, guarded": "outside, through guard_stream",
    "plain": "consumed to the end",
    "guarded": "through guard_stream",
    "left_open": "stopped early, still referenced",
}


def save_table(table: pd.DataFrame, folder: Path, name: str) -> Path:
    """Write a tidy table as CSV, with whole bytes and seconds.

    Args:
        table: Tidy; its index is not written.
        folder: Made if it does not exist.
        name: Of the file, without its suffix.

    Returns:
        The file's path.

    Raises:
        OSError: The file cannot be written.
    """
    # A name of a run need not be UTF-8: its other bytes are escaped.
    return write_atomically(
        folder / f"{name}.csv",
        lambda part: table.to_csv(part, index=False, encoding="utf-8", errors="backslashreplace"),
    )


def readable(table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Some columns of a tidy table as text: bytes and seconds with their unit, shares in percent.

    The first column becomes the index. A column without any known value is left out.

    Args:
        table: Tidy; the end of a column's name says its unit, as in :func:`~i2v_lab.units.format_value`.
        columns: Heading by column's name, in the order wanted.

    Example:
        >>> rows = pd.DataFrame({"phase": ["decode_video"], "peak_bytes": [2**30], "published_bytes": [None]})
        >>> readable(rows, {"phase": "phase", "peak_bytes": "peak", "published_bytes": "published"})
                          peak
        decode_video  1.00 GiB
    """
    known = {name: heading for name, heading in columns.items() if not len(table) or not table[name].isna().all()}
    texts = {heading: [cell_text(name, value) for value in table[name]] for name, heading in known.items()}
    shown = pd.DataFrame({heading: [WORDS.get(text, text) for text in column] for heading, column in texts.items()})
    first = next(iter(known.values()))
    return shown.set_index(first).rename_axis(None)


def html_table(table: pd.DataFrame) -> str:
    """A table of text as HTML, without a style of its own; controls in it are escaped, and a dollar is no formula."""
    shown = table.map(lambda cell: printable(str(cell))).rename(index=lambda name: printable(str(name)))
    return str(shown.to_html(border=0, escape=True, classes="tex2jax_ignore"))


def cell_text(name: str, value: Any) -> str:
    """A table's cell as text: :func:`~i2v_lab.units.format_value`, for pandas' missing values too.

    Args:
        name: The column's.
        value: Of any type that a column holds; missing is ``n/a``.

    Example:
        >>> cell_text("peak_bytes", 2**30), cell_text("peak_bytes", pd.NA)
        ('1.00 GiB', 'n/a')
    """
    missing = not isinstance(value, tuple) and pd.isna(value)
    return format_value(name, None if missing else value)


def as_sentence(words: str) -> str:
    """Text with a capital in front and a full stop behind; of several lines each.

    Example:
        >>> as_sentence("peak 30.1 MiB in decode_video")
        'Peak 30.1 MiB in decode_video.'
    """
    return " ".join(f"{line[:1].upper()}{line[1:].rstrip('.')}." for line in words.splitlines())
