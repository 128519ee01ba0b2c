"""Attributes of modules and classes that are replaced for one thread; all others go on with the originals.

A forecast replaces functions of torch. ``unittest.mock.patch`` does so for the whole process, and a real run in another
thread would call the replacements.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_Key = tuple[int, str]
_SUBCLASSABLE = 1 << 10  # Py_TPFLAGS_BASETYPE


class _Here(threading.local):
    """The substitutes of a thread, the innermost last."""

    def __init__(self) -> None:
        self.stacks: dict[_Key, list[Any]] = {}


@dataclass
class _Patch:
    """An attribute whose value chooses by the thread.

    Attributes:
        target: Whose attribute it is.
        original: Its value everywhere else.
        dispatcher: Its value while there is a substitute in any thread.
        inherited: Whether ``target`` has the original from a base class.
        scopes: How many have a substitute.
    """

    target: Any
    original: Any
    dispatcher: Any
    inherited: bool
    scopes: int = 0


_HERE = _Here()
_LOCK = threading.RLock()
_PATCHES: dict[_Key, _Patch] = {}
_COVERED: list[_Patch] = []
"""Patches over which another one was laid, that may put their dispatchers back when they are gone themselves."""


@contextmanager
def patched_here(target: Any, name: str, substitute: Any) -> Iterator[None]:
    """Replace an attribute in this thread alone, within this scope.

    Args:
        target: A module or a class.
        name: Of a function, class, class method, flag or data descriptor, or of a value of which only attributes are
            read.
        substitute: Called instead of a function or class, with the same arguments, and instead of a class method, with
            the class before them; takes the place of anything else. It reaches what it replaces by :func:`unpatched`.

    Example:
        >>> with patched_here(torch.cuda, "device_count", lambda: 7):
        ...     torch.cuda.device_count()
        7
    """
    key = (id(target), name)
    stacks = _HERE.stacks
    _install(key, target, name)
    stack = stacks.setdefault(key, [])
    stack.append(substitute)
    try:
        yield
    finally:
        stack.remove(substitute)
        if not stack:
            del stacks[key]
        _remove(key, name)


def unpatched(target: Any, name: str) -> Any:
    """The original of an attribute, whether it is replaced in this thread or not; a class method as its function."""
    with _LOCK:  # another thread may be about to replace or restore it
        patch = _PATCHES.get((id(target), name))
        value = patch.dispatcher if patch is not None else inspect.getattr_static(target, name, None)
        original = patch.original if patch is not None else _seen_through(value)
        if isinstance(original, classmethod):
            return original.__func__
        return getattr(target, name) if original is value else original


def _install(key: _Key, target: Any, name: str) -> None:
    with _LOCK:
        patch = _PATCHES.get(key)
        value = inspect.getattr_static(target, name)
        if patch is None or value is not patch.dispatcher:  # another patch lies over it
            original = _seen_through(value)
            scopes = patch.scopes if patch is not None else 0
            if patch is not None:
                _COVERED.append(patch)
            patch = _Patch(target, original, _dispatcher(key, original), name not in vars(target), scopes)
            _PATCHES[key] = patch
            setattr(target, name, patch.dispatcher)
        patch.scopes += 1


def _remove(key: _Key, name: str) -> None:
    with _LOCK:
        patch = _PATCHES[key]
        patch.scopes -= 1
        if patch.scopes:
            return
        del _PATCHES[key]
        if inspect.getattr_static(patch.target, name) is not patch.dispatcher:
            _COVERED.append(patch)
            return
        if patch.inherited:
            delattr(patch.target, name)
        else:
            setattr(patch.target, name, patch.original)


def _seen_through(value: Any) -> Any:
    """A value, or the original of one that is a dispatcher, put back by whoever undid a patch over it."""
    return next((patch.original for patch in _COVERED if patch.dispatcher is value), value)


def _dispatcher(key: _Key, original: Any) -> Any:
    if isinstance(original, bool):
        return _Flag(key, original)
    if isinstance(original, classmethod | staticmethod):
        return type(original)(_function_dispatcher(key, original.__func__))
    if isinstance(original, type) and original.__flags__ & _SUBCLASSABLE:
        return _class_dispatcher(key, original)
    if hasattr(original, "__set__"):
        return property(
            lambda owner: _chosen(key, original).__get__(owner, type(owner)),
            lambda owner, value: _chosen(key, original).__set__(owner, value),
        )
    return _function_dispatcher(key, original) if callable(original) else _Value(key, original)


def _chosen(key: _Key, original: Any) -> Any:
    stack = _HERE.stacks.get(key)
    return stack[-1] if stack else original


def _function_dispatcher(key: _Key, original: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # which cannot trace what belongs to a thread
            return original(*args, **kwargs)
        return _chosen(key, original)(*args, **kwargs)

    for method in ("cache_clear", "cache_info", "cache_parameters"):  # of functools.lru_cache
        if hasattr(original, method):
            setattr(dispatch, method, getattr(original, method))
    return dispatch


class _Flag:
    """A truth value that is a thread's own."""

    def __init__(self, key: _Key, original: bool) -> None:
        self._key, self._original = key, original

    def __bool__(self) -> bool:
        return bool(_chosen(self._key, self._original))


class _Value:
    """A value of which code only reads attributes."""

    def __init__(self, key: _Key, original: Any) -> None:
        self.__dict__["_chosen"] = functools.partial(_chosen, key, original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chosen(), name)


def _class_dispatcher(key: _Key, original: type) -> type:
    """A class that is called as the thread's substitute, and of which the original's instances are instances."""
    kind: Any = type(original)

    class Dispatcher(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self is not dispatcher:  # a subclass
                return super().__call__(*args, **kwargs)
            return _chosen(key, original)(*args, **kwargs)

        def __instancecheck__(self, instance: Any) -> bool:
            if self is not dispatcher:
                return bool(super().__instancecheck__(instance))
            chosen = _chosen(key, original)
            return isinstance(instance, original) or (isinstance(chosen, type) and isinstance(instance, chosen))

        def __subclasscheck__(self, subclass: type) -> bool:
            own = self is not dispatcher
            return bool(super().__subclasscheck__(subclass)) if own else issubclass(subclass, original)

    names = ("__doc__", "__module__", "__qualname__")
    own = {name: getattr(original, name) for name in names}
    dispatcher: Any = Dispatcher(original.__name__, (original,), own)
    return dispatcher
