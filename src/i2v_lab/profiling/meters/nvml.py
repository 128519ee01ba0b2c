"""NVML's view of whole cards: memory, processes, names and driver; the only module that opens NVML. Needs no torch."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from i2v_lab.errors import I2VLabError, ProfilerError
from i2v_lab.profiling.records import DeviceRecord

if TYPE_CHECKING:
    import torch

NO_PACKAGE = "no package"
NO_DRIVER = "no driver"
NO_ANSWER = "no answer"


class NvmlUnavailable(I2VLabError):
    """NVML cannot be opened, or does not answer a query.

    Attributes:
        cause: :data:`NO_PACKAGE`, :data:`NO_DRIVER` or :data:`NO_ANSWER`; also in ``fields``.
        reason: NVML's own message; empty without the package.
    """

    @property
    def cause(self) -> str:
        """What is missing."""
        return str(self.fields["cause"])

    @property
    def reason(self) -> str:
        """NVML's own message."""
        return str(self.fields["reason"])


@contextmanager
def nvml_session() -> Iterator[Any]:
    """Open NVML for this scope; sessions may nest, and only the outermost one loads the driver's library.

    Yields:
        The module ``pynvml``.

    Raises:
        NvmlUnavailable: The package or the driver is missing, or a query inside the scope failed.

    Example:
        >>> from contextlib import suppress
        >>> with suppress(NvmlUnavailable), nvml_session() as nvml:
        ...     count = nvml.nvmlDeviceGetCount()
    """
    try:
        import pynvml
    except ImportError as error:
        message = "The package nvidia-ml-py is not installed, so the card cannot be queried."
        raise NvmlUnavailable(message, cause=NO_PACKAGE, reason="") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        message = f"There is no NVIDIA driver to query here ({error})."
        raise NvmlUnavailable(message, cause=NO_DRIVER, reason=str(error)) from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"NVML does not answer ({error}).", cause=NO_ANSWER, reason=str(error)) from error
    finally:
        with suppress(pynvml.NVMLError):  # a driver that has gone is not there to be left in order
            pynvml.nvmlShutdown()


# --- The driver and its cards -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A card as NVML lists it.

    Attributes:
        name: Product name, such as ``NVIDIA H100 80GB HBM3``.
        free_bytes: Memory that no process uses.
        total_bytes: Memory of the card.
    """

    name: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Driver:
    """The installed driver.

    Attributes:
        version: Such as ``550.54``.
        cuda: ``(major, minor)`` of the newest CUDA that it supports.
        cards: All cards, whatever ``CUDA_VISIBLE_DEVICES`` says.
    """

    version: str
    cuda: tuple[int, int]
    cards: tuple[Card, ...]


def read_driver() -> Driver:
    """Query the driver and its cards.

    Raises:
        NvmlUnavailable: The package or the driver is missing, or does not answer.
    """
    with nvml_session() as nvml:
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        cards = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            cards.append(Card(_text(nvml.nvmlDeviceGetName(handle)), memory.free, memory.total))
        version = _text(nvml.nvmlSystemGetDriverVersion())
        return Driver(version, (cuda // 1000, cuda % 1000 // 10), tuple(cards))


def driver_cuda_major() -> int | None:
    """Major version of the newest CUDA that the driver supports; ``None`` where there is no driver."""
    try:
        with nvml_session() as nvml:
            return int(nvml.nvmlSystemGetCudaDriverVersion_v2()) // 1000
    except Exception:  # no package, no library, no driver: all the same here
        return None


def describe_device(device: str) -> tuple[str | None, str | None]:
    """Product name and driver version of a CUDA device, without importing torch.

    Args:
        device: As torch writes it, such as ``cuda:1``; numbered as ``CUDA_VISIBLE_DEVICES`` leaves them.

    Returns:
        Two ``None`` where it is no CUDA device or NVML does not know it: a run must not fail for its description.
    """
    kind, _, number = str(device).partition(":")
    if kind != "cuda":
        return None, None
    try:
        with nvml_session() as nvml:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
            entry = visible[int(number or 0)].strip() if visible else number or "0"
            by_index = entry.isdigit()
            handle = nvml.nvmlDeviceGetHandleByIndex(int(entry)) if by_index else nvml.nvmlDeviceGetHandleByUUID(entry)
            return _text(nvml.nvmlDeviceGetName(handle)), driver
    except Exception:  # also an index beyond the visible devices, or a pynvml that lacks a function
        return None, None


def visible_cards() -> list[str]:
    """UUIDs of the cards that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; none where NVML does not answer."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        with nvml_session() as nvml:
            count = nvml.nvmlDeviceGetCount()
            entries = [str(index) for index in range(count)] if given is None else given.split(",")
            cards = []
            for entry in map(str.strip, entries):
                if entry.isdigit() and int(entry) < count:
                    entry = _text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(int(entry))))
                elif not entry.startswith(("GPU-", "MIG-")):
                    break  # as CUDA does: what comes after an entry that is no card is hidden
                cards.append(entry)
            return cards
    except Exception:  # no package, no library, no driver: all the same here
        return []


