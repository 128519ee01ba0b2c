"""Does allocated memory grow from one generation to the next in the same process, and what holds it?"""

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

NO_GROWTH = 0.01  # of the retained graph: growth below this counts as none
OPEN_RATIO = 1.25  # to what an unfinished stream holds without a graph: the decoder and its buffers


def leak_specs(request: I2VRequest, model: str, generations: int) -> list[RunSpec]:
    """Both grad modes, each with streams consumed to the end and with streams left unfinished and referenced."""
    return [
        RunSpec(request=replace(request, decode_scope=scope), model=model, generations=generations, consumer=consumer)
        for consumer in (Consumer.PLAIN, Consumer.LEFT_OPEN)
        for scope in SCOPES
    ]


def leak_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """What is still allocated after each generation.

    Returns:
        One row for each run and generation: ``decode_scope, consumer, generation, allocated_bytes, growth_bytes``
        (over the previous generation; the first counts from zero), ``peak_bytes`` up to its decoding, which includes
        what previous generations left allocated, and ``seconds``, as in
        :func:`~i2v_lab.runs.sources.phases_frame`.
    """
    rows = []
    for each in observations:
        before = 0
        phases = phases_frame([each])
        by_generation = phases[phases["phase"] != AFTER_RETURN].groupby("generation")["peak_bytes"].max()
        seconds = phases.groupby("generation")["seconds"].sum(min_count=1)
        for record in each.run.of(GenerationRecord) if each.run else []:
            rows.append(
                {
                    "decode_scope": each.spec.request.decode_scope.value,
                    "consumer": each.spec.consumer.value,
                    "generation": record.generation,
                    "allocated_bytes": record.allocated_bytes,
                    "growth_bytes": record.allocated_bytes - before,
                    "peak_bytes": by_generation.get(record.generation),
                    "seconds": seconds.get(record.generation),
                }
            )
            before = record.allocated_bytes
    columns = ["decode_scope", "consumer", "generation", "allocated_bytes", "growth_bytes", "peak_bytes", "seconds"]
    return pd.DataFrame(rows, columns=columns).astype({"peak_bytes": "Int64", "seconds": "Float64"})


def growth_table(generations: pd.DataFrame) -> pd.DataFrame:
    """The first and the last generation of each run.

    Args:
        generations: Of :func:`leak_table`.

    Returns:
        One row for each run: ``decode_scope, consumer, generations`` (those that ended), ``first_bytes`` and
        ``last_bytes``, allocated after the first and after the last, ``growth_bytes`` of the last,
        ``first_peak_bytes`` and ``last_peak_bytes`` up to decoding, and ``seconds``, the median of a generation.
    """
    rows = [
        {
            "decode_scope": scope,
            "consumer": consumer,
            "generations": len(part),
            "first_bytes": part["allocated_bytes"].iloc[0],
            "last_bytes": part["allocated_bytes"].iloc[-1],
            "growth_bytes": part["growth_bytes"].iloc[-1],
            "first_peak_bytes": part["peak_bytes"].iloc[0],
            "last_peak_bytes": part["peak_bytes"].iloc[-1],
            "seconds": part["seconds"].median(),
        }
        for (scope, consumer), part in generations.groupby(["decode_scope", "consumer"], sort=False)
    ]
    return pd.DataFrame(rows)


def _last_growth(observation: Observation) -> int:
    """Growth by the last generation that ended; for an out-of-memory error in the first, what was allocated then."""
    if observation.run is None:
        return 0
    left = [0, *(record.allocated_bytes for record in observation.run.of(GenerationRecord))]
    if len(left) == 1:
        left += [record.alive_bytes for record in observation.run.of(OutOfMemoryRecord)]
    return left[-1] - left[-2] if len(left) > 1 else 0


def leak_verdict(observations: Sequence[Observation]) -> dict[str, Any]:
    """Claim 6: the apparent leak over consecutive generations was the same retained graph.

    Decided by the growth of allocated bytes after the last generation that ended. ``confirmed``: with the defect memory
    grows even if every stream is consumed to the end, and without the defect it does not. ``refined``: it grows only
    where streams are left unfinished, and then by more than 1.25 times as much with the defect. ``refuted``: neither.
    """
    if any(each.run is None for each in observations):
        return no_data(observations)
    growth = {
        (each.spec.consumer.value, each.spec.request.decode_scope.value): _last_growth(each) for each in observations
    }
    consumed, fixed = growth["plain", "escaped"], growth["plain", "no_grad"]
    open_graph, open_fixed = growth["left_open", "escaped"], growth["left_open", "no_grad"]
    least = NO_GROWTH * max(1, open_graph)
    if consumed > least and fixed <= least:
        verdict = CONFIRMED
    elif open_graph > OPEN_RATIO * max(0, open_fixed):
        verdict = REFINED
    else:
        verdict = REFUTED
    finding = (
        f"With streams consumed to the end, allocated memory grows by {format_bytes(consumed)} per generation with the "
        f"defect and by {format_bytes(fixed)} without; each stream that is stopped early and still referenced holds "
        f"{format_bytes(open_graph)} with the defect and {format_bytes(open_fixed)} without."
    )
    for each in observations:
        if each.run is not None and each.run.of(OutOfMemoryRecord):
            reached = len(each.run.of(GenerationRecord)) + 1
            defect = each.spec.request.decode_scope is DecodeScope.ESCAPED
            left_open = each.spec.consumer is Consumer.LEFT_OPEN
            streams = "unfinished" if left_open else "consumed"
            finding += (
                f" {'With' if defect else 'Without'} the defect and with {streams} streams, "
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
