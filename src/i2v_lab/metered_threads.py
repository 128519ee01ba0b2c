"""Which threads a profiler meters: dispatch modes and hooks of autograd are a thread's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol


class ThreadPart(Protocol):
    """Part of a profiler that sees only the threads that it is entered in."""

    def enter_thread(self) -> None:
        """See this thread."""

    def leave_thread(self) -> None:
        """See it no more."""


class _Here(threading.local):
    """The profilers that meter a thread."""

    def __init__(self) -> None:
        self.metering: list[MeteredThreads] = []


_HERE = _Here()


class MeteredThreads:
    """Has the parts of a profiler see one thread after another, each once.

    Args:
        parts: Outermost first.

    Example:
        >>> threads = MeteredThreads([])
        >>> with threads.metered():
        ...     threads in metering_this_thread()
        True
    """

    def __init__(self, parts: Sequence[ThreadPart]) -> None:
        self._parts = parts
        self._is_over = False

    def entered(self) -> None:
        """This thread has entered the parts itself."""
        _HERE.metering.append(self)

    def end(self) -> None:
        """This thread has left the parts itself, and they see no other any more."""
        self._is_over = True
        if self in _HERE.metering:
            _HERE.metering.remove(self)

    def enter(self) -> bool:
        """Meter this thread from now on; ``False`` if it is metered already, or the profiler has ended."""
        if self._is_over or self in _HERE.metering:
            return False
        self.entered()
        for part in self._parts:
            part.enter_thread()
        return True

    def leave(self) -> None:
        """Meter this thread no more, if it is metered; also after the profiler ended in another one."""
        if self in _HERE.metering:
            _HERE.metering.remove(self)
            for part in reversed(self._parts):
                part.leave_thread()

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Meter this thread within this scope."""
        is_new = self.enter()
        try:
            yield
        finally:
            if is_new:
                self.leave()

    @staticmethod
    def clear_thread() -> None:
        """Take what profilers that ended in another thread left behind out of this one."""
        for threads in reversed(_HERE.metering[:]):
            if threads._is_over:
                threads.leave()


def metering_this_thread() -> list[MeteredThreads]:
    """The profilers that meter this thread."""
    return _HERE.metering[:]
