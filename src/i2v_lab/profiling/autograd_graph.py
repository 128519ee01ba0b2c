"""What an autograd graph holds, and the moment at which one begins where none should."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from i2v_lab.errors import GradEscape, ProfilerError
from i2v_lab.profiling.components import find_modules
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.module_paths import ModulePaths

T = TypeVar("T")
OnEscape = Literal["fix", "warn", "raise"]


# --- Bytes saved for backward -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Held:
    """A storage that a graph holds, as often as it was saved."""

    nbytes: int
    module: str
    times: int = 0


class _Saved:
    """Takes a saved tensor's place in the graph; tells the probe when the graph lets go of it."""

    __slots__ = ("_key", "_release", "tensor")

    def __init__(self, tensor: torch.Tensor, key: int, release: Callable[[int], None]) -> None:
        self.tensor = tensor
        self._key = key
        self._release = release

    def __del__(self) -> None:
        self._release(self._key)


class AutogradGraphProbe:
    """Counts the bytes that autograd graphs hold for a backward pass, while it is active.

    Every storage counts once however often it is saved, and for as long as any graph holds it; parameters and buffers
    do not count, since they are there without a graph too. Uses ``torch.autograd.graph.saved_tensors_hooks``, so that
    what a graph holds stays held exactly as long as without the probe.

    Args:
        paths: Names the modules; made by the probe itself if not given.
        meter: Told of every storage that becomes saved or is let go of.

    Attributes:
        alive_bytes: Held now.
        peak_bytes: The most held since :meth:`reset_peak`.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> with AutogradGraphProbe() as probe:
        ...     out = layer(torch.ones(2, 4))
        ...     probe.alive_bytes, probe.by_module()
        (32, {'Linear': 32})
    """

    def __init__(self, paths: ModulePaths | None = None, meter: LiveStorageMeter | None = None) -> None:
        self._paths = paths or ModulePaths()
        self._meter = meter
        self._held: dict[int, _Held] = {}
        self._hooks: Any = None
        self.alive_bytes = 0
        self.peak_bytes = 0
        self._peak_by_module: dict[str, int] = {}

    def by_module(self) -> dict[str, int]:
        """Bytes held now, by the path of the module whose operators saved them first."""
        return _by_module(self._held)

    def peak_by_module(self) -> dict[str, int]:
        """The same at the moment of the peak since :meth:`reset_peak`."""
        self._note_peak()
        return self._peak_by_module

    def reset_peak(self) -> None:
        """Look for a new peak, from what is held now."""
        self.peak_bytes = self.alive_bytes
        self._peak_by_module = _by_module(self._held)

    def _note_peak(self) -> None:
        """Write the breakdown down before the first release after a rise, and when asked: not at every save."""
        if self.alive_bytes > self.peak_bytes:
            self.peak_bytes = self.alive_bytes
            self._peak_by_module = _by_module(self._held)

    def _pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return tensor
        held = self._held.get(key)
        if held is None:
            module = self._paths.current  # asked first: it meets modules that nobody announced, with their weights
            if key in self._paths.weights:
                return tensor
            held = self._held[key] = _Held(storage.nbytes(), module)
            self.alive_bytes += held.nbytes
            if self._meter is not None:
                self._meter.mark_saved(tensor)
        held.times += 1
        # Detached: a result that its own node saves would otherwise hold the node, and the node it, for ever.
        return _Saved(tensor.detach(), key, self._release)

    def _release(self, key: int) -> None:
        held = self._held[key]
        held.times -= 1
        if held.times == 0:
            self._note_peak()
            del self._held[key]
            self.alive_bytes -= held.nbytes
            if self._meter is not None:
                self._meter.mark_released(key)

    def __enter__(self) -> Self:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._note_peak()
        self._hooks.__exit__(*exc)


def _unpack(packed: Any) -> torch.Tensor:
    return packed.tensor if isinstance(packed, _Saved) else packed


def _by_module(held: dict[int, _Held]) -> dict[str, int]:
    totals: defaultdict[str, int] = defaultdict(int)
    for entry in held.values():
        totals[entry.module] += entry.nbytes
    return dict(totals)


# --- Grad where none should be ----------------------------------------------------------------------------------------


class GradEscapeWarning(UserWarning):
    """Work with trainable parameters ran with grad enabled where it should not."""


