"""Notebooks on workers, one task each: executed there as they are here, with the card that the worker sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from i2v_lab.scale.dispatch import Task, dispatch, tell
from i2v_lab.scale.workers import Workers


def execute_on(
    workers: Workers,
    notebooks: Sequence[tuple[Path, Mapping[str, Any]]],
    out: Path,
    *,
    started: Callable[[str], None],
    cell: Callable[[str, int, int], None],
) -> Iterator[tuple[str, str | None, float | None]]:
    """Execute notebooks into ``out/notebooks``, and yield each as it ends.

    Args:
        workers: How many, and where.
        notebooks: The sources with their parameters.
        out: The build folder, which all workers share.
        started: Called in another thread with the name of a notebook that begins; again if its worker died.
        cell: Called in another thread before each cell, with the name, the cell's index and the number of cells.

    Yields:
        Name, error in one line or ``None``, and seconds, ``None`` where the worker died.

    Raises:
        WorkersUnavailable: No workers can be started.
    """

    def told(event: Mapping[str, Any]) -> None:
        if event["kind"] == "began":
            started(event["part"])
        else:
            cell(event["name"], event["index"], event["cells"])

    tasks = [
        Task(notebook.stem, _execute_here, (notebook.resolve(), dict(given), out.absolute() / "notebooks"))
        for notebook, given in notebooks
    ]
    for ended in dispatch(workers, tasks, out, told=told):
        if ended.error is not None:
            yield ended.task.name, " ".join(str(ended.error).split()), None
        else:
            error, seconds = ended.value
            yield ended.task.name, error, seconds


def _execute_here(notebook: Path, given: dict[str, Any], folder: Path) -> tuple[str | None, float]:
    from i2v_lab.reproduce.execution import Executor

    def on_cell(index: int, cells: int) -> None:
        tell("cell", name=notebook.stem, index=index, cells=cells)

    start_s = time.monotonic()
    error = Executor().execute(notebook, given, folder / notebook.name, on_cell)
    return error, time.monotonic() - start_s
