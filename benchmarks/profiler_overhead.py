"""What the profilers cost: the same tiny generation with and without them, paired, in one process.

Rounds are interleaved, so that a slow minute of the machine hits every way of measuring alike; of each round the ratio
to its own unprofiled run is taken, and of the ratios the median and the range.

    python benchmarks/profiler_overhead.py [rounds]
"""

from __future__ import annotations

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


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "off": nullcontext,
    "off again": nullcontext,
    "phase boundaries": lambda: PhaseProfiler(meter=BoundaryMeter(), attribute=False),
    "live storages": lambda: PhaseProfiler(attribute=False),
    "live storages, modules, graphs": PhaseProfiler,
}


def main(rounds: int) -> None:
    weights = resolve_weights(load_architecture("ltx-2.3-tiny"))
    request = I2VRequest(image=str(STILL), width=128, height=64, frames=17, fps=120)

    def generate(way: Callable[[], AbstractContextManager[Any]]) -> float:
        start = time.perf_counter()
        with way() as profiler:
            for _ in TwoStagePipeline(weights, sinks=[profiler] if profiler else [])(request).video:
                pass
        return time.perf_counter() - start

    generate(nullcontext)
    ratios: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in tqdm(range(rounds), desc="rounds"):
        seconds = {name: generate(way) for name, way in WAYS.items()}
        for name in WAYS:
            ratios[name].append(seconds[name] / seconds["off"])
    table = Table(
        "way", "median", "lowest", "highest", title=f"time, as a multiple of the unprofiled run, {rounds} rounds"
    )
    for name, values in ratios.items():
        table.add_row(name, *(f"{value:.3f}" for value in (statistics.median(values), min(values), max(values))))
    Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
