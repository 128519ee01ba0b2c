"""Two recorded runs side by side: sentences, figures and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from i2v_lab.display import escaped
from i2v_lab.errors import RecordError
from i2v_lab.reporting.figures import live
from i2v_lab.reporting.headlines import difference_headline, headline
from i2v_lab.reporting.run_tables import difference_table
from i2v_lab.reporting.tables import as_sentence, html_table, readable
from i2v_lab.runs.store import Run, read_run, run_folders

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
        'peak 30.1 MiB instead of 56.3 MiB: -26.2 MiB (-47 %); 4.71 s instead of 4.90 s'
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

    @property
    def headline(self) -> str:
        """How the second differs from the first, in one sentence."""
        return difference_headline(self.first, self.second)

    def html(self) -> str:
        """Both headlines, bars, timelines, and the difference phase by phase."""
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


def compare_html(first: Path, second: Path) -> str:
    """The comparison, or the reason in one line if a run cannot be read."""
    try:
        return Comparison.read(first, second).html()
    except RecordError as error:
        return f"<p><em>{escaped(str(error))}</em></p>"
