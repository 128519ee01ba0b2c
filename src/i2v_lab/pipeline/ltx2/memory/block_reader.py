"""Threads that read blocks of weights from their files into buffers in host memory, one block after another."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from i2v_lab.errors import CheckpointError
from i2v_lab.pipeline.ltx2.memory.host_copies import BlockPlan, Job
from i2v_lab.pipeline.ltx2.memory.host_memory import PageLocked
from i2v_lab.pipeline.ltx2.memory.readers import file_identity

THREADS = min(8, os.cpu_count() or 1)
THREAD_NAME = "i2v-lab-weights"


@dataclass
class Spare:
    """A buffer whose block has been used, and the event after which the device has its copy."""

    buffer: PageLocked
    event: Any = None


@dataclass
class Reading:
    """A block that threads are reading, or have read.

    Attributes:
        name: The block's.
        plan: How it is read.
        ended: Called once, by one of the threads, or by who stops the reader.
        buffer: Gets it.
        error: What ended it.
        refused: Whether its buffer could not be had.
        stopped: Whether it was stopped.
        left: Jobs that have not ended.
    """

    name: str
    plan: BlockPlan
    ended: Callable[[Reading], None]
    buffer: PageLocked | None = None
    error: BaseException | None = None
    refused: bool = False
    stopped: bool = False
    left: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether its buffer has the block."""
        return self.error is None and not self.refused and not self.stopped


class BlockReader:
    """Reads blocks in the order in which they are asked for, several tensors at once.

    A block that is made on demand is not read: its buffer is locked, which takes as long.

    Args:
        device: The device that copies from the buffers.

    Attributes:
        pageable_bytes: The most that the conversion of tensors took at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.pageable_bytes = 0
        self._device = device
        self._converting_bytes = 0
        self._lock = threading.Lock()
        self._readings: list[Reading] = []
        self._identities: dict[str, Hashable] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._stopping = False

    def read(self, reading: Reading, spare: Spare | None = None) -> None:
        """Have threads read a block; returns at once.

        Args:
            reading: Its ``ended`` is called at the end.
            spare: A buffer to be filled again; a new one without.
        """
        try:
            for path in reading.plan.paths:
                self._identities.setdefault(path, file_identity(path))
        except CheckpointError as error:
            reading.error = error
            reading.buffer = None if spare is None else spare.buffer
            reading.ended(reading)
            return
        with self._lock:
            self._stopping = False
            self._readings.append(reading)
            self._threads = self._threads or ThreadPoolExecutor(THREADS, thread_name_prefix=THREAD_NAME)
            self._threads.submit(self._begin, reading, spare)

    def stop(self) -> None:
        """Wait until no thread reads any more; what was not read to its end has been stopped."""
        self._stopping = True
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            cancelled = list(self._readings)
            self._readings.clear()
        for reading in cancelled:
            reading.stopped = True
            reading.ended(reading)

    def _begin(self, reading: Reading, spare: Spare | None) -> None:
        plan, jobs = reading.plan, list[Job]()
        try:
            if spare is None:
                reading.buffer = PageLocked(plan.nbytes, self._device)
            else:
                reading.buffer = spare.buffer
                if spare.event is not None:
                    spare.event.synchronize()
            jobs = plan.jobs(reading.buffer.data) if plan.paths else []
        except (RuntimeError, OSError, MemoryError):
            reading.refused = True
        except BaseException as error:  # for who takes the block
            reading.error = error
        with self._lock:
            reading.left += len(jobs)
            threads = self._threads
        for job in jobs:
            with suppress(RuntimeError):  # it is being stopped
                if threads is not None:
                    threads.submit(self._run, reading, job)
        self._job_ended(reading)

    def _run(self, reading: Reading, job: Job) -> None:
        with self._lock:
            self._converting_bytes += job.staging_bytes
            self.pageable_bytes = max(self.pageable_bytes, self._converting_bytes)
        try:
            if reading.is_whole and not self._stopping:
                job()
        except BaseException as error:  # for who takes the block
            reading.error = reading.error or error
        with self._lock:
            self._converting_bytes -= job.staging_bytes
        self._job_ended(reading)

    def _job_ended(self, reading: Reading) -> None:
        with self._lock:
            reading.left -= 1
            if reading.left:
                return
        if reading.is_whole and not self._stopping:
            try:
                self._verify(reading.plan)
            except CheckpointError as error:
                reading.error = error
        with self._lock:
            self._readings.remove(reading)
        reading.stopped = self._stopping
        reading.ended(reading)

    def _verify(self, plan: BlockPlan) -> None:
        for path in plan.paths:
            if file_identity(path) != self._identities[path]:
                raise CheckpointError(
                    f"weight file '{path}' changed while it was read; leave weights in place while a run streams them, "
                    "and run again",
                    path=path,
                )
