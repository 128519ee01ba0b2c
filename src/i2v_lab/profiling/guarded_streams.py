"""Lazy streams that run in their producer's modes and cannot record a graph unnoticed."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, Generic, Self, TypeVar, cast

import torch

from i2v_lab.errors import GradEscape
from i2v_lab.profiling.containers import map_leaves
from i2v_lab.profiling.escape import EscapeDetector, GradEscapeWarning, OnEscape, has_graph
from i2v_lab.profiling.module_paths import ModulePaths
from i2v_lab.thread_modes import CarriedModes

T = TypeVar("T")


class _Guard(Generic[T]):
    """What both kinds of guarded streams do: run a step in the producer's modes, and check what crosses."""

    def __init__(self, source: Any, on_escape: OnEscape, modes: CarriedModes | None = None) -> None:
        self._source = source
        self._on_escape = on_escape
        grad = False if on_escape == "fix" else None  # as the consumer has it, which is what is judged
        self._modes = modes or CarriedModes(grad=grad, inference=torch.is_inference_mode_enabled())
        self._message = ""
        self.escaped = False

    def _run(self, step: Callable[..., Any], *args: Any, stacklevel: int = 3) -> Any:
        """Run a step of the producer; neither its arguments nor its result bring a graph along."""
        had_escaped = self.escaped
        detectors = [] if self._on_escape == "fix" else [EscapeDetector(self._detected)]
        try:
            args = tuple(self._cross(each) for each in args)
            try:
                with self._modes.step(detectors):
                    result = step(*args)
            except (StopIteration, StopAsyncIteration) as stop:
                if not stop.args:
                    raise
                raise type(stop)(*(self._cross(each) for each in stop.args)) from None
            return self._cross(result)
        finally:
            if self._on_escape == "warn" and self.escaped and not had_escaped:
                warnings.warn(self._message, GradEscapeWarning, stacklevel=stacklevel)

    def _cross(self, value: Any) -> Any:
        return map_leaves(self._cross_leaf, value)

    def _cross_leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if has_graph(leaf):
                if self._on_escape == "fix":
                    return leaf.detach()
                function = leaf.grad_fn.name() if leaf.grad_fn is not None else ""
                self._report(f"a tensor with an autograd graph, of {function}, left or entered a stream", function, "")
            elif self._on_escape == "fix" and leaf.is_inference() and torch.is_grad_enabled():
                return leaf.clone()  # an inference tensor cannot be part of what the consumer records
            return leaf
        if is_lazy(leaf):
            return guarded(leaf, self._on_escape, self._modes.fork())
        return leaf

    def _detected(self, function: str) -> None:
        module = ModulePaths().current
        what = f"{function} in {module or 'no module'} recorded an autograd graph while a stream was consumed"
        self._report(what, function, module)

    def _report(self, what: str, function: str, module: str) -> None:
        if self.escaped:
            return
        self.escaped = True
        message = (
            f"{what}: its activations stay allocated; consume it inside torch.no_grad(), or use "
            "guard_stream(on_escape='fix')"
        )
        if self._on_escape == "raise":
            raise GradEscape(message, function=function, module=module)
        self._message = message

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)


class GuardedStream(_Guard[T], Iterator[T]):
    """A lazy iterator that cannot record a graph unnoticed; made by :func:`~i2v_lab.profiling.guard.guard_stream`.

    Attributes:
        escaped: Whether a graph was recorded, or crossed between producer and consumer (``warn`` and ``raise``).
    """

    def __next__(self) -> T:
        return cast(T, self._run(self._source.__next__))

    def send(self, value: Any) -> T:
        """As a generator's."""
        return cast(T, self._run(self._source.send, value))

    def throw(self, *error: Any) -> T:
        """As a generator's."""
        return cast(T, self._run(self._source.throw, *error))

    def close(self) -> None:
        """Close the underlying generator, if it is one; the consumer's modes stay as they are."""
        close = getattr(self._source, "close", None)
        if close is not None:
            self._run(close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_modes" in self.__dict__ and not sys.is_finalizing():
            with self._modes.step():  # an unfinished generator leaves its own scopes now
                del self._source


class GuardedAsyncStream(_Guard[T], AsyncIterator[T]):
    """The same for an asynchronous iterator; other tasks of the event loop run in their own modes.

    Attributes:
        escaped: As in :class:`GuardedStream`.
    """

    async def __anext__(self) -> T:
        return cast(T, await _Steps(self, self._source.__anext__))

    async def asend(self, value: Any) -> T:
        """As an asynchronous generator's."""
        return cast(T, await _Steps(self, self._source.asend, value))

    async def athrow(self, *error: Any) -> T:
        """As an asynchronous generator's."""
        return cast(T, await _Steps(self, self._source.athrow, *error))

    async def aclose(self) -> None:
        """Close the underlying generator, if it is one."""
        close = getattr(self._source, "aclose", None)
        if close is not None:
            await _Steps(self, close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class _Steps:
    """Awaits what a producer's method returns; each piece of it between two suspensions is a step of the producer."""

    def __init__(self, guard: _Guard[Any], method: Callable[..., Any], *args: Any) -> None:
        self._guard = guard
        self._method = method
        self._args = args

    def __await__(self) -> Generator[Any, Any, Any]:
        guard = self._guard
        steps = self._method(*(guard._cross(each) for each in self._args)).__await__()
        step: Callable[..., Any] = steps.__next__
        args: tuple[Any, ...] = ()
        while True:
            try:
                suspended = guard._run(step, *args, stacklevel=4)
            except StopIteration as stop:
                return stop.value
            try:
                sent = yield suspended
            except BaseException as error:
                step, args = steps.throw, (error,)
            else:
                step, args = (steps.__next__, ()) if sent is None else (steps.send, (sent,))


def is_lazy(value: Any) -> bool:
    """Whether it is an iterator that is not guarded yet; files are not meant."""
    return isinstance(value, Iterator | AsyncIterator) and not isinstance(value, _Guard | io.IOBase)


def guarded(source: Any, on_escape: OnEscape, modes: CarriedModes | None = None) -> Any:
    """Guard an iterator, in these modes or else in those of this moment."""
    kind = GuardedAsyncStream if isinstance(source, AsyncIterator) else GuardedStream
    return kind(source, on_escape, modes)
