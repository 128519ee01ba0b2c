"""A forecast that nobody waits for: in a process of its own, and ended when another one is wanted instead."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from i2v_lab.errors import ForecastError, I2VLabError
from i2v_lab.runs.forecast import forecast_spec
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.workers import start_child, worker_context

LOOK_S = 0.05  # between two looks at whether something else is wanted
Wanted = tuple[RunSpec, str]
OnEnd = Callable[[RunSpec, I2VLabError | None], None]


class LatestForecast:
    """Works out one forecast at a time, always the one that was asked for last.

    Forecasts take seconds of Python under fake tensors, which would hold the interpreter and are no business for two
    threads; so each runs in a process, and is in the cache when that has ended. A thread looks after it for as long as
    something is wanted; between forecasts there is neither.

    Args:
        on_end: Called in that thread, with the spec and what went wrong, if anything; not for a forecast that
            was overtaken.

    Example:
        >>> latest = LatestForecast(lambda spec, error: None)
        >>> latest.ask(RunSpec(request=request))  # doctest: +SKIP
        >>> latest.drop()
    """

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._lock = threading.Lock()
        self._wanted: Wanted | None = None
        self._thread: threading.Thread | None = None

    def ask(self, spec: RunSpec, device: str = "cuda") -> None:
        """Want this forecast instead of any other; returns at once."""
        with self._lock:
            self._wanted = (spec, device)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="i2v-lab-forecast", daemon=True)
                self._thread.start()

    def drop(self, wait_s: float = 0.0) -> None:
        """Want nothing any more: the process that is at work ends.

        Args:
            wait_s: How long to wait until it has.
        """
        with self._lock:
            self._wanted = None
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait_s)

    def _serve(self) -> None:
        while True:
            with self._lock:
                wanted = self._wanted
                if wanted is None:
                    self._thread = None
                    return
            try:
                ended, error = self._work_out(wanted)
            except (OSError, RuntimeError) as problem:  # no process could be started
                reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
                ended, error = True, ForecastError(f"no process for the forecast ({reason}); use forecast_request()")
            with self._lock:
                current = ended and self._wanted is wanted
                if current:
                    self._wanted = None
            if current:
                self._on_end(wanted[0], error)

    def _work_out(self, wanted: Wanted) -> tuple[bool, I2VLabError | None]:
        """Whether the forecast came to its end, and what went wrong."""
        context: Any = worker_context()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_forecast, args=(sender, dict(os.environ), *wanted), daemon=True)
        with receiver:
            process.start()
            sender.close()
            while not receiver.poll(LOOK_S):
                if self._wanted is not wanted:
                    process.kill()
                    process.join()
                    return False, None
            try:
                error = receiver.recv()
            except EOFError:
                process.join()
                error = ForecastError(f"the forecast's process ended with status {process.exitcode}; ask again")
            process.join()
        return True, error


def _forecast(sender: Connection, environment: Mapping[str, str], spec: RunSpec, device: str) -> None:
    """In a process of its own, which also ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted cell is no reason
    start_child(environment)
    error: I2VLabError | None = None
    try:
        forecast_spec(spec, device)
    except I2VLabError as problem:
        error = problem
    except Exception as problem:
        reason = next(iter(str(problem).splitlines()), type(problem).__name__)
        error = ForecastError(f"the forecast of {spec.name} failed ({reason}); ask for another request")
    sender.send(error)
