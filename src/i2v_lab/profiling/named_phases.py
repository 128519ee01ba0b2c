"""Phases that the caller of a third-party pipeline names, and the modules and functions that they consist of."""

from __future__ import annotations

import functools
import inspect
import io
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from i2v_lab.errors import ProfilerError, shown
from i2v_lab.profiling.components import find_modules

Scope = Callable[[str, torch.nn.Module | None], AbstractContextManager[None]]


class NamedPhases:
    """What the caller says of a pipeline's phases.

    Args:
        phases: By the name of the phase: a module, a function or method, an object that holds modules, the dotted name
            of one of them in the pipeline, such as ``vae.model.decoder``, or a list of these.
        pipeline: What names are looked up in.
        components: The same, by their names.

    Attributes:
        names: Of the phases.
        modules: The phase of each module.

    Raises:
        ProfilerError: A name that is not of a phase, or not in the pipeline; anything that holds no module; a function
            that nothing but a local variable refers to; one part in two phases.

    Example:
        >>> vae = torch.nn.ModuleDict({"decoder": torch.nn.Linear(2, 2)})
        >>> named = NamedPhases({"decode": "vae.decoder"}, vae, {"vae": vae})
        >>> list(named.modules.values())
        ['decode']
    """

    def __init__(
        self,
        phases: Mapping[str, Any] = types.MappingProxyType({}),
        pipeline: Any = None,
        components: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        if not isinstance(phases, Mapping):
            raise ProfilerError(f"phases={shown(phases)} is no dictionary; give parts by the name of the phase")
        self.names = list(phases)
        self.modules: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._functions: list[tuple[str, Any, str, Any]] = []  # a phase, and an object's attribute with its value
        self._pipeline, self._components = pipeline, components
        for phase, part in phases.items():
            if not isinstance(phase, str) or not phase.strip() or not phase.isprintable():
                raise ProfilerError(f"phases: {shown(phase)} is no name of a phase; use words", phase=phase)
            self._add(phase, part, shown(part))
        del self._pipeline, self._components

    def _add(self, phase: str, part: Any, label: str) -> None:
        if isinstance(part, str):
            self._add(phase, self._look_up(phase, part), repr(part))
        elif isinstance(part, torch.nn.Module):
            if self.modules.setdefault(part, phase) != phase:
                raise self._refused(phase, label, f"is in phase '{self.modules[part]}' already; give it to one")
        elif isinstance(part, list | tuple) and part:
            for each in part:
                self._add(phase, each, shown(each))
        elif isinstance(part, types.MethodType | types.FunctionType):
            self._add_function(phase, part, label)
        else:
            modules = {} if isinstance(part, type | types.ModuleType) else find_modules(part)
            if not modules:
                raise self._refused(phase, label, "is no module or function, and holds none; give one, or its name")
            for module in modules.values():
                self._add(phase, module, label)

    def _look_up(self, phase: str, name: str) -> Any:
        owner = self._pipeline
        while isinstance(owner, functools.partial | types.MethodType):
            owner = owner.func if isinstance(owner, functools.partial) else owner.__self__
        first, *rest = name.split(".")
        found = [value for value in (_attribute(owner, first), self._components.get(first)) if value is not None]
        value = found[0] if found else None
        for each in rest:
            value = _attribute(value, each)
        if value is None:
            known = ", ".join(self._components) or "none: it builds them when called"
            raise self._refused(phase, repr(name), f"is not in the pipeline; its components are {known}", name=name)
        return value

    def _add_function(self, phase: str, function: Any, label: str) -> None:
        name = function.__name__
        if isinstance(function, types.MethodType):
            homes = [function.__self__] if getattr(function.__self__, name, None) == function else []
        else:
            homes = [home for home in list(sys.modules.values()) if getattr(home, "__dict__", {}).get(name) is function]
        if not homes:
            raise self._refused(phase, label, "is in no module's global scope; give a method, or a component's module")
        if any(value == function and other != phase for other, _, _, value in self._functions):
            raise self._refused(phase, label, "is in another phase already; give it to one")
        self._functions += [(phase, home, name, function) for home in homes]

    def _refused(self, phase: str, label: str, why: str, **fields: Any) -> ProfilerError:
        return ProfilerError(f"phases['{phase}']={label} {why}", phase=phase, **fields)

    @contextmanager
    def seen(self, scope: Scope) -> Iterator[None]:
        """Run the modules and functions within ``scope``, wherever they are called from within this one.

        Args:
            scope: Given the phase, and the module or ``None``.
        """
        with ExitStack() as ends:
            for module, phase in self.modules.items():
                ends.enter_context(_hooked(module, phase, scope))
            for phase, home, name, function in self._functions:
                ends.enter_context(_replaced(home, name, _wrapped(function, phase, scope)))
            yield


NO_NAMES = NamedPhases()


def _attribute(owner: Any, name: str) -> Any:
    if isinstance(owner, Mapping) and name in owner:
        return owner[name]
    if isinstance(owner, list | tuple) and name.isdecimal() and int(name) < len(owner):
        return owner[int(name)]
    return getattr(owner, name, None) if name else None


@contextmanager
def _hooked(module: torch.nn.Module, phase: str, scope: Scope) -> Iterator[None]:
    running: list[tuple[AbstractContextManager[None], BaseException | None]] = []

    def enter(*_: Any) -> None:
        running.append((scope(phase, module), sys.exception()))  # the caller may be in an except block
        running[-1][0].__enter__()

    def leave(*_: Any) -> None:
        if running:
            entered, handled = running.pop()
            has_failed = sys.exception() is not handled
            entered.__exit__(*(sys.exc_info() if has_failed else (None, None, None)))

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _wrapped(function: Any, phase: str, scope: Scope) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if inspect.isgeneratorfunction(function):
            return lazily(function(*args, **kwargs))
        with scope(phase, None):
            result = function(*args, **kwargs)
        is_lazy = isinstance(result, Iterator) and not isinstance(result, io.IOBase)
        return lazily(result) if is_lazy else result

    def lazily(result: Iterator[Any]) -> Iterator[Any]:
        while True:
            with scope(phase, None):
                try:
                    item = next(result)
                except StopIteration as stop:
                    return stop.value
            yield item
            del item

    return run


@contextmanager
def _replaced(home: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute within this scope, of the object itself."""
    own = inspect.getattr_static(home, "__dict__", None) is not None and name in vars(home)
    before = vars(home)[name] if own else None
    setattr(home, name, staticmethod(value) if isinstance(home, type) else value)
    try:
        yield
    finally:
        if own:
            setattr(home, name, before)
        else:
            delattr(home, name)
