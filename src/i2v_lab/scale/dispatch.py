"""Tasks to workers, one at a time to each: a task whose worker dies is given to another, three times in all."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from i2v_lab.errors import I2VLabError
from i2v_lab.locks import say
from i2v_lab.scale.cluster import started
from i2v_lab.scale.workers import Workers

MOST_DEATHS = 3
MOST_WAITED = 20
TOPIC = "i2v-lab"
LOOK_S = 5.0  # between two looks at whether there still are as many workers as asked for
PATIENCE_S = 20.0  # without any worker, until that is said


@dataclass(frozen=True)
class Task:
    """A call on a worker; it may be repeated after it has returned, so what takes long is kept in files.

    A result is in its worker's memory until it is fetched. If that worker dies before, the call is made again.

    Attributes:
        name: For messages, and to count the deaths of its workers.
        function: At the top of a module; its arguments and result can be pickled.
        arguments: For it.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How a task ended.

    Attributes:
        task: Which.
        value: What it returned; ``None`` if it failed.
        error: What it raised, or that its worker died three times; ``None`` if it did not fail.
        part: Of a task with several parts, the one that it last began; otherwise its name.
    """

    task: Task
    value: Any
    error: Exception | None
    part: str


class WorkerDied(I2VLabError):
    """The worker of a task died, three times."""

    exit_status = 1


class Abandoned(I2VLabError):
    """Nobody waits for a task any more: the command that dispatched it has ended."""

    exit_status = 1


def tell(kind: str, **values: Any) -> None:
    """On a worker, within a task: tell the one who dispatched it; ``kind="began"`` names a ``part`` of a ``task``.

    Raises:
        Abandoned: There is nobody to tell.
    """
    from distributed import get_worker

    worker = get_worker()
    if worker.status.name != "running":
        raise Abandoned("the command that asked for this task has ended; run it again", **values)
    worker.log_event(TOPIC, {"kind": kind, **values})


def dispatch(
    workers: Workers,
    tasks: Iterable[Task],
    folder: Path,
    *,
    ahead: int = 0,
    told: Callable[[Mapping[str, Any]], None] = lambda event: None,
    after_death: Callable[[Ended], Iterable[Task]] = lambda ended: (),
) -> Iterator[Ended]:
    """Carry out tasks, in their order as far as there are workers, and yield each once, as they end.

    A task is carried out at least once: again if its worker dies, also between its end and the fetching of its result.

    Args:
        workers: How many, and where.
        tasks: With names of their own.
        folder: That all workers share, for their temporary keys.
        ahead: Tasks that wait at the workers, which saves some milliseconds a task; for short ones.
        told: Called with what tasks :func:`tell`, in another thread.
        after_death: What is left to do of a task whose worker died three times.

    Raises:
        WorkersUnavailable: No workers can be started.

    Example:
        >>> for ended in dispatch(Workers(2), [Task("a", len, ("word",))], Path("runs")):  # doctest: +SKIP
        ...     print(ended.value)
        4
    """
    waiting = deque(tasks)
    if not waiting:
        return
    with started(workers, folder) as (cluster, client):
        yield from _Dispatch(workers, cluster, client, waiting, ahead, told, after_death).ended()


class _Dispatch:
    """The tasks that wait and that run, and how often their workers died."""

    def __init__(
        self,
        workers: Workers,
        cluster: Any,
        client: Any,
        waiting: deque[Task],
        ahead: int,
        told: Callable[[Mapping[str, Any]], None],
        after_death: Callable[[Ended], Iterable[Task]],
    ) -> None:
        self._workers, self._cluster, self._client = workers, cluster, client
        self._waiting, self._ahead = waiting, ahead
        self._told, self._after_death = told, after_death
        self._running: dict[str, tuple[Task, Any]] = {}  # the future too: Dask forgets what nobody holds
        self._began: dict[str, str] = {}  # the part that a task last began
        self._deaths: Counter[str] = Counter()
        self._waited: Counter[str] = Counter()  # how often its worker died before it began
        self._finished: SimpleQueue[str] = SimpleQueue()
        self._submitted = 0
        self._seen_s = self._looked_s = time.monotonic()

    def ended(self) -> Iterator[Ended]:
        self._client.subscribe_topic(TOPIC, self._receive)
        while self._waiting or self._running:
            self._submit()
            try:
                key = self._finished.get(timeout=LOOK_S if self._running else 0.1)
            except Empty:
                self._look_at_workers()
                continue
            task, future = self._running.pop(key)
            ended = self._outcome(task, future)
            if ended is not None:
                yield ended
                if isinstance(ended.error, WorkerDied):
                    self._waiting.extendleft(self._after_death(ended))

    def _submit(self) -> None:
        """As many as there are workers, and those ahead: a new worker is not to find all tasks given away."""
        places = self._cluster.scheduler.total_nthreads
        while self._waiting and len(self._running) < places + min(places, self._ahead):
            task = self._waiting.popleft()
            self._submitted += 1
            key = f"{task.name}-{self._submitted}"
            self._began.pop(task.name, None)
            future = self._client.submit(_call, task.name, task.function, task.arguments, key=key, pure=False)
            self._running[key] = (task, future)
            future.add_done_callback(lambda done: self._finished.put(done.key))

    def _outcome(self, task: Task, future: Any) -> Ended | None:
        """``None`` if the task is to be done again."""
        from concurrent.futures import CancelledError

        from distributed import KilledWorker

        try:
            return Ended(task, future.result(), None, self._began.get(task.name, task.name))
        except (KilledWorker, CancelledError):
            began = self._began.get(task.name)
            part = began or task.name
            if began is None and self._ahead and self._waited[part] < MOST_WAITED:
                self._waited[part] += 1  # it waited at a worker that another task killed
            else:
                self._deaths[part] += 1
            if self._deaths[part] < MOST_DEATHS:
                self._waiting.appendleft(task)
                return None
            died = WorkerDied(
                f"{part}: its worker died {MOST_DEATHS} times (killed, or out of host memory); look at the machine's "
                "log, then repeat the command",
                part=part,
                deaths=MOST_DEATHS,
            )
            return Ended(task, None, died, part)
        except Exception as error:
            return Ended(task, None, error, self._began.get(task.name, task.name))

    def _receive(self, event: tuple[float, Any]) -> None:
        values = event[1]
        if values["kind"] == "began":
            self._began[values["task"]] = values["part"]
        self._told(values)

    def _look_at_workers(self) -> None:
        """Jobs that ended, by their time limit or with their node, are submitted again."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            self._cluster.scale(self._workers.count)
        if self._cluster.scheduler.total_nthreads:
            self._seen_s = now_s
        elif now_s - self._seen_s > PATIENCE_S:
            say("i2v-lab: no worker has started yet, or all have ended; waiting for one")
            self._seen_s = float("inf")


def _call(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    tell("began", task=name, part=name)
    return function(*arguments)
