"""Interleaved A/B benchmark: several specs generate in turn within one process, and are compared pairwise by round.

Separate processes differ by more than the effects looked for here, so all arms run in one. They change places from
round to round, so that drift of the machine, and what the run before left behind, affect all alike.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2v_lab.errors import InvalidRequest, RecordError
from i2v_lab.files import scratch_folder
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.registry import RUNNERS
from i2v_lab.request import DecodeScope, I2VRequest
from i2v_lab.runs.execute import Hooks, Mode, execute
from i2v_lab.runs.record_files import file_content, json_fault, strict_json
from i2v_lab.runs.spec import ProfilerMode, RunSpec

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from i2v_lab.events import Event

BASELINE = "no profiler"
RESAMPLES = 10_000
COLUMNS = ["round", "place", "arm", "seconds", "event_seconds"]
TABLE_COLUMNS = ["size", "arm", "rounds", "median_seconds", "ratio", "low_ratio", "high_ratio", "event_share"]
PROFILER_ROUNDS = ("interleaved-profilers-h200.json",)  # in data/measured
POLICY_ROUNDS = ("interleaved-policies-1024x768.json", "interleaved-policies-2048x1536.json")


def profiler_arms(request: I2VRequest, model: str) -> dict[str, RunSpec]:
    """What profiling costs, the defect, and third-party pipelines of the same model; what its runner lacks is left out.

    The first is the baseline; all decode to the last chunk, which stays on the device.
    """
    plain = RunSpec(
        request=replace(request, memory=MemoryPolicy.RESIDENT, decode_scope=DecodeScope.NO_GRAD),
        model=model,
        profiler=ProfilerMode.NONE,
        write_video=False,
    )
    runner = plain.runner_spec
    arms = {BASELINE: plain, "no profiler, again": plain}
    if runner.emits_events:
        arms["phase boundaries"] = replace(plain, profiler=ProfilerMode.BOUNDARIES)
    arms["modules and graphs"] = replace(plain, profiler=ProfilerMode.FULL)
    with suppress(InvalidRequest):  # of a model that cannot
        arms["decoded outside no_grad"] = plain.with_request(decode_scope=DecodeScope.ESCAPED)
    for other in RUNNERS.values():
        if other.third_party and other.models == runner.name and other is not runner:
            arms[other.label] = replace(plain, runner=other.name)
    return arms


def policy_arms(request: I2VRequest, model: str) -> dict[str, RunSpec]:
    """The model's memory policies, ``resident`` first."""
    plain = profiler_arms(request, model)[BASELINE]
    policies = [policy for policy in plain.runner_spec.memory if policy is not MemoryPolicy.AUTO]
    return {policy.value: plain.with_request(memory=policy) for policy in policies}


ARMS: Mapping[str, Callable[[I2VRequest, str], dict[str, RunSpec]]] = {
    "profilers": profiler_arms,
    "policies": policy_arms,
}


def run_interleaved(
    arms: Mapping[str, RunSpec], weights: Any, device: torch.device, rounds: int
) -> Iterator[dict[str, Any]]:
    """Generate with every arm, round after round, after one warm-up generation that does not count.

    A generation's time is from the pipeline's call to the last chunk, which stays on the device.

    Args:
        arms: By their names; the first is the baseline.
        weights: The model's.
        device: Where to run.
        rounds: How many.

    Yields:
        ``round`` and ``place`` in it, from 1; ``arm``; ``seconds``; and ``event_seconds``, of these the time in which
        the profiler handled the pipeline's events, ``None`` without one.
    """
    names = list(arms)
    _generate(arms[names[0]], weights, device)
    for number in range(rounds):
        shift = number % len(names)
        for place, name in enumerate(names[shift:] + names[:shift], start=1):
            seconds, event_seconds = _generate(arms[name], weights, device)
            yield {"round": number + 1, "place": place, "arm": name, "seconds": seconds, "event_seconds": event_seconds}


