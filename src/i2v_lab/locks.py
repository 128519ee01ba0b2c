"""Locks between processes, which the kernel releases with the process that holds one, however that ends."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from i2v_lab.errors import OutputError
from i2v_lab.stopping import on_stop

INTERVAL_S = 0.1  # between two looks at a lock that another process holds


@contextmanager
def exclusive(lock: Path, target: Path, *, wait: Callable[[str], object] | None = None) -> Iterator[None]:
    """Write ``target`` within this scope, which one process (and one thread of it) enters at a time.

    The file of the lock is removed at the end. One that a killed process left is no lock. Where the file system has no
    locks (some network file systems, Windows), nothing is locked.

    Args:
        lock: The file; its folder is made if there is none.
        target: What is written, for the message.
        wait: Called once, with a line that says on whom this process waits; without it, it does not wait.

    Raises:
        OutputError: Another process writes it, and ``wait`` is not given; ``fields`` has its ``process`` and ``host``.
        OSError: The lock's folder cannot be written.

    Example:
        >>> with exclusive(Path(".table.lock"), Path("table.csv")):
        ...     written = Path("table.csv").write_text("peak_bytes")
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(lock, target, wait)
    remove = partial(lock.unlink, missing_ok=True)
    try:
        with on_stop(remove):
            try:
                yield
            finally:
                with suppress(OSError):
                    remove()
    finally:
        os.close(descriptor)


def say(line: str) -> None:
    """A line on stderr, except where progress is not shown, as in a kernel whose output goes into a page."""
    if os.environ.get("TQDM_DISABLE", "0") in ("", "0"):
        print(line, file=sys.stderr, flush=True)


def lock_beside(target: Path) -> Path:
    """A lock's path in the folder that ``target`` is in; short, whatever the target's name."""
    return target.with_name(f".{_digest(target.name)}.lock")


def lock_on_this_machine(target: Path) -> Path:
    """A lock's path in the folder of temporary files, for a target in whose folder nothing else should be."""
    return Path(tempfile.gettempdir()) / f"i2v-lab-{_digest(str(target.resolve()))}.lock"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def _acquire(lock: Path, target: Path, wait: Callable[[str], object] | None) -> int:
    has_waited = False
    while True:
        descriptor = _open(lock)
        if _try(descriptor):
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), lock.stat()):  # else its last holder has removed it
                    with suppress(OSError):  # another user's
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
                    return descriptor
            os.close(descriptor)
            continue
        process, host = _holder(descriptor)
        os.close(descriptor)
        writer = f"process {process} on {host}" if host else "another process"
        if wait is None:
            raise OutputError(
                f"'{target}' is being written by {writer}; wait for its end, or choose another place",
                path=target,
                process=process,
                host=host,
            )
        if not has_waited:
            wait(f"i2v-lab: '{target}' is being written by {writer}; waiting for its end")
            has_waited = True
        time.sleep(INTERVAL_S)


def _holder(descriptor: int) -> tuple[str, str]:
    """Process and host, which the holder writes as soon as it has the lock; empty if it does not."""
    for _ in range(5):
        process, _, host = os.pread(descriptor, 1000, 0).decode(errors="replace").partition(" ")
        if host:
            break
        time.sleep(INTERVAL_S)
    return process, host


def _open(lock: Path) -> int:
    no_link = getattr(os, "O_NOFOLLOW", 0)  # in a folder of temporary files, which is everybody's
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | no_link, 0o666)
    except PermissionError:
        if not lock.exists():
            raise
        return os.open(lock, os.O_RDONLY | no_link)  # another user's


def _try(descriptor: int) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
