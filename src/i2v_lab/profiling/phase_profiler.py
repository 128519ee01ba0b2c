"""Records memory and time of phases: an event sink for a pipeline, and a context manager for any other code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from i2v_lab.errors import ProfilerError, VramCapExceeded
from i2v_lab.events import ComponentBuilt, ComponentReleased, Event, Note, PhaseEnded, PhaseStarted, StepEnded
from i2v_lab.metered_threads import MeteredThreads
from i2v_lab.profiling.autograd_graph import AutogradGraphProbe
from i2v_lab.profiling.meters.base import MemoryMeter
from i2v_lab.profiling.meters.cuda import CudaMeter, allocation_history, requested_bytes
from i2v_lab.profiling.meters.devices import device_support, make_meter
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.module_paths import ModulePaths
from i2v_lab.profiling.open_phase import OpenPhase
from i2v_lab.profiling.phase_html import phases_html
from i2v_lab.profiling.record_frames import record_frame
from i2v_lab.profiling.records import (
    AssumptionRecord,
    GenerationRecord,
    GraphRecord,
    HostMemoryRecord,
    NoteRecord,
    OutOfMemoryRecord,
    PhaseRecord,
    Record,
    StepRecord,
)
from i2v_lab.profiling.timeline import peak_breakdown, phase_timeline
from i2v_lab.profiling.worker_threads import metered_workers
from i2v_lab.units import format_bytes

if TYPE_CHECKING:
    import pandas as pd


class PhaseProfiler:
    """Records memory and time of every phase: an event sink for a pipeline, :meth:`phase` for any other code.

    A stream that is consumed after its pipeline returned is attributed to its own phase, as long as the profiler is
    still active then; :meth:`stream` does the same for a plain generator. Phases may nest: an outer phase's peak is the
    maximum over its segments.

    Args:
        device: The device whose memory is metered.
        meter: ``auto``, ``cuda`` (the caching allocator), ``live`` (live storages), or a meter of your own.
        attribute: Also attribute memory to modules and autograd graphs: what is saved for backward, and with live
            storages what is allocated at the peak. Without it, only phase boundaries cost anything.
        vram_cap_bytes: Emulate a smaller card: allocations beyond it fail.
        on_record: Called with every record as soon as it exists.
        snapshot: Where to write the allocator's history for PyTorch's memory_viz; devices with a caching allocator
            only.
        ambient: Let another profiler start while this one is active. Until that one ends, what is saved for backward
            counts there.
        independent: The meter sees the work of this profiler alone, as in a forecast: others may be active beside it.

    Attributes:
        records: All records so far, oldest first.
        paths: Names the running module; ``None`` without ``attribute``.
        threads: The threads that are metered: that which entered the profiler, and others during a phase.

    Raises:
        ProfilerError: An unknown meter, a cap that is not positive, a snapshot without CUDA, another profiler that is
            still active, or a profiler used again after it was closed.

    Example:
        >>> with PhaseProfiler("cpu") as profiler:
        ...     with profiler.phase("multiply"):
        ...         product = torch.ones(16, 16) @ torch.ones(16, 16)
        >>> profiler.peak.phase, profiler.peak.peak_bytes
        ('multiply', 3072)
    """

    _active: PhaseProfiler | None = None

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        meter: str | MemoryMeter = "auto",
        attribute: bool = True,
        vram_cap_bytes: int | None = None,
        on_record: Callable[[Record], None] | None = None,
        snapshot: Path | None = None,
        ambient: bool = False,
        independent: bool = False,
    ) -> None:
        self._meter = make_meter(torch.device(device), meter, vram_cap_bytes) if isinstance(meter, str) else meter
        self._live = self._meter if isinstance(self._meter, LiveStorageMeter) else None
        can_snapshot = isinstance(self._meter, CudaMeter) and device_support(torch.device(device)).snapshot
        if snapshot is not None and not can_snapshot:
            raise ProfilerError(
                f"snapshot='{snapshot}' needs the CUDA allocator; leave it out for {device}", device=str(device)
            )
        self._snapshot = snapshot
        self._cap_bytes = vram_cap_bytes
        self.paths = ModulePaths() if attribute else None
        self._probe = AutogradGraphProbe(self.paths, self._live) if attribute else None
        if self._live is not None:
            self._live.paths = self.paths
        self._on_record = on_record
        self._open: list[OpenPhase] = []
        self._peak_so_far_bytes = 0
        self._origin_s = 0.0
        self._scopes = ExitStack()
        self._closed = False
        self._ambient = ambient
        self._independent = independent
        self._entered = False
        self._outer: PhaseProfiler | None = None
        self.threads = MeteredThreads([part for part in (self._live, self._probe) if part is not None])
        self.records: list[Record] = []

    # --- Reading ---

    @property
    def phases(self) -> list[PhaseRecord]:
        """The phases that have ended, in that order."""
        return [record for record in self.records if isinstance(record, PhaseRecord)]

    @property
    def peak(self) -> PhaseRecord:
        """The phase with the highest peak, the first of equals.

        Raises:
            ProfilerError: No phase has ended yet.
        """
        if not self.phases:
            raise ProfilerError(
                "no phase has ended yet; put this profiler among a pipeline's sinks, or use phase()", state="no phase"
            )
        return max(self.phases, key=lambda record: record.peak_bytes)

    @property
    def assumptions(self) -> list[AssumptionRecord]:
        """What a forecast answered without knowing it; complete when its scope has ended."""
        return [record for record in self.records if isinstance(record, AssumptionRecord)]

    def to_frame(self) -> pd.DataFrame:
        """The phases that have ended, one a row, with a column for each field of ``PhaseRecord``; bytes are integers.

        Example:
            >>> with PhaseProfiler("cpu") as profiler, profiler.phase("multiply"):
            ...     product = torch.ones(16, 16) @ torch.ones(16, 16)
            >>> profiler.to_frame()[["phase", "peak_bytes"]].values.tolist()
            [['multiply', 3072]]
        """
        return record_frame(PhaseRecord, self.phases)

    def allocated_bytes(self) -> int:
        """Bytes allocated now."""
        return self._meter.allocated_bytes()

    def _repr_html_(self) -> str:
        if not self.phases:
            return phases_html([], "PhaseProfiler: no phase has ended yet.")
        words = f"PhaseProfiler: the peak is {format_bytes(self.peak.peak_bytes)} in {self.peak.phase}."
        return phases_html(self.phases, words)

    # --- Events ---

    def __call__(self, event: Event) -> None:
        """Handle a pipeline's event."""
        match event:
            case PhaseStarted(phase=phase):
                self.start(phase.value)
            case ComponentBuilt(name=name, module=module):
                self.component(name, module)
                if self.paths is not None:
                    self.paths.components.append(name)
            case ComponentReleased(phase, name, locked, pageable, resident):
                peak_bytes = self._component_peak_bytes()
                if locked or pageable:
                    self.write(HostMemoryRecord(phase.value, name, locked, pageable, resident, peak_bytes))
                if self.paths is not None and name in self.paths.components:
                    self.paths.components.remove(name)
            case StepEnded(step=step, steps=steps):
                self._step(step, steps)
            case PhaseEnded(seconds=seconds, completed=completed, error=error):
                self._end(seconds, completed, error)
            case Note(phase=phase, topic=topic, count=count, text=text):
                self.write(NoteRecord(phase.value, topic, count, text))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute a ``with`` block to a phase of this name, in any thread, and what it has other threads do."""
        with self.threads.metered(), metered_workers(self.threads):
            self.start(name)
            start_s = time.perf_counter()
            try:
                yield
            except BaseException as error:
                self._end(time.perf_counter() - start_s, completed=False, error=error)
                raise
            self._end(time.perf_counter() - start_s, completed=True, error=None)

    def stream(self, iterator: Iterable[Any], name: str) -> Iterator[Any]:
        """Yield a lazy iterator's items, and attribute its work to a phase of this name, wherever it is consumed."""
        source = iter(iterator)
        while True:
            with self.phase(name):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item
            del item

    def component(self, name: str, module: torch.nn.Module) -> None:
        """Register a component, and count its parameters and buffers as weights."""
        if self.paths is None:
            self._meter.observe([*module.parameters(), *module.buffers()], weights=True)
            return
        self.paths.register(name, module)
        for path, submodule in module.named_modules():
            own = [*submodule.parameters(recurse=False), *submodule.buffers(recurse=False)]
            with self.paths.override(f"{name}.{path}" if path else name):
                self._meter.observe(own, weights=True)

    def generation_ended(self, number: int) -> None:
        """Record what is still allocated after the ``number``-th of several generations."""
        self.write(GenerationRecord(number, self.allocated_bytes()))

    def observe(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that exist already."""
        self._meter.observe(tensors)

    # --- Segments ---

    def start(self, name: str) -> None:
        """Begin a phase, nested in those that are open."""
        self._require_active()
        self._end_segment()
        now_s = time.perf_counter() - self._origin_s
        tick = self._live.tick if self._live else 0
        parent = self._open[-1].name if self._open else None
        allocated = self._meter.allocated_bytes()
        self._open.append(OpenPhase(name, parent, allocated, now_s, tick, allocated, tick, step_start_s=now_s))
        if self.paths is not None:
            self.paths.phase = name

    def _end_segment(self) -> None:
        """End a segment between two readings: its costs count for the innermost phase, its peaks for all."""
        costs = self._live.take_costs() if self._live else []
        if self._open:
            self._open[-1].costs += costs
        self._end_peaks()

    def _end_peaks(self) -> None:
        """Count the peaks since the last reading for every open phase, and reset them."""
        peak_bytes, reserved_bytes = self._meter.peak_bytes(), self._meter.reserved_peak_bytes()
        for phase in self._open:
            phase.step_peak_bytes = max(phase.step_peak_bytes, peak_bytes)
            phase.component_peak_bytes = max(phase.component_peak_bytes, peak_bytes)
            if peak_bytes > phase.peak_bytes:
                phase.peak_bytes = peak_bytes
                phase.peak_tick = self._live.peak_tick if self._live else 0
            if reserved_bytes is not None:
                phase.reserved_bytes = max(phase.reserved_bytes or 0, reserved_bytes)
            if self._probe is not None:
                by_module = self._probe.peak_by_module()
                if self._probe.peak_bytes > phase.saved_bytes:
                    phase.saved_bytes, phase.saved_by_module = self._probe.peak_bytes, by_module
        self._peak_so_far_bytes = max(self._peak_so_far_bytes, peak_bytes)
        self._meter.reset_peak()
        if self._probe is not None:
            self._probe.reset_peak()

    def _component_peak_bytes(self) -> int:
        """The peak of the innermost phase since it began, or since this was asked last."""
        self._end_peaks()
        return self._open[-1].take_component_peak() if self._open else 0

    def _step(self, step: int, steps: int) -> None:
        self._end_segment()
        phase = self._open[-1]
        now_s = time.perf_counter() - self._origin_s
        self.write(StepRecord(phase.name, step, steps, phase.step_peak_bytes, now_s - phase.step_start_s))
        phase.step_start_s, phase.step_peak_bytes = now_s, 0

    def _end(self, seconds: float, completed: bool, error: BaseException | None) -> None:
        phase = self.suspend()
        phase.seconds = seconds
        self.write_phase(phase, completed, self._live.behind(error) if self._live is not None else error)

    # --- Phases whose name, or number of steps, is known only later ---

    def suspend(self) -> OpenPhase:
        """End the innermost phase without writing its record: see :meth:`resume` and :meth:`write_phase`."""
        self._end_segment()
        phase = self._open.pop()
        if self.paths is not None:
            self.paths.phase = self._open[-1].name if self._open else ""
        phase.end_bytes = self._meter.allocated_bytes()
        phase.end_tick = self._live.tick if self._live else 0
        phase.peak_so_far_bytes = self._peak_so_far_bytes
        phase.seconds = time.perf_counter() - self._origin_s - phase.start_s
        return phase

    def resume(self, phase: OpenPhase) -> None:
        """Continue a suspended phase; the one that was started since becomes part of it."""
        phase.merge(self.suspend())
        self._open.append(phase)
        self.rename(phase.name)

    def rename(self, name: str) -> None:
        """Rename the innermost phase."""
        self._open[-1].name = name
        if self.paths is not None:
            self.paths.phase = name

    def end_step(self) -> None:
        """End a step of the innermost phase; its record is written with the phase, when their number is known."""
        self._end_segment()
        phase, now_s = self._open[-1], time.perf_counter() - self._origin_s
        phase.steps.append((phase.step_peak_bytes, now_s - phase.step_start_s))
        phase.step_start_s, phase.step_peak_bytes = now_s, 0

    def write_phase(self, phase: OpenPhase, completed: bool = True, error: BaseException | None = None) -> None:
        """Write the records of a suspended phase."""
        for step, (peak_bytes, seconds) in enumerate(phase.steps, start=1):
            self.write(StepRecord(phase.name, step, len(phase.steps), peak_bytes, seconds))
        if isinstance(error, VramCapExceeded | torch.OutOfMemoryError):
            self.write(self._out_of_memory(phase.name, error, phase.end_bytes))
        for cost in phase.cost_records():
            self.write(cost)
        self.write(phase.record(completed, with_saved=bool(self._probe)))
        for module, nbytes in sorted(phase.saved_by_module.items()):
            self.write(GraphRecord(phase.name, module, nbytes))
        if self._live is not None and self.paths is not None:
            for breakdown in peak_breakdown(phase.name, list(self._live.live_at(phase.peak_tick)), phase.peak_tick):
                self.write(breakdown)
            if phase.parent is None:
                for record in phase_timeline(self._live, phase.name, phase.start_tick, phase.end_tick, self._origin_s):
                    self.write(record)
        if self._live is not None and phase.parent is None:
            self._live.drop_freed(phase.end_tick)

    def _out_of_memory(self, phase: str, error: BaseException, alive_bytes: int) -> OutOfMemoryRecord:
        message = str(error).splitlines()[0]
        if isinstance(error, VramCapExceeded):
            fields = error.fields
            return OutOfMemoryRecord(
                phase, fields["module"], fields.get("asked_bytes"), fields["alive_bytes"], fields["cap_bytes"], message
            )
        asked_bytes = requested_bytes(message)
        module = self.paths.raised_in(error) if self.paths else ""
        return OutOfMemoryRecord(phase, module, asked_bytes, alive_bytes, self._cap_bytes, message)

    def write(self, record: Record) -> None:
        """Add a record."""
        self.records.append(record)
        if self._on_record is not None:
            self._on_record(record)

    # --- Context manager ---

    def _require_active(self) -> None:
        if self._closed:
            raise ProfilerError("this profiler is closed; make a new one for the next run", state="closed")
        if not self._entered or (PhaseProfiler._active is not self and not self._independent):
            raise ProfilerError(
                "this profiler is not active; run the pipeline inside `with profiler:`", state="inactive"
            )

    def __enter__(self) -> Self:
        if self._closed:
            raise ProfilerError("this profiler is closed; make a new one for the next run", state="closed")
        outer = None if self._independent else PhaseProfiler._active
        if outer is not None and not outer._ambient:
            raise ProfilerError("another profiler is active; leave its with block first", state="another active")
        MeteredThreads.clear_thread()
        with ExitStack() as scopes:
            scopes.enter_context(self._meter)
            if self._probe is not None:
                scopes.enter_context(self._probe)
            if self._snapshot is not None:
                scopes.enter_context(allocation_history(self._snapshot, self.paths))
            self._scopes = scopes.pop_all()
        self._entered = True
        if not self._independent:
            self._outer, PhaseProfiler._active = PhaseProfiler._active, self
        self.threads.entered()
        self._origin_s = time.perf_counter()
        self._meter.reset_peak()
        return self

    def __exit__(self, *exc: Any) -> None:
        if not self._independent:
            PhaseProfiler._active, self._outer = self._outer, None
        self._closed = True
        self._scopes.__exit__(*exc)
        self.threads.end()
