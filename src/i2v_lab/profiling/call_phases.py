"""Phases of a call of a third-party pipeline, inferred from the calls of its components.

Phases are contiguous. Work between two components' calls is attributed to the second one, which it prepares: it is
built, and its input is read. The outputs of denoisers and decoders are processed further, by the scheduler or into
frames; that work is attributed to their own phase, until a component of another phase is built or called.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from i2v_lab.events import Phase
from i2v_lab.profiling.components import DENOISE, phase_of, snake_case
from i2v_lab.profiling.open_phase import OpenPhase
from i2v_lab.profiling.phase_profiler import PhaseProfiler

CALL = "call"  # the phase of a call in which no component is recognised
INCLUDE_FOLLOWING_WORK = {DENOISE, Phase.DECODE_AUDIO.value, Phase.DECODE_VIDEO.value}


class CallPhases:
    """Starts and ends a profiler's phases during a call, within :meth:`track`.

    Modules that are built during the call are seen by torch's registration hook, so that a submodule that is called
    directly is attributed to its component. No hook is active while a component runs. A denoising stage is numbered by
    the latent upsamplings before it; a call of its transformer is a step.

    Args:
        profiler: An active profiler.
        components: Modules that exist already, by name.
    """

    def __init__(self, profiler: PhaseProfiler, components: Mapping[str, torch.nn.Module]) -> None:
        self._profiler = profiler
        self._owners: weakref.WeakKeyDictionary[torch.nn.Module, tuple[weakref.ref[torch.nn.Module], str]]
        self._owners = weakref.WeakKeyDictionary()
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._known: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, str | None]] = weakref.WeakKeyDictionary()
        self._name: str | None = None  # of the open phase; None until a component's call names it
        self._is_open = False
        self._suspended: OpenPhase | None = None
        self._ended: list[tuple[OpenPhase, bool]] = []
        self._unnamed = CALL
        self._stage = 1
        self._inside = False
        self._entry: Any = None
        self._exits: list[Any] = []
        self._handled: BaseException | None = None
        for name, module in components.items():
            profiler.component(name, module)
            self._names[module] = name
            for part in module.modules():
                for child_name, child in part.named_children():
                    self._owners[child] = (weakref.ref(part), child_name)

    @contextmanager
    def track(self, unnamed: str = CALL) -> Iterator[None]:
        """Track components' calls within this scope; the phase that is open at its end stays open, unless it failed.

        Args:
            unnamed: Name of a phase in which no component is called.
        """
        self._unnamed = unnamed
        if not self._is_open:
            self._profiler.start(unnamed)
            self._is_open, self._name = True, None
        built = torch_module.register_module_module_registration_hook(self._on_registered)
        self._register_entry_hook()
        try:
            yield
        except BaseException as error:
            self.finish(completed=False, failed=True)
            self.write(error)
            raise
        finally:
            built.remove()
            self._entry.remove()
            self._remove_exit_hooks()
            self._inside, self._handled = False, None

    def finish(self, *, completed: bool = True, failed: bool = False) -> None:
        """End the open phase, if there is one; work after the last component belongs to its phase, unless it failed.

        Args:
            completed: Whether it ran to its end.
            failed: Whether it ended by an error.
        """
        if not self._is_open:
            return
        if self._suspended is not None and not failed:
            self._profiler.resume(self._suspended)
            self._suspended = None
        else:
            self._end_suspended()
        self._ended.append((self._profiler.suspend(), completed))
        self._is_open, self._name = False, None
        if self._profiler.paths is not None:
            self._profiler.paths.components.clear()

    def write(self, error: BaseException | None = None) -> None:
        """Write the records of all ended phases; after the call, so that writing takes no time of a phase.

        Args:
            error: The error that ended the last one, if any.
        """
        ended, self._ended = self._ended, []
        for phase, completed in ended:
            self._profiler.write_phase(phase, completed, None if completed else error)

    def step(self) -> None:
        """End a step of the open phase."""
        if self._is_open:
            self._profiler.end_step()

    # --- Hooks ---

    def _register_entry_hook(self) -> None:
        self._entry = torch_module.register_module_forward_pre_hook(self._on_enter)

    def _on_registered(self, owner: torch.nn.Module, name: str, part: torch.nn.Module | None) -> None:
        known = self._owners.get(part) if part is not None else None
        if known is not None and known[0]() is not None:
            return  # nothing is built: a slice of a ModuleList is a list of its own, which holds the same modules
        if part is not None:
            self._owners[part] = (weakref.ref(owner), name)
        if not self._inside:
            self._pause()

    def _on_enter(self, module: torch.nn.Module, args: Any) -> None:
        if self._inside:  # a call in another thread
            return
        self._inside = True
        self._handled = sys.exception()  # the caller may be in an except block
        self._entry.remove()  # calls of its submodules change no phase
        self._remove_exit_hooks()
        self._exits.append(module.register_forward_hook(self._on_exit, always_call=True))
        name, phase = self._component_of(module)
        if phase is not None:
            self._begin(phase)
        if self._profiler.paths is not None:  # to which all work is attributed until the next call
            self._profiler.paths.components[:] = [name]

    def _on_exit(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        # Its hook is not removed here: after an error torch is iterating over this module's hooks.
        if not self._inside:
            return
        self._inside = False
        self._register_entry_hook()
        if sys.exception() is not self._handled:  # it failed, which ends the phase
            return
        kind = self._known[module][1]
        if kind == DENOISE:
            self._profiler.end_step()
        if kind is not None and kind not in INCLUDE_FOLLOWING_WORK:
            self._pause()

    def _remove_exit_hooks(self) -> None:
        for handle in self._exits:
            handle.remove()
        self._exits.clear()

    # --- Phases ---

    def _component_of(self, module: torch.nn.Module) -> tuple[str, str | None]:
        """Name of the component that a module belongs to, and the phase that its call belongs to."""
        if module not in self._known:
            names: list[str] = []
            component = module
            while component not in self._names and component in self._owners:
                reference, name = self._owners[component]
                owner = reference()
                if owner is None:
                    break
                names += [name, type(component).__name__]
                component = owner
            kind = type(component)
            if component not in self._names:
                self._names[component] = snake_case(kind.__name__)
                self._profiler.component(self._names[component], component)
            name = self._names[component]
            self._known[module] = (name, phase_of([name, kind.__name__], names, kind.__module__))
        return self._known[module]

    def _pause(self) -> None:
        """Suspend the phase: work from now on belongs to that of the next component, which is not known yet."""
        if self._name is not None:
            self._suspended = self._profiler.suspend()
            self._profiler.start(self._unnamed)
            self._name = None
            if self._profiler.paths is not None:
                self._profiler.paths.components.clear()

    def _begin(self, kind: str) -> None:
        name = f"{kind}_stage_{self._stage}" if kind == DENOISE else kind
        if name == self._name:
            return
        if self._name is not None:
            self._ended.append((self._profiler.suspend(), True))
            self._profiler.start(name)
        elif self._suspended is not None and self._suspended.name == name:
            self._profiler.resume(self._suspended)
            self._suspended = None
            self._name = name
            return
        else:
            self._end_suspended()
            self._profiler.rename(name)
        self._name = name
        if kind == Phase.UPSAMPLE_LATENT.value:
            self._stage += 1

    def _end_suspended(self) -> None:
        if self._suspended is not None:
            self._ended.append((self._suspended, True))
            self._suspended = None
