"""Modes of torch that belong to a thread, and so do not travel with a lazy stream by themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from i2v_lab.metered_threads import metering_this_thread
from i2v_lab.torch_compat import DeviceContext, ModeStacks

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Autocast:
    """The state of autocast in a thread.

    Attributes:
        devices: Whether it is enabled and its dtype, for each of ``AUTOCAST_DEVICES``.
        cache: Whether casts of weights are kept.
        nesting: How many scopes of autocast are open; the outermost one drops the kept casts at its end.
    """

    devices: tuple[tuple[bool, torch.dtype], ...]
    cache: bool
    nesting: int

    @classmethod
    def current(cls) -> Autocast:
        """That of this thread."""
        devices = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in AUTOCAST_DEVICES)
        torch.autocast_increment_nesting()
        return cls(devices, torch.is_autocast_cache_enabled(), torch.autocast_decrement_nesting())

    def apply(self) -> None:
        """Make it that of this thread."""
        current = Autocast.current()
        if current == self:
            return
        for kind, (enabled, dtype) in zip(AUTOCAST_DEVICES, self.devices, strict=True):
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.cache)
        for _ in range(current.nesting, self.nesting):
            torch.autocast_increment_nesting()
        for _ in range(self.nesting, current.nesting):
            torch.autocast_decrement_nesting()
        if self.nesting == 0:
            torch.clear_autocast_cache()


@contextmanager
def thread_state_restored() -> Iterator[None]:
    """Restore the default device of this thread at the end of this scope, and forget casts of autocast before and then.

    The casts are kept by weight, so that code outside this scope would be given a fake one, and the other way round.
    """
    before = ModeStacks.current()
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        replace(ModeStacks.current(), function=before.function, default=before.default).apply()
        torch.clear_autocast_cache()


class _Flag:
    """A mode that a producer is given, or finds as its consumer has it, until it sets its own across a yield."""

    def __init__(self, given: bool | None) -> None:
        self._given = given
        self._base = bool(given)
        self._own: bool | None = None

    def enter(self, consumers: bool) -> bool:
        if self._own is not None:
            return self._own
        self._base = consumers if self._given is None else self._given
        return self._base

    def leave(self, now: bool) -> None:
        self._own = None if now == self._base else now

    def fork(self) -> _Flag:
        return _Flag(self._given if self._own is None else self._own)


class CarriedModes:
    """The modes of a lazy producer, put around each of its steps, in whichever thread that runs.

    Autocast and the default device are those of the thread and moment in which this object was made, and the profilers
    that meter that thread then meter every step. What the producer
    sets, and leaves set where it yields, is there again at its next step, and never in its consumer. So are modes of
    torch functions and of dispatch that it entered, except meters (``stays_in_thread``), which follow the thread.

    Args:
        grad: Whether its first step runs with grad enabled; ``None``: as its consumer has it.
        inference: The same for inference mode.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     modes = CarriedModes()
        >>> with modes.step():
        ...     torch.is_autocast_enabled("cpu")
        True
        >>> torch.is_autocast_enabled("cpu")
        False
    """

    def __init__(self, *, grad: bool | None = None, inference: bool | None = None) -> None:
        self._grad = _Flag(grad)
        self._inference = _Flag(inference)
        self._autocast = Autocast.current()
        self._default_device = ModeStacks.current().device_context()
        self._meters = metering_this_thread()
        self._function_modes: list[Any] = []  # that it left entered where it yielded
        self._dispatch_modes: list[Any] = []

    def fork(self) -> CarriedModes:
        """Modes for a stream that this producer yielded: to begin with, as the producer left them."""
        forked = copy.copy(self)
        forked._grad, forked._inference = self._grad.fork(), self._inference.fork()
        forked._function_modes, forked._dispatch_modes = [], []
        return forked

    @contextmanager
    def step(self, function_modes: Sequence[Any] = ()) -> Iterator[None]:
        """Run a step of the producer within this scope; the consumer's modes are restored at its end.

        Args:
            function_modes: Also active within it.
        """
        with ExitStack() as scopes:
            for meter in self._meters:
                scopes.enter_context(meter.metered())
            with self._step(function_modes):
                yield

    @contextmanager
    def _step(self, function_modes: Sequence[Any]) -> Iterator[None]:
        consumers = ModeStacks.current()
        after = consumers
        grad, autocast = torch.is_grad_enabled(), Autocast.current()
        try:
            # Entered whether or not it changes anything: at its end the consumer's modes are back, whatever was left.
            with torch.inference_mode(self._inference.enter(torch.is_inference_mode_enabled())):
                torch.set_grad_enabled(self._grad.enter(grad))
                self._autocast.apply()
                outer = [mode for mode in consumers.function if not isinstance(mode, DeviceContext)]
                if self._default_device is not None:
                    outer.insert(0, self._default_device)
                function = (*outer, *function_modes, *self._function_modes)
                ModeStacks(function, (*consumers.dispatch, *self._dispatch_modes), self._default_device).apply()
                try:
                    yield
                finally:
                    left = ModeStacks.current()
                    self._default_device = left.default  # the producer may have called torch.set_default_device
                    self._function_modes = _without(left.function, (*outer, *function_modes, left.default))
                    entered = _without(left.dispatch, consumers.dispatch)
                    self._dispatch_modes = [mode for mode in entered if not _stays(mode)]
                    ended = _without(consumers.dispatch, left.dispatch)
                    after = replace(
                        consumers, dispatch=(*_without(consumers.dispatch, ended), *filter(_stays, entered))
                    )
                    consumers.apply()
                    self._autocast = Autocast.current()
                    self._grad.leave(torch.is_grad_enabled())
                    self._inference.leave(torch.is_inference_mode_enabled())
                    autocast.apply()
        finally:
            after.apply()  # not before: the end of inference mode sets anew whether this thread has dispatch modes


def _stays(mode: Any) -> bool:
    """Whether a mode that was entered during a step sees its thread from then on, as a meter does."""
    return bool(getattr(mode, "stays_in_thread", False))


def _without(modes: Iterable[Any], others: Iterable[Any]) -> list[Any]:
    ids = {id(mode) for mode in others}
    return [mode for mode in modes if id(mode) not in ids]
