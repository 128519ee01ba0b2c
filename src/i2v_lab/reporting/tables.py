"""Tidy tables as people read them, and as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from i2v_lab.files import write_atomically
from i2v_lab.units import format_bytes

WORDS = {
    "escaped": "outside no_grad",
    "no_grad": "inside no_grad",
    "escaped, guarded": "outside, through guard_stream",
    "plain": "consumed to its end",
    "guarded": "through guard_stream",
    "left_open": "stopped early and kept",
}
ABSENT = "n/a"


def save_table(table: pd.DataFrame, folder: Path, name: str) -> Path:
    """Write a tidy table as CSV, with whole bytes and seconds."""
    return write_atomically(folder / f"{name}.csv", lambda part: table.to_csv(part, index=False))


def readable(table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Some columns of a tidy table as people read them: bytes and seconds with their unit, shares in percent.

    The first column becomes the index. A column in which nothing is known is left out.

    Args:
        table: Tidy; the end of a column's name says its unit, as everywhere in this package.
        columns: Heading by column's name, in the order wanted.

    Example:
        >>> rows = pd.DataFrame({"phase": ["decode_video"], "peak_bytes": [2**30], "published_bytes": [None]})
        >>> readable(rows, {"phase": "phase", "peak_bytes": "peak", "published_bytes": "published"})
                          peak
        decode_video  1.00 GiB
    """
    known = {name: heading for name, heading in columns.items() if not len(table) or not table[name].isna().all()}
    shown = pd.DataFrame({heading: [_text(name, value) for value in table[name]] for name, heading in known.items()})
    first = next(iter(known.values()))
    return shown.set_index(first).rename_axis(None)


def _text(name: str, value: Any) -> str:
    if pd.isna(value):
        return ABSENT
    if name.endswith("bytes"):
        plus = "+" if name.startswith("difference") and value > 0 else ""
        return plus + format_bytes(int(value))
    if name.endswith("seconds"):
        return f"{value:.1f} s"
    if name.endswith("ratio"):
        return f"{value:.2f}"
    if name.endswith(("error", "told_share")):
        return f"{100 * value:.2f} %"
    if name.startswith("share"):
        return f"{100 * value:.0f} %"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return WORDS.get(str(value), str(value))


def as_sentence(words: str) -> str:
    """With a capital in front and a full stop behind; of several lines each.

    Example:
        >>> as_sentence("peak 30.1 MiB in decode_video")
        'Peak 30.1 MiB in decode_video.'
    """
    return " ".join(f"{line[:1].upper()}{line[1:].rstrip('.')}." for line in words.splitlines())
