"""Which threads a profiler meters: dispatch modes and hooks of autograd are a thread's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Protocol


class ThreadPart(Protocol):
    """Part of a profiler that sees only the threads that it is entered in."""

    def enter_thread(self) -> None:
        """See this thread."""

    def leave_thread(self) -> None:
        """See it no more."""


class MeteredThreads:
    """Has the parts of a profiler see one thread after another, each once.

    Args:
        parts: Outermost first.
    """

    _left_behind: ClassVar[list[MeteredThreads]] = []  # of profilers that ended in another thread

    def __init__(self, parts: Sequence[ThreadPart]) -> None:
        self._parts = parts
        self._threads: set[int] = set()

    def entered(self) -> None:
        """This thread has entered the parts itself."""
        self._threads.add(threading.get_ident())

    def left(self) -> None:
        """This thread has left the parts itself."""
        self._threads.discard(threading.get_ident())

    def end(self) -> None:
        """The profiler ended, in this thread; in others that it metered its parts see nothing any more."""
        self.left()
        if self._threads:
            self._left_behind.append(self)

    @classmethod
    def clear_thread(cls) -> None:
        """Take what profilers that ended in another thread left behind out of this one."""
        for threads in list(cls._left_behind):
            threads.leave()
            if not threads._threads:
                cls._left_behind.remove(threads)

    def enter(self) -> bool:
        """Meter this thread from now on; ``False`` if it is metered already."""
        if threading.get_ident() in self._threads:
            return False
        self.entered()
        for part in self._parts:
            part.enter_thread()
        return True

    def leave(self) -> None:
        """Meter this thread no more, if it is metered; also after the profiler ended in another one."""
        if threading.get_ident() in self._threads:
            self.left()
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
