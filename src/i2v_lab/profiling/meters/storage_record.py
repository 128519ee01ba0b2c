"""Allocation records of single storages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

CATEGORIES = ("weight", "saved", "activation", "other")


@dataclass(slots=True)
class StorageRecord:
    """Allocation record of one storage, from the first operator that touched it until it was freed.

    Moments are ticks of the meter's logical clock, which advances at every allocation, free, save and release.

    Attributes:
        nbytes: Its size.
        shape: Of the first tensor seen on it.
        dtype: Of that tensor.
        module: Path of the module that was running then; empty outside any.
        is_weight: Whether a module has it as a parameter or buffer.
        allocated_at: First tick at which it was allocated.
        freed_at: First tick at which it was freed; ``None`` while it is allocated.
        saved: Intervals ``[from, to)`` in which an autograd graph saved it; ``to`` is ``None`` while it does.
        is_workspace: Whether a library allocated it internally; then it is no tensor and ``module`` names the library.
        operator: What returned it first, such as ``aten.mm``; empty if it was there before any operator touched it.
    """

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str
    is_weight: bool
    allocated_at: int
    freed_at: int | None = None
    saved: list[list[int | None]] = field(default_factory=list)
    is_workspace: bool = False
    operator: str = ""

    def mark_weight(self, tensor: torch.Tensor, module: str) -> None:
        """Reclassify a storage that was loaded first and became a parameter or buffer of a module afterwards."""
        self.is_weight, self.module = True, module
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def is_live_at(self, tick: int) -> bool:
        """Whether it was allocated at a tick."""
        return self.allocated_at <= tick and (self.freed_at is None or tick < self.freed_at)

    def category_at(self, tick: int) -> str:
        """What it was for at a tick: one of ``CATEGORIES``, the first that fits."""
        if self.is_weight:
            return "weight"
        if any(start is not None and start <= tick and (end is None or tick < end) for start, end in self.saved):
            return "saved"
        return self.unsaved_category

    @property
    def unsaved_category(self) -> str:
        """What it is for while no autograd graph saves it."""
        if self.is_weight:
            return "weight"
        return "activation" if self.module and not self.is_workspace else "other"
