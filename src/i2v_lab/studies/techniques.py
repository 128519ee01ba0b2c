"""What holds the peak, taken away piece by piece: one technique after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from i2v_lab.events import Phase
from i2v_lab.memory_policy import MemoryPolicy, Technique, to_techniques
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.request import DecodeScope, I2VRequest
from i2v_lab.runs.execute import WHOLE
from i2v_lab.runs.sources import Observation, Source, runs_frame
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import Run
from i2v_lab.studies.published import beside_published
from i2v_lab.studies.verdicts import CONFIRMED, NO_DATA, REFINED, REFUTED, conclude, no_data
from i2v_lab.units import format_bytes

# Each where it lowers the peak of the whole run, or of its own phase below what holds that.
ORDER: dict[Technique, tuple[str, Phase]] = {
    Technique.SHARED_MODULATIONS: ("modulations shared by timestep", Phase.DENOISE_STAGE_2),
    Technique.TOKEN_CHUNKS: ("tokens in chunks", Phase.DENOISE_STAGE_2),
    Technique.TEXT_ONLY: ("vision tower not loaded", Phase.ENCODE_PROMPT),
    Technique.STREAMED_TEXT: ("text encoder streamed", Phase.ENCODE_PROMPT),
    Technique.FEATURE_CHUNKS: ("text features in chunks", Phase.ENCODE_PROMPT),
    Technique.STREAMED_TRANSFORMER: ("transformer streamed", Phase.DENOISE_STAGE_2),
    Technique.BLEND_IN_PLACE: ("tiles blended in place", Phase.DECODE_VIDEO),
    Technique.ROW_BANDS: ("decoder in bands of rows", Phase.DECODE_VIDEO),
    Technique.STREAMED_VAE: ("decoder streamed", Phase.DECODE_VIDEO),
}
FIRST = "as upstream runs it"
EIGHTH = 1 / 8  # 4 GiB of the published 33.55, with something to spare
STEP_COLUMNS = {
    "step": "int64",
    "technique": "str",
    "words": "str",
    "peak_bytes": "Int64",
    "peak_phase": "str",
    "own_phase": "str",
    "before_bytes": "Int64",
    "after_bytes": "Int64",
    "before_seconds": "Float64",
    "after_seconds": "Float64",
}


def has_techniques(model: str) -> bool:
    """Whether a model's backend has memory policies."""
    return bool(runner_of(load_architecture(model)).techniques)


def step_specs(request: I2VRequest, model: str, techniques: Sequence[str] = ()) -> list[RunSpec]:
    """The request with no technique, then with one more each time.

    Args:
        request: What to generate.
        model: An architecture's name.
        techniques: In this order; all of them, in that of :data:`ORDER`, if empty.

    Raises:
        InvalidRequest: One is unknown, or comes before one that it needs.
    """
    plain = under(request, model, MemoryPolicy.RESIDENT)
    if not has_techniques(model):
        return [plain]
    names = list(dict.fromkeys(techniques)) or list(ORDER)
    steps = [replace(plain, techniques=to_techniques(names[:count])) for count in range(1, len(names) + 1)]
    return [plain, *steps]


def under(request: I2VRequest, model: str, policy: MemoryPolicy) -> RunSpec:
    """The request under a policy, without the graph."""
    return RunSpec(request=replace(request, decode_scope=DecodeScope.NO_GRAD, memory=policy), model=model)


def steps_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """What each technique takes away, and from which phase.

    Args:
        observations: Of :func:`step_specs`.

    Returns:
        One row for each step, the first with no technique: ``step, technique, words``, the whole run's ``peak_bytes``
        and ``peak_phase``, and, of the phase that the technique is for (``own_phase``), ``before_bytes`` and
        ``after_bytes``, and its seconds before and after as they were measured, or recorded where this is a forecast.
        What is of a step without a run is missing.
    """
    timed = [each.recorded if each.source is Source.FORECAST else each.run for each in observations]
    peaks = [phase_peaks(each.run) for each in observations]
    seconds = [phase_seconds(run) for run in timed]
    rows: list[list[Any]] = []
    sets = [each.spec.technique_set for each in observations]
    for step, own_set in enumerate(sets):
        technique = next(iter(own_set - sets[step - 1]), None) if step else None
        words, own = (FIRST, "") if technique is None else ORDER[technique]
        top = max(peaks[step], key=lambda phase: peaks[step][phase], default="")
        before = max(step - 1, 0)
        rows.append(
            [
                *(step, technique or "", words, peaks[step].get(top), top, str(own)),
                *(peaks[before].get(own), peaks[step].get(own)),
                *(seconds[before].get(own), seconds[step].get(own)),
            ]
        )
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS)).astype(STEP_COLUMNS)


def phase_peaks(run: Run | None) -> dict[str, int]:
    """The peak of each of a run's phases, in their order; of several of one name the highest."""
    peaks: dict[str, int] = {}
    for phase in _innermost(run):
        peaks[phase.phase] = max(peaks.get(phase.phase, 0), phase.peak_bytes)
    return peaks


def phase_seconds(run: Run | None) -> dict[str, float]:
    """The time of each of a run's phases; of several of one name the sum."""
    seconds: dict[str, float] = {}
    for phase in _innermost(run):
        seconds[phase.phase] = seconds.get(phase.phase, 0.0) + phase.seconds
    return seconds


def _innermost(run: Run | None) -> list[PhaseRecord]:
    """Without the one phase around everything that runs have whose time is compared."""
    return [phase for phase in run.of(PhaseRecord) if phase.phase != WHOLE] if run else []


def techniques_verdict(observations: Sequence[Observation]) -> dict[str, Any]:
    """The claim that the peak comes down to an eighth, piece by piece.

    ``confirmed``: with all techniques the whole run's peak is at most an eighth of what it is with none. ``refined``:
    it is lower, but not by that much. ``refuted``: it is not lower. ``no data`` for a model without techniques.

    Args:
        observations: Of :func:`step_specs`.
    """
    if any(each.run is None for each in observations):
        return no_data(observations)
    if len(observations) == 1:
        model = observations[0].spec.model
        return conclude(observations, NO_DATA, f"{model} has no memory policy but resident.", techniques=0)
    steps = steps_table(observations)
    first, last = steps.iloc[0], steps.iloc[-1]
    ratio = int(last["peak_bytes"]) / int(first["peak_bytes"])
    verdict = REFUTED if ratio >= 1 else CONFIRMED if ratio <= EIGHTH else REFINED
    theirs = beside_published(runs_frame(observations[:1]))["published_bytes"].iloc[0]
    published = f"{format_bytes(int(theirs))} as published, " if pd.notna(theirs) else ""
    finding = (
        f"{observations[0].spec.name}: {published}{format_bytes(int(first['peak_bytes']))} with every component "
        f"resident (in {first['peak_phase']}), {format_bytes(int(last['peak_bytes']))} (in {last['peak_phase']}) with "
        f"{len(steps) - 1} techniques and the same model, {1 / ratio:.1f} times less."
    )
    return conclude(
        observations,
        verdict,
        finding,
        first_peak_bytes=int(first["peak_bytes"]),
        last_peak_bytes=int(last["peak_bytes"]),
        first_peak_phase=str(first["peak_phase"]),
        last_peak_phase=str(last["peak_phase"]),
        techniques=len(steps) - 1,
    )
