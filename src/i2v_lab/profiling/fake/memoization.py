"""Calls that are like one already seen are not run again: a forecast of 48 equal blocks costs one.

Nothing is guessed. A call is replayed only where grad is off, where the first of its kind left nothing alive but its
result, and where no more is alive than was then: such a call allocates what the first one did, and cannot be the peak.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from i2v_lab.profiling.fake.operators import are_new
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.module_paths import ModulePaths

# Of a module and the arguments of a call: what, besides shapes, decides which operators run.
Likeness = Callable[..., Hashable]


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A call that has been run: what was alive before it, how far it rose above that, and its result's recipe."""

    start_bytes: int
    rise_bytes: int
    result: Any


class Replay:
    """Replays calls of modules of certain kinds.

    Args:
        meter: Counts what the calls allocate.
        paths: Tells the phase; a call is run afresh in every phase.
        kinds: Module classes, each with its likeness. Two calls are alike if their modules' parameters have the same
            names, shapes and dtypes, their arguments the same structure and shapes, and their likenesses are equal.
    """

    def __init__(self, meter: LiveStorageMeter, paths: ModulePaths, kinds: Mapping[type[torch.nn.Module], Likeness]):
        self._meter = meter
        self._paths = paths
        self._kinds = kinds
        self._seen: dict[Hashable, _Seen] = {}
        self._layouts: weakref.WeakKeyDictionary[torch.nn.Module, Hashable] = weakref.WeakKeyDictionary()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within this scope calls are replayed."""
        with ExitStack() as scopes:
            for kind, likeness in self._kinds.items():
                forward = functools.partial(self._forward, kind.forward, likeness)
                scopes.enter_context(patch.object(kind, "forward", functools.partialmethod(_call, forward)))
            yield

    def _forward(self, forward: Any, likeness: Likeness, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        inputs: list[torch.Tensor] = []
        signature = _recipe((args, kwargs), inputs, known=len(inputs))
        key = (forward, self._paths.phase, likeness(module, *args, **kwargs), self._layout(module), signature)
        start_bytes = self._meter.allocated_bytes()
        seen = self._seen.get(key)
        if seen is not None and start_bytes <= seen.start_bytes:
            self._meter.rise_to(start_bytes + seen.rise_bytes)
            return _made(seen.result, inputs, [])
        with self._meter.local_peak() as peak:
            result = forward(module, *args, **kwargs)
        outputs = list(inputs)
        recipe = _recipe(result, outputs, known=len(inputs))
        new = outputs[len(inputs) :]
        if are_new(new, inputs) and self._meter.allocated_bytes() - start_bytes == self._meter.bytes_of(new):
            self._seen[key] = _Seen(start_bytes, peak.bytes - start_bytes, recipe)
        return result

    def _layout(self, module: torch.nn.Module) -> Hashable:
        if module not in self._layouts:
            tensors = [*module.named_parameters(), *module.named_buffers()]
            self._layouts[module] = tuple((name, tuple(t.shape), t.dtype) for name, t in tensors)
        return self._layouts[module]


def _call(module: torch.nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    return forward(module, args, kwargs)


# --- Recipes: nested values with tensors by number, for those known, or by their shape --------------------------------


def _recipe(value: Any, tensors: list[torch.Tensor], known: int) -> Any:
    """``value`` as hashable nested tuples; its tensors go to ``tensors``, the first ``known`` of which are given."""
    if isinstance(value, torch.Tensor):
        for index, tensor in enumerate(tensors):
            if tensor is value:
                return ("tensor", index)
        tensors.append(value)
        shape = (tuple(value.shape), value.stride(), value.dtype, value.device)
        return ("new", len(tensors) - 1 - known, *shape)
    if isinstance(value, list | tuple):
        return ("sequence", type(value), tuple(_recipe(item, tensors, known) for item in value))
    if isinstance(value, dict):
        return ("dict", tuple((key, _recipe(item, tensors, known)) for key, item in value.items()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        items = tuple((name, _recipe(getattr(value, name), tensors, known)) for name in names)
        return ("dataclass", type(value), items)
    return ("other", value if isinstance(value, Hashable) else id(value), None)


def _made(recipe: Any, inputs: list[torch.Tensor], made: list[torch.Tensor]) -> Any:
    """The value of a recipe: its known tensors from ``inputs``, its new ones allocated."""
    match recipe:
        case ("tensor", index):
            return inputs[index] if index < len(inputs) else made[index - len(inputs)]
        case ("new", _, shape, stride, dtype, device):
            made.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
            return made[-1]
        case ("sequence", kind, items):
            values = [_made(item, inputs, made) for item in items]
            return kind(*values) if hasattr(kind, "_fields") else kind(values)
        case ("dict", items):
            return {key: _made(item, inputs, made) for key, item in items}
        case ("dataclass", kind, items):
            return kind(**{name: _made(item, inputs, made) for name, item in items})
        case _:
            return recipe[1]
