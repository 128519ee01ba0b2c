"""Guards around lazy streams and modules: no autograd graph is recorded unnoticed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import torch
from torch.nn.modules import module as torch_module

from i2v_lab.errors import GradEscape, ProfilerError
from i2v_lab.profiling.components import find_modules
from i2v_lab.profiling.containers import map_leaves
from i2v_lab.profiling.escape import GradEscapeWarning, OnEscape, check_on_escape, has_graph
from i2v_lab.profiling.guarded_streams import GuardedAsyncStream, GuardedStream, guarded, is_lazy

T = TypeVar("T")


@overload
def guard_stream(iterator: AsyncIterable[T], on_escape: OnEscape = "fix") -> GuardedAsyncStream[T]: ...


@overload
def guard_stream(iterator: Any, on_escape: OnEscape = "fix") -> GuardedStream[Any]: ...


def guard_stream(iterator: Any, on_escape: OnEscape = "fix") -> GuardedStream[Any] | GuardedAsyncStream[Any]:
    """Wrap a lazy iterator or generator so that consuming it cannot record an autograd graph unnoticed.

    Inference mode, autocast and the default device of every step are those of the moment in which the stream is
    guarded, or what the producer has set since, in whichever thread it is consumed. The consumer keeps its own.

    Every tensor that is yielded, returned or sent is checked for a graph, whoever recorded it: also those in tuples,
    lists, dictionaries, sets and dataclasses, and those of iterators among them, which are guarded too.

    Args:
        iterator: Any iterable, or an asynchronous one.
        on_escape: ``fix`` produces every item inside ``torch.no_grad()``, and detaches tensors that have a graph all
            the same; ``warn`` emits a :class:`~i2v_lab.profiling.escape.GradEscapeWarning` at the first operator that
            records a graph, or where a tensor crosses with one, and goes on; ``raise`` raises
            :class:`~i2v_lab.errors.GradEscape` there. The consumer's grad mode is restored in all three cases.

    Raises:
        ProfilerError: Another ``on_escape``.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> outputs = guard_stream(layer(torch.ones(2)) for _ in range(2))
        >>> [output.requires_grad for output in outputs]
        [False, False]
    """
    check_on_escape(on_escape)
    return guarded(aiter(iterator) if isinstance(iterator, AsyncIterable) else iter(iterator), on_escape)


@dataclass
class _Call:
    """A watched module that runs: the grad mode it was called in, and whether it or one below it has escaped."""

    module: torch.nn.Module
    grad: bool
    has_escaped: bool = False


class _Calls(threading.local):
    """The watched modules that run in a thread, innermost last: grad mode is a thread's own."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


def _holds_graph(value: Any) -> bool:
    graphs: list[Any] = []
    map_leaves(lambda leaf: graphs.append(leaf) if has_graph(leaf) else leaf, value)
    return bool(graphs)