@cache
def card_index(device: torch.device) -> int:
    """NVML's index of a CUDA device, which differs from CUDA's where ``CUDA_VISIBLE_DEVICES`` hides or reorders cards.

    Matched by UUID; CUDA's own index where NVML does not answer.
    """
    index = device.index or 0
    with suppress(NvmlUnavailable), nvml_session() as nvml:
        import torch

        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return int(nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetHandleByUUID(uuid)))
    return index


# --- Memory of a card -------------------------------------------------------------------------------------------------


def read_device(index: int = 0, time_s: float = 0.0) -> DeviceRecord:
    """Query a card's memory and processes once.

    ``others_bytes`` is the used memory less our own, so that memory counts which NVML attributes to no process: the
    driver's, and that of processes in other PID namespaces. It is ``None`` where our own is not known: under WSL and
    WDDM, on vGPUs and MIG slices NVML does not list the processes, or hides what each uses; in a container it may list
    none, or those of another PID namespace.

    Args:
        index: The card, as NVML counts: see :func:`card_index`.
        time_s: Goes into the record.

    Returns:
        What NVML reports. Without a driver, the package or such a card every value is ``None`` and ``reason`` says why.
    """
    try:
        with nvml_session() as nvml:
            return _read_card(nvml, index, time_s)
    except NvmlUnavailable as error:
        reason = str(error)
        if error.cause == NO_ANSWER:
            reason = f"NVML does not answer for card {index} ({error.reason})."
        return DeviceRecord(time_s, None, None, None, None, None, None, reason)


def _read_card(nvml: Any, index: int, time_s: float) -> DeviceRecord:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    used_bytes, reason = _processes(nvml, handle)
    own_pid = os.getpid()
    others = own_bytes = others_bytes = None
    if used_bytes is not None:
        others = tuple((pid, _process_name(nvml, pid), n) for pid, n in sorted(used_bytes.items()) if pid != own_pid)
        own_bytes = used_bytes[own_pid] if own_pid in used_bytes else _none_held()
    if own_bytes is not None and own_bytes <= memory.used:  # more is not of this process, or not of this card
        others_bytes = memory.used - own_bytes
    else:
        own_bytes = None
    return DeviceRecord(
        time_s=time_s,
        total_bytes=memory.total,
        used_bytes=memory.used,
        own_bytes=own_bytes,
        others_bytes=others_bytes,
        budget_bytes=None if others_bytes is None else max(0, memory.total - others_bytes),
        others=others,
        reason=reason,
    )


def _processes(nvml: Any, handle: Any) -> tuple[dict[int, int | None] | None, str]:
    """The bytes of each process on a card, ``None`` where NVML hides them; or ``None`` in all, and why."""
    with suppress(nvml.NVMLError, AttributeError):  # most cards have no MIG
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            return None, "MIG is enabled: what NVML reports is the whole card's, not that of a slice."
    used_bytes: dict[int, int | None] = {}
    try:
        for query in (nvml.nvmlDeviceGetGraphicsRunningProcesses, nvml.nvmlDeviceGetComputeRunningProcesses):
            for process in query(handle):
                known = [n for n in (used_bytes.get(process.pid), process.usedGpuMemory) if n is not None]
                used_bytes[process.pid] = max(known, default=None)
    except nvml.NVMLError as error:
        return None, f"NVML does not list the processes of this card ({error})."
    return used_bytes, ""


def _none_held() -> int | None:
    """What this process holds where NVML does not list it: nothing, or what is not known if it has a CUDA context."""
    torch = sys.modules.get("torch")
    return None if torch is not None and torch.cuda.is_initialized() else 0


def _process_name(nvml: Any, pid: int) -> str:
    try:
        return _text(nvml.nvmlSystemGetProcessName(pid))
    except nvml.NVMLError:
        return "unknown"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class NvmlSampler:
    """Queries a card at a fixed interval, in a thread of its own, while it is active.

    Sample ``n`` is due at ``start + n * interval_s``, so the interval does not drift; a sample that is late by a whole
    interval is skipped.

    Args:
        index: The card, as NVML counts.
        interval_s: Seconds between samples.
        on_sample: Called with every sample, in the sampler's thread.

    Attributes:
        samples: One :class:`~i2v_lab.profiling.records.DeviceRecord` for each sample.

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

    def _run(self) -> None:
        with ExitStack() as scopes:
            # One session for all samples: opening NVML takes far longer than a query, and the driver's locks with it.
            with suppress(Exception):  # every sample will say what is missing
                scopes.enter_context(nvml_session())
            self._sample_until_stopped()

    def _sample_until_stopped(self) -> None:
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
        self._thread = threading.Thread(target=self._run, name="i2v-lab-nvml", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
