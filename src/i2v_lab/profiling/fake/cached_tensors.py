"""Keeps the fake tensors of a forecast out of ``functools`` caches, and real ones out of the forecast."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from i2v_lab.thread_patches import patched_here, unpatched
from i2v_lab.torch_compat import FakeTensor

OWN_CACHES = ("i2v_lab.", "torch.")  # modules whose caches hold no tensors of a pipeline
_LruCache = functools._lru_cache_wrapper

_found: tuple[int, list[tuple[Any, str, Any]]] = (0, [])
_known: weakref.WeakSet[Any] = weakref.WeakSet()
_KNOWN_LOCK = threading.Lock()


@contextmanager
def own_caches() -> Iterator[None]:
    """Give this thread empty ``functools.lru_cache`` caches for functions that can name torch, within this scope.

    ltx-core caches its grids of frequencies this way. A fake one would be useless to a real run, now in another thread
    or later; a real one would be memory whose allocation a forecast does not see. diffusers and accelerate cache
    whether there is a card: in a forecast there is. Caches that are no attribute of a
    module or class cannot be replaced for a thread: those that hold tensors are cleared, for all threads.
    """
    private: dict[int, Callable[..., Any]] = {}
    with ExitStack() as scopes:
        for target, name, function in _cached_functions():
            scopes.enter_context(patched_here(target, name, _with_own_cache(function, private)))
        _clear_caches_with(torch.Tensor, apart_from=private)
        try:
            yield
        finally:
            _clear_caches_with(FakeTensor, apart_from=private)


def _clear_caches_with(kind: type[torch.Tensor], apart_from: Mapping[int, Any]) -> None:
    for candidate in known_caches():
        if id(candidate) not in apart_from and _contains(gc.get_referents(candidate), kind, depth=3):
            candidate.cache_clear()


def known_caches() -> list[Any]:
    """Every ``functools.lru_cache`` of this process.

    After ``gc.freeze()``, which hides what there is from the search, those that an earlier call has found.
    """
    # Not by gc.get_objects(): it references tuples that other threads are about to build, which then fails there.
    found = [each for each in gc.get_referrers(_LruCache) if type(each) is _LruCache]
    with _KNOWN_LOCK:
        _known.update(found)
        return list(_known)


def _cached_functions() -> list[tuple[Any, str, Any]]:
    """Where functions with a cache are attributes of a module or class: owner, name and function."""
    global _found
    modules = list(sys.modules.items())
    if _found[0] != len(modules):
        found = []
        for name, module in modules:
            if module is None or f"{name}.".startswith(OWN_CACHES):
                continue
            owners = [module, *(each for each in list(vars(module).values()) if _is_class_of(each, name))]
            found += [
                (owner, key, unpatched(owner, key))
                for owner in owners
                for key, value in list(vars(owner).items())
                if (cache := _cache_of(value)) is not None and _is_of_torch(cache)
            ]
        _found = (len(modules), found)
    return _found[1]


def _is_class_of(value: Any, module: str) -> bool:
    return isinstance(value, type) and value.__module__ == module


def _cache_of(value: Any) -> Any:
    """The cache that is this value, or that a function wraps."""
    if isinstance(value, staticmethod):
        return _cache_of(value.__func__)
    if type(value) is _LruCache:
        return value
    if type(value) is types.FunctionType and value.__closure__:
        return next((cell for cell in map(_contents, value.__closure__) if type(cell) is _LruCache), None)
    return None


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _is_of_torch(cache: Any) -> bool:
    """Whether a cached function can name torch, and was defined outside :data:`OWN_CACHES`."""
    function = cache.__wrapped__
    module = f"{getattr(function, '__module__', '')}."
    names = getattr(function, "__globals__", {})
    return not module.startswith(OWN_CACHES) and any(value is torch for value in names.values())


def _with_own_cache(function: Any, private: dict[int, Callable[..., Any]]) -> Callable[..., Any]:
    if isinstance(function, staticmethod):  # which is already replaced in another thread
        function = function.__func__
    cache = _cache_of(function)
    own = private.setdefault(id(cache), _own_cache(cache))
    if function is cache:
        return own
    cells = tuple(types.CellType(own) if _contents(cell) is cache else cell for cell in function.__closure__)
    copied = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _own_cache(cache: Any) -> Callable[..., Any]:
    return functools.lru_cache(**cache.cache_parameters())(cache.__wrapped__)


def _contains(values: Iterable[Any], kind: type[torch.Tensor], depth: int) -> bool:
    """Whether ``values``, or containers among them, hold a tensor; functions and their globals are not followed."""
    for value in values:
        if isinstance(value, kind):
            return True
        if depth and isinstance(value, dict) and _contains(list(value.values()), kind, depth - 1):
            return True
        if depth and isinstance(value, list | tuple) and _contains(value, kind, depth - 1):
            return True
    return False
