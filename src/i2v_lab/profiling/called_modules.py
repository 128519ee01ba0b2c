"""Which component of a third-party pipeline a module belongs to, and what that is."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from i2v_lab.events import Phase
from i2v_lab.profiling.components import (
    AUTOENCODER,
    DENOISE,
    GUIDE,
    is_container,
    is_generic,
    phase_of,
    role_of,
    snake_case,
    takes_noise_level,
)
from i2v_lab.profiling.phase_profiler import PhaseProfiler


@dataclass(frozen=True)
class CalledModule:
    """What is known of a module that is called, whatever it is called with.

    Attributes:
        component: Name of the component that it belongs to.
        kind: A phase, or :data:`AUTOENCODER`, whose direction the call says, or :data:`GUIDE`; ``None`` if its call
            belongs to no phase.
        is_whole: Whether it is the component itself.
        is_named: Whether the caller named the phase.
        is_open: Whether the modules within it are seen.
    """

    component: str
    kind: str | None
    is_whole: bool = False
    is_named: bool = False
    is_open: bool = False


class CalledModules:
    """Finds the component that each module belongs to, among those that exist and those that are built.

    Args:
        profiler: Learns the names of components.
        components: Modules that exist already, by name.
        root: What is called, which is no component of itself.
        named: The phase of each module that the caller named.
    """

    def __init__(
        self,
        profiler: PhaseProfiler,
        components: Mapping[str, torch.nn.Module],
        root: Any,
        named: Mapping[torch.nn.Module, str],
    ) -> None:
        self._profiler = profiler
        self._owners: weakref.WeakKeyDictionary[torch.nn.Module, tuple[weakref.ref[torch.nn.Module], str]]
        self._owners = weakref.WeakKeyDictionary()
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._known: weakref.WeakKeyDictionary[torch.nn.Module, CalledModule] = weakref.WeakKeyDictionary()
        self._held = set(components)
        self._root = weakref.ref(root) if isinstance(root, torch.nn.Module) else None
        self._named = named
        if isinstance(root, torch.nn.Module):
            self._own(root)
        for name, module in components.items():
            profiler.component(name, module)
            self._names[module] = name
            self._own(module)

    def _own(self, module: torch.nn.Module) -> None:
        for part in module.modules():
            for child_name, child in part.named_children():
                self._owners[child] = (weakref.ref(part), child_name)

    def built(self, owner: torch.nn.Module, name: str, part: torch.nn.Module | None) -> bool:
        """Take note that a module was registered in another; ``False`` if it was built before.

        A slice of a ModuleList is a list of its own, which holds the same modules: nothing is built.
        """
        known = self._owners.get(part) if part is not None else None
        if known is not None and known[0]() is not None:
            return False
        if part is not None:
            self._owners[part] = (weakref.ref(owner), name)
        return True

    def of(self, module: torch.nn.Module) -> CalledModule:
        """What is known of a module; the first call of a component that was built registers it with the profiler."""
        if module not in self._known:
            self._known[module] = self._identify(module)
        return self._known[module]

    def _identify(self, module: torch.nn.Module) -> CalledModule:
        """The component that a module belongs to: the outermost one that is recognised, or else the outermost one."""
        chain = [("", module)]  # outermost last
        while chain[-1][1] not in self._names and chain[-1][1] in self._owners:
            reference, name = self._owners[chain[-1][1]]
            owner = reference()
            if owner is None:
                break
            chain[-1] = (name, chain[-1][1])
            chain.append(("", owner))
        if self._is_pipeline(chain[-1][1]):
            if len(chain) == 1:
                return CalledModule("", None, is_open=is_container(module))
            chain.pop()
        name, top = chain[-1]
        if top not in self._names:
            self._names[top] = name or snake_case(type(top).__name__)
            self._profiler.component(self._names[top], top)
        chain[-1] = (self._names[top], top)
        paths = [".".join(name for name, _ in reversed(chain[index:]) if name) for index in range(len(chain))]
        for (_, part), path in zip(chain, paths, strict=True):
            if part in self._named:
                return CalledModule(path, self._named[part], is_whole=part is module, is_named=True)
        for index in reversed(range(len(chain))):
            kind = self._kind(chain, index)
            if kind is not None:
                inner = [name for name, _ in chain[:index]]
                return CalledModule(paths[index], kind, is_whole=is_generic(inner))
        name, component = chain[-1]
        wrapped = self._wrapped(component)
        if wrapped is not None:
            return CalledModule(paths[-1], wrapped, is_whole=len(chain) == 1)
        if takes_noise_level(component) and _has_tensors(component):
            return CalledModule(paths[-1], DENOISE, is_whole=len(chain) == 1)
        is_component = name in self._held or _has_tensors(component)
        return CalledModule(paths[-1], paths[-1] if is_component else None)

    def _is_pipeline(self, module: torch.nn.Module) -> bool:
        if module in self._names:
            return False
        is_root = self._root is not None and module is self._root()
        names = [type(module).__name__]
        return is_container(module) or (is_root and role_of(names, type(module).__module__) is None)

    def _kind(self, chain: list[tuple[str, torch.nn.Module]], index: int) -> str | None:
        name, component = chain[index]
        names = [name, type(component).__name__]
        package = type(component).__module__
        part = [each for name, module in chain[:index] for each in (name, type(module).__name__)]
        role = role_of(names, package, part)
        if role is None and name in self._held:
            return self._among_others(name)
        return role if role == GUIDE else phase_of(names, part, package) or role

    def _wrapped(self, wrapper: torch.nn.Module) -> str | None:
        """What the one child of a module is that says nothing itself, as those that compile or shard another do not."""
        children = list(wrapper.named_children())
        if len(children) != 1 or not is_generic([children[0][0]]):
            return None
        return self._kind(children, 0) or self._wrapped(children[0][1])

    def _among_others(self, name: str) -> str | None:
        """What a component is whose name says something only beside the others."""
        others = {role_of([each]) for each in self._held}
        word = name.rstrip("_0123456789")
        if is_generic([word]) and others & {AUTOENCODER, Phase.ENCODE_PROMPT.value}:
            return DENOISE
        if word == "decoder" and DENOISE in others:
            return Phase.DECODE_VIDEO.value
        return (
            Phase.ENCODE_IMAGE.value if word == "encoder" and others >= {DENOISE, Phase.ENCODE_PROMPT.value} else None
        )


def _has_tensors(module: torch.nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
