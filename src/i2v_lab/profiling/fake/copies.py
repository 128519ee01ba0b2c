"""Fake copies of what is forecast: tensors, modules, and objects that hold modules, such as diffusers' pipelines."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.known_values import keep_values_of
from i2v_lab.torch_compat import (
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
    no_dispatch,
    tree_leaves,
    tree_map_only,
)

DEPTH = 3  # an object that holds an object that holds a module, in lists or dictionaries
HOOKS = ("_hf_hook", "_diffusers_hook")  # of accelerate and diffusers, which keep hold of the module


def to_fake(values: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """Replace modules and tensors among ``values`` by fake copies on ``device``; the originals are not modified.

    Also those on the meta device: a module without memory is forecast as if it were on ``device``. An object that holds
    modules is copied whole, with its modules on ``device``.

    Whole numbers and masks keep their values, and so do the buffers of modules; other values are unknown.

    Since they are copies, a write to one is not seen by code that reaches the original in another way.

    Raises:
        ForecastError: An object that holds modules cannot be copied, or a module has hooks that keep hold of it, as
            those for offloading do.
    """
    copies = _Copies(mode, device)
    return tree_map_only(object, copies.of, values)


def components(values: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules among ``values``, each with the name of its class, or of the attribute where an object holds it."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.nn.Module):
            yield type(leaf).__name__, leaf
        elif isinstance(leaf, functools.partial):
            yield from components((leaf.func, leaf.args, leaf.keywords))
        elif isinstance(leaf, types.MethodType):
            yield from components(leaf.__self__)
        else:
            yield from _held(leaf).values()


class _Copies:
    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        self._mode = mode
        self._device = device
        self._converter = FakeTensorConverter(copy_data=False, export=False)
        self._memo: dict[int, Any] = {}
        self._originals: list[Any] = []  # kept alive, so that no other object gets an id that is in the memo

    def of(self, value: Any) -> Any:
        """A fake copy of a tensor, a module or an object that holds modules; anything else as it is."""
        match value:
            case torch.Tensor():
                return self._argument(value)
            case torch.nn.Module():
                return self._module(value)
            case functools.partial():
                args, kwargs = tree_map_only(object, self.of, (value.args, value.keywords))
                return functools.partial(self.of(value.func), *args, **kwargs)
            case types.MethodType():
                owner = self.of(value.__self__)
                return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
            case _:
                return self._holder(value) if _held(value) else value

    def _argument(self, original: torch.Tensor) -> torch.Tensor:
        moved = self._fake(original).to(self._device)
        if not (original.is_floating_point() or original.is_complex()):
            keep_values_of(original, moved)
        return moved

    def _module(self, original: torch.nn.Module) -> torch.nn.Module:
        self._add_tensors(original)
        copied: torch.nn.Module = copy.deepcopy(original, self._memo)
        return copied.to(self._device)

    def _holder(self, original: Any) -> Any:
        for _, module in _held(original).values():
            self._add_tensors(module)
        for tensor in _tensors(original, DEPTH, set()):  # such as the sigmas of a scheduler
            if id(tensor) not in self._memo:
                self._remember(tensor, self._fake(tensor))
                keep_values_of(tensor, self._memo[id(tensor)])
        try:
            copied = copy.deepcopy(original, self._memo)
        except Exception as error:
            raise ForecastError(
                f"{type(original).__name__} holds modules and cannot be copied ({' '.join(str(error).split())[:200]}); "
                "forecast a function that builds it, or its modules one by one",
                cause="cannot be copied",
                kind=type(original).__name__,
            ) from error
        for _, module in _held(copied).values():
            module.to(self._device)
        return copied

    def _add_tensors(self, module: torch.nn.Module) -> None:
        _check_hooks(module)
        for parameter in module.parameters():
            if id(parameter) not in self._memo:
                fake = torch.nn.Parameter(self._fake(parameter).detach(), parameter.requires_grad)
                self._remember(parameter, fake)
        for buffer in module.buffers():
            if id(buffer) not in self._memo:
                self._remember(buffer, self._fake(buffer))
                keep_values_of(buffer, self._memo[id(buffer)])

    def _remember(self, original: torch.Tensor, fake: torch.Tensor) -> None:
        self._memo[id(original)] = fake
        self._originals.append(original)

    def _fake(self, original: torch.Tensor) -> FakeTensor:
        if original.device.type != "meta" or isinstance(original, FakeTensor):
            return self._converter.from_real_tensor(self._mode, original)
        with no_dispatch():  # the skeleton of a module, whose weights will be on the device
            meta = torch.empty_strided(original.shape, original.stride(), dtype=original.dtype, device="meta")
        skeleton = FakeTensor(self._mode, meta, self._device)
        skeleton.requires_grad = original.requires_grad
        return skeleton


def _check_hooks(module: torch.nn.Module) -> None:
    hooked = [type(each).__name__ for each in module.modules() if any(hasattr(each, name) for name in HOOKS)]
    if hooked:
        raise ForecastError(
            f"{type(module).__name__} has hooks of accelerate or diffusers, as for offloading, which a copy would "
            "share; build it and enable them within `with forecasting(...)`, or in a function that is forecast",
            cause="hooks",
            module=type(module).__name__,
            hooked=hooked[:5],
        )


def _held(holder: Any) -> dict[int, tuple[str, torch.nn.Module]]:
    """The modules that an object holds, by their identity: each with the name of its attribute."""
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    for name, value in _attributes(holder):
        for module in _instances(value, torch.nn.Module, DEPTH - 1, set()):
            found.setdefault(id(module), (name, module))
    return found


def _tensors(holder: Any, depth: int, seen: set[int]) -> Iterator[torch.Tensor]:
    for _, value in _attributes(holder):
        yield from _instances(value, torch.Tensor, depth - 1, seen)


def _instances(value: Any, kind: type[Any], depth: int, seen: set[int]) -> Iterator[Any]:
    """Instances of a class among a value, the items of containers and the attributes of objects."""
    if isinstance(value, kind):
        yield value
    elif depth and id(value) not in seen and not isinstance(value, torch.nn.Module | torch.Tensor):
        seen.add(id(value))
        if isinstance(value, dict):
            items = list(value.values())
        elif isinstance(value, list | tuple | set):
            items = list(value)
        else:
            items = [each for _, each in _attributes(value)]
        for item in items:
            yield from _instances(item, kind, depth - 1, seen)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Attributes of an object, not those of classes, modules of Python and functions."""
    if isinstance(value, type | types.ModuleType | types.FunctionType | types.MethodType | torch.dtype | torch.device):
        return []
    return list(getattr(value, "__dict__", {}).items())
