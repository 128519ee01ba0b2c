"""Forecasts: any torch code under fake tensors, profiled as a real run, on a device that is not here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch

from i2v_lab import events
from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.assumptions import DEFAULT, Answers, Assumptions, chosen_assumptions
from i2v_lab.profiling.fake.block_trace import TracingAllocator
from i2v_lab.profiling.fake.cached_tensors import own_caches
from i2v_lab.profiling.fake.card import CardProperties, FakeCard
from i2v_lab.profiling.fake.copies import components, to_fake
from i2v_lab.profiling.fake.device import fake_device
from i2v_lab.profiling.fake.garbage import no_collection
from i2v_lab.profiling.fake.memoization import MemoryKey, ModuleMemo
from i2v_lab.profiling.fake.operator_costs import OperatorCosts
from i2v_lab.profiling.fake.workspaces import Workspaces
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import CostRow, Forecast, NoteRecord
from i2v_lab.thread_patches import patched_here
from i2v_lab.torch_compat import active_fake_mode, inner_tensors, storage_key, tree_leaves

NOT_COUNTED = (
    "library workspaces, the allocator's rounding and the CUDA context are not counted; pass "
    "workspaces=load_workspaces()"
)


class ForecastMeter(LiveStorageMeter):
    """Counts the storages of operators that the fake device reports, and the workspaces of their kernels.

    Never entered as a dispatch mode: the fake device sees every operator anyway.
    """

    def __init__(self, device_type: str, workspaces: Workspaces | None, capability: tuple[int, int] = (9, 0)) -> None:
        allocator = TracingAllocator() if workspaces is not None else None
        super().__init__(device_type=device_type, allocator=allocator)
        self.allocator = allocator
        self._workspaces = workspaces
        self._capability = capability
        self._initialized: set[str] = set()
        self.costs = OperatorCosts(device_type)
        self._segments = 0
        self._max_allocated_bytes = 0
        self._max_reserved_bytes = 0
        self._reserved_bytes = 0  # without a model of the allocator: what it has to keep until its cache is emptied

    def on_operator(self, func: Any, args: Any, result: Any, tensors: list[torch.Tensor]) -> None:
        """Count the tensors that an operator takes and returns, its kernel's workspaces, and what it costs."""
        returned = {id(leaf) for leaf in tree_leaves(result)}
        self.observe(tensor for tensor in tensors if id(tensor) not in returned)
        self.observe((tensor for tensor in tensors if id(tensor) in returned), operator=func)
        self.costs.operator(func, args, result, tensors)
        if self._workspaces is not None:
            for library, nbytes in self._workspaces.persistent(func, args, self._capability).items():
                if nbytes and library not in self._initialized:
                    self._initialized.add(library)
                    self.add_persistent_workspace(nbytes, f"{library} workspace")
            nbytes = self._workspaces.transient(func, args, result)
            if nbytes:
                self.add_transient_workspace(nbytes, "cuDNN workspace")

    def observe(self, tensors: Iterable[torch.Tensor], *, weights: bool = False, operator: Any = None) -> None:
        """As of a real run; the weights of a component that was built are also what loading it costs."""
        if not weights:
            super().observe(tensors, operator=operator)
            return
        tensors = list(tensors)
        super().observe(tensors, weights=True)
        self.costs.weights([inner for tensor in tensors for inner in inner_tensors(tensor)])

    def take_costs(self) -> list[tuple[CostRow, ...]]:
        """What operators cost since it was asked last, segment by segment."""
        if self.allocator is not None and self.allocator.segments > self._segments:
            self.costs.count("segment", "", count=self.allocator.segments - self._segments)
            self._segments = self.allocator.segments
        self.costs.cut()
        return self.costs.take()

    def _update_peak(self, before_bytes: int) -> None:
        super()._update_peak(before_bytes)
        self._raise_max(self._live_bytes)

    def raise_peak(self, nbytes: int) -> None:
        """As of a real run too, whose peak this is."""
        super().raise_peak(nbytes)
        self._raise_max(nbytes)

    def _raise_max(self, nbytes: int) -> None:
        self._max_allocated_bytes = max(self._max_allocated_bytes, nbytes)
        self._reserved_bytes = max(self._reserved_bytes, nbytes)
        self._max_reserved_bytes = max(self._max_reserved_bytes, self.reserved_bytes())

    # --- What ``torch.cuda`` tells the code: other peaks than those of phases ---

    def max_allocated_bytes(self) -> int:
        """As ``torch.cuda.max_memory_allocated()``."""
        return self._max_allocated_bytes

    def reserved_bytes(self) -> int:
        """As ``torch.cuda.memory_reserved()``."""
        return self._reserved_bytes if self.allocator is None else self.allocator.reserved_bytes

    def max_reserved_bytes(self) -> int:
        """As ``torch.cuda.max_memory_reserved()``."""
        return self._max_reserved_bytes

    def reset_max(self) -> None:
        """As ``torch.cuda.reset_peak_memory_stats()``."""
        self._max_allocated_bytes = self.allocated_bytes()
        self._max_reserved_bytes = self.reserved_bytes()

    def empty_cache(self) -> None:
        """As ``torch.cuda.empty_cache()``."""
        self._reserved_bytes = self.allocated_bytes()
        if self.allocator is not None:
            self.allocator.empty_cache()

    def use_stream(self, stream_id: int) -> None:
        """Allocate on a stream from now on."""
        if self.allocator is not None:
            self.allocator.use_stream(stream_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@contextmanager
def forecasting(
    device: str | torch.device = "cuda",
    *,
    memoize: Mapping[type[torch.nn.Module], MemoryKey] | None = None,
    workspaces: Workspaces | None = None,
    assume: Assumptions | str | None = DEFAULT,
    card: CardProperties | None = None,
) -> Iterator[PhaseProfiler]:
    """Make tensors fake and ``device`` available within this scope, and profile it.

    Args:
        device: ``cuda``, which needs none, or ``cpu``.
        memoize: Module classes whose identical calls are executed once, each with its memory key (see
            :mod:`i2v_lab.profiling.fake.memoization`).
        workspaces: Model of what libraries allocate on the device besides tensors; with it bytes are those of the
            caching allocator's blocks, without it those of tensors alone.
        assume: What to answer where the code asks for values that are not known; ``"nothing"`` or ``None`` refuses all
            such questions. What was answered, and where, is in the profiler's records.
        card: What ``torch.cuda`` tells of the card; an H100 of 80 GB by default.

    Yields:
        The profiler: a sink for a pipeline, or :meth:`~i2v_lab.profiling.phase_profiler.PhaseProfiler.phase`.

    Raises:
        ForecastError: The code does something whose memory cannot be known without running it.

    Example:
        >>> with forecasting("cuda") as profiler, profiler.phase("product"):
        ...     product = torch.empty(4096, 4096, device="cuda") @ torch.empty(4096, 4096, device="cuda")
        >>> profiler.peak.peak_bytes == 3 * 4096 * 4096 * 4
        True
    """
    device = torch.device(device)
    properties = card or CardProperties()
    meter = ForecastMeter(device.type, workspaces, (properties.major, properties.minor))
    profiler = PhaseProfiler(device, meter=meter, independent=True)
    paths = profiler.paths
    assert paths is not None
    context_bytes = workspaces.context_bytes if workspaces is not None else 0

    def is_weight(tensor: torch.Tensor) -> bool:
        module = paths.current  # first: it registers modules not seen before, with their weights
        return bool(module) and storage_key(tensor) in paths.weights

    answers = Answers(chosen_assumptions(assume), lambda: paths.current, lambda: paths.phase, is_weight)
    with (
        no_collection(),
        own_caches(),
        patched_here(events, "installed_sinks", list),  # they would read the real allocator
        fake_device(
            device,
            current_module=lambda: paths.current,
            on_operator=meter.on_operator,
            on_attention=meter.costs.attention,
            card=FakeCard(meter, context_bytes, properties),
            answers=answers,
        ),
        ModuleMemo(meter, meter.allocator, paths, memoize or {}, meter.costs).active(),
        profiler,
    ):
        try:
            yield profiler
        finally:
            for record in answers.records():
                profiler.write(record)


def forecast(
    run: Callable[..., Any],
    *args: Any,
    device: str | torch.device = "cuda",
    workspaces: Workspaces | None = None,
    assume: Assumptions | str | None = DEFAULT,
    card: CardProperties | None = None,
    **kwargs: Any,
) -> Forecast:
    """Forecast one call of any torch code: a function, a model, a training step.

    Args:
        run: The callable; a module may have its weights on any device, and so may those of an object that holds
            modules, such as a pipeline of diffusers, whose components are then on ``device``.
        *args: Its arguments; tensors and modules among them become fakes on ``device``. Of tensors, only whole numbers
            and masks keep their values.
        device: As in :func:`forecasting`.
        workspaces: As in :func:`forecasting`.
        assume: As in :func:`forecasting`.
        card: As in :func:`forecasting`.
        **kwargs: Its keyword arguments.

    Returns:
        The records of one phase, ``call``. Without ``workspaces`` a note among them says what is not counted.

    Raises:
        ForecastError: As in :func:`forecasting`; or the call allocated nothing.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024))
        >>> forecast(model, torch.empty(64, 1024)).peak.peak_bytes
        36196352
    """
    start_s = time.perf_counter()
    with forecasting(device, workspaces=workspaces, assume=assume, card=card) as profiler:
        run, args, kwargs = to_fake((run, args, kwargs), active_fake_mode(), torch.device(device))
        for name, module in components((run, args, kwargs)):
            profiler.component(name, module)
        profiler.observe(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        with profiler.phase("call"):
            run(*args, **kwargs)
        if workspaces is None and torch.device(device).type == "cuda":
            profiler.write(NoteRecord("call", "workspaces", 0, NOT_COUNTED))
    if not profiler.peak.peak_bytes:
        raise ForecastError(
            f"the call allocated nothing on device={str(device)!r} and was given no tensor or module; let it make its "
            "tensors there, or pass them as arguments",
            cause="nothing allocated",
            device=str(device),
        )
    context_bytes = workspaces.context_bytes if workspaces is not None else 0
    return Forecast(tuple(profiler.records), context_bytes, time.perf_counter() - start_s)
