"""The phases of a call of somebody else's pipeline, found from the calls of its components while it runs.

Phases follow one another without a gap. What lies between two components' calls prepares the second one: it is built,
and its input is read. Only what a denoiser or a decoder has returned is worked on for its own sake, by the scheduler or
on the way to a picture; so that belongs to their own phase, until a component is built or called that is of another.
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

CALL = "call"  # the phase of a call none of whose components is known
KEEP_WHAT_FOLLOWS = {DENOISE, Phase.DECODE_AUDIO.value, Phase.DECODE_VIDEO.value}


class CallPhases:
    """Tells a profiler of the phases of a call, while :meth:`followed`.

    Modules that are built during the call are met by torch's registration hook, so that a part that is called past its
    component's own call is known to belong to it. Nothing is hooked into while a component runs. A stage of denoising
    is numbered by the upsamplings of latents before it; a call of its transformer is a step.

    Args:
        profiler: Active.
        components: Modules that exist already, by name.
    """

    def __init__(self, profiler: PhaseProfiler, components: Mapping[str, torch.nn.Module]) -> None:
        self._profiler = profiler
        self._owners: weakref.WeakKeyDictionary[torch.nn.Module, tuple[weakref.ref[torch.nn.Module], str]]
        self._owners = weakref.WeakKeyDictionary()
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._known: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, str | None]] = weakref.WeakKeyDictionary()
        self._name: str | None = None  # of the open phase; None while it has only just begun to build
        self._is_open = False
        self._aside: OpenPhase | None = None
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
    def followed(self, unnamed: str = CALL) -> Iterator[None]:
        """Within this scope components are followed; the phase that is open at its end stays open, unless it failed.

        Args:
            unnamed: What a phase is called that no component's call has given a name.
        """
        self._unnamed = unnamed
        if not self._is_open:
            self._profiler.start(unnamed)
            self._is_open, self._name = True, None
        built = torch_module.register_module_module_registration_hook(self._built)
        self._listen()
        try:
            yield
        except BaseException as error:
            self.finish(completed=False, failed=True)
            self.write(error)
            raise
        finally:
            built.remove()
            self._entry.remove()
            self._leave_for_good()
            self._inside, self._handled = False, None

    def finish(self, *, completed: bool = True, failed: bool = False) -> None:
        """End the open phase, if there is one; what was built last belongs to the phase before, unless it failed.

        Args:
            completed: Whether it came to its end.
            failed: Whether it ended by an error.
        """
        if not self._is_open:
            return
        if self._aside is not None and not failed:
            self._profiler.reopen(self._aside)
            self._aside = None
        else:
            self._end_aside()
        self._ended.append((self._profiler.set_aside(), completed))
        self._is_open, self._name = False, None
        if self._profiler.paths is not None:
            self._profiler.paths.components.clear()

    def write(self, error: BaseException | None = None) -> None:
        """Write down all phases that have ended: after the call, not between two phases, which it would lie between.

        Args:
            error: What the last one ended by. Not kept.
        """
        ended, self._ended = self._ended, []
        for phase, completed in ended:
            self._profiler.write_phase(phase, completed, None if completed else error)

    def step(self) -> None:
        """A step of the open phase is done."""
        if self._is_open:
            self._profiler.note_step()

    # --- What torch tells ---

    def _listen(self) -> None:
        self._entry = torch_module.register_module_forward_pre_hook(self._entering)

    def _built(self, owner: torch.nn.Module, name: str, part: torch.nn.Module | None) -> None:
        if part is not None:
            self._owners[part] = (weakref.ref(owner), name)
        if not self._inside:
            self._pause()

    def _entering(self, module: torch.nn.Module, args: Any) -> None:
        if self._inside:  # a call in another thread
            return
        self._inside = True
        self._handled = sys.exception()  # the caller may be in an except block
        self._entry.remove()  # its parts need not be met one by one
        self._leave_for_good()
        self._exits.append(module.register_forward_hook(self._leaving, always_call=True))
        name, phase = self._meet(module)
        if phase is not None:
            self._begin(phase)
        if self._profiler.paths is not None:  # on whose behalf all is done until the next one is called
            self._profiler.paths.components[:] = [name]

    def _leaving(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        # Not removed here: after an error torch is walking over this module's hooks.
        if not self._inside:
            return
        self._inside = False
        self._listen()
        if sys.exception() is not self._handled:  # it failed: what ends now is its phase
            return
        kind = self._known[module][1]
        if kind == DENOISE:
            self._profiler.note_step()
        if kind is not None and kind not in KEEP_WHAT_FOLLOWS:
            self._pause()

    def _leave_for_good(self) -> None:
        for handle in self._exits:
            handle.remove()
        self._exits.clear()

    # --- What it means ---

    def _meet(self, module: torch.nn.Module) -> tuple[str, str | None]:
        """Name of the component that a module belongs to, and the kind of phase that its call belongs to."""
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
        """What runs from now on belongs to the next component's phase, whichever that is."""
        if self._name is not None:
            self._aside = self._profiler.set_aside()
            self._profiler.start(self._unnamed)
            self._name = None
            if self._profiler.paths is not None:
                self._profiler.paths.components.clear()

    def _begin(self, kind: str) -> None:
        name = f"{kind}_stage_{self._stage}" if kind == DENOISE else kind
        if name == self._name:
            return
        if self._name is not None:
            self._ended.append((self._profiler.set_aside(), True))
            self._profiler.start(name)
        elif self._aside is not None and self._aside.name == name:
            self._profiler.reopen(self._aside)
            self._aside = None
            self._name = name
            return
        else:
            self._end_aside()
            self._profiler.rename(name)
        self._name = name
        if kind == Phase.UPSAMPLE_LATENT.value:
            self._stage += 1

    def _end_aside(self) -> None:
        if self._aside is not None:
            self._ended.append((self._aside, True))
            self._aside = None