def _check_mode(on_escape: str) -> None:
    if on_escape not in ("fix", "warn", "raise"):
        raise ProfilerError(f"on_escape={on_escape!r} is not a way to react; use fix, warn or raise")


class _EscapeDetector(TorchFunctionMode):
    """Sees every torch function; reports the first that turns a trainable leaf into a part of a graph."""

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.is_grad_enabled() and any(_is_graph(leaf) for leaf in tree_leaves(result)):
            trainable = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            if any(leaf.requires_grad and leaf.is_leaf for leaf in trainable):
                self._report(getattr(func, "__name__", str(func)))
        return result


def _is_graph(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None


class GuardedStream(Iterator[T], Generic[T]):
    """A lazy iterator that cannot record a graph unseen; made by :func:`guard_stream`.

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
            with _EscapeDetector(lambda name: self._report(name, ModulePaths().current)):
                return next(self._iterator)
        finally:
            torch.set_grad_enabled(mode)  # even if the generator left its own mode behind at a yield
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
        """Close the generator behind it, if it is one; the caller's grad mode stays as it is."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def guard_stream(iterator: Any, on_escape: OnEscape = "fix") -> GuardedStream[Any]:
    """Wrap any lazy iterator or generator so that consuming it cannot keep an autograd graph unnoticed.

    Args:
        iterator: Anything that can be iterated over.
        on_escape: ``fix`` produces every item inside ``torch.no_grad()``; ``warn`` lets the first operator that
            records a graph from trainable parameters pass with a :class:`GradEscapeWarning`; ``raise`` raises
            :class:`~i2v_lab.errors.GradEscape` there. The consumer's grad mode is left as it was in all three.

    Raises:
        ProfilerError: Another ``on_escape``.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> outputs = guard_stream(layer(torch.ones(2)) for _ in range(2))
        >>> [output.requires_grad for output in outputs]
        [False, False]
    """
    _check_mode(on_escape)
    return GuardedStream(iter(iterator), on_escape)


@dataclass
class Watch:
    """The same guard around a module, wherever it is called from; made by :func:`watch`.

    Attributes:
        on_escape: As in :func:`guard_stream`.
        escaped: Paths of the parts that were called with grad enabled.
    """

    on_escape: OnEscape
    escaped: list[str] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)
    _modes: list[bool] = field(default_factory=list)

    def attach(self, model: torch.nn.Module, name: str = "") -> Self:
        """Watch this model too, under a name; by default its class."""
        kind = name or type(model).__name__
        for path, part in model.named_modules():
            name = f"{kind}.{path}" if path else kind
            self._handles.append(part.register_forward_pre_hook(self._entering(name)))
            self._handles.append(part.register_forward_hook(self._leaving, always_call=True))
        return self

    def _entering(self, name: str) -> Callable[[torch.nn.Module, Any], None]:
        def enter(module: torch.nn.Module, args: Any) -> None:
            mode = torch.is_grad_enabled()
            self._modes.append(mode)
            if not mode or not any(p is not None and p.requires_grad for p in module._parameters.values()):
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

        return enter

    def _leaving(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        torch.set_grad_enabled(self._modes.pop())

    def close(self) -> None:
        """Stop watching."""
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
    """Guard a module, or all modules of a pipeline, against being called with grad enabled, from wherever.

    Every part that has parameters of its own is guarded, so that a model whose methods call ``self.forward`` directly,
    past its own hooks, is covered too.

    Args:
        model: The module, or an object that holds some, such as a pipeline of diffusers.
        on_escape: ``fix`` runs each such part inside ``no_grad``; ``warn`` warns once; ``raise`` raises
            :class:`~i2v_lab.errors.GradEscape` before the part runs.

    Returns:
        A handle: ``close()`` it, or use it as a context manager.

    Raises:
        ProfilerError: Another ``on_escape``, or an object that holds no module: it builds them when it is called.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> with watch(layer):
        ...     layer(torch.ones(2)).requires_grad
        False
    """
    _check_mode(on_escape)
    handle = Watch(on_escape)
    if isinstance(model, torch.nn.Module):
        return handle.attach(model)
    components = find_modules(model)
    if not components:
        kind = type(model).__name__
        raise ProfilerError(f"{kind} holds no module that could be watched; use guard_stream on what it returns")
    for name, module in components.items():
        handle.attach(module, name)
    return handle
