"""Phases of a run as an HTML table, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from i2v_lab.display import escaped, table_html
from i2v_lab.units import format_bytes


class ShownPhase(Protocol):
    """The fields of :class:`~i2v_lab.profiling.records.PhaseRecord` that are shown; records import this module."""

    @property
    def phase(self) -> str:
        """Its name."""

    @property
    def peak_bytes(self) -> int:
        """Maximum of the allocated bytes."""

    @property
    def end_bytes(self) -> int:
        """Bytes allocated at its end."""

    @property
    def saved_for_backward_bytes(self) -> int | None:
        """Maximum of the bytes saved for backward."""

    @property
    def seconds(self) -> float:
        """Its duration."""


def phases_html(phases: Sequence[ShownPhase], words: str, *, times: bool = True) -> str:
    """A sentence and the phases under it.

    Args:
        phases: In the order of the rows.
        words: The sentence.
        times: Whether to show their seconds; not for a forecast, whose seconds are not those of a run.
    """
    heads = ["phase", "peak", "allocated at end", "saved for backward", *(["time"] if times else [])]
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
    return f"<p>{escaped(words)}</p>" + (table_html(heads, rows) if rows else "")
