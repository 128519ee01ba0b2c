"""The runs of a plan on workers: each a process of its own that sees one card, recorded in its folder."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from i2v_lab.errors import I2VLabError, OutputError
from i2v_lab.files import remove_partial_files
from i2v_lab.locks import exclusive, lock_beside, say
from i2v_lab.runs.measure import mark_failed, measure
from i2v_lab.runs.plans import PlannedRun
from i2v_lab.runs.spec import RunSpec
from i2v_lab.scale.dispatch import MOST_DEATHS, Ended, Task, WorkerDied, dispatch, tell
from i2v_lab.scale.workers import Workers
from i2v_lab.stopping import on_stop


@dataclass(frozen=True)
class Measured:
    """How a run of a plan ended; its records are in its folder.

    Attributes:
        name: The run's.
        error: Why there is no result, in one line; empty if there is one.
        seconds: From the start of its process to its end; ``None`` where the worker died.
    """

    name: str
    error: str
    seconds: float | None = None


def measure_on(
    workers: Workers,
    planned: Sequence[PlannedRun],
    out: Path,
    device: str,
    *,
    began: Callable[[str], None] = lambda name: None,
    ended: Callable[[Measured], None] = lambda measured: None,
) -> dict[str, Measured]:
    """Measure runs on workers.

    Runs that are made in turns, to compare their times, stay together on one worker, one after another. A run whose
    process or worker dies is repeated, and is marked as failed after the third time.

    Args:
        workers: How many, and where.
        planned: What is to be run.
        out: Folder of the run directories, which all workers share.
        device: ``auto``, ``cpu`` or ``cuda``.
        began: Called with the name of a run that begins.
        ended: Called once for each run, when it has ended. Both are called in another thread.

    Returns:
        How each run ended, by its name.

    Raises:
        WorkersUnavailable: No workers can be started.
    """
    specs = {each.name: each.spec for each in planned}
    results: dict[str, Measured] = {}
    lock = threading.Lock()

    def report(measured: Measured) -> None:
        with lock:
            if measured.name not in results:
                results[measured.name] = measured
                ended(measured)

    def told(event: Mapping[str, Any]) -> None:
        if event["kind"] == "ended":
            report(Measured(event["part"], event["error"], event["seconds"]))
        elif event["part"] in specs:
            with lock:
                began(event["part"])

    def task(names: Sequence[str]) -> Task:
        runs = tuple((name, specs[name].to_json(), str(out.absolute() / name)) for name in names)
        return Task(names[0], _measure_here, (names[0], runs, device, tempfile.gettempdir()))

    def rest(dead: Ended) -> list[Task]:
        names = _names(dead.task)
        left = names[names.index(dead.part) + 1 :]
        return [task(left)] if left else []

    def finished(task: Ended) -> None:
        if isinstance(task.error, WorkerDied):
            mark_failed(specs[task.part], out / task.part, device, task.error)
            report(Measured(task.part, str(task.error)))
        elif task.error is not None:
            for name in _names(task.task):
                report(Measured(name, " ".join(str(task.error).split())))
        else:
            for values in task.value:
                report(Measured(*values))

    clean_up = partial(_clean_up, [out / name for name in specs])
    with on_stop(clean_up) if workers.local else nullcontext():
        for each in dispatch(workers, map(task, _together(planned)), out, told=told, after_death=rest):
            finished(each)
    return results


def _clean_up(folders: Sequence[Path]) -> None:
    """What workers of this machine that were killed left: partial files, and the files of locks that nobody holds."""
    for folder in folders:
        lock = lock_beside(folder)
        if lock.exists():
            with suppress(OutputError, OSError), exclusive(lock, folder):
                remove_partial_files(folder)


def _names(task: Task) -> list[str]:
    return [name for name, *_ in task.arguments[1]]


def _together(planned: Sequence[PlannedRun]) -> list[list[str]]:
    """Names of runs, with those in one list that are made in turns."""
    tasks: dict[Any, list[str]] = {}
    for each in planned:
        tasks.setdefault(each.name if each.turns is None else each.turns, []).append(each.name)
    return list(tasks.values())


# --- On a worker ------------------------------------------------------------------------------------------------------


def _measure_here(
    task: str, runs: Sequence[tuple[str, dict[str, Any], str]], device: str, locks: str
) -> list[tuple[str, str, float]]:
    done = []
    for name, spec, folder in runs:
        start_s = time.monotonic()
        with _own_card(Path(locks)):
            tell("began", task=task, part=name)
            error = _measure_one(RunSpec.from_json(spec), Path(folder), device)
        done.append((name, error, time.monotonic() - start_s))
        tell("ended", part=name, error=error, seconds=done[-1][-1])
    return done


def _measure_one(spec: RunSpec, folder: Path, device: str) -> str:
    for death in range(1, MOST_DEATHS + 1):
        try:
            measure(spec, folder, device)
        except I2VLabError as error:
            if (error.fields.get("status") or 0) >= 0:  # it ended by itself
                return str(error)
            if death == MOST_DEATHS:
                died = WorkerDied(f"{error}, {death} times; repeat the command", **error.fields)
                mark_failed(spec, folder, device, died)
                return str(died)
        else:
            return ""
    raise AssertionError


def _own_card(locks: Path) -> AbstractContextManager[None]:
    """The lock of the card that this worker sees: no other one of this machine, whoever's, uses it meanwhile."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not card or "," in card:
        return nullcontext()
    return exclusive(locks / f"i2v-lab-{card}.lock", Path(f"card {card}"), wait=say)
