"""The peak of any torch code on a device that is not here: run under fake tensors, watched by the same profiler."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves

from i2v_lab.events import VRAM_VARIABLE
from i2v_lab.profiling.fake.allocator import CachingAllocator
from i2v_lab.profiling.fake.cached_tensors import no_cached_tensors
from i2v_lab.profiling.fake.device import fake_device, to_fake
from i2v_lab.profiling.fake.garbage import no_collection
from i2v_lab.profiling.fake.memoization import Likeness, Replay
from i2v_lab.profiling.fake.workspaces import Workspaces
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import Forecast


class _WatchingMeter(LiveStorageMeter):
    """Is told of operators by the fake device, which sees them anyway."""

    def __init__(self, device_type: str, workspaces: Workspaces | None) -> None:
        allocator = CachingAllocator() if workspaces is not None else None
        super().__init__(device_type=device_type, allocator=allocator)
        self.allocator = allocator
        self._workspaces = workspaces
        self._held: set[str] = set()

    def watch(self, func: Any, args: Any, result: Any, tensors: list[torch.Tensor]) -> None:
        """Count what an operator takes and returns, and what its kernel needs besides."""
        self.observe(tensors)
        if self._workspaces is not None:
            library, nbytes = self._workspaces.held(func)
            if nbytes and library not in self._held:
                self._held.add(library)
                self.hold(nbytes, f"{library} workspace")
            borrowed = self._workspaces.borrowed(func, args, result)
            if borrowed:
                self.borrow(borrowed, "cuDNN workspace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@contextmanager
def forecasting(
    device: str | torch.device = "cuda",
    *,
    memoize: Mapping[type[torch.nn.Module], Likeness] | None = None,
    workspaces: Workspaces | None = None,
) -> Iterator[PhaseProfiler]:
    """Within this scope tensors are fake, ``device`` exists, and a profiler watches it.

    Args:
        device: ``cuda``, which needs none, or ``cpu``.
        memoize: Module classes whose identical calls are run once (see :mod:`i2v_lab.profiling.fake.memoization`).
        workspaces: What libraries allocate on the device besides tensors, and with it the caching allocator's rounding;
            without, bytes are those of tensors alone.

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
    meter = _WatchingMeter(device.type, workspaces)
    profiler = PhaseProfiler(device, meter=meter)
    paths = profiler.paths
    assert paths is not None
    on_empty_cache = meter.allocator.empty_cache if meter.allocator is not None else lambda: None
    with (
        no_collection(),
        no_cached_tensors(),
        patch.dict(os.environ, {VRAM_VARIABLE: "0"}),  # whose profiler would ask the real allocator
        fake_device(device, where=lambda: paths.current, watch=meter.watch, on_empty_cache=on_empty_cache),
        Replay(meter, paths, memoize or {}).active(),
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
    """Forecast one call of anything made of torch: a function, a model, a step of training.

    Args:
        run: The callable; a module may have its weights anywhere.
        *args: Its arguments; tensors and modules among them become fakes on ``device``.
        device: As in :func:`forecasting`.
        workspaces: As in :func:`forecasting`.
        **kwargs: More arguments.

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
        mode = torch._guards.active_fake_mode()
        assert mode is not None
        run, args, kwargs = to_fake((run, args, kwargs), mode, torch.device(device))
        for leaf in tree_leaves((run, args, kwargs)):
            if isinstance(leaf, torch.nn.Module):
                profiler.component(type(leaf).__name__, leaf)
            elif isinstance(leaf, torch.Tensor):
                profiler.observe([leaf])
        with profiler.phase("call"):
            run(*args, **kwargs)
    context_bytes = workspaces.context_bytes if workspaces is not None else 0
    return Forecast(tuple(profiler.records), context_bytes, time.perf_counter() - start_s)
