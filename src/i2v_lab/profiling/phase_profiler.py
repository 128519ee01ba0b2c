"""Joins meters to the phases of a run: an event sink, and a context manager for any other code."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from i2v_lab.display import phases_html
from i2v_lab.errors import ProfilerError, VramCapExceeded
from i2v_lab.events import ComponentBuilt, ComponentReleased, Event, PhaseEnded, PhaseStarted, StepEnded
from i2v_lab.profiling.autograd_graph import AutogradGraphProbe
from i2v_lab.profiling.meters.cuda import CudaMeter, MemoryMeter, make_meter
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter, StorageLife
from i2v_lab.profiling.module_paths import ModulePaths
from i2v_lab.profiling.open_phase import OpenPhase
from i2v_lab.profiling.records import (
    GenerationRecord,
    GraphRecord,
    HolderRecord,
    ModuleRecord,
    OutOfMemoryRecord,
    PhaseRecord,
    Record,
    StepRecord,
)
from i2v_lab.profiling.timeline import phase_timeline
from i2v_lab.units import format_bytes

HOLDERS = 20  # largest storages written down for a phase's peak
TORCH_ASKED = re.compile(r"Tried to allocate ([\d.]+) (B|KiB|MiB|GiB)")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class PhaseProfiler:
    """Writes down memory and time of every phase: an event sink for a pipeline, :meth:`phase` for any other code.

    A stream that is consumed after its pipeline returned is charged to its own phase, as long as the profiler is still
    active then; :meth:`stream` does the same for a plain generator. Phases may nest: an outer phase's peak is the
    maximum over its segments.

    Args:
        device: The device whose memory is metered.
        meter: ``auto``, ``cuda`` (the caching allocator), ``live`` (live storages), or a meter of your own.
        attribute: Also follow modules and autograd graphs: what is saved for backward, and with live storages what is
            alive at the peak. Without it, phase boundaries are all that costs anything.
        vram_cap_bytes: Pretend to a smaller card: allocations beyond it fail.
        on_record: Called with every record as soon as it exists.
        snapshot: CUDA only: where to write the allocator's history for PyTorch's memory_viz.
        ambient: Let another profiler start while this one is active. Until that one ends, what is saved for backward
            counts there.

    Attributes:
        records: All records so far, in the order in which they came about.
        paths: Names the module that is running; ``None`` without ``attribute``.

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
    ) -> None:
        self._meter = make_meter(torch.device(device), meter, vram_cap_bytes) if isinstance(meter, str) else meter
        self._live = self._meter if isinstance(self._meter, LiveStorageMeter) else None
        if snapshot is not None and not isinstance(self._meter, CudaMeter):
            raise ProfilerError(f"snapshot='{snapshot}' needs the CUDA allocator; leave it out for {device}")
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
        self._outer: PhaseProfiler | None = None
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
            raise ProfilerError("no phase has ended yet; put this profiler among a pipeline's sinks, or use phase()")
        return max(self.phases, key=lambda record: record.peak_bytes)

    def allocated_bytes(self) -> int:
        """Allocated now."""
        return self._meter.allocated_bytes()

    def _repr_html_(self) -> str:
        if not self.phases:
            return phases_html([], "PhaseProfiler: no phase has ended yet.")
        words = f"PhaseProfiler: the peak is {format_bytes(self.peak.peak_bytes)} in {self.peak.phase}."
        return phases_html(self.phases, words)

    # --- Being told ---

    def __call__(self, event: Event) -> None:
        """Take note of a pipeline's event."""
        match event:
            case PhaseStarted(phase=phase):
                self.start(phase.value)
            case ComponentBuilt(name=name, module=module):
                self.component(name, module)
                if self.paths is not None:
                    self.paths.components.append(name)
            case ComponentReleased(name=name):
                if self.paths is not None and name in self.paths.components:
                    self.paths.components.remove(name)
            case StepEnded(step=step, steps=steps):
                self._step(step, steps)
            case PhaseEnded(seconds=seconds, completed=completed, error=error):
                self._end(seconds, completed, error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge a ``with`` block to a phase of this name."""
        self.start(name)
        start_s = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self._end(time.perf_counter() - start_s, completed=False, error=error)
            raise
        self._end(time.perf_counter() - start_s, completed=True, error=None)

    def stream(self, iterator: Iterable[Any], name: str) -> Iterator[Any]:
        """Pass on what a lazy iterator yields, and charge its work to a phase of this name, whoever consumes it."""
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
        """Name a module tree, and count its parameters and buffers as weights."""
        if self.paths is None:
            self._meter.observe([*module.parameters(), *module.buffers()], weights=True)
            return
        self.paths.name_tree(name, module)
        for path, part in module.named_modules():
            own = [t for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]
            with self.paths.inside(f"{name}.{path}" if path else name):
                self._meter.observe(own, weights=True)

    def generation_ended(self, number: int) -> None:
        """Write down what is left allocated after the ``number``-th of several generations."""
        self._write(GenerationRecord(number, self.allocated_bytes()))

    def observe(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that exist already."""
        self._meter.observe(tensors)

    # --- Segments ---

    def start(self, name: str) -> None:
        """Begin a phase, inside of those that are open."""
        self._require_active()
        self._cut()
        now_s = time.perf_counter() - self._origin_s
        tick = self._live.tick if self._live else 0
        parent = self._open[-1].name if self._open else None
        allocated = self._meter.allocated_bytes()
        self._open.append(OpenPhase(name, parent, allocated, now_s, tick, allocated, tick, step_start_s=now_s))
        if self.paths is not None:
            self.paths.phase = name

    def _cut(self) -> None:
        """End a segment: its peaks count for every open phase; the next one starts from what is allocated now."""
        peak_bytes, reserved_bytes = self._meter.peak_bytes(), self._meter.reserved_peak_bytes()
        for phase in self._open:
            phase.step_peak_bytes = max(phase.step_peak_bytes, peak_bytes)
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

    def _step(self, step: int, steps: int) -> None:
        self._cut()
        phase = self._open[-1]
        now_s = time.perf_counter() - self._origin_s
        self._write(StepRecord(phase.name, step, steps, phase.step_peak_bytes, now_s - phase.step_start_s))
        phase.step_start_s, phase.step_peak_bytes = now_s, 0

    def _end(self, seconds: float, completed: bool, error: BaseException | None) -> None:
        phase = self.set_aside()
        phase.seconds = seconds
        self.write_phase(phase, completed, error)

    # --- Phases whose name, or number of steps, shows later ---

    def set_aside(self) -> OpenPhase:
        """End the innermost phase and do not write it down yet."""
        self._cut()
        phase = self._open.pop()
        if self.paths is not None:
            self.paths.phase = self._open[-1].name if self._open else ""
        phase.end_bytes = self._meter.allocated_bytes()
        phase.end_tick = self._live.tick if self._live else 0
        phase.peak_so_far_bytes = self._peak_so_far_bytes
        phase.seconds = time.perf_counter() - self._origin_s - phase.start_s
        return phase

    def reopen(self, phase: OpenPhase) -> None:
        """Go on with a phase that was set aside; the one that was begun since turns out to be a part of it."""
        phase.absorb(self.set_aside())
        self._open.append(phase)
        self.rename(phase.name)

    def rename(self, name: str) -> None:
        """Give the innermost phase another name."""
        self._open[-1].name = name
        if self.paths is not None:
            self.paths.phase = name

    def note_step(self) -> None:
        """A step of the innermost phase is done; it is written down with the phase, when their number is known."""
        self._cut()
        phase = self._open[-1]
        now_s = time.perf_counter() - self._origin_s
        phase.steps.append((phase.step_peak_bytes, now_s - phase.step_start_s))
        phase.step_start_s, phase.step_peak_bytes = now_s, 0

    def write_phase(self, phase: OpenPhase, completed: bool = True, error: BaseException | None = None) -> None:
        """Write down a phase that was set aside."""
        for step, (peak_bytes, seconds) in enumerate(phase.steps, start=1):
            self._write(StepRecord(phase.name, step, len(phase.steps), peak_bytes, seconds))
        if isinstance(error, VramCapExceeded | torch.OutOfMemoryError):
            self._write(self._out_of_memory(phase.name, error, phase.end_bytes))
        self._write(
            PhaseRecord(
                phase=phase.name,
                parent=phase.parent,
                start_bytes=phase.start_bytes,
                peak_bytes=phase.peak_bytes,
                end_bytes=phase.end_bytes,
                peak_reserved_bytes=phase.reserved_bytes,
                peak_so_far_bytes=phase.peak_so_far_bytes,
                saved_for_backward_bytes=phase.saved_bytes if self._probe else None,
                start_s=phase.start_s,
                seconds=phase.seconds,
                completed=completed,
            )
        )
        for module, nbytes in sorted(phase.saved_by_module.items()):
            self._write(GraphRecord(phase.name, module, nbytes))
        if self._live is not None and self.paths is not None:
            self._write_the_peak(phase, list(self._live.alive_at(phase.peak_tick)))
            if phase.parent is None:
                for record in phase_timeline(self._live, phase.name, phase.start_tick, phase.end_tick, self._origin_s):
                    self._write(record)
        if self._live is not None and phase.parent is None:
            self._live.forget_the_dead(phase.end_tick)

    def _write_the_peak(self, phase: OpenPhase, alive: list[StorageLife]) -> None:
        totals: defaultdict[tuple[str, str], int] = defaultdict(int)
        for life in alive:
            totals[life.module, life.category_at(phase.peak_tick)] += life.nbytes
        for (module, category), nbytes in sorted(totals.items()):
            self._write(ModuleRecord(phase.name, module, category, nbytes))
        for life in sorted(alive, key=lambda life: life.nbytes, reverse=True)[:HOLDERS]:
            dtype = str(life.dtype).removeprefix("torch.")
            category = life.category_at(phase.peak_tick)
            self._write(HolderRecord(phase.name, life.nbytes, life.shape, dtype, category, life.module))

    def _out_of_memory(self, phase: str, error: BaseException, alive_bytes: int) -> OutOfMemoryRecord:
        message = str(error).splitlines()[0]
        if isinstance(error, VramCapExceeded):
            fields = error.fields
            return OutOfMemoryRecord(
                phase, fields["module"], fields.get("asked_bytes"), fields["alive_bytes"], fields["cap_bytes"], message
            )
        asked = TORCH_ASKED.search(message)
        asked_bytes = round(float(asked[1]) * UNITS[asked[2]]) if asked else None
        module = self.paths.failed_in(error) if self.paths else ""
        return OutOfMemoryRecord(phase, module, asked_bytes, alive_bytes, self._cap_bytes, message)

    def _write(self, record: Record) -> None:
        self.records.append(record)
        if self._on_record is not None:
            self._on_record(record)

    # --- Life ---

    def _require_active(self) -> None:
        if self._closed:
            raise ProfilerError("this profiler is closed; make a new one for the next run")
        if PhaseProfiler._active is not self:
            raise ProfilerError("this profiler is not active; run the pipeline inside `with profiler:`")

    def __enter__(self) -> Self:
        if self._closed:
            raise ProfilerError("this profiler is closed; make a new one for the next run")
        if PhaseProfiler._active is not None and not PhaseProfiler._active._ambient:
            raise ProfilerError("another profiler is active; leave its with block first")
        with ExitStack() as scopes:
            scopes.enter_context(self._meter)
            if self._probe is not None:
                scopes.enter_context(self._probe)
            if self._snapshot is not None:
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)
                scopes.callback(_dump_snapshot, self._snapshot)
            self._scopes = scopes.pop_all()
        self._outer, PhaseProfiler._active = PhaseProfiler._active, self
        self._origin_s = time.perf_counter()
        self._meter.reset_peak()
        return self

    def __exit__(self, *exc: Any) -> None:
        PhaseProfiler._active, self._outer = self._outer, None
        self._closed = True
        self._scopes.__exit__(*exc)


def _dump_snapshot(path: Path) -> None:
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
