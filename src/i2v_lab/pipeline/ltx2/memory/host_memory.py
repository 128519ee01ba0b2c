"""Host memory for weights that wait: page-locked, so that a device copies from it by itself while it computes."""

from __future__ import annotations

import mmap
import sys

import psutil
import torch

HOST_SHARE = 0.8  # of the free host memory that weights may fill
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


def room_bytes(device: torch.device) -> int:
    """How much host memory weights may fill that run on ``device``; on a CPU they are where they run."""
    if device.type != "cuda":
        return 0
    if torch._guards.active_fake_mode() is not None:
        return sys.maxsize  # a forecast is of a machine that has enough
    return int(HOST_SHARE * psutil.virtual_memory().available)


class PageLocked:
    """A buffer in host memory that the driver has locked, until it is released.

    torch's own page-locked memory (``pin_memory=True``) is rounded up to a power of two, 512 MiB for a block of the 22B
    that has 371, stays with the process when it is let go of, and takes some five times as long to get: 0.5 to 0.65 s a
    GiB on the host of an H100, where touching pages and registering them takes 0.12.

    Args:
        nbytes: Its size.
        device: What copies from it; nothing is locked for a CPU, nor in a forecast.

    Attributes:
        data: ``(nbytes,)``, uint8.

    Raises:
        RuntimeError: The system grants no more.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._locked: torch.Tensor | None = None
        if device.type != "cuda" or torch._guards.active_fake_mode() is not None:
            self.data = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            return
        pages = own_pages(nbytes)
        pages.fill_(0)  # by all cores; the driver would touch page after page
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, PORTABLE))
        self._locked, self.data = pages, pages[:nbytes]

    def release(self) -> None:
        """Unlock it. No copy from or to it may be under way."""
        if self._locked is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._locked.data_ptr()))
            self._locked = None


def own_pages(nbytes: int) -> torch.Tensor:
    """Whole pages of host memory for ``nbytes`` or more, uint8: one that two buffers share cannot be locked twice."""
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    wider = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
    first = -wider.data_ptr() % mmap.PAGESIZE
    return wider[first : first + size]