def _generate(spec: RunSpec, weights: Any, device: torch.device) -> tuple[float, float | None]:
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    timers: list[_EventTimer] = []

    def timed(sink: Callable[[Event], None]) -> _EventTimer:
        timers.append(_EventTimer(sink))
        return timers[-1]

    with scratch_folder() as folder:
        start = time.perf_counter()
        run_dir = None if spec.profiler is ProfilerMode.NONE else folder / "run"
        execute(spec, Mode.REAL, str(device), weights=weights, run_dir=run_dir, hooks=Hooks(wrap_profiler=timed))
        return time.perf_counter() - start, timers[0].seconds if timers else None


class _EventTimer:
    """Passes events on and adds up how long the receiver takes."""

    def __init__(self, receiver: Callable[[Event], None]) -> None:
        self._receiver = receiver
        self.seconds = 0.0

    def __call__(self, event: Event) -> None:
        start = time.perf_counter()
        self._receiver(event)
        self.seconds += time.perf_counter() - start


def recorded_rounds(names: Sequence[str] = PROFILER_ROUNDS, folder: Path | None = None) -> pd.DataFrame:
    """Rounds that were measured before, at 22B.

    Args:
        names: Of files; one that is not there has no rounds.
        folder: Where they are; ``data/measured`` by default.

    Raises:
        RecordError: A file is damaged.

    Returns:
        The columns that :func:`run_interleaved` yields, ``size`` such as ``1024x768``, and ``gpu``.
    """
    import pandas as pd

    parts = [pd.DataFrame(columns=[*COLUMNS, "size", "gpu"])]
    for name in names:
        path = (folder or data_dir() / "measured") / name
        if path.exists():
            try:
                values = strict_json(file_content(path))
                size = f"{values['request']['width']}x{values['request']['height']}"
                rounds = pd.DataFrame(values["rounds"], columns=COLUMNS)
                parts.append(
                    rounds.astype({"seconds": float, "event_seconds": float}).assign(
                        size=size, gpu=str(values["device"])
                    )
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = json_fault(error)
                raise RecordError(
                    f"'{path}' holds no rounds ({reason}); restore it or measure again", path=path
                ) from error
    return pd.concat(parts[1:] or parts, ignore_index=True)


def ratio_table(rounds: pd.DataFrame) -> pd.DataFrame:
    """Each arm's time as a multiple of the baseline's in the same round.

    Args:
        rounds: As of :func:`run_interleaved`, or of :func:`recorded_rounds`, which may have several sizes.

    Returns:
        ``size`` (empty where ``rounds`` has none), ``arm, rounds, median_seconds``, the median ratio as ``ratio``, from
        ``low_ratio`` to ``high_ratio`` in 95 % of 10,000 bootstrap resamples of the rounds, and ``event_share``, the
        median share of the time spent in handling events.
    """
    import pandas as pd

    sized = rounds if "size" in rounds else rounds.assign(size="")
    rows = [row for size, part in sized.groupby("size", sort=False) for row in _rows(part, str(size))]
    return pd.DataFrame(rows, columns=TABLE_COLUMNS)


def _rows(rounds: pd.DataFrame, size: str) -> Iterator[dict[str, Any]]:
    import numpy as np

    arms = list(dict.fromkeys(rounds.sort_values(["round", "place"], kind="stable")["arm"]))
    seconds = rounds.pivot(index="round", columns="arm", values="seconds").dropna()  # a round cut short pairs nothing
    chosen = np.random.default_rng(0).integers(len(seconds), size=(RESAMPLES, len(seconds)))
    for arm in arms:
        ratios = (seconds[arm] / seconds[arms[0]]).to_numpy()
        low, high = np.quantile(np.median(ratios[chosen], axis=1), [0.025, 0.975])
        own = rounds[rounds["arm"] == arm]
        yield {
            "size": size,
            "arm": arm,
            "rounds": len(seconds),
            "median_seconds": seconds[arm].median(),
            "ratio": float(np.median(ratios)),
            "low_ratio": float(low),
            "high_ratio": float(high),
            "event_share": (own["event_seconds"].astype(float) / own["seconds"]).dropna().median(),
        }
