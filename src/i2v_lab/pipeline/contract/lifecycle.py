"""A component's life as a context manager: build, announce, use, let go of every byte."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError

from i2v_lab.errors import CheckpointError
from i2v_lab.events import ComponentBuilt, ComponentReleased, EventSink, Phase, PhaseEnded, PhaseStarted, StepEnded

YOUNG_OBJECTS = 50_000
_LOCK = threading.Lock()
_scopes, _thresholds = 0, gc.get_threshold()


@dataclass(frozen=True)
class PhaseScope:
    """One phase of one run: builds components on the run's device and reports what happens.

    Attributes:
        phase: Which one.
        device: Where components are built.
        emit: Where events go.
    """

    phase: Phase
    device: torch.device
    emit: EventSink

    @contextmanager
    def component(self, name: str, build: Callable[[], torch.nn.Module]) -> Iterator[Any]:
        """Build a component for the length of a ``with`` block; afterwards none of its weights is held by it.

        The weights go when the block ends, even if a frame or a closure still refers to the module.

        Raises:
            CheckpointError: A weight file is gone or damaged, which was whole when it was verified.
        """
        try:
            module = build()
        except CheckpointError as error:
            error.fields.setdefault("component", name)
            raise
        except (OSError, SafetensorError) as error:  # it was whole when the run began
            raise CheckpointError(
                f"the weights of {name} cannot be read any more ({error}); restore their file and run again",
                component=name,
            ) from error
        try:
            self.emit(ComponentBuilt(self.phase, name, module))
            yield module
        finally:
            page_locked_bytes = pageable_bytes = 0
            resident_bytes: tuple[int, ...] = ()
            for part in module.modules():
                stream: Any = vars(part).get("weight_stream")
                if stream is not None:
                    page_locked_bytes += stream.page_locked_bytes
                    pageable_bytes = max(pageable_bytes, stream.pageable_bytes)
                    resident_bytes = stream.resident_bytes
                    stream.close()
                part._parameters.clear()
                part._buffers.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.emit(ComponentReleased(self.phase, name, page_locked_bytes, pageable_bytes, resident_bytes))

    def step(self, step: int, steps: int) -> None:
        """Report a finished step, or a finished chunk."""
        self.emit(StepEnded(self.phase, step, steps))


@contextmanager
def phase_scope(phase: Phase, device: torch.device, emit: EventSink) -> Iterator[PhaseScope]:
    """Bracket a phase with its events, on a monotonic clock, with the device's queue drained at both ends."""
    emit(PhaseStarted(phase))
    synchronize(device)
    start = time.perf_counter()
    try:
        yield PhaseScope(phase, device, emit)
        synchronize(device)
    except BaseException as error:
        failure = None if isinstance(error, GeneratorExit) else error
        emit(PhaseEnded(phase, time.perf_counter() - start, completed=False, error=failure))
        raise
    emit(PhaseEnded(phase, time.perf_counter() - start, completed=True))


@contextmanager
def rare_collections() -> Iterator[None]:
    """Within this scope Python's garbage collector runs once for :data:`YOUNG_OBJECTS` new objects, in all threads.

    By its own thresholds the many objects of a component that is built start collections of all of the process, half a
    million with torch and transformers: 0.25 to 0.4 s each time, three times a generation, in which no kernel is
    launched. What is released in cycles is still found, somewhat later. A process without collections stays so.
    """
    global _scopes, _thresholds
    with _LOCK:
        if not _scopes:
            _thresholds = gc.get_threshold()
            if _thresholds[0]:
                gc.set_threshold(max(YOUNG_OBJECTS, _thresholds[0]), *_thresholds[1:])
        _scopes += 1
    try:
        yield
    finally:
        with _LOCK:
            _scopes -= 1
            if not _scopes:
                gc.set_threshold(*_thresholds)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
