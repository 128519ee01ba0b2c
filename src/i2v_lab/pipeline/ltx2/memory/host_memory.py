"""Page-locked host memory for offloaded weights, from which a device copies by DMA while it computes."""

from __future__ import annotations

import mmap
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any

import torch

from i2v_lab.pipeline.contract.host_memory import available_bytes
from i2v_lab.torch_compat import is_fake

HOST_SHARE = 0.8  # of the available host memory that offloaded weights may take
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device
ANONYMOUS: dict[str, int] = (  # by default pages are shared with children, and no huge ones
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)


def host_budget_bytes(device: torch.device) -> int:
    """How much host memory the offloaded weights of a model on ``device`` may take; none for a CPU's."""
    if device.type != "cuda":
        return 0
    if is_fake():
        return sys.maxsize  # a forecast assumes a machine with enough host memory
    return int(HOST_SHARE * available_bytes())


class HostRoom:
    """Host memory that several components share.

    Attributes:
        changed: Notified when a thread ends the reading of a block; its lock is that of all components.
        limit_bytes: The most that they may take.
        held_bytes: What they take now.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.limit_bytes = self.held_bytes = 0

    @property
    def free_bytes(self) -> int:
        """What is left; below zero where the limit is lower than what is held."""
        return self.limit_bytes - self.held_bytes

    def reserve(self, nbytes: int) -> bool:
        """Whether there is room for ``nbytes`` more, which are then taken; with the lock held, as what follows."""
        if nbytes > self.free_bytes:
            return False
        self.held_bytes += nbytes
        return True

    def unreserve(self, nbytes: int) -> None:
        """``nbytes`` are free again."""
        self.held_bytes -= nbytes

    def refused(self) -> None:
        """The driver refuses to lock more memory."""
        self.limit_bytes = 0


class PageLocked:
    """A page-locked buffer in host memory; locked until :meth:`release`.

    torch's own page-locked memory (``pin_memory=True``) is rounded up to a power of two, 512 MiB for a block of the 22B
    that has 371, stays in the process's cache when it is freed, and takes some five times as long to allocate: 0.5 to
    0.65 s a GiB on the host of an H100, where touching pages and registering them takes 0.12.

    Args:
        nbytes: Its size.
        device: The device that copies from it; nothing is locked for a CPU, nor in a forecast.

    Attributes:
        data: ``(nbytes,)``, uint8.

    Raises:
        RuntimeError: The driver refuses to lock more memory.
        OSError: The system has no more.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._unlock: weakref.finalize[Any, Any] | None = None
        if is_fake():  # where memory is said to be locked and is not
            self.data = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
            return
        pages = own_pages(nbytes)
        self.data = pages[:nbytes]
        if device.type != "cuda":
            return
        pages.numpy().fill(0)  # touched by this thread alone: torch would have every core do it, for each of several
        try:
            with torch.cuda.device(device):  # a thread's is the first card, which would get a context for this
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, PORTABLE))
        except RuntimeError:
            with suppress(RuntimeError):  # it stays the thread's last error, which its next kernel would raise
                torch.zeros(1, device=device).add_(1)
            raise
        self._unlock = weakref.finalize(self, _unregister, pages, device)
        self._unlock.atexit = False  # the driver does, and may be gone by then

    def release(self) -> None:
        """Unlock the pages. No copy from or to the buffer may be in flight."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None


def _unregister(pages: torch.Tensor, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(pages.data_ptr()))


def own_pages(nbytes: int) -> torch.Tensor:
    """Whole pages of host memory, ``nbytes`` rounded up, uint8.

    Page-aligned, because a page that two buffers shared could not be registered twice. Huge pages where the system has
    them: a thread touches five times as many bytes a second.
    """
    pages = mmap.mmap(-1, -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE, **ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
