"""Host memory that a run would lock: fakes of it are marked, since nothing is locked in a forecast."""

from __future__ import annotations

import torch

PAGE_LOCKED = "_i2v_lab_page_locked"  # attribute of a storage


def is_page_locked(tensor: torch.Tensor) -> bool:
    """Whether a host tensor is page-locked, or would be in a run that is not a forecast."""
    return getattr(tensor.untyped_storage(), PAGE_LOCKED, False)


def set_page_locked(*tensors: torch.Tensor) -> None:
    """Take the memory of fake host tensors to be page-locked."""
    for tensor in tensors:
        setattr(tensor.untyped_storage(), PAGE_LOCKED, True)
