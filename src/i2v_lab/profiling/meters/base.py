"""Protocols of the meters: what a profiler asks of a meter, and what a meter asks of a modelled allocator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch


class MemoryMeter(Protocol):
    """Counts allocated bytes while it is active (a context manager)."""

    def allocated_bytes(self) -> int:
        """Bytes allocated now."""

    def peak_bytes(self) -> int:
        """Maximum of the allocated bytes since :meth:`reset_peak`."""

    def reserved_peak_bytes(self) -> int | None:
        """Maximum of the bytes reserved by a caching allocator since :meth:`reset_peak`; ``None`` without one."""

    def reset_peak(self) -> None:
        """Reset the peaks to what is allocated and reserved now."""

    def observe(self, tensors: Iterable[torch.Tensor], *, weights: bool = False) -> None:
        """Count tensors that exist already, such as the weights of a component that has just been built."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exc: Any) -> Any: ...


class Block(Protocol):
    """What an allocator hands out.

    Attributes:
        size: Bytes that it counts for the block, at least those requested.
    """

    size: int


class Allocator(Protocol):
    """A model of a caching allocator.

    Attributes:
        peak_reserved_bytes: Maximum of the reserved bytes since :meth:`reset_peak`.
    """

    peak_reserved_bytes: int

    def allocate(self, nbytes: int) -> Block:
        """Allocate at least ``nbytes``."""

    def free(self, block: Any) -> None:
        """Free a block that :meth:`allocate` returned."""

    def reset_peak(self) -> None:
        """Reset the peak to what is reserved now."""
