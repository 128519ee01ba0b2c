"""Is something left behind by one generation after another in the same process, and what?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from i2v_lab.profiling.records import GenerationRecord, OutOfMemoryRecord
from i2v_lab.request import DecodeScope, I2VRequest
from i2v_lab.runs.sources import Observation, phases_frame
from i2v_lab.runs.spec import Consumer, RunSpec
from i2v_lab.studies.localization import AFTER_RETURN, SCOPES
from i2v_lab.studies.verdicts import CONFIRMED, REFINED, REFUTED, conclude, no_data
from i2v_lab.units import format_bytes

NOTHING = 0.01  # of the retained graph: growth below this is none
MORE = 1.25  # times what an open stream keeps without a graph, which is the decoder and its buffers


def leak_specs(request: I2VRequest, model: str, generations: int) -> list[RunSpec]:
    """Both scopes, with every stream consumed to its end and with every stream left open."""
    return [
        RunSpec(request=replace(request, decode_scope=scope), model=model, generations=generations, consumer=consumer)
        for consumer in (Consumer.PLAIN, Consumer.LEFT_OPEN)
        for scope in SCOPES
    ]


def leak_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """What was still allocated after each generation.

    Returns:
        One row for each run and generation: ``decode_scope, consumer, generation, allocated_bytes, growth_bytes``
        (since the generation before; the first counts from nothing).
    """
    rows = []
    for each in observations:
        before = 0
        for record in each.run.of(GenerationRecord) if each.run else []:
            rows.append(
                {
                    "decode_scope": each.spec.request.decode_scope.value,
                    "consumer": each.spec.consumer.value,
                    "generation": record.generation,
                    "allocated_bytes": record.allocated_bytes,
                    "growth_bytes": record.allocated_bytes - before,
                }
            )
            before = record.allocated_bytes
    return pd.DataFrame(rows, columns=["decode_scope", "consumer", "generation", "allocated_bytes", "growth_bytes"])


def leak_peaks(observations: Sequence[Observation]) -> pd.DataFrame:
    """The peak of each generation up to its decoding, which what the ones before have left adds to.

    Returns:
        ``decode_scope, consumer, generation, peak_bytes``.
    """
    table = phases_frame(observations)
    before = table[table["phase"] != AFTER_RETURN]
    keys = ["decode_scope", "consumer", "generation"]
    return before.groupby(keys, sort=False)["peak_bytes"].max().reset_index()


def _last_growth(observation: Observation) -> int:
    """What the last generation left that ended; of a run that ran out of memory in its first, what was alive then."""
    if observation.run is None:
        return 0
    left = [0, *(record.allocated_bytes for record in observation.run.of(GenerationRecord))]
    if len(left) == 1:
        left += [record.alive_bytes for record in observation.run.of(OutOfMemoryRecord)]
    return left[-1] - left[-2] if len(left) > 1 else 0


def leak_verdict(observations: Sequence[Observation]) -> dict[str, Any]:
    """Claim 6: a leak over consecutive generations was the same retained graph.

    Told from the growth of what is allocated after the last generation that ended. ``confirmed``: with the defect it
    grows even when every stream is consumed to its end, and without the defect it does not. ``refined``: it grows only
    where streams are left open, and then more with the defect, by a quarter at least. ``refuted``: no more than that.
    """
    if any(each.run is None for each in observations):
        return no_data(observations)
    growth = {
        (each.spec.consumer.value, each.spec.request.decode_scope.value): _last_growth(each) for each in observations
    }
    consumed, fixed = growth["plain", "escaped"], growth["plain", "no_grad"]
    open_graph, open_fixed = growth["left_open", "escaped"], growth["left_open", "no_grad"]
    least = NOTHING * max(1, open_graph)
    if consumed > least and fixed <= least:
        verdict = CONFIRMED
    elif open_graph > MORE * max(0, open_fixed):
        verdict = REFINED
    else:
        verdict = REFUTED
    finding = (
        f"Streams consumed to their end leave {format_bytes(consumed)} more after each generation with the defect and "
        f"{format_bytes(fixed)} without; streams that are stopped early and kept leave {format_bytes(open_graph)} each "
        f"with the defect, {format_bytes(open_fixed)} without."
    )
    for each in observations:
        if each.run is not None and each.run.of(OutOfMemoryRecord):
            reached = len(each.run.of(GenerationRecord)) + 1
            defect = each.spec.request.decode_scope is DecodeScope.ESCAPED
            kept = each.spec.consumer is Consumer.LEFT_OPEN
            finding += (
                f" {'With' if defect else 'Without'} the defect and streams {'kept' if kept else 'consumed'}, "
                f"generation {reached} of {each.spec.generations} ran out of memory."
            )
    return conclude(
        observations,
        verdict,
        finding,
        consumed_escaped_growth_bytes=consumed,
        consumed_no_grad_growth_bytes=fixed,
        open_escaped_growth_bytes=open_graph,
        open_no_grad_growth_bytes=open_fixed,
    )
