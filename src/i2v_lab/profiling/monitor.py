"""What is in use right now, looked at from a thread of its own, with the phases of a generation marked."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch

from i2v_lab.errors import ProfilerError
from i2v_lab.events import Event, PhaseStarted
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.meters.nvml import card_index, read_device
from i2v_lab.profiling.phase_profiler import PhaseProfiler

KEPT = 600  # samples; older ones are dropped


@dataclass(frozen=True)
class Sample:
    """One look.

    Attributes:
        time_s: Since the monitor was made.
        allocated_bytes: By tensors of this process.
        reserved_bytes: What the caching allocator holds; ``None`` where there is none.
        others_bytes: What other processes use of the card; ``None`` where nobody knows.
        budget_bytes: What the card has for this process; ``None`` where nobody knows.
    """

    time_s: float
    allocated_bytes: int
    reserved_bytes: int | None
    others_bytes: int | None
    budget_bytes: int | None


class MemoryMonitor:
    """Looks at even intervals while it is active (a context manager); also an event sink, which marks phases.

    On CUDA it reads the caching allocator, without waiting for the device, and NVML for the rest of the card. Elsewhere
    it counts tensors: those that a profiler counts while it is followed, or else those of the
    thread that starts it.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        interval_s: Seconds between looks.
        on_sample: Called after every look, in the monitor's thread.

    Attributes:
        samples: The last looks, the newest last.
        marks: ``(seconds, phase)`` for each phase that began.

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
        self.samples: deque[Sample] = deque(maxlen=KEPT)
        self.marks: deque[tuple[float, str]] = deque(maxlen=KEPT)
        self.on_sample = on_sample
        self._interval_s = interval_s
        self._origin_s = time.perf_counter()
        self._profiler: PhaseProfiler | None = None
        self._meter: LiveStorageMeter | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def running(self) -> bool:
        """Whether it looks."""
        return self._thread is not None

    @property
    def source(self) -> str:
        """What the figures are, in one sentence."""
        if self.device.type == "cuda":
            return f"Read from PyTorch's caching allocator and, for the rest of the card, from NVML ({self.device})."
        return (
            "No GPU is in use here, so these are this process's own tensors: those of a generation while one runs, "
            "else those that cells touch while somebody watches."
        )

    def __call__(self, event: Event) -> None:
        """Mark a phase that begins."""
        if isinstance(event, PhaseStarted):
            self.marks.append((time.perf_counter() - self._origin_s, event.phase.value))

    def look(self) -> Sample:
        """Look once, now."""
        now_s = time.perf_counter() - self._origin_s
        if self.device.type == "cuda":
            index = self.device.index if self.device.index is not None else torch.cuda.current_device()
            card = read_device(card_index(torch.device("cuda", index)))
            sample = Sample(
                now_s,
                torch.cuda.memory_allocated(index),
                torch.cuda.memory_reserved(index),
                card.others_bytes,
                card.budget_bytes,
            )
        else:
            sample = Sample(now_s, self._counted_bytes(), None, None, None)
        self.samples.append(sample)
        return sample

    def _counted_bytes(self) -> int:
        counter = self._profiler if self._profiler is not None else self._meter
        return 0 if counter is None else counter.allocated_bytes()

    def start(self) -> None:
        """Look from now on; on a CPU, count the tensors of the calling thread from now on."""
        if self.running:
            return
        if self.device.type != "cuda" and self._profiler is None:
            if MemoryMonitor._counting is not None:
                raise ProfilerError("another monitor counts tensors already; stop it first")
            self._meter = LiveStorageMeter(device_type=self.device.type)  # not the fakes of a forecast
            self._meter.__enter__()
            MemoryMonitor._counting = self
        self._stop.clear()
        self._thread = threading.Thread(target=self._serve, name="i2v-lab-monitor", daemon=True)
        self._thread.start()

    @contextmanager
    def following(self, profiler: PhaseProfiler) -> Iterator[None]:
        """Within this scope look, and on a CPU show what this profiler counts."""
        begun = not self.running
        self._profiler = profiler
        if begun:
            self.start()
        try:
            yield
        finally:
            if begun:
                self.stop()
            self._profiler = None

    def stop(self) -> None:
        """Look once more, and then no longer."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stop.set()
        if thread is not threading.current_thread():
            thread.join()
        self.look()
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._meter, MemoryMonitor._counting = None, None
        self.on_sample()

    def _serve(self) -> None:
        while not self._stop.is_set():
            self.look()
            self.on_sample()
            if self._meter is not None:
                self._meter.forget_the_dead()
            self._stop.wait(self._interval_s)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
