"""Progress of a generation on stderr: bars in a terminal, one line per phase otherwise."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from i2v_lab.display import printable
from i2v_lab.events import Event, Note, Phase, PhaseEnded, PhaseStarted, StepEnded
from i2v_lab.reporting.console import PlainConsole
from i2v_lab.units import format_seconds


class ManyReport:
    """One bar for all of many runs in a terminal, and a line for each; only the lines elsewhere.

    Args:
        total: How many there are.
        unit: What they are, in the plural.

    Example:
        >>> with ManyReport(2, "runs") as report:  # doctest: +SKIP
        ...     report.ended("64x64x9", "complete, 8 s")
    """

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._ended = total, 0
        self._bars = Progress(
            TextColumn(unit),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=PlainConsole(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._all = self._bars.add_task("", total=total)
        self._running: list[str] = []

    def began(self, name: str) -> None:
        """Show that one is running; in a terminal only."""
        self._running = [*(each for each in self._running if each != name), name]
        self._bars.update(self._all, description=", ".join(self._running[-3:]))

    def ended(self, name: str, words: str = "") -> None:
        """Count one that has ended, and print its line if it has ``words``."""
        self._ended += 1
        self._running = [each for each in self._running if each != name]
        self._bars.update(self._all, completed=self._ended, description=", ".join(self._running[-3:]))
        if not words:
            return
        line = printable(f"[{self._ended}/{self._total}] {name}: {words}", lines=False)
        if self._bars.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bars.console.print(line, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


class ProgressReport:
    """An event sink that shows the progress of a generation and of writing its frames.

    Args:
        frames: Number of frames of the video.
    """

    def __init__(self, frames: int) -> None:
        self._plain = (
            not sys.stderr.isatty()
        )  # not the console's is_terminal, which FORCE_COLOR in a notebook makes true
        self._bars = Progress(
            TextColumn("{task.description:<16}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=PlainConsole(stderr=True),
            disable=self._plain,
        )
        self._tasks: dict[Phase | str, TaskID] = {}
        self._frames = frames

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        match event:
            case PhaseStarted(phase=phase):
                self._tasks[phase] = self._bars.add_task(phase.value, total=None)
            case StepEnded(phase=phase, step=step, steps=steps):
                self._bars.update(self._tasks[phase], total=steps, completed=step)
            case PhaseEnded(phase=phase, seconds=seconds, completed=completed):
                task = self._tasks[phase]
                if completed and self._bars.tasks[task].total is None:
                    self._bars.update(task, total=1, completed=1)
                self._bars.stop_task(task)
                if self._plain:
                    print(f"{phase.value:<16} {format_seconds(seconds):>9}", file=sys.stderr, flush=True)
            case Note(text=text):
                self.note(text)

    def checked(self, name: str, tensors: int, total: int) -> None:
        """Show the progress of verifying a weight file, in tensors."""
        key = f"check {name}"
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(key, total=total)
        self._bars.update(self._tasks[key], completed=tensors)

    def note(self, text: str) -> None:
        """Print a line about the run."""
        self._bars.console.print(text, soft_wrap=True)

    def frame_written(self) -> None:
        """Count a frame that was written to the file."""
        if "file" not in self._tasks:
            self._tasks["file"] = self._bars.add_task("write file", total=self._frames)
        self._bars.advance(self._tasks["file"])

    def __enter__(self) -> Self:
        if not self._plain:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._plain:
            self._bars.stop()
