"""Meters: how many bytes are allocated now, and what the most was since the last reset."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, Self

import torch

from i2v_lab.errors import ProfilerError, VramCapExceeded
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter


class MemoryMeter(Protocol):
    """Counts allocated bytes while it is active (a context manager)."""

    def allocated_bytes(self) -> int:
        """Allocated now."""

    def peak_bytes(self) -> int:
        """The most allocated at any time since :meth:`reset_peak`."""

    def reserved_peak_bytes(self) -> int | None:
        """The most an allocator held since :meth:`reset_peak`; ``None`` where no allocator holds anything back."""

    def reset_peak(self) -> None:
        """Start looking for a new peak, from what is allocated now."""

    def observe(self, tensors: Iterable[torch.Tensor], *, weights: bool = False) -> None:
        """Count tensors that exist already, such as the weights of a component that has just been built."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exc: Any) -> Any: ...


class CudaMeter:
    """Reads the CUDA caching allocator; the figures are those of ``torch.cuda.max_memory_allocated()``.

    Args:
        device: A CUDA device.
        cap_bytes: Let the allocator take no more than this from the card, while the meter is active.
    """

    def __init__(self, device: torch.device, cap_bytes: int | None = None) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)  # the allocator's limit wants an index
        self._cap_bytes = cap_bytes

    def allocated_bytes(self) -> int:
        """Allocated now, after the device's queue is drained."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        """The most allocated since :meth:`reset_peak`, after the device's queue is drained."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def reserved_peak_bytes(self) -> int | None:
        """The most the allocator held."""
        return torch.cuda.max_memory_reserved(self._device)

    def reset_peak(self) -> None:
        """Reset the allocator's peaks."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def observe(self, tensors: Iterable[torch.Tensor], *, weights: bool = False) -> None:
        """Nothing to do: the allocator has seen them."""

    def __enter__(self) -> Self:
        if self._cap_bytes is not None:
            allocated = self.allocated_bytes()
            if allocated > self._cap_bytes:
                raise VramCapExceeded(
                    f"vram_cap_bytes={self._cap_bytes} is below the {allocated} bytes that are allocated already; "
                    "raise the cap or free them first",
                    cap_bytes=self._cap_bytes,
                    alive_bytes=allocated,
                )
            self._limit(self._cap_bytes)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._cap_bytes is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def _limit(self, cap_bytes: int) -> None:
        total_bytes = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total_bytes), self._device)


def make_meter(device: torch.device, kind: str = "auto", cap_bytes: int | None = None) -> MemoryMeter:
    """A meter by name.

    Args:
        device: What to meter.
        kind: ``cuda`` (the caching allocator), ``live`` (live storages), or ``auto``: the allocator on CUDA, live
            storages elsewhere.
        cap_bytes: Refuse allocations beyond this.

    Raises:
        ProfilerError: Another name, a cap that is not positive, or the allocator's meter for a device without one.
    """
    if cap_bytes is not None and cap_bytes <= 0:
        raise ProfilerError(f"vram_cap_bytes={cap_bytes} is not positive; give whole bytes", cap_bytes=cap_bytes)
    if kind not in ("auto", "cuda", "live"):
        raise ProfilerError(f"meter={kind!r} is not a meter; use auto, cuda or live", meter=kind)
    if kind == "cuda" and device.type != "cuda":
        raise ProfilerError(f"meter='cuda' cannot meter device={str(device)!r}; use live or auto", meter=kind)
    if kind == "cuda" or (kind == "auto" and device.type == "cuda"):
        return CudaMeter(device, cap_bytes)
    return LiveStorageMeter(cap_bytes=cap_bytes)
