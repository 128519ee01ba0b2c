"""Which module is running, by its dotted path from the component it belongs to; and which storages are weights."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch.nn.modules import module as torch_module


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
    """Follows the calls of all modules in the process while it is active, by torch's global forward hooks.

    Attributes:
        weights: Storages of all parameters and buffers of the components met so far.
        phase: The phase that is running, as a profiler has set it; for messages.
        components: Names of components that exist now; work outside any module's call is on behalf of the newest, such
            as that of a decoder's methods other than ``forward``.
        failed_at: Path of the innermost module that the last exception came out of.

    Example:
        >>> with ModulePaths() as paths:
        ...     paths.name_tree("decoder", torch.nn.Sequential(torch.nn.Linear(2, 2)))
        ...     paths.current
        ''
    """

    def __init__(self) -> None:
        self.weights = StorageSet()
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._stack: list[str] = []
        self._handles: list[Any] = []
        self._failure = 0
        self.phase = ""
        self.components: list[str] = []
        self.failed_at = ""

    @property
    def current(self) -> str:
        """Path of the innermost module that is running, such as ``video_decoder.up_blocks.3``.

        Outside any module's call it is the newest of :attr:`components`, else empty.
        """
        if self._stack:
            return self._stack[-1]
        return self.components[-1] if self.components else ""

    def name_tree(self, name: str, module: torch.nn.Module) -> None:
        """Call a component ``name`` and all its parts by their paths below it."""
        for path, part in module.named_modules():
            self._names[part] = f"{name}.{path}" if path else name
        self.weights.add([*module.parameters(), *module.buffers()])

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """As if the module called ``name`` were running."""
        self._stack.append(name)
        try:
            yield
        finally:
            self._stack.pop()

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        name = self._names.get(module)
        if name is None:
            kind = type(module).__name__
            name = f"{self.current}.{kind}" if self._stack else kind
            self.name_tree(name, module)
        self._stack.append(name)

    def _leave(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        if not self._stack:
            return
        error = sys.exception()
        if error is not None and id(error) != self._failure:
            self._failure, self.failed_at = id(error), self._stack[-1]
        self._stack.pop()

    def __enter__(self) -> Self:
        self._handles = [
            torch_module.register_module_forward_pre_hook(self._enter),
            torch_module.register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stack.clear()
