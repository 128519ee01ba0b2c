"""The forecast of a placement, computed from the forecasts that its parts were chosen from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from i2v_lab.capacity.candidates import UPSAMPLE, Base, Part, mixed_costs
from i2v_lab.profiling.records import (
    AssumptionRecord,
    CostRecord,
    Forecast,
    HostMemoryRecord,
    NoteRecord,
    Record,
    StepRecord,
)


def computed_forecast(parts: Sequence[Part], rest: Base) -> Forecast:
    """Phases, steps, costs and host memory of a placement; what holds a peak is not known.

    Args:
        parts: One of each group.
        rest: Has the phases of no group.
    """
    if len({id(part.base) for part in parts}) == 1 and not any(count for part in parts for _, count in part.counts):
        only = parts[0].base
        if {part.prefetch for part in parts} <= {None, only.placement.prefetch}:
            return only.forecast
    _, denoising, autoencoder = parts
    owners = {phase: part for part in parts for phase in part.group.phases} | {UPSAMPLE: autoencoder}
    peaks = peaks_of(parts, rest)
    records: list[Record] = []
    so_far = 0
    for phase in rest.forecast.phases:
        part = owners.get(phase.phase)
        base = part.base if part is not None else rest
        own, peak = base.phases[phase.phase], peaks[phase.phase]
        added = peak - own.peak_bytes
        records += [
            replace(step, peak_bytes=max(0, step.peak_bytes + added))
            for step in base.forecast.records
            if isinstance(step, StepRecord) and step.phase == phase.phase
        ]
        costs = base.costs.get(phase.phase, [])
        if part is not None and part.whole is not part.base:
            costs = mixed_costs(part.base, part.whole, phase.phase, part.shares[phase.phase])
        records += [CostRecord(phase.phase, len(list(equal)), rows) for rows, equal in groupby(costs)]
        if part is not None:
            records += [
                _host(one, part)
                for one in part.base.hosts
                if one.phase == phase.phase and one.component in dict(part.counts)
            ]
        so_far = max(so_far, peak)
        start = denoising.shared_bytes if phase.phase == UPSAMPLE else own.start_bytes
        records.append(
            replace(
                own,
                start_bytes=start,
                peak_bytes=peak,
                end_bytes=max(0, own.end_bytes + start - own.start_bytes),
                peak_reserved_bytes=None if own.peak_reserved_bytes is None else own.peak_reserved_bytes + added,
                peak_so_far_bytes=so_far,
            )
        )
    records += [one for one in rest.forecast.records if isinstance(one, NoteRecord | AssumptionRecord)]
    return Forecast(tuple(records), rest.forecast.context_bytes, 0.0)


def peaks_of(parts: Sequence[Part], rest: Base) -> dict[str, int]:
    """The peak of every phase, in their order."""
    own = {phase: nbytes for part in parts for phase, nbytes in part.peaks.items()}
    own[UPSAMPLE] = sum(part.shared_bytes for part in parts)
    return {phase: own.get(phase, rest.phases[phase].peak_bytes) for phase in rest.phases}


def _host(record: HostMemoryRecord, part: Part) -> HostMemoryRecord:
    """Page-locked memory of the blocks that are still streamed."""
    sizes, count = record.resident_bytes, dict(part.counts)[record.component]
    left = 1 - sizes[count] / sizes[-1] if sizes[-1] else 0.0
    return replace(
        record,
        page_locked_bytes=int(record.page_locked_bytes * left),
        pageable_bytes=record.pageable_bytes if left else 0,
        peak_bytes=(record.peak_bytes or 0) + sizes[count],
    )
