"""Progress of a reproduction, as bars in a terminal and as lines otherwise, and a table of its outcomes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from i2v_lab.display import printable
from i2v_lab.reporting.console import PlainConsole, TerminalTable
from i2v_lab.units import format_seconds


@dataclass(frozen=True)
class Outcome:
    """The outcome of one notebook.

    Attributes:
        notebook: The executed copy, partial if a cell failed.
        error: The error in one line; ``None`` if there was none.
        seconds: Duration; ``None`` if the notebook was up to date.
    """

    notebook: Path
    error: str | None
    seconds: float | None

    def __str__(self) -> str:
        if self.error is not None:
            return f"failed: {self.error}"
        return "up to date" if self.seconds is None else "done"


class RunReport:
    """Shows the progress of each notebook on stderr; may be called from any thread.

    Args:
        names: Names of all notebooks of the run, in their order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._plain = (
            not sys.stderr.isatty()
        )  # not the console's is_terminal, which FORCE_COLOR in a notebook makes true
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TimeElapsedColumn(),
            console=PlainConsole(stderr=True),
            disable=self._plain,
            transient=True,  # the lines and the table remain
        )
        self._all = self._bars.add_task("all", total=len(names), unit="notebooks")
        self._tasks: dict[str, TaskID] = {}

    def estimated(self, stale: int, out: Path) -> None:
        """Say beforehand how long so many notebooks take, and where they go, if there are any to execute."""
        if stale:
            words = "half a minute each with cached forecasts, one to five minutes without, 06 twenty"
            self._print(f"{stale} to execute, into {out}: about {words}")

    def started(self, name: str, why: str | None) -> None:
        """Report that a notebook starts; ``why`` is the reason why its last run is stale, if there was one."""
        self._line(name, f"started, since {why}" if why else "started")
        if name not in self._tasks:  # else its worker died, and another one starts it again
            self._tasks[name] = self._bars.add_task(f"  {name}", total=None, unit="cells")

    def cell(self, name: str, index: int, cells: int) -> None:
        """Report the number of cells of a notebook that have ended."""
        self._bars.update(self._tasks[name], completed=index, total=cells)

    def ended(self, name: str, outcome: Outcome) -> None:
        """Report that a notebook has ended or is up to date."""
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
        self._bars.advance(self._all)
        took = "" if outcome.seconds is None else f" ({format_seconds(outcome.seconds, rough=True)})"
        self._line(name, f"{outcome}{took}")

    def _line(self, name: str, text: str) -> None:
        self._print(f"[{self._names.index(name) + 1}/{len(self._names)}] {name}: {text}")

    def _print(self, line: str) -> None:
        if self._plain:
            sys.stderr.write(
                f"{printable(line, lines=False)}\n"
            )  # one call, so that lines of several threads do not mix
            sys.stderr.flush()
        else:
            self._bars.console.print(line, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


def print_summary(outcomes: Sequence[Outcome], out: Path) -> None:
    """Print the outcome of every notebook as a table, and the path of the site below the build folder."""
    table = TerminalTable("notebook", "outcome", "time", header_style="bold")
    table.columns[-1].justify = "right"
    for outcome in outcomes:
        style = "bold red" if outcome.error else ""
        seconds = "" if outcome.seconds is None else format_seconds(outcome.seconds, rough=True)
        table.add_row(outcome.notebook.stem, Text(printable(str(outcome)), style=style), seconds)
    console = PlainConsole()
    console.print(table)
    console.print(str(out / "site" / "index.html"), soft_wrap=True)
