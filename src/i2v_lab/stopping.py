"""How a command ends on SIGINT or SIGTERM: at once and in order, with nothing raised in the code that is running.

What a signal handler raises arrives anywhere: in the callback of a weak reference, where Python drops it, or halfway
through an update. Here the main thread stands still instead, wherever it is, while another thread ends the child
processes, undoes what :func:`on_stop` names, and ends the process. Code that runs in a notebook or a program of one's
own is not concerned: there Ctrl-C is a ``KeyboardInterrupt``, as ever.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType
from typing import Any, NoReturn

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
GRACE_S = 1.9
"""Seconds until child processes are killed that have not ended in order."""
LAST_S = 0.5
"""Seconds for what is undone after that."""
REPEAT_S = 0.3
"""Seconds after which another signal ends the grace; ``timeout`` sends each one twice."""

Action = Callable[[], object]

_lock = threading.Lock()
_first: dict[object, Action] = {}
_last: dict[object, Action] = {}
_undoing: set[int] = set()  # threads
_psutil: list[Any] = []  # the module, once it is imported
_stopped_by: int | None = None  # the signal


@contextmanager
def on_stop(action: Action, *, children_first: bool = True) -> Iterator[None]:
    """Have ``action`` called if the command is stopped within this scope, which then does not end by itself.

    It is called in a thread of its own, while other threads go on; of several actions, the last is called first.

    Args:
        action: Takes a moment, and no lock that the main thread may hold.
        children_first: Call it once all child processes have ended; else before they are killed.

    Example:
        >>> with on_stop(lambda: Path("half.mp4").unlink()):
        ...     pass
    """
    actions, key = _last if children_first else _first, object()
    with _lock:
        if _stopped_by is not None and threading.get_ident() not in _undoing:
            _stand_still(_stopped_by)
        actions[key] = action
    try:
        yield
    finally:
        actions.pop(key, None)


def stop_on_signals(*, say: bool = True) -> None:
    """Have SIGINT and SIGTERM end this process as this module says; for a command, before all else. Again is no harm.

    A signal that the caller of the command ignores, as a shell does for a job in the background, stays ignored.

    Args:
        say: Print a line at the end; not for a process of which the user knows nothing.
    """
    _watch_signals(say)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # as the caller may have them, in the moment of a fork
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stand_still)


@cache
def _watch_signals(say: bool) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_wait_for_signal, args=(reader, say), daemon=True).start()
    threading.Thread(target=_import_psutil, daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to even while the main thread is in a kernel


def _stand_still(number: int, frame: FrameType | None = None) -> NoReturn:
    """In the main thread, which may be halfway through anything."""
    time.sleep(GRACE_S + LAST_S + 1)
    os._exit(128 + number)


def _wait_for_signal(signals: int, say: bool) -> None:
    global _stopped_by
    while True:
        number = os.read(signals, 1)[0]
        if signal.getsignal(number) is _stand_still:  # other handlers write here too
            break
    _stopped_by = number
    if _lock.acquire(timeout=0.2):  # for what is being registered, unless the main thread stands still within that
        _lock.release()
    _call(_first, signals, GRACE_S)
    _kill_children()
    _call(_last, signals, LAST_S)
    words = f"i2v-lab: {SIGNALS[signal.Signals(number)]}\n"
    with suppress(OSError):
        if say:
            os.write(2, (f"\n\x1b[?25h{words}" if os.isatty(2) else words).encode())  # bars hide the cursor
    os._exit(128 + number)


def _call(actions: dict[object, Action], signals: int, most_s: float) -> None:
    """Call actions in another thread, the last first, and wait for them: not longer than this, and no second signal."""
    done, tell = os.pipe()  # of this call alone: what was waited for in vain may end later

    def call() -> None:
        _undoing.add(threading.get_ident())
        for action in reversed(list(actions.values())):
            with suppress(BaseException):
                action()
        os.write(tell, b"\0")

    _thread.start_new_thread(call, ())  # not threading.Thread, whose locks the main thread may hold
    since_s = time.monotonic()
    while (left_s := since_s + most_s - time.monotonic()) > 0:
        ready = select.select([signals, done], [], [], left_s)[0]
        if signals in ready:
            os.read(signals, 1)
        if done in ready or (ready and time.monotonic() - since_s > REPEAT_S):
            return


def _import_psutil() -> None:
    """Ahead of need, and apart from who waits: the main thread may stand still with the lock of an import."""
    import psutil

    _psutil.append(psutil)


def _kill_children() -> None:
    if not _psutil:  # in the first moments, in which there are none
        return
    (psutil,) = _psutil
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(children, timeout=0.5)
