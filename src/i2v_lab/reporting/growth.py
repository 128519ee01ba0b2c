"""What grew from one run to another: phases at their peaks, and the modules and operators that hold the bytes there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from i2v_lab.display import HtmlFields
from i2v_lab.errors import InvalidRequest, shown
from i2v_lab.profiling.records import GraphRecord, ModuleRecord, OperatorRecord
from i2v_lab.reporting.run_tables import phase_table, records_at_peak, typed_frame
from i2v_lab.runs.store import Run
from i2v_lab.units import format_bytes, format_percent, parse_bytes

SAVED = "saved"
GROWTH_COLUMNS = {
    **dict.fromkeys(("level", "phase", "module", "category", "operator"), "str"),
    **dict.fromkeys(("first_bytes", "second_bytes", "difference_bytes"), "Int64"),
    "difference_share": "Float64",
}
RUN_FIELDS = ("model", "runner", "pipeline", "device", "device_name", "driver_version", "package", "clock")


@dataclass(frozen=True)
class Tolerance(HtmlFields):
    """How much a peak may grow without counting as growth.

    Attributes:
        nbytes: By so many bytes.
        share: Or by this part of the first run's, where that is more.

    Example:
        >>> Tolerance.parse("1%").allows(200, 202), Tolerance.parse("64MiB").allows(0, 2**26 + 1)
        (True, False)
    """

    nbytes: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """Read a size or a percentage: ``64MiB``, ``512 KiB``, ``0``, ``1%``.

        Raises:
            InvalidRequest: It is neither.
        """
        try:
            if text.strip().endswith("%"):
                return cls(share=_percentage(text))
            return cls(nbytes=parse_bytes(text))
        except ValueError:
            words = f"tolerance={shown(text)} is no size and no percentage; use one such as 64MiB or 1%"
            raise InvalidRequest(words, tolerance=text) from None

    def allows(self, first_bytes: int, second_bytes: int) -> bool:
        """Whether the second is no growth."""
        return second_bytes - first_bytes <= max(self.nbytes, self.share * first_bytes)

    def __str__(self) -> str:
        return format_percent(self.share, 2) if self.share else format_bytes(self.nbytes)


@dataclass(frozen=True)
class Growth(HtmlFields):
    """What something held in two runs, at a phase's peak in each.

    Attributes:
        level: ``phase``, ``module`` or ``operator``.
        phase: The phase.
        module: Path of a module; empty for all of a phase, and outside any module.
        category: As in :class:`~i2v_lab.profiling.records.ModuleRecord`, at the level of modules; else empty.
        operator: Such as ``aten.mm``, at the level of operators; else empty.
        first_bytes: In the first run; ``None`` for a phase that it does not have.
        second_bytes: Likewise in the second.
    """

    level: str
    phase: str
    module: str
    category: str
    operator: str
    first_bytes: int | None
    second_bytes: int | None

    @property
    def difference_bytes(self) -> int:
        """Bytes that were added; a phase that only one run has counts in full."""
        return (self.second_bytes or 0) - (self.first_bytes or 0)

    @property
    def difference_share(self) -> float | None:
        """Relative to the first run; ``None`` where that has nothing."""
        return self.difference_bytes / self.first_bytes if self.first_bytes else None

    def is_beyond(self, tolerance: Tolerance) -> bool:
        """Whether it grew by more than is tolerated."""
        return not tolerance.allows(self.first_bytes or 0, self.second_bytes or 0)


def phase_growth(first: Run, second: Run) -> list[Growth]:
    """Every phase of two runs with its peak in each, the largest growth first."""
    ours, theirs = _peaks(first), _peaks(second)
    return _sorted(
        Growth("phase", phase, "", "", "", ours.get(phase), theirs.get(phase)) for phase in {**ours, **theirs}
    )


def module_growth(first: Run, second: Run) -> list[Growth]:
    """Modules whose bytes at a phase's peak differ, by category, the largest growth first.

    Of runs without live storages, such as those on a card, what modules save for backward is compared. Phases whose
    modules one of the runs does not know are left out, as those that only one of them has.
    """
    rows = []
    for phase in _common(first, second):
        ours, theirs = _modules(first, phase), _modules(second, phase)
        if ours is not None and theirs is not None:
            rows += [
                Growth("module", phase, module, category, "", ours[module, category], theirs[module, category])
                for module, category in {**ours, **theirs}
            ]
    return _sorted(row for row in rows if row.difference_bytes)


def operator_growth(first: Run, second: Run) -> list[Growth]:
    """Operators whose results at a phase's peak differ in bytes, by module, the largest growth first.

    Weights are no operator's. Phases whose operators one of the runs does not know are left out.
    """
    rows = []
    for phase in _common(first, second):
        ours, theirs = _operators(first, phase), _operators(second, phase)
        if ours and theirs:
            rows += [
                Growth("operator", phase, module, "", operator, ours[module, operator], theirs[module, operator])
                for module, operator in {**ours, **theirs}
            ]
    return _sorted(row for row in rows if row.difference_bytes)


def growth_table(rows: Sequence[Growth]) -> pd.DataFrame:
    """What grew as a table.

    Returns:
        ``level, phase, module, category, operator, first_bytes, second_bytes, difference_bytes, difference_share``.
    """
    return typed_frame([{name: getattr(row, name) for name in GROWTH_COLUMNS} for row in rows], GROWTH_COLUMNS)


def unknown_levels(first: Run, second: Run) -> list[str]:
    """What cannot be compared because the records of a run have none: ``modules``, ``operators``."""
    unknown = []
    if not all(run.of(ModuleRecord) or run.of(GraphRecord) for run in (first, second)):
        unknown.append("modules")
    if not all(run.of(OperatorRecord) for run in (first, second)):
        unknown.append("operators")
    return unknown


def set_up_differences(first: Run, second: Run) -> dict[str, tuple[Any, Any]]:
    """What two runs were told that differs, by name: device, versions, fields of the request and of the spec.

    Example:
        >>> from pathlib import Path
        >>> runs = [Run(Path("a"), {"versions": {"torch": version}}, (), "complete") for version in ("2.11", "2.12")]
        >>> set_up_differences(*runs)
        {'torch': ('2.11', '2.12')}
    """
    ours, theirs = _set_up(first), _set_up(second)
    return {
        name: (ours.get(name), theirs.get(name)) for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)
    }


def _percentage(text: str) -> float:
    number = float(text.strip().removesuffix("%"))
    if not 0 <= number < float("inf"):
        raise ValueError(text)
    return number / 100


def _set_up(run: Run) -> dict[str, Any]:
    known: Mapping[str, Any] = run.metadata
    spec = dict(known.get("spec") or {})
    request = dict(spec.pop("request", None) or known.get("request") or {})
    return {
        **{name: known[name] for name in RUN_FIELDS if known.get(name) is not None},
        **{name: value for name, value in spec.items() if name not in RUN_FIELDS},
        **request,
        **(known.get("versions") or {}),
    }


def _peaks(run: Run) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for row in phase_table(run).to_dict("records"):
        peaks[row["phase"]] = max(peaks.get(row["phase"], 0), int(row["peak_bytes"]))
    return peaks


def _common(first: Run, second: Run) -> list[str]:
    theirs = _peaks(second)
    return [phase for phase in _peaks(first) if phase in theirs]


def _modules(run: Run, phase: str) -> Counter[tuple[str, str]] | None:
    """Bytes by module and category; ``None`` where they are not known."""
    found: Counter[tuple[str, str]] = Counter()
    for record in records_at_peak(run, ModuleRecord, phase):
        found[record.module, record.category] += record.nbytes
    if not found and not run.of(ModuleRecord):
        if not run.of(GraphRecord):
            return None
        for graph in records_at_peak(run, GraphRecord, phase):
            found[graph.module, SAVED] += graph.nbytes
    return found


def _operators(run: Run, phase: str) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for record in records_at_peak(run, OperatorRecord, phase):
        found[record.module, record.operator] += record.nbytes
    return found


def _sorted(rows: Iterable[Growth]) -> list[Growth]:
    return sorted(rows, key=lambda row: -row.difference_bytes)
