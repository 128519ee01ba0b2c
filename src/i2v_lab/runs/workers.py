"""Worker processes that start quickly: the libraries are imported once, the code of this package in each worker.

A fork server imports the libraries and nothing else; each worker is forked from it, so that it has the state of a new
interpreter after those imports, and no CUDA context, which does not survive a fork.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any

from i2v_lab.files import scratch_folder
from i2v_lab.profiling.meters.nvml import driver_cuda_major
from i2v_lab.runs import fork_server
from i2v_lab.stopping import on_stop, stop_on_signals

# What takes seconds to import and asks nothing of the device meanwhile. Not ltx_pipelines, which looks for CUDA when it
# is imported, nor this package, so that code changed since (in a notebook's kernel, say) is the code that runs.
LIBRARIES = (
    "torch",
    "torchaudio",
    "transformers.models.gemma3.modeling_gemma3",
    "av",
    "ltx_core.loader",
    "ltx_core.model.transformer",
    "ltx_core.model.video_vae",
    "ltx_core.model.audio_vae",
    "ltx_core.text_encoders.gemma",
)
WITHOUT_TRANSFORMERS = ("torch", "torchaudio", "av")
"""Those of them that import no torchao, which looks for CUDA when it is imported, as by transformers."""

END_S = 1.0
"""Seconds that a worker has to remove its partial files before it is killed."""

_FOR_GOOD = ExitStack()
_starting = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: Its exit status; negative where a signal ended it.
        errors: What it wrote on stderr.
    """

    status: int
    errors: str


@cache
def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    _FOR_GOOD.enter_context(on_stop(_end_workers, children_first=False))
    # What multiprocessing removes when Python exits, which a stopped command does not wait for.
    _FOR_GOOD.enter_context(on_stop(partial(shutil.rmtree, multiprocessing.util.get_temp_dir(), True)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([fork_server.__name__, *_preloaded()])
    return context


def _preloaded() -> tuple[str, ...]:
    """What the fork server imports: no torchao where there is a card, whose context does not survive a fork."""
    asks_cuda = importlib.util.find_spec("torchao") is not None and driver_cuda_major() is not None
    return WITHOUT_TRANSFORMERS if asks_cuda else LIBRARIES


def worker_context() -> BaseContext:
    """Where processes of this package come from, for :mod:`multiprocessing` and :mod:`concurrent.futures`.

    The fork server is started here, with SIGINT blocked: Ctrl-C in a terminal, which every process there receives, is
    for the one that asked. Where a process cannot be forked (Windows) each one imports everything itself.
    """
    context = _context()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver, resource_tracker

        with _starting:  # several threads may ask, and the environment is that of all
            resource_tracker.ensure_running()  # by itself: it unblocks SIGINT at its end
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            os.environ[fork_server.CALLER_VARIABLE] = str(os.getpid())
            try:
                forkserver.ensure_running()
            finally:
                del os.environ[fork_server.CALLER_VARIABLE]
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


def run_in_child(function: Callable[..., None], *args: Any) -> Ended:
    """Call a function in a process of its own and wait for its end; what it prints is not shown.

    The process has the environment of the caller's at this moment. It ends with this one, and if the waiting is
    interrupted.

    Args:
        function: At the top of a module; ends with status 0, or as :func:`sys.exit` says.
        args: For it; picklable.

    Example:
        >>> from i2v_lab.runs.workers import run_in_child
        >>> run_in_child(print, "hello").status  # doctest: +SKIP
        0
    """
    with scratch_folder() as folder:
        errors = folder / "stderr"
        process = worker_context().Process(  # type: ignore[attr-defined]
            target=_begin, args=(dict(os.environ), str(errors), function, args), daemon=True
        )
        process.start()
        try:
            process.join()
        finally:
            if process.is_alive():
                process.terminate()
                process.join(END_S)
                process.kill()
                process.join()
        text = errors.read_text(encoding="utf-8", errors="replace") if errors.exists() else ""
        return Ended(process.exitcode, text)


def _begin(environment: Mapping[str, str], errors: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    end_on_interrupt()
    start_child(environment)
    written = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    function(*args)


def end_on_interrupt() -> None:
    """In a process of :func:`worker_context`: a signal ends it without a word, its partial files removed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    stop_on_signals(say=False)


def _end_workers() -> None:
    """Before they are killed: they can then remove their partial files."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    deadline_s = time.monotonic() + END_S
    left = [worker.sentinel for worker in workers]
    while left and (left_s := deadline_s - time.monotonic()) > 0:
        left = [sentinel for sentinel in left if sentinel not in wait(left, left_s)]


def start_child(environment: Mapping[str, str]) -> None:
    """In a process of :func:`worker_context`: have the environment of who asked, and end with them, killed or not."""
    os.environ.clear()
    os.environ.update(environment)
    enable_mkl_cnr()
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def enable_mkl_cnr() -> None:
    """Have MKL, which reads this at its first product, choose kernels that do not go by their operands' addresses.

    Else a product of float32 on a CPU differs in its last bits from process to process, and a seed's frames with it.
    ``COMPATIBLE`` is the only value of ``MKL_CBWR`` that does so on every processor; no product on a GPU is MKL's.
    """
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")


def _exit_with_parent() -> None:
    """A process whose parent was killed would go on, with a GPU's memory in its hands."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
