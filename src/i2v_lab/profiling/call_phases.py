"""Phases of a call of a third-party pipeline, inferred from the calls of its components.

Phases are contiguous. Work between two components' calls is attributed to the second one, which it prepares: it is
built, and its input is read. The outputs of denoisers and decoders are processed further, by the scheduler or into
frames; that work is attributed to their own phase, until a component of another phase is built or called. A component
that no rule knows is a phase of its own name.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from i2v_lab.events import Phase
from i2v_lab.profiling.called_modules import CalledModule, CalledModules
from i2v_lab.profiling.components import AUTOENCODER, DENOISE, GUIDE, method_words
from i2v_lab.profiling.containers import is_picture
from i2v_lab.profiling.decoded import DECODE_IMAGE
from i2v_lab.profiling.named_phases import NO_NAMES, NamedPhases
from i2v_lab.profiling.open_phase import OpenPhase
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.worker_threads import metered_workers

CALL = "call"  # the phase of a call in which no component is recognised
INCLUDE_FOLLOWING_WORK = {"denoise", "decode"}  # a phase's name begins with it
DECODED = {Phase.DECODE_VIDEO.value, DECODE_IMAGE}  # by an autoencoder
METHODS = {"encode": Phase.ENCODE_IMAGE.value, "decode": Phase.DECODE_VIDEO.value}  # words in the names of methods


class CallPhases:
    """Starts and ends a profiler's phases during a call, within :meth:`track`.

    Modules that are built during the call are seen by torch's registration hook, so that a submodule that is called
    directly is attributed to its component. No hook is active while a component runs, but those of what the caller
    named. A stage of denoising is numbered in the order in which they begin: the next one begins with another denoiser,
    and after latents are upsampled. A call of its transformer is a step.

    Args:
        profiler: An active profiler.
        components: Modules that exist already, by name.
        root: What is called, which is no component of itself.
        named: Phases that the caller named.

    Attributes:
        decoded: The phase of what an autoencoder decodes.
    """

    def __init__(
        self,
        profiler: PhaseProfiler,
        components: Mapping[str, torch.nn.Module],
        root: Any = None,
        named: NamedPhases = NO_NAMES,
    ) -> None:
        self._profiler = profiler
        self._called = CalledModules(profiler, components, root, named.modules)
        self._named = named
        self.decoded = Phase.DECODE_VIDEO.value
        self._name: str | None = None  # of the open phase; None until a component's call names it
        self._component = ""  # that was called last
        self._is_open = False
        self._suspended: OpenPhase | None = None
        self._ended: list[tuple[OpenPhase, bool]] = []
        self._unnamed = CALL
        self._stages: dict[tuple[int, str], int] = {}
        self._upsamplings = 0
        self._lock = threading.RLock()  # modules may be called in any thread
        self._inside = False
        self._thread = 0  # of the module that is running
        self._joined = False
        self._caller = 0
        self._entry: Any = None
        self._exits: list[Any] = []
        self._handled: BaseException | None = None

    @contextmanager
    def track(self, unnamed: str = CALL) -> Iterator[None]:
        """Track components' calls within this scope; the phase that is open at its end stays open, unless it failed.

        Args:
            unnamed: Name of a phase in which no component is called.
        """
        self._unnamed = unnamed
        self._caller = id(sys._getframe(2))  # beyond which no frame is the pipeline's
        if not self._is_open:
            self._profiler.start(unnamed)
            self._is_open, self._name = True, None
        built = torch_module.register_module_module_registration_hook(self._on_registered)
        self._register_entry_hook()
        try:
            with metered_workers(self._profiler.threads), self._named.seen(self._scope):
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
            if phase.name in DECODED and phase.name not in self._named.names:
                phase.name = self.decoded
            self._profiler.write_phase(phase, completed, None if completed else error)

    def step(self) -> None:
        """End a step of the open phase."""
        if self._is_open:
            self._profiler.end_step()

    # --- Hooks ---

    def _register_entry_hook(self) -> None:
        self._entry = torch_module.register_module_forward_pre_hook(self._on_enter)

    def _on_registered(self, owner: torch.nn.Module, name: str, part: torch.nn.Module | None) -> None:
        with self._lock:
            if self._called.built(owner, name, part) and not self._inside:
                self._pause()

    def _on_enter(self, module: torch.nn.Module, args: Any) -> None:
        with self._lock:
            if self._inside:  # a call in another thread
                return
            called = self._called.of(module)
            if called.is_open:
                return
            self._inside, self._thread = True, threading.get_ident()
            self._handled = sys.exception()  # the caller may be in an except block
            self._entry.remove()  # calls of its submodules change no phase
            self._remove_exit_hooks()
            self._exits.append(module.register_forward_hook(self._on_exit, always_call=True))
            phase = self._phase(called, args)
            if phase is not None:
                self._begin(phase, called.component)
            if self._profiler.paths is not None:  # to which all work is attributed until the next call
                self._profiler.paths.components[:] = [called.component]
            self._joined = self._profiler.threads.enter()  # a thread that was there before the call

    def _on_exit(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        # Its hook is not removed here: after an error torch is iterating over this module's hooks.
        with self._lock:
            if not self._inside or threading.get_ident() != self._thread:
                return
            self._inside = False
            if self._joined:
                self._profiler.threads.leave()
            self._register_entry_hook()
            if sys.exception() is not self._handled:  # it failed, which ends the phase
                return
            called = self._called.of(module)
            if called.kind is None:
                return
            if called.kind == AUTOENCODER and self._name == called.component and is_picture(result):
                self._rename(self.decoded)
            self._leave(is_step=called.kind.startswith(DENOISE) and called.is_whole)

    def _leave(self, *, is_step: bool) -> None:
        if self._name is None:
            return
        if is_step:
            self._profiler.end_step()
        if self._name.partition("_")[0] not in INCLUDE_FOLLOWING_WORK:
            self._pause()

    def _remove_exit_hooks(self) -> None:
        for handle in self._exits:
            handle.remove()
        self._exits.clear()

    @contextmanager
    def _scope(self, phase: str, module: torch.nn.Module | None) -> Iterator[None]:
        """A phase that the caller named, while what it is of runs; within another component's call, interrupts it."""
        with self._lock:
            outer = (self._inside, self._name)
            self._inside = True
            self._begin(phase, self._component)
        with self._profiler.threads.metered():  # in a thread that was there before the call
            yield  # an error ends the phase
        with self._lock:
            self._inside = outer[0]
            is_step = module is not None and phase.startswith(DENOISE)
            if self._inside and outer[1] is not None:
                if is_step and phase != outer[1]:
                    self._profiler.end_step()
                self._begin(outer[1], self._component)
            else:
                self._leave(is_step=is_step)

    # --- Phases ---

    def _phase(self, called: CalledModule, args: Any) -> str | None:
        """The phase of a call; ``None`` if it belongs to that of its neighbours."""
        kind = called.kind
        if called.is_named:
            return kind
        if kind in (DENOISE, GUIDE):
            return f"{DENOISE}_stage_{self._stage(called)}"
        if kind == Phase.ENCODE_PROMPT.value and is_picture(args):  # the conditioner of Stable Video Diffusion
            return Phase.ENCODE_IMAGE.value
        if kind == Phase.UPSAMPLE_LATENT.value and is_picture(args):  # not latents
            return called.component
        if kind == AUTOENCODER:
            kind = self._direction(called, args)
        return self.decoded if kind == Phase.DECODE_VIDEO.value else kind

    def _stage(self, called: CalledModule) -> int:
        key = (self._upsamplings, called.component)
        if called.kind == GUIDE:  # of the denoiser's stage, before it or after it
            return next((self._stages[each] for each in reversed(self._stages) if each[0] == key[0]), self._next_stage)
        return self._stages.setdefault(key, self._next_stage)

    @property
    def _next_stage(self) -> int:
        return len(self._stages) + 1

    def _direction(self, called: CalledModule, args: Any) -> str:
        """The phase of an autoencoder's call whose names do not say it."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and id(frame) != self._caller:
            found = method_words(frame.f_code.co_name) & set(METHODS)
            if len(found) == 1:
                return METHODS[found.pop()]
            frame = frame.f_back
        if called.is_whole and is_picture(args):
            return Phase.ENCODE_IMAGE.value
        if called.component == self._component and (self._name is not None or self._suspended is not None):
            return self._name or self._suspended.name  # type: ignore[union-attr]
        return Phase.DECODE_VIDEO.value if self._stages else called.component

    def _pause(self) -> None:
        """Suspend the phase: work from now on belongs to that of the next component, which is not known yet."""
        if self._name is not None:
            self._suspended = self._profiler.suspend()
            self._profiler.start(self._unnamed)
            self._name = None
            if self._profiler.paths is not None:
                self._profiler.paths.components.clear()

    def _begin(self, name: str, component: str) -> None:
        self._component = component
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
        if name == Phase.UPSAMPLE_LATENT.value:
            self._upsamplings += 1

    def _rename(self, name: str) -> None:
        self._profiler.rename(name)
        self._name = name

    def _end_suspended(self) -> None:
        if self._suspended is not None:
            self._ended.append((self._suspended, True))
            self._suspended = None
