"""Live monitor: samples memory from a thread of its own, and marks the phases of a generation."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from i2v_lab.errors import ProfilerError
from i2v_lab.events import Event, PhaseStarted
from i2v_lab.profiling.meters.devices import device_support
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.meters.nvml import card_index, read_device
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.record_frames import record_frame

if TYPE_CHECKING:
    import pandas as pd

MAX_SAMPLES = 600  # older ones are dropped


@dataclass(frozen=True)
class Sample:
    """Memory at one moment.

    Attributes:
        time_s: Since the monitor was constructed.
        allocated_bytes: By tensors of this process.
        reserved_bytes: By the caching allocator; ``None`` where there is none.
        others_bytes: Used by other processes and the driver on the card; ``None`` where unknown.
        budget_bytes: Memory of the card less ``others_bytes``; ``None`` where unknown.
    """

    time_s: float
    allocated_bytes: int
    reserved_bytes: int | None
    others_bytes: int | None
    budget_bytes: int | None


class MemoryMonitor:
    """Samples memory at a fixed interval while it is active (a context manager); also an event sink that marks phases.

    On CUDA it reads the caching allocator, without synchronising the device, and NVML for the rest of the card.
    Elsewhere it counts live storages: those of a profiler within :meth:`following`, or else those of the thread that
    starts it.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        interval_s: Seconds between samples.
        on_sample: Called after every sample, in the monitor's thread.

    Attributes:
        samples: The latest samples, oldest first.
        marks: ``(seconds, phase)`` for each phase that started.

    Raises:
        ProfilerError: The interval is not positive, or, on start, another monitor counts tensors already.

    Example:
        >>> with MemoryMonitor("cpu", interval_s=0.01) as monitor:
        ...     kept = torch.zeros(1024)
        ...     time.sleep(0.05)
        >>> monitor.samples[-1].allocated_bytes
        4096
    """

    _counting: MemoryMonitor | None = None

    def __init__(
        self, device: str = "auto", interval_s: float = 0.25, on_sample: Callable[[], None] = lambda: None
    ) -> None:
        if not interval_s > 0:
            raise ProfilerError(f"interval_s={interval_s} is not positive; use 0.25", interval_s=interval_s)
        cuda = torch.cuda.is_available() if device == "auto" else torch.device(device).type == "cuda"
        self.device = torch.device("cuda" if device == "auto" else device) if cuda else torch.device("cpu")
        self.samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self.marks: deque[tuple[float, str]] = deque(maxlen=MAX_SAMPLES)
        self.on_sample = on_sample
        self._interval_s = interval_s
        self._origin_s = time.perf_counter()
        self._profiler: PhaseProfiler | None = None
        self._meter: LiveStorageMeter | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def _reads_allocator(self) -> bool:
        return device_support(self.device).caching_allocator

    @property
    def running(self) -> bool:
        """Whether it is sampling."""
        return self._thread is not None

    @property
    def source(self) -> str:
        """Where the figures come from, in one sentence."""
        if self._reads_allocator:
            return f"Read from PyTorch's caching allocator and, for the rest of the card, from NVML ({self.device})."
        return (
            "No GPU is in use here, so these are this process's own tensors: those of a generation while one runs, "
            "else those that cells touch while the monitor runs."
        )

    def __call__(self, event: Event) -> None:
        """Mark the start of a phase."""
        if isinstance(event, PhaseStarted):
            self.marks.append((time.perf_counter() - self._origin_s, event.phase.value))

    def to_frame(self) -> pd.DataFrame:
        """The samples, one a row, with a column for each field of :class:`Sample`; bytes are integers.

        Example:
            >>> monitor = MemoryMonitor("cpu")
            >>> monitor.to_frame()["allocated_bytes"].dtype.name
            'int64'
        """
        return record_frame(Sample, list(self.samples))

    def sample(self) -> Sample:
        """Take one sample now."""
        now_s = time.perf_counter() - self._origin_s
        if self._reads_allocator:
            index = self.device.index if self.device.index is not None else torch.cuda.current_device()
            others_bytes = budget_bytes = None
            if device_support(self.device).process_bytes:
                card = read_device(card_index(torch.device("cuda", index)))
                others_bytes, budget_bytes = card.others_bytes, card.budget_bytes
            allocated_bytes, reserved_bytes = torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)
            sample = Sample(now_s, allocated_bytes, reserved_bytes, others_bytes, budget_bytes)
        else:
            sample = Sample(now_s, self._counted_bytes(), None, None, None)
        self.samples.append(sample)
        return sample

    def _counted_bytes(self) -> int:
        counter = self._profiler if self._profiler is not None else self._meter
        return 0 if counter is None else counter.allocated_bytes()

    def start(self) -> None:
        """Start sampling; without a caching allocator, also count the tensors of the calling thread from now on."""
        if self.running:
            return
        if not self._reads_allocator and self._profiler is None:
            if MemoryMonitor._counting is not None:
                raise ProfilerError("another monitor counts tensors already; stop it first")
            self._meter = LiveStorageMeter(device_type=self.device.type)  # not a forecast's fake storages
            self._meter.__enter__()
            MemoryMonitor._counting = self
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="i2v-lab-monitor", daemon=True)
        self._thread.start()

    @contextmanager
    def following(self, profiler: PhaseProfiler) -> Iterator[None]:
        """Sample within this scope; without a caching allocator, what this profiler counts."""
        started_here = not self.running
        self._profiler = profiler
        if started_here:
            self.start()
        try:
            yield
        finally:
            if started_here:
                self.stop()
            self._profiler = None

    def stop(self) -> None:
        """Take a last sample and stop."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stop.set()
        if thread is not threading.current_thread():
            thread.join()
        self.sample()
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._meter, MemoryMonitor._counting = None, None
        self.on_sample()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self.on_sample()
            if self._meter is not None:
                self._meter.drop_freed()
            self._stop.wait(self._interval_s)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
