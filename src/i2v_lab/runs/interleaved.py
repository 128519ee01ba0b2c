"""What the time of a generation depends on: ways of running it, in turns within one process, compared in pairs.

Processes of their own differ by more than what is looked for here, so all ways run in one. They change places from
round to round, so that a slow minute of the machine, and what the run before left behind, hit all alike.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.paths import data_dir
from i2v_lab.request import DecodeScope, I2VRequest
from i2v_lab.runs.implementations import Implementation
from i2v_lab.runs.measure import profiled

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from i2v_lab.events import Event
    from i2v_lab.pipeline.ltx2.weights import Weights
    from i2v_lab.profiling.phase_profiler import PhaseProfiler

BASELINE = "no profiler"
RESAMPLES = 10_000
COLUMNS = ["round", "place", "way", "seconds", "told_s"]
TABLE_COLUMNS = ["size", "way", "rounds", "median_seconds", "ratio", "low_ratio", "high_ratio", "told_share"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of generating.

    Attributes:
        pipeline: Whose.
        memory: Under which policy.
        scope: Where the video is decoded.
        attribute: Follow modules and autograd graphs, or the phases alone; ``None`` goes without a profiler.
    """

    pipeline: Implementation = Implementation.OURS
    memory: MemoryPolicy = MemoryPolicy.RESIDENT
    scope: DecodeScope = DecodeScope.NO_GRAD
    attribute: bool | None = None


PROFILER_WAYS: Mapping[str, Way] = {
    BASELINE: Way(),
    "no profiler, again": Way(),
    "phase boundaries": Way(attribute=False),
    "modules and graphs": Way(attribute=True),
    "decoded outside no_grad": Way(scope=DecodeScope.ESCAPED),
    "ltx-pipelines": Way(pipeline=Implementation.UPSTREAM),
}
POLICY_WAYS: Mapping[str, Way] = {
    policy.value: Way(memory=policy) for policy in (MemoryPolicy.RESIDENT, MemoryPolicy.LEAN, MemoryPolicy.STREAMED)
}
WAYS: Mapping[str, Mapping[str, Way]] = {"profilers": PROFILER_WAYS, "policies": POLICY_WAYS}
PROFILER_TURNS = ("turns-h200.json",)  # in data/measured
POLICY_TURNS = ("policy-turns-1024x768.json", "policy-turns-2048x1536.json")


def take_turns(
    weights: Weights, device: torch.device, request: I2VRequest, rounds: int, ways: Mapping[str, Way] = PROFILER_WAYS
) -> Iterator[dict[str, Any]]:
    """Generate in every way, round after round, after one generation that does not count.

    A generation's time is from the pipeline's call to the last chunk, which stays on the device.

    Args:
        weights: The model's.
        device: Where to run.
        request: What to generate; its ``decode_scope`` and ``memory`` are each way's own.
        rounds: How often.
        ways: By their names.

    Yields:
        ``round`` and ``place`` in it, from 1; ``way``; ``seconds``; and ``told_s``, of these the seconds in which the
        profiler took note of the pipeline's events, ``None`` without one.
    """
    _generate(Way(), weights, device, request)
    names = list(ways)
    for number in range(rounds):
        turn = number % len(names)
        for place, name in enumerate(names[turn:] + names[:turn], start=1):
            seconds, told_s = _generate(ways[name], weights, device, request)
            yield {"round": number + 1, "place": place, "way": name, "seconds": seconds, "told_s": told_s}


def _generate(way: Way, weights: Weights, device: torch.device, request: I2VRequest) -> tuple[float, float | None]:
    import torch

    from i2v_lab.pipeline.contract.runner import backend_of

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    backend = backend_of(weights.architecture)
    pipeline = backend.upstream if way.pipeline is Implementation.UPSTREAM else backend.pipeline
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with _profiler(way, device, Path(folder) / "run") as profiler:
            told = _Told(profiler) if profiler else None
            generation = pipeline(weights, device, sinks=[told] if told else [])(
                replace(request, decode_scope=way.scope, memory=way.memory)
            )
            for chunk in generation.video:
                del chunk
        return time.perf_counter() - start, told.seconds if told else None


def _profiler(way: Way, device: torch.device, folder: Path) -> AbstractContextManager[PhaseProfiler | None]:
    if way.attribute is None:
        return nullcontext()
    return profiled(device, folder, {}, attribute=way.attribute)


class _Told:
    """Passes events on and adds up how long the receiver takes."""

    def __init__(self, receiver: Callable[[Event], None]) -> None:
        self._receiver = receiver
        self.seconds = 0.0

    def __call__(self, event: Event) -> None:
        start = time.perf_counter()
        self._receiver(event)
        self.seconds += time.perf_counter() - start


def recorded_turns(names: Sequence[str] = PROFILER_TURNS, folder: Path | None = None) -> pd.DataFrame:
    """Turns that were taken before, at 22B.

    Args:
        names: Of files; one that is not there has no turns.
        folder: Where they are; ``data/measured`` by default.

    Returns:
        The columns that :func:`take_turns` yields, ``size`` such as ``1024x768``, and ``gpu``.
    """
    import pandas as pd

    parts = [pd.DataFrame(columns=[*COLUMNS, "size", "gpu"])]
    for name in names:
        path = (folder or data_dir() / "measured") / name
        if path.exists():
            values = json.loads(path.read_text())
            size = f"{values['request']['width']}x{values['request']['height']}"
            parts.append(pd.DataFrame(values["turns"], columns=COLUMNS).assign(size=size, gpu=values["device"]))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def turns_table(turns: pd.DataFrame) -> pd.DataFrame:
    """Each way's time as a multiple of that of the first way, of the same round.

    Args:
        turns: As of :func:`take_turns`, or of :func:`recorded_turns`, which may have several sizes.

    Returns:
        ``size`` (empty where ``turns`` has none), ``way, rounds, median_seconds``, the median ratio as ``ratio``, from
        ``low_ratio`` to ``high_ratio`` in 95 % of 10,000 bootstrap resamples of the rounds, and ``told_share``, the
        median share of the time spent in taking note of events.
    """
    import pandas as pd

    sized = turns if "size" in turns else turns.assign(size="")
    rows = [row for size, part in sized.groupby("size", sort=False) for row in _rows(part, str(size))]
    return pd.DataFrame(rows, columns=TABLE_COLUMNS)


def _rows(turns: pd.DataFrame, size: str) -> Iterator[dict[str, Any]]:
    import numpy as np

    seconds = turns.pivot(index="round", columns="way", values="seconds").dropna()  # a round cut short pairs nothing
    chosen = np.random.default_rng(0).integers(len(seconds), size=(RESAMPLES, len(seconds)))
    ways = [way for known in WAYS.values() for way in known if way in seconds]
    for way in ways:
        ratios = (seconds[way] / seconds[ways[0]]).to_numpy()
        low, high = np.quantile(np.median(ratios[chosen], axis=1), [0.025, 0.975])
        of_way = turns[turns["way"] == way]
        yield {
            "size": size,
            "way": way,
            "rounds": len(seconds),
            "median_seconds": seconds[way].median(),
            "ratio": float(np.median(ratios)),
            "low_ratio": float(low),
            "high_ratio": float(high),
            "told_share": (of_way["told_s"].astype(float) / of_way["seconds"]).median(),
        }
