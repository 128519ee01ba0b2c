"""Guards around lazy streams and modules: no autograd graph is recorded unnoticed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

from i2v_lab.errors import GradEscape, ProfilerError
from i2v_lab.profiling.components import find_modules
from i2v_lab.profiling.escape import EscapeDetector, GradEscapeWarning, OnEscape, check_on_escape
from i2v_lab.profiling.module_paths import ModulePaths

T = TypeVar("T")


class GuardedStream(Iterator[T], Generic[T]):
    """A lazy iterator that cannot record a graph unnoticed; made by :func:`guard_stream`.

    Attributes:
        escaped: Whether work with trainable parameters ran with grad enabled (``warn`` and ``raise``).
    """

    def __init__(self, iterator: Iterator[T], on_escape: OnEscape) -> None:
        self._iterator = iterator
        self._on_escape = on_escape
        self._message = ""
        self.escaped = False

    def __next__(self) -> T:
        mode, had_escaped = torch.is_grad_enabled(), self.escaped
        try:
            if self._on_escape == "fix":
                with torch.no_grad():
                    return next(self._iterator)
            with EscapeDetector(lambda name: self._report(name, ModulePaths().current)):
                return next(self._iterator)
        finally:
            torch.set_grad_enabled(mode)  # a generator may leave its own mode set at a yield
            if self._on_escape == "warn" and self.escaped and not had_escaped:
                warnings.warn(self._message, GradEscapeWarning, stacklevel=2)

    def _report(self, function: str, module: str) -> None:
        if self.escaped:
            return
        self.escaped = True
        message = (
            f"{function} in {module or 'no module'} recorded an autograd graph while a stream was consumed: its "
            "activations stay allocated; consume it inside torch.no_grad(), or use guard_stream(on_escape='fix')"
        )
        if self._on_escape == "raise":
            raise GradEscape(message, function=function, module=module)
        self._message = message

    def close(self) -> None:
        """Close the underlying generator, if it is one; the caller's grad mode stays as it is."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def guard_stream(iterator: Any, on_escape: OnEscape = "fix") -> GuardedStream[Any]:
    """Wrap a lazy iterator or generator so that consuming it cannot record an autograd graph unnoticed.

    Args:
        iterator: Any iterable.
        on_escape: ``fix`` produces every item inside ``torch.no_grad()``; ``warn`` emits a
            :class:`~i2v_lab.profiling.escape.GradEscapeWarning` at the first operator that records a graph from
            trainable parameters and goes on; ``raise`` raises :class:`~i2v_lab.errors.GradEscape` there. The
            consumer's grad mode is restored in all three cases.

    Raises:
        ProfilerError: Another ``on_escape``.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> outputs = guard_stream(layer(torch.ones(2)) for _ in range(2))
        >>> [output.requires_grad for output in outputs]
        [False, False]
    """
    check_on_escape(on_escape)
    return GuardedStream(iter(iterator), on_escape)


@dataclass
class Watch:
    """The same guard around modules, by forward hooks; made by :func:`watch`.

    Attributes:
        on_escape: As in :func:`guard_stream`.
        escaped: Paths of the submodules that were called with grad enabled.
    """

    on_escape: OnEscape
    escaped: list[str] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)
    _modes: list[bool] = field(default_factory=list)

    def attach(self, model: torch.nn.Module, name: str = "") -> Self:
        """Guard this model too, under a name; by default its class."""
        kind = name or type(model).__name__
        for path, submodule in model.named_modules():
            name = f"{kind}.{path}" if path else kind
            self._handles.append(submodule.register_forward_pre_hook(self._pre_hook(name)))
            self._handles.append(submodule.register_forward_hook(self._post_hook, always_call=True))
        return self

    def _pre_hook(self, name: str) -> Callable[[torch.nn.Module, Any], None]:
        def hook(module: torch.nn.Module, args: Any) -> None:
            mode = torch.is_grad_enabled()
            self._modes.append(mode)
            if not mode or not any(p.requires_grad for p in module.parameters(recurse=False)):
                return
            self.escaped.append(name)
            message = (
                f"{name} was called with grad enabled and has trainable parameters: autograd keeps its activations; "
                "call it inside torch.no_grad(), or use watch(on_escape='fix')"
            )
            if self.on_escape == "raise":
                raise GradEscape(message, module=name)
            if self.on_escape == "fix":
                torch.set_grad_enabled(False)
            elif len(self.escaped) == 1:
                warnings.warn(message, GradEscapeWarning, stacklevel=5)

        return hook

    def _post_hook(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        torch.set_grad_enabled(self._modes.pop())

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def watch(model: Any, on_escape: OnEscape = "fix") -> Watch:
    """Guard a module, or all modules of a pipeline, against being called with grad enabled.

    Every submodule that has parameters of its own is guarded, so that a model whose methods call ``self.forward``
    directly, bypassing its own hooks, is covered too.

    Args:
        model: A module, or an object that holds some, such as a pipeline of diffusers.
        on_escape: ``fix`` runs each such submodule inside ``no_grad``; ``warn`` warns once; ``raise`` raises
            :class:`~i2v_lab.errors.GradEscape` before the submodule runs.

    Returns:
        A handle: ``close()`` it, or use it as a context manager.

    Raises:
        ProfilerError: Another ``on_escape``, or an object that holds no module because it builds them when called.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> with watch(layer):
        ...     layer(torch.ones(2)).requires_grad
        False
    """
    check_on_escape(on_escape)
    handle = Watch(on_escape)
    if isinstance(model, torch.nn.Module):
        return handle.attach(model)
    components = find_modules(model)
    if not components:
        kind = type(model).__name__
        raise ProfilerError(
            f"{kind} holds no module that could be watched; use guard_stream on what it returns", type=kind
        )
    for name, module in components.items():
        handle.attach(module, name)
    return handle
