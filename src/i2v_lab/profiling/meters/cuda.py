"""Meter of ``torch.cuda``'s caching allocator, on NVIDIA and, by the same API, on ROCm."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from i2v_lab.errors import VramCapExceeded
from i2v_lab.profiling.module_paths import ModulePaths

_REQUESTED = re.compile(r"Tried to allocate ([\d.]+) (B|KiB|MiB|GiB)")
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def requested_bytes(message: str) -> int | None:
    """Bytes that a failed allocation asked for, from torch's message; ``None`` if it does not say.

    Example:
        >>> requested_bytes("CUDA out of memory. Tried to allocate 2.00 MiB.")
        2097152
    """
    requested = _REQUESTED.search(message)
    return round(float(requested[1]) * _UNITS[requested[2]]) if requested else None


class CudaMeter:
    """Reads the CUDA caching allocator; the figures are those of ``torch.cuda.max_memory_allocated()``.

    Args:
        device: A CUDA device.
        cap_bytes: Limit of the allocator's reserved bytes while the meter is active.
    """

    def __init__(self, device: torch.device, cap_bytes: int | None = None) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)  # set_per_process_memory_fraction requires an index
        self._cap_bytes = cap_bytes

    def allocated_bytes(self) -> int:
        """Bytes allocated now, after the device is synchronised."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        """Maximum of the allocated bytes since :meth:`reset_peak`, after the device is synchronised."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def reserved_peak_bytes(self) -> int | None:
        """Maximum of the reserved bytes since :meth:`reset_peak`."""
        return torch.cuda.max_memory_reserved(self._device)

    def reset_peak(self) -> None:
        """Reset the allocator's peaks."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def observe(self, tensors: Iterable[torch.Tensor], *, weights: bool = False) -> None:
        """Do nothing: the allocator has counted them."""

    def __enter__(self) -> Self:
        if self._cap_bytes is not None:
            allocated_bytes = self.allocated_bytes()
            if allocated_bytes > self._cap_bytes:
                raise VramCapExceeded(
                    f"vram_cap_bytes={self._cap_bytes} is below the {allocated_bytes} bytes that are allocated "
                    "already; raise the cap or free them first",
                    cap_bytes=self._cap_bytes,
                    alive_bytes=allocated_bytes,
                )
            self._limit(self._cap_bytes)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._cap_bytes is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def _limit(self, cap_bytes: int) -> None:
        total_bytes = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total_bytes), self._device)


@contextmanager
def _annotated(paths: ModulePaths, annotate: Callable[[str], None]) -> Iterator[None]:
    """Say which phase and module allocate from now on, whenever one of them changes."""

    def say(module: str) -> None:
        words = {"phase": paths.phase, "module": module}
        annotate(" ".join(f"{name}={value}" for name, value in words.items() if value))

    def left(*_: Any) -> None:
        say(paths.current.rpartition(".")[0])  # the hook runs within the module, which calls for nothing any more

    hooks = [
        register_module_forward_pre_hook(lambda *_: say(paths.current)),
        register_module_forward_hook(left, always_call=True),
    ]
    paths.on_phase = lambda: say(paths.current)
    try:
        yield
    finally:
        paths.on_phase = None
        for hook in hooks:
            hook.remove()
        annotate("")


@contextmanager
def allocation_history(snapshot: Path, paths: ModulePaths | None = None) -> Iterator[None]:
    """Record every allocation within this scope, and write torch's memory snapshot, for its viewer, at the end.

    Where the installed torch can (2.11 can), each allocation has the phase and the module that made it as its
    ``user_metadata``.

    Args:
        snapshot: The file.
        paths: Names the phase and the running module; without it there are no annotations.
    """
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        with ExitStack() as scopes:
            annotate = getattr(torch.cuda.memory, "_set_memory_metadata", None)
            if paths is not None and annotate is not None:
                scopes.enter_context(_annotated(paths, annotate))
            yield
    finally:
        torch.cuda.memory._dump_snapshot(str(snapshot))
        torch.cuda.memory._record_memory_history(enabled=None)
