"""Which module is running, by its dotted path from the component it belongs to; and which storages are weights."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from traceback import walk_tb
from types import FrameType
from typing import Any

import torch

_CALL = torch.nn.Module._call_impl.__code__  # the one function that every call of a module passes through


class StorageSet:
    """A set of storages that holds none of them alive; a storage leaves it when its last owner lets go."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add the storages of these tensors."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._references:
                self._references[key] = weakref.ref(storage, partial(self._forget, key))

    def __contains__(self, key: int) -> bool:
        """Whether the storage at this address (``untyped_storage()._cdata``) is in the set."""
        return key in self._references

    def _forget(self, key: int, reference: weakref.ref[Any]) -> None:
        if self._references.get(key) is reference:
            del self._references[key]


class ModulePaths:
    """Names the module that is running, when asked: found on the interpreter's stack.

    Nothing is hooked into the modules, so that a call of one costs nothing here. A method that is called past the
    module's own call, such as ``decoder.decode()``, is not a module's call.

    Attributes:
        weights: Storages of all parameters and buffers of the components met before a path was last asked for.
        phase: The phase that is running, as a profiler has set it; for messages.
        components: Names of components that exist now; work outside any module's call is on behalf of the newest, such
            as that of a decoder's methods other than ``forward``.

    Example:
        >>> paths = ModulePaths()
        >>> paths.name_tree("decoder", torch.nn.Sequential(torch.nn.Linear(2, 2)))
        >>> paths.current
        ''
    """

    def __init__(self) -> None:
        self.weights = StorageSet()
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._unread: list[tuple[str, weakref.ref[torch.nn.Module]]] = []
        self._inside: list[str] = []
        self.phase = ""
        self.components: list[str] = []

    @property
    def current(self) -> str:
        """Path of the innermost module that is running in this thread, such as ``video_decoder.up_blocks.3``.

        Outside any module's call it is the newest of :attr:`components`, else empty. A module that belongs to no
        component is given a name now, after its class, below that of the module that calls it.
        """
        if self._inside:
            return self._inside[-1]
        return self._path(_modules(_outwards(sys._getframe(1)))) or (self.components[-1] if self.components else "")

    def failed_in(self, error: BaseException) -> str:
        """Path of the innermost module whose call an exception came out of; empty if it came out of none."""
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        return self._path(_modules(reversed(frames)))

    def name_tree(self, name: str, module: torch.nn.Module) -> None:
        """Call a component ``name`` and all its parts by their paths below it.

        The parts are looked at when a path is first asked for, which on a GPU and without a graph is never.
        """
        self._unread.append((name, weakref.ref(module)))

    def _read_trees(self) -> None:
        for name, reference in self._unread:
            module = reference()
            if module is not None:
                for path, part in module.named_modules():
                    self._names[part] = f"{name}.{path}" if path else name
                self.weights.add([*module.parameters(), *module.buffers()])
        self._unread.clear()

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """As if the module called ``name`` were running."""
        self._inside.append(name)
        try:
            yield
        finally:
            self._inside.pop()

    def _path(self, modules: Iterable[torch.nn.Module]) -> str:
        """The path of the first of ``modules``, each of which was called by the next."""
        self._read_trees()
        path, strangers = "", []
        for module in modules:
            path = self._names.get(module, "")
            if path:
                break
            strangers.append(module)
        for module in reversed(strangers):
            if module not in self._names:  # as a part of the stranger before it
                kind = type(module).__name__
                self.name_tree(f"{path}.{kind}" if path else kind, module)
                self._read_trees()
            path = self._names[module]
        return path


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _modules(frames: Iterable[FrameType]) -> Iterator[torch.nn.Module]:
    return (frame.f_locals["self"] for frame in frames if frame.f_code is _CALL)
