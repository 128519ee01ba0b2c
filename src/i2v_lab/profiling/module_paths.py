"""Paths of running modules, dotted from the component they belong to; and which storages are weights."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from types import FrameType

import torch

from i2v_lab.profiling.storages import StorageSet
from i2v_lab.torch_compat import CALL


class _Overrides(threading.local):
    """What a thread reports as the running module, the innermost last."""

    def __init__(self) -> None:
        self.names: list[str] = []


class ModulePaths:
    """Finds the running module on the interpreter's stack, when asked.

    No hooks are registered, so calls of modules cost nothing. A method that bypasses the module's ``__call__``, such as
    ``decoder.decode()``, is not seen as a call of the module.

    Attributes:
        weights: Storages of all parameters and buffers of the registered components.
        phase: The running phase, set by a profiler; for messages.
        on_phase: Called when it changes.
        components: Names of the components that exist now; work outside any module's call is attributed to the newest,
            such as that of a decoder's methods other than ``forward``.

    Example:
        >>> paths = ModulePaths()
        >>> paths.register("decoder", torch.nn.Sequential(torch.nn.Linear(2, 2)))
        >>> paths.current
        ''
    """

    def __init__(self) -> None:
        self.weights = StorageSet()
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._pending: list[tuple[str, weakref.ref[torch.nn.Module]]] = []
        self._here = _Overrides()
        self._phase = ""
        self.on_phase: Callable[[], None] | None = None
        self.components: list[str] = []

    @property
    def phase(self) -> str:
        """The running phase."""
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._phase = name
        if self.on_phase is not None:
            self.on_phase()

    @property
    def current(self) -> str:
        """Path of the innermost module that is running in this thread, such as ``video_decoder.up_blocks.3``.

        Outside any module's call it is the newest of :attr:`components`, else empty. A module of no registered
        component is registered now under its class's name, below the module that calls it.
        """
        if self._here.names:
            return self._here.names[-1]
        return self._path(_modules(_outer_frames(sys._getframe(1)))) or (self.components[-1] if self.components else "")

    def raised_in(self, error: BaseException) -> str:
        """Path of the innermost module whose call an exception was raised in; empty if in none."""
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        return self._path(_modules(reversed(frames)))

    def register(self, name: str, module: torch.nn.Module) -> None:
        """Name a component, and all its submodules by their paths below it.

        The submodules are read when a path is first asked for, which on a GPU and without a graph is never.
        """
        self._pending.append((name, weakref.ref(module)))

    def _read_pending(self) -> None:
        while self._pending:  # other threads may register more
            name, reference = self._pending.pop(0)
            module = reference()
            if module is not None:
                for path, submodule in module.named_modules():
                    self._names[submodule] = f"{name}.{path}" if path else name
                self.weights.add([*module.parameters(), *module.buffers()])

    @contextmanager
    def override(self, name: str) -> Iterator[None]:
        """Report ``name`` as the running module within this scope."""
        self._here.names.append(name)
        try:
            yield
        finally:
            self._here.names.pop()

    def _path(self, modules: Iterable[torch.nn.Module]) -> str:
        """The path of the first of ``modules``, each of which was called by the next."""
        self._read_pending()
        path, unregistered = "", []
        for module in modules:
            path = self._names.get(module, "")
            if path:
                break
            unregistered.append(module)
        for module in reversed(unregistered):
            if module not in self._names:  # registered as a submodule of the one before it
                kind = type(module).__name__
                self.register(f"{path}.{kind}" if path else kind, module)
                self._read_pending()
            path = self._names[module]
        return path


def _outer_frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _modules(frames: Iterable[FrameType]) -> Iterator[torch.nn.Module]:
    return (frame.f_locals["self"] for frame in frames if frame.f_code is CALL)
