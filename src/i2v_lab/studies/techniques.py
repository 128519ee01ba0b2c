"""What the peak is made of: memory techniques applied cumulatively, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from i2v_lab.memory_policy import LABELS, MemoryPolicy, Technique, to_techniques
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.request import DecodeScope, I2VRequest
from i2v_lab.runs.phases import phase_peaks, run_peak
from i2v_lab.runs.recorded import seconds_of
from i2v_lab.runs.sources import Observation, has_clock, runs_frame
from i2v_lab.runs.spec import RunSpec
from i2v_lab.studies.published import beside_published
from i2v_lab.studies.verdicts import CONFIRMED, NO_DATA, REFINED, REFUTED, conclude, no_data
from i2v_lab.units import format_bytes

BASELINE = "as upstream runs it"
EIGHTH = 1 / 8  # 4 GiB over the published 33.55 GiB is 0.119
STEP_COLUMNS = {
    "step": "int64",
    "technique": "str",
    "label": "str",
    "peak_bytes": "Int64",
    "peak_phase": "str",
    "seconds": "Float64",
    "target_phase": "str",
    "before_bytes": "Int64",
    "after_bytes": "Int64",
}


def studied_techniques(model: str) -> list[Technique]:
    """The techniques of a model's runner that the study adds one by one, in their order."""
    supported = runner_of(load_architecture(model)).techniques
    return [technique for technique in LABELS if technique in supported]


def step_specs(request: I2VRequest, model: str, techniques: Sequence[str] = ()) -> list[RunSpec]:
    """The request without techniques, then with one more technique in each spec.

    Args:
        request: What to generate; its own memory policy is ignored.
        model: An architecture's name.
        techniques: Names in the order in which they are added; all of :func:`studied_techniques` if empty.

    Raises:
        InvalidRequest: A technique is unknown, or precedes one that it depends on.
    """
    plain = with_policy(request, model, MemoryPolicy.RESIDENT)
    names = list(dict.fromkeys(techniques)) or studied_techniques(model)
    steps = [replace(plain, techniques=to_techniques(names[:count])) for count in range(1, len(names) + 1)]
    return [plain, *steps]


def with_policy(request: I2VRequest, model: str, policy: MemoryPolicy) -> RunSpec:
    """The request under a memory policy, decoded inside ``no_grad``."""
    return RunSpec(request=replace(request, decode_scope=DecodeScope.NO_GRAD, memory=policy), model=model)


def steps_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """The effect of each technique on the run's peak, and on its target phase.

    Args:
        observations: Of :func:`step_specs`.

    Returns:
        One row for each step, the first without techniques: ``step, technique, label``; the run's
        ``peak_bytes``, ``peak_phase`` and ``seconds``, which a forecast without the clock of a card has not; the
        technique's target phase ``target_phase``, with its peak ``before_bytes`` and ``after_bytes``. Values of a step
        without a run are missing.
    """
    peaks = [phase_peaks(each.run) for each in observations]
    rows: list[list[Any]] = []
    sets = [each.spec.technique_set for each in observations]
    for step, own_set in enumerate(sets):
        technique = next(iter(own_set - sets[step - 1]), None) if step else None
        label, own = (BASELINE, "") if technique is None else LABELS.get(technique, (technique.value, ""))
        run = observations[step].run
        peak = run_peak(run)
        before = max(step - 1, 0)
        rows.append(
            [
                *(step, technique or "", label),
                *((peak.peak_bytes, peak.phase) if peak else (None, "")),
                seconds_of(run) if run and has_clock(run) else None,
                str(own),
                *(peaks[before].get(own), peaks[step].get(own)),
            ]
        )
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS)).astype(STEP_COLUMNS)


def techniques_verdict(observations: Sequence[Observation]) -> dict[str, Any]:
    """The claim that the techniques together reduce the peak to an eighth.

    ``confirmed``: with all techniques the run's peak is at most an eighth of that without. ``refined``: it is lower,
    but above an eighth. ``refuted``: it is not lower. ``no data``: the model has no techniques.

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
    published_bytes = beside_published(runs_frame(observations[:1]))["published_bytes"].iloc[0]
    finding = (
        f"{observations[0].spec.name}: {format_bytes(int(first['peak_bytes']))} with every component "
        f"resident (in {first['peak_phase']}), {format_bytes(int(last['peak_bytes']))} (in {last['peak_phase']}) with "
        f"{len(steps) - 1} techniques and the same model, {1 / ratio:.1f} times less."
    )
    if pd.notna(published_bytes):
        finding += f" The published study's set-up is another: {format_bytes(int(published_bytes))} as published."
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
