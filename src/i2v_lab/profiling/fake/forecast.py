"""Forecasts: any torch code under fake tensors, profiled as a real run, on a device that is not here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self
from unittest.mock import patch

import torch

from i2v_lab.events import VRAM_VARIABLE
from i2v_lab.profiling.fake.block_trace import TracingAllocator
from i2v_lab.profiling.fake.cached_tensors import no_cached_tensors
from i2v_lab.profiling.fake.device import fake_device, to_fake
from i2v_lab.profiling.fake.garbage import no_collection
from i2v_lab.profiling.fake.memoization import MemoryKey, ModuleMemo
from i2v_lab.profiling.fake.workspaces import Workspaces
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import Forecast
from i2v_lab.torch_compat import active_fake_mode, tree_leaves


class ForecastMeter(LiveStorageMeter):
    """Counts the storages of operators that the fake device reports, and the workspaces of their kernels.

    Never entered as a dispatch mode: the fake device sees every operator anyway.
    """

    def __init__(self, device_type: str, workspaces: Workspaces | None) -> None:
        allocator = TracingAllocator() if workspaces is not None else None
        super().__init__(device_type=device_type, allocator=allocator)
        self.allocator = allocator
        self._workspaces = workspaces
        self._initialized: set[str] = set()

    def on_operator(self, func: Any, args: Any, result: Any, tensors: list[torch.Tensor]) -> None:
        """Count the tensors that an operator takes and returns, and its kernel's workspaces."""
        self.observe(tensors)
        if self._workspaces is not None:
            library, nbytes = self._workspaces.persistent(func)
            if nbytes and library not in self._initialized:
                self._initialized.add(library)
                self.add_persistent_workspace(nbytes, f"{library} workspace")
            nbytes = self._workspaces.transient(func, args, result)
            if nbytes:
                self.add_transient_workspace(nbytes, "cuDNN workspace")

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
) -> Iterator[PhaseProfiler]:
    """Make tensors fake and ``device`` available within this scope, and profile it.

    Args:
        device: ``cuda``, which needs none, or ``cpu``.
        memoize: Module classes whose identical calls are executed once, each with its memory key (see
            :mod:`i2v_lab.profiling.fake.memoization`).
        workspaces: Model of what libraries allocate on the device besides tensors; with it bytes are those of the
            caching allocator's blocks, without it those of tensors alone.

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
    meter = ForecastMeter(device.type, workspaces)
    profiler = PhaseProfiler(device, meter=meter)
    paths = profiler.paths
    assert paths is not None
    on_empty_cache = meter.allocator.empty_cache if meter.allocator is not None else lambda: None
    with (
        no_collection(),
        no_cached_tensors(),
        patch.dict(os.environ, {VRAM_VARIABLE: "0"}),  # that sink would read the real allocator
        fake_device(
            device,
            current_module=lambda: paths.current,
            on_operator=meter.on_operator,
            on_empty_cache=on_empty_cache,
        ),
        ModuleMemo(meter, meter.allocator, paths, memoize or {}).active(),
        profiler,
    ):
        yield profiler


def forecast(
    run: Callable[..., Any],
    *args: Any,
    device: str | torch.device = "cuda",
    workspaces: Workspaces | None = None,
    **kwargs: Any,
) -> Forecast:
    """Forecast one call of any torch code: a function, a model, a training step.

    Torch runs no backward pass on ``cuda``, fake or not, without a CUDA driver: there, forecast training on ``cpu``.

    Args:
        run: The callable; a module may have its weights on any device.
        *args: Its arguments; tensors and modules among them become fakes on ``device``.
        device: As in :func:`forecasting`.
        workspaces: As in :func:`forecasting`.
        **kwargs: Its keyword arguments.

    Returns:
        The records of one phase, ``call``.

    Raises:
        ForecastError: As in :func:`forecasting`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024))
        >>> forecast(model, torch.empty(64, 1024)).peak.peak_bytes
        36196352
    """
    start_s = time.perf_counter()
    with forecasting(device, workspaces=workspaces) as profiler:
        run, args, kwargs = to_fake((run, args, kwargs), active_fake_mode(), torch.device(device))
        for leaf in tree_leaves((run, args, kwargs)):
            if isinstance(leaf, torch.nn.Module):
                profiler.component(type(leaf).__name__, leaf)
            elif isinstance(leaf, torch.Tensor):
                profiler.observe([leaf])
        with profiler.phase("call"):
            run(*args, **kwargs)
    context_bytes = workspaces.context_bytes if workspaces is not None else 0
    return Forecast(tuple(profiler.records), context_bytes, time.perf_counter() - start_s)
