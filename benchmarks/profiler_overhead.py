"""What the profilers cost: the same tiny generation with and without them, paired, in one process.

The ways take turns, and change places from round to round, so that a slow minute of the machine and what the run before
left behind hit all alike; of each round the ratio to its own unprofiled run is taken, and of the ratios the median and
the range. A machine that others share varies by more than what phase boundaries cost, so the time spent inside that
profiler is also taken directly.

    python benchmarks/profiler_overhead.py [rounds]
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from i2v_lab.events import Event
from i2v_lab.pipeline.architectures import load_architecture
from i2v_lab.pipeline.checkpoints import resolve_weights
from i2v_lab.pipeline.two_stage import TwoStagePipeline
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.request import I2VRequest

STILL = Path(__file__).parents[1] / "data" / "stills" / "lighthouse.png"


class BoundaryMeter:
    """Reads a counter at phase boundaries, as the CUDA allocator's meter does, and watches nothing in between."""

    def allocated_bytes(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 0

    def reserved_peak_bytes(self) -> int | None:
        return 0

    def reset_peak(self) -> None:
        pass

    def observe(self, tensors: Iterable[torch.Tensor], *, weights: bool = False) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass


class TimedProfiler(PhaseProfiler):
    """Adds up the time that its own work takes."""

    spent_s = 0.0

    def __call__(self, event: Event) -> None:
        start = time.perf_counter()
        super().__call__(event)
        self.spent_s += time.perf_counter() - start


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "off": nullcontext,
    "off again": nullcontext,
    "phase boundaries": lambda: TimedProfiler(meter=BoundaryMeter(), attribute=False),
    "live storages": lambda: PhaseProfiler(attribute=False),
    "live storages, modules, graphs": PhaseProfiler,
}


def main(rounds: int) -> None:
    weights = resolve_weights(load_architecture("ltx-2.3-tiny"))
    request = I2VRequest(image=str(STILL), width=128, height=64, frames=17, fps=120)

    shares: list[float] = []

    def generate(way: Callable[[], AbstractContextManager[Any]]) -> float:
        gc.collect()
        start = time.perf_counter()
        with way() as profiler:
            for _ in TwoStagePipeline(weights, sinks=[profiler] if profiler else [])(request).video:
                pass
        seconds = time.perf_counter() - start
        if isinstance(profiler, TimedProfiler):
            shares.append(profiler.spent_s / seconds)
        return seconds

    generate(nullcontext)
    ratios: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in tqdm(range(rounds), desc="rounds"):
        names = [*WAYS][number % len(WAYS) :] + [*WAYS][: number % len(WAYS)]
        seconds = {name: generate(WAYS[name]) for name in names}
        for name in WAYS:
            ratios[name].append(seconds[name] / seconds["off"])
    table = Table(
        "way", "median", "lowest", "highest", title=f"time, as a multiple of the unprofiled run, {rounds} rounds"
    )
    for name, values in ratios.items():
        table.add_row(name, *(f"{value:.3f}" for value in (statistics.median(values), min(values), max(values))))
    Console().print(table)
    Console().print(f"time inside the profiler of phase boundaries: {statistics.median(shares):.4%} of the run")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
