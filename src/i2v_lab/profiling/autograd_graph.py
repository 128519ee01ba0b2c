"""Bytes that autograd graphs save for a backward pass."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch

from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.module_paths import ModulePaths
from i2v_lab.torch_compat import inner_tensors, storage_key


@dataclass(slots=True)
class _SavedStorage:
    """A storage saved by at least one graph node, and by how many."""

    nbytes: int
    module: str
    references: int = 0


class _SavedTensor:
    """Takes a saved tensor's place in the graph; notifies the probe when the graph releases it."""

    __slots__ = ("_key", "_release", "tensor")

    def __init__(self, tensor: torch.Tensor, key: int, release: Callable[[int], None]) -> None:
        self.tensor = tensor
        self._key = key
        self._release = release

    def __del__(self) -> None:
        self._release(self._key)


class AutogradGraphProbe:
    """Counts the bytes that autograd graphs save for a backward pass, while it is active.

    Every storage counts once however often it is saved, for as long as any graph saves it; parameters and buffers do
    not count, since they are allocated without a graph too. Uses ``torch.autograd.graph.saved_tensors_hooks``, which
    keeps the lifetime of what a graph saves unchanged.

    Args:
        paths: Names the modules; made by the probe itself if not given.
        meter: Notified of every storage that becomes saved or is released.

    Attributes:
        saved_bytes: Saved now.
        peak_bytes: Maximum of the saved bytes since :meth:`reset_peak`.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> with AutogradGraphProbe() as probe:
        ...     out = layer(torch.ones(2, 4))
        ...     probe.saved_bytes, probe.by_module()
        (32, {'Linear': 32})
    """

    def __init__(self, paths: ModulePaths | None = None, meter: LiveStorageMeter | None = None) -> None:
        self._paths = paths or ModulePaths()
        self._meter = meter
        self._storages: dict[int, _SavedStorage] = {}
        self._thread = threading.local()  # whose own the hooks are
        self._lock = meter.lock if meter is not None else threading.RLock()  # one, since each calls the other
        self._is_over = False
        self.saved_bytes = 0
        self.peak_bytes = 0
        self._peak_by_module: dict[str, int] = {}

    def by_module(self) -> dict[str, int]:
        """Bytes saved now, by the path of the module whose operators saved them first."""
        with self._lock:
            return _by_module(self._storages)

    def peak_by_module(self) -> dict[str, int]:
        """The same at the peak since :meth:`reset_peak`."""
        with self._lock:
            self._update_peak()
            return self._peak_by_module

    def reset_peak(self) -> None:
        """Reset the peak to what is saved now."""
        with self._lock:
            self.peak_bytes = self.saved_bytes
            self._peak_by_module = _by_module(self._storages)

    def _update_peak(self) -> None:
        """Called before the first release after a rise and when the peak is read, not at every save: it is O(n)."""
        if self.saved_bytes > self.peak_bytes:
            self.peak_bytes = self.saved_bytes
            self._peak_by_module = _by_module(self._storages)

    def _pack(self, tensor: torch.Tensor) -> Any:
        with self._lock:
            return tensor if self._is_over else self._save(tensor)

    def _save(self, tensor: torch.Tensor) -> Any:
        key = storage_key(tensor)
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return tensor
        saved = self._storages.get(key)
        if saved is None:
            module = self._paths.current  # first: it registers modules not seen before, with their weights
            if key in self._paths.weights:
                return tensor
            nbytes = sum(inner.untyped_storage().nbytes() for inner in inner_tensors(tensor))
            saved = self._storages[key] = _SavedStorage(nbytes, module)
            self.saved_bytes += saved.nbytes
            if self._meter is not None:
                self._meter.mark_saved(tensor)
        saved.references += 1
        # Detached: a result that its own node saves would otherwise form a reference cycle with it.
        return _SavedTensor(tensor.detach(), key, self._release)

    def _release(self, key: int) -> None:
        with self._lock:
            saved = self._storages[key]
            saved.references -= 1
            if saved.references == 0:
                self._update_peak()
                del self._storages[key]
                self.saved_bytes -= saved.nbytes
                if self._meter is not None:
                    self._meter.mark_released(key)

    def enter_thread(self) -> None:
        """Count what this thread's operators save too."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._thread.hooks = hooks

    def leave_thread(self) -> None:
        """Count what they save no more."""
        hooks = getattr(self._thread, "hooks", None)
        if hooks is not None:
            hooks.__exit__(None, None, None)
            self._thread.hooks = None

    def __enter__(self) -> Self:
        self.enter_thread()
        self._is_over = False
        return self

    def __exit__(self, *exc: Any) -> None:
        with self._lock:
            self._update_peak()
        self._is_over = True  # in a thread that is followed still, which cannot be left from here
        self.leave_thread()


def _unpack(packed: Any) -> torch.Tensor:
    return packed.tensor if isinstance(packed, _SavedTensor) else packed


def _by_module(storages: dict[int, _SavedStorage]) -> dict[str, int]:
    totals: defaultdict[str, int] = defaultdict(int)
    for saved in storages.values():
        totals[saved.module] += saved.nbytes
    return dict(totals)
