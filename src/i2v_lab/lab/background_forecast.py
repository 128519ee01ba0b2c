"""Background forecasts, each in a process of its own that is killed when another forecast is requested."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from i2v_lab.errors import ForecastError, I2VLabError
from i2v_lab.runs.workers import start_child, worker_context

POLL_INTERVAL_S = 0.05  # how often a running forecast is checked for cancellation
Job = tuple[Any, Callable[[], Any]]
OnEnd = Callable[[Any, Any, I2VLabError | None], None]


class LatestForecast:
    """Computes one forecast at a time, always the one requested last.

    A forecast is seconds of Python under fake tensors. It would hold the interpreter lock, and fake tensor modes are
    not safe in two threads at once; so it runs in a process, which leaves forecasts in the cache. A thread supervises
    that process; both exist only while a forecast is requested.

    Args:
        on_end: Called in that thread with what was asked, the result and the error, ``None`` if there was none; not
            called for a forecast that was cancelled or replaced.

    Example:
        >>> latest = LatestForecast(lambda spec, result, error: None)
        >>> latest.ask(spec, partial(forecast_spec, spec))  # doctest: +SKIP
        >>> latest.cancel()
    """

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._thread: threading.Thread | None = None
        self._last: threading.Thread | None = None  # the latest, which may be about to end

    def ask(self, asked: Any, work: Callable[[], Any]) -> None:
        """Request a forecast in place of any other; returns immediately.

        Args:
            asked: What is handed to ``on_end`` again.
            work: Computes the result in the process; picklable, as is the result.
        """
        with self._lock:
            self._job = (asked, work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="i2v-lab-forecast", daemon=True)
                self._last = self._thread
                self._thread.start()

    def cancel(self, wait_s: float = 0.0) -> None:
        """Kill the process of a forecast in progress.

        Args:
            wait_s: Seconds to wait for its end.
        """
        with self._lock:
            self._job = None
            thread = self._last
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait_s)

    def _run(self) -> None:
        while True:
            with self._lock:
                job = self._job
                if job is None:
                    self._thread = None
                    return
            try:
                ended, result, error = self._compute(job)
            except (OSError, RuntimeError) as problem:  # no process could be started
                reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
                ended, result = True, None
                error = ForecastError(f"no process for the forecast ({reason}); use forecast_request()")
            with self._lock:
                current = ended and self._job is job
                if current:
                    self._job = None
            if current:
                self._on_end(job[0], result, error)

    def _compute(self, job: Job) -> tuple[bool, Any, I2VLabError | None]:
        """Whether the process ended by itself, its result and its error."""
        context: Any = worker_context()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_forecast, args=(sender, dict(os.environ), job[1]), daemon=True)
        with receiver:
            process.start()
            sender.close()
            while not receiver.poll(POLL_INTERVAL_S):
                if self._job is not job:
                    process.kill()
                    process.join()
                    return False, None, None
            try:
                result, error = receiver.recv()
            except EOFError:
                process.join()
                result = None
                error = ForecastError(f"the forecast's process ended with status {process.exitcode}; ask again")
            process.join()
        return True, result, error


def _forecast(sender: Connection, environment: Mapping[str, str], work: Callable[[], Any]) -> None:
    """The child process; it ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # interrupting a cell does not cancel it
    start_child(environment)
    result: Any = None
    error: I2VLabError | None = None
    try:
        result = work()
    except I2VLabError as problem:
        error = problem
    except Exception as problem:
        reason = next(iter(str(problem).splitlines()), type(problem).__name__)
        error = ForecastError(f"the forecast failed ({reason}); ask for another request")
    sender.send((result, error))
