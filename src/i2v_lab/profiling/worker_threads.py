"""Meters the threads that a metered one starts, and what it hands to a pool: hooks and modes are a thread's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from i2v_lab.metered_threads import MeteredThreads
from i2v_lab.thread_patches import patched_here, unpatched
from i2v_lab.torch_compat import is_fake


@contextmanager
def metered_workers(threads: MeteredThreads) -> Iterator[None]:
    """Meter what this thread has others do, in threads that it starts or a pool's, from within this scope.

    So do those threads with others. A pool's thread is metered while it runs what was handed to it, whoever started it;
    any other until it ends. ``asyncio.to_thread`` hands its work to a pool. A forecast, which refuses other threads,
    goes on doing so.

    Args:
        threads: Of the profiler.

    Example:
        >>> threads = MeteredThreads([])
        >>> with metered_workers(threads), ThreadPoolExecutor(1) as pool:
        ...     pool.submit(threads.enter).result()
        False
    """
    if is_fake():
        yield
        return
    is_pools = False  # the thread that starts

    def metered(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with threads.metered(), metered_workers(threads):
                return function(*args, **kwargs)

        return run

    def start(thread: threading.Thread) -> None:
        is_progress_bars = type(thread).__module__.startswith("tqdm.")  # which computes nothing and never ends
        if not is_pools and not is_progress_bars:
            thread.run = metered(thread.run)  # type: ignore[method-assign]
        unpatched(threading.Thread, "start")(thread)

    def submit(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        nonlocal is_pools
        is_pools = True
        try:
            future: Future[Any] = unpatched(ThreadPoolExecutor, "submit")(pool, metered(function), *args, **kwargs)
            return future
        finally:
            is_pools = False

    with ExitStack() as scopes:
        scopes.enter_context(patched_here(threading.Thread, "start", start))
        scopes.enter_context(patched_here(ThreadPoolExecutor, "submit", submit))
        yield