@dataclass
class Watch:
    """The same guard around modules, by forward hooks; made by :func:`watch`.

    Attributes:
        on_escape: As in :func:`guard_stream`.
        escaped: Paths of the submodules that were called with grad enabled and have trainable parameters, or that
            returned a graph which their arguments did not have.
    """

    on_escape: OnEscape
    escaped: list[str] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)
    _scripted: dict[int, tuple[torch.nn.Module, str]] = field(default_factory=dict)
    _has_global_hooks: bool = False
    _running: _Calls = field(default_factory=_Calls)

    def attach(self, model: torch.nn.Module, name: str = "") -> Self:
        """Guard this model too, under a name; by default its class."""
        kind = name or type(model).__name__
        for path, submodule in model.named_modules():
            name = f"{kind}.{path}" if path else kind
            if isinstance(submodule, torch.jit.ScriptModule):  # takes no hook of its own
                self._scripted[id(submodule)] = (submodule, name)
                continue
            before, after = partial(self._before, name), partial(self._after, name)
            self._handles.append(submodule.register_forward_pre_hook(before))
            self._handles.append(submodule.register_forward_hook(after, with_kwargs=True, always_call=True))
        if self._scripted and not self._has_global_hooks:
            self._has_global_hooks = True
            self._handles.append(torch_module.register_module_forward_pre_hook(self._before_script))
            self._handles.append(
                torch_module.register_module_forward_hook(self._after_script, with_kwargs=True, always_call=True)
            )
        return self

    def _before_script(self, module: torch.nn.Module, args: Any) -> None:
        if id(module) in self._scripted:
            self._before(self._scripted[id(module)][1], module, args)

    def _after_script(self, module: torch.nn.Module, args: Any, *rest: Any) -> Any:
        if id(module) not in self._scripted:
            return None
        kwargs = rest[0] if len(rest) == 2 else {}  # which torch leaves out after an error
        return self._after(self._scripted[id(module)][1], module, args, kwargs, rest[-1])

    def _before(self, name: str, module: torch.nn.Module, args: Any) -> None:
        call = _Call(module, torch.is_grad_enabled())
        self._running.calls.append(call)
        whole = isinstance(module, torch.jit.ScriptModule)  # calls its submodules without hooks
        if not call.grad or not any(p.requires_grad for p in module.parameters(recurse=whole)):
            return
        call.has_escaped = True
        self._escape(name, f"{name} was called with grad enabled and has trainable parameters")
        if self.on_escape == "fix":
            torch.set_grad_enabled(False)

    def _after(self, name: str, module: torch.nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        calls = self._running.calls
        if not calls or calls[-1].module is not module:  # another's hook refused the call before ours ran
            return None
        call = calls.pop()
        torch.set_grad_enabled(call.grad)
        graphs: list[torch.Tensor] = []
        checked = map_leaves(partial(self._leave, graphs), result)
        if graphs and not _holds_graph((args, kwargs)):  # whoever recorded it: it begins here
            if not call.has_escaped:
                call.has_escaped = True
                self._escape(name, f"{name} returned a tensor with an autograd graph")
            if self.on_escape == "fix":
                checked = map_leaves(lambda leaf: leaf.detach() if has_graph(leaf) else leaf, checked)
        if calls and call.has_escaped:
            calls[-1].has_escaped = True
        return checked if checked is not result else None

    def _leave(self, graphs: list[torch.Tensor], leaf: Any) -> Any:
        if has_graph(leaf):
            graphs.append(leaf)
        return guarded(leaf, self.on_escape) if is_lazy(leaf) else leaf

    def _escape(self, name: str, what: str) -> None:
        self.escaped.append(name)
        message = (
            f"{what}: autograd keeps its activations; call it inside torch.no_grad(), or use watch(on_escape='fix')"
        )
        if self.on_escape == "raise":
            raise GradEscape(message, module=name)
        if self.on_escape == "warn" and len(self.escaped) == 1:
            warnings.warn(message, GradEscapeWarning, stacklevel=6)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._scripted.clear()
        self._has_global_hooks = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def watch(model: Any, on_escape: OnEscape = "fix") -> Watch:
    """Guard a module, or all modules of a pipeline, against being called with grad enabled.

    Every submodule that has parameters of its own is guarded, so that a model whose methods call ``self.forward``
    directly, bypassing its own hooks, is covered too. What any submodule returns is checked as well: a graph may begin
    in a ``torch.autograd.Function``, in TorchScript, in a checkpoint, or in a thread of the submodule's own. A stream
    that it returns is guarded as by :func:`guard_stream`. Modules may run in several threads at once.

    Args:
        model: A module, or an object that holds some, such as a pipeline of diffusers.
        on_escape: ``fix`` runs each such submodule inside ``no_grad``, and detaches a graph that it returns all the
            same; ``warn`` warns once; ``raise`` raises :class:`~i2v_lab.errors.GradEscape` before the submodule runs,
            or when it returns a graph.

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
    components = find_modules(model, open_pipelines=False)
    if not components:
        kind = type(model).__name__
        raise ProfilerError(
            f"{kind} holds no module that could be watched; use guard_stream on what it returns", type=kind
        )
    for name, module in components.items():
        handle.attach(module, name)
    return handle
