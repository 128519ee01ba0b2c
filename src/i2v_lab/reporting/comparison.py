"""Two recorded runs side by side: sentences, figures and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from i2v_lab.display import escaped
from i2v_lab.errors import RecordError
from i2v_lab.profiling.records import Forecast, PhaseRecord, Record
from i2v_lab.reporting.growth import (
    Growth,
    Tolerance,
    growth_table,
    module_growth,
    operator_growth,
    phase_growth,
    set_up_differences,
)
from i2v_lab.reporting.headlines import difference_headline, headline
from i2v_lab.reporting.run_tables import difference_table
from i2v_lab.reporting.tables import as_sentence, html_table, readable
from i2v_lab.runs.store import COMPLETE, FORECAST, Run, read_run, run_folders

if TYPE_CHECKING:
    import pandas as pd


class Recorded(Protocol):
    """What has records: a forecast, a profiler, a call that was profiled."""

    @property
    def records(self) -> Sequence[Record]:
        """In the order in which they came about."""


Compared = str | Path | Run | Recorded

BARS = "With a caching allocator, bars end at the reserved bytes; the table has the allocated bytes."
TIMES = "Times are of one run each, and vary from run to run: a difference of them is no finding."
COLUMNS = {
    "phase": "phase",
    "peak_bytes": "peak",
    "other_peak_bytes": "other peak",
    "difference_bytes": "change",
    "seconds": "time",
    "other_seconds": "other time",
}


def find_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """All run directories below these folders, by a short unique name, in the order of the folders."""
    found: dict[str, Path] = {}
    for folder in folders:
        for run in run_folders(folder) if folder.is_dir() else []:
            name = run.relative_to(folder).as_posix() if run != folder else run.name
            found[name if name not in found else f"{folder.name}/{name}"] = run
    return found


@dataclass(frozen=True)
class Comparison:
    """Two runs, the second compared with the first.

    Attributes:
        first: The baseline.
        second: The run that is compared with it.

    Example:
        >>> Comparison.read(Path("runs/escaped"), Path("runs/no_grad")).headline  # doctest: +SKIP
        'peak 30.1 MiB instead of 56.3 MiB: -26.2 MiB (-47 %); 4.71 s instead of 4.90 s, of one run each'
    """

    first: Run
    second: Run

    @classmethod
    def read(cls, first: Path, second: Path) -> Comparison:
        """Read both runs.

        Raises:
            RecordError: One of them is missing or damaged.
        """
        return cls(read_run(first), read_run(second))

    @cached_property
    def phases(self) -> list[Growth]:
        """Every phase with its peak in both runs, the largest growth first."""
        return phase_growth(self.first, self.second)

    @cached_property
    def modules(self) -> list[Growth]:
        """Modules whose bytes at a phase's peak differ: see :func:`~i2v_lab.reporting.growth.module_growth`."""
        return module_growth(self.first, self.second)

    @cached_property
    def operators(self) -> list[Growth]:
        """Operators whose results at a phase's peak differ: see :func:`~i2v_lab.reporting.growth.operator_growth`."""
        return operator_growth(self.first, self.second)

    @property
    def set_up(self) -> dict[str, tuple[Any, Any]]:
        """What the runs were told that differs: versions, device, fields of the request."""
        return set_up_differences(self.first, self.second)

    def grown(self, tolerance: Tolerance | str = "0") -> list[Growth]:
        """The phases whose peak grew by more than is tolerated, such as ``64MiB`` or ``1%``."""
        allowed = tolerance if isinstance(tolerance, Tolerance) else Tolerance.parse(tolerance)
        return [phase for phase in self.phases if phase.is_beyond(allowed)]

    def to_frame(self) -> pd.DataFrame:
        """All of :attr:`phases`, :attr:`modules` and :attr:`operators` as one table.

        Returns:
            ``level, phase, module, category, operator, first_bytes, second_bytes, difference_bytes,
            difference_share``.
        """
        return growth_table([*self.phases, *self.modules, *self.operators])

    @property
    def headline(self) -> str:
        """How the second differs from the first, in one sentence."""
        return difference_headline(self.first, self.second)

    def html(self) -> str:
        """Both headlines, bars, timelines, and the difference phase by phase."""
        from i2v_lab.reporting.figures import live  # draws with matplotlib, which the core does without

        table = readable(difference_table(self.first, self.second), COLUMNS)
        return "".join(
            [
                f"<p><strong>{escaped(as_sentence(self.headline))}</strong></p>",
                *(
                    f"<p>{words}: {escaped(run.folder.name)}. {escaped(as_sentence(headline(run)))}</p>"
                    for words, run in (("First (upper bars, areas)", self.first), ("Second (lower bars)", self.second))
                ),
                live.phase_bars(self.first, other=self.second),
                f"<p><small>{BARS} {TIMES}</small></p>",
                live.timeline(self.first, self.second),
                html_table(table),
            ]
        )

    def _repr_html_(self) -> str:
        return self.html()


def compare_runs(first: Compared, second: Compared) -> Comparison:
    """Compare two runs: which phase, module and operator grew.

    Args:
        first: The baseline: a run directory, a run that was read, a forecast, or a profiler or call that has ended.
        second: What is compared with it.

    Raises:
        RecordError: A run directory is missing or damaged, or no phase of a run has ended.

    Example:
        >>> from i2v_lab.profiling.records import PhaseRecord
        >>> def forecast(peak_bytes):
        ...     phase = PhaseRecord("decode_video", None, 0, peak_bytes, 0, None, peak_bytes, 0, 0.0, 0.1, True)
        ...     return Forecast((phase,), 0, 0.1)
        >>> compare_runs(forecast(2**20), forecast(3 * 2**20)).grown("64MiB")
        []
    """
    return Comparison(_as_run(first, "first"), _as_run(second, "second"))


def _as_run(compared: Compared, name: str) -> Run:
    if isinstance(compared, str | Path):
        run = read_run(compared)
    elif isinstance(compared, Run):
        run = compared
    else:
        device = {"device": FORECAST} if isinstance(compared, Forecast) else {}
        run = Run(Path(name), device, tuple(compared.records), COMPLETE)
    if not run.of(PhaseRecord):
        raise RecordError(f"run '{run.folder}' has no phase that ended, so no peak; give another", folder=run.folder)
    return run


def compare_html(first: Path, second: Path) -> str:
    """The comparison, or the reason in one line if a run cannot be read."""
    try:
        return Comparison.read(first, second).html()
    except RecordError as error:
        return f"<p><em>{escaped(str(error))}</em></p>"
