"""Who else is on the card: NVML's view of a whole device, at even intervals."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Self

import torch

from i2v_lab.errors import ProfilerError
from i2v_lab.profiling.records import DeviceRecord


@cache
def card_index(device: torch.device) -> int:
    """Which card, as NVML counts, a CUDA device is: CUDA counts only what ``CUDA_VISIBLE_DEVICES`` leaves.

    Matched by UUID; where NVML does not answer, CUDA's own index.
    """
    index = device.index or 0
    try:
        import pynvml
    except ImportError:
        return index
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return int(pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(uuid)))
        finally:
            pynvml.nvmlShutdown()
    return index


def read_device(index: int = 0, time_s: float = 0.0) -> DeviceRecord:
    """One look at a card.

    NVML names the processes on a card but may hide what each uses (in a container, or from another user); then the
    others' bytes are what is used less our own, if our own are known, and ``None`` if not.

    Args:
        index: The card, as NVML counts: see :func:`card_index`.
        time_s: Goes into the record.

    Returns:
        What NVML says. Without a driver, a library or such a card every value is ``None`` and ``reason`` says why.
    """
    try:
        import pynvml
    except ImportError:
        return _unknown(time_s, "The package nvidia-ml-py is not installed, so the card cannot be asked.")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return _unknown(time_s, f"There is no NVIDIA driver to ask here ({error}).")
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        running = {
            process.pid: process.usedGpuMemory
            for list_processes in (
                pynvml.nvmlDeviceGetGraphicsRunningProcesses,
                pynvml.nvmlDeviceGetComputeRunningProcesses,
            )
            for process in list_processes(handle)
        }
        others = tuple((pid, _name(pynvml, pid), used) for pid, used in sorted(running.items()) if pid != os.getpid())
    except pynvml.NVMLError as error:
        return _unknown(time_s, f"NVML does not answer for card {index} ({error}).")
    finally:
        pynvml.nvmlShutdown()
    own_bytes = running.get(os.getpid(), 0)
    others_bytes: int | None
    if all(used is not None for _, _, used in others):
        others_bytes = sum(used or 0 for _, _, used in others)
    else:
        others_bytes = None if own_bytes is None else memory.used - own_bytes
    return DeviceRecord(
        time_s=time_s,
        total_bytes=memory.total,
        used_bytes=memory.used,
        own_bytes=own_bytes,
        others_bytes=others_bytes,
        budget_bytes=None if others_bytes is None else memory.total - others_bytes,
        others=others,
        reason="",
    )


def _unknown(time_s: float, reason: str) -> DeviceRecord:
    return DeviceRecord(time_s, None, None, None, None, None, None, reason)


def _name(pynvml: Any, pid: int) -> str:
    try:
        name = pynvml.nvmlSystemGetProcessName(pid)
    except pynvml.NVMLError:
        return "unknown"
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


@contextmanager
def _session() -> Iterator[None]:
    """Keep NVML up for many looks: bringing it up takes far longer than a look, and the driver's locks with it."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # every look will say what is missing
        yield
        return
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


class NvmlSampler:
    """Looks at a card at even intervals, in a thread of its own, while it is active.

    Sample ``n`` is due at ``start + n * interval_s``, so the interval does not drift; a sample that is late by a whole
    interval is left out rather than made up for.

    Args:
        index: The card.
        interval_s: Seconds between samples.
        on_sample: Called with every sample, in the sampler's thread.

    Attributes:
        samples: One :class:`~i2v_lab.profiling.records.DeviceRecord` for each look.

    Raises:
        ProfilerError: The interval is not positive.

    Example:
        >>> with NvmlSampler(interval_s=0.01) as sampler:
        ...     time.sleep(0.05)
        >>> len(sampler.samples) > 0
        True
    """

    def __init__(
        self, index: int = 0, interval_s: float = 0.1, on_sample: Callable[[DeviceRecord], None] = lambda _: None
    ) -> None:
        if not interval_s > 0:
            raise ProfilerError(f"interval_s={interval_s} is not positive; use 0.1", interval_s=interval_s)
        self.samples: list[DeviceRecord] = []
        self._index = index
        self._on_sample = on_sample
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _sample(self) -> None:
        with _session():
            self._look_again_and_again()

    def _look_again_and_again(self) -> None:
        start_s = time.perf_counter()
        due = 0
        while True:
            now_s = time.perf_counter() - start_s
            self.samples.append(read_device(self._index, now_s))
            self._on_sample(self.samples[-1])
            due = max(due, int((time.perf_counter() - start_s) / self._interval_s)) + 1
            if self._stop.wait(max(0.0, start_s + due * self._interval_s - time.perf_counter())):
                return

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._sample, name="i2v-lab-nvml", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
