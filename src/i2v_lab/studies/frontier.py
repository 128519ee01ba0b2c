"""Time against memory: the fastest placement within every budget, third-party pipelines, and measured runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from i2v_lab.capacity.cards import card_name
from i2v_lab.capacity.device_profile import device_profile
from i2v_lab.capacity.time_model import predicted_seconds
from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.profiling.records import Forecast
from i2v_lab.runs.phases import run_peak
from i2v_lab.runs.recorded import RecordedRuns, card_of, seconds_of, spec_of
from i2v_lab.runs.sources import Observation, Source
from i2v_lab.runs.spec import ProfilerMode, RunSpec
from i2v_lab.runs.store import COMPLETE, Run
from i2v_lab.studies.placed import best_placements, rates_of
from i2v_lab.units import GIB

BUDGETS = 24
SHOWN = 8  # placements of a table; all of them are in the figure and in its CSV
PLACEMENT, PIPELINE, MEASURED = "placement", "pipeline", "measured"
COLUMNS = [
    *("size", "kind", "name", "budget_bytes", "placement", "resident_blocks", "blocks"),
    *("peak_bytes", "peak_phase", "seconds", "warm_seconds", "gpu", "rates"),
]
WHOLE = dict.fromkeys(["budget_bytes", "resident_blocks", "blocks", "peak_bytes"], "Int64")


def frontier_table(
    observations: Sequence[Observation],
    third_party: Sequence[Mapping[str, Observation]],
    recorded: RecordedRuns,
    gpu: str,
    budgets: Sequence[float] = (),
) -> pd.DataFrame:
    """Peak and seconds of placements within rising budgets, of third-party pipelines, and of recorded runs.

    Placements are solved from forecasts, whatever the source of the observations; for recorded runs none are.

    Args:
        observations: Of :func:`~i2v_lab.studies.pipelines.policy_specs`.
        third_party: Of :func:`~i2v_lab.studies.pipelines.observe_third_party`, for each size.
        recorded: The runs to search for those of the same requests on the GPU, without a written video.
        gpu: Whose rates predict the seconds.
        budgets: In GiB; by default :data:`BUDGETS` by equal ratios, from the smallest that has a placement to what the
            fastest placement needs.

    Returns:
        One row for each point: ``size``; ``kind``: ``placement``, ``pipeline`` (of a third party) or ``measured``;
        ``name``; of a placement ``budget_bytes, placement, resident_blocks, blocks``; ``peak_bytes, peak_phase``;
        ``seconds``, predicted or measured, missing where nothing fits the budget; of a placement ``warm_seconds``, of
        a generation that finds streamed blocks in page-locked memory; ``gpu``; and ``rates``, as in
        :func:`~i2v_lab.studies.card_map.card_table`.

    Raises:
        InvalidRequest: There is no such GPU, or no published peaks of it.
    """
    device = device_profile(gpu)
    rows: list[dict[str, Any]] = []
    bases = {_size(each.spec): each.spec for each in reversed(observations)}  # of the first policy
    if any(each.source is not Source.RECORDED for each in observations) and observations[0].spec.runner_spec.techniques:
        rows += [row for spec in reversed(bases.values()) for row in _curve(spec, gpu, budgets)]
    named = [(name, each) for found in third_party for name, each in found.items()]
    for name, each in named:
        if each.run is not None:
            seconds = predicted_seconds(Forecast(each.run.records, 0, 0.0), device)
            rows.append({**_point(each.spec, PIPELINE, name, each.run), "seconds": seconds})
    names = {_key(spec): "" for spec in bases.values()} | {_key(each.spec): name for name, each in named}
    rows += _measured(names, recorded, gpu)
    table = pd.DataFrame(rows, columns=COLUMNS).assign(gpu=card_name(gpu), rates=rates_of(gpu))
    return table.astype(WHOLE | dict.fromkeys(["seconds", "warm_seconds"], "Float64"))


def placements_table(frontier: pd.DataFrame, size: str) -> pd.DataFrame:
    """Placements of :func:`frontier_table` at one size: each once, at most :data:`SHOWN` of them over all budgets.

    Args:
        frontier: Of :func:`frontier_table`.
        size: Such as ``1024x768``.
    """
    found = frontier[(frontier["kind"] == PLACEMENT) & (frontier["size"] == size)].drop_duplicates("name")
    picked = np.unique(np.linspace(0, len(found) - 1, min(SHOWN, len(found))).round().astype(int))
    return found.iloc[picked]


def _curve(spec: RunSpec, gpu: str, budgets: Sequence[float]) -> list[dict[str, Any]]:
    given = [round(budget * GIB) for budget in budgets]
    if not given:
        ends = best_placements(spec.request, spec.model, [(gpu, 0), (gpu, 2**60)])
        least_bytes, most_bytes = (end.needed_bytes for end in ends)
        given = [round(size) for size in np.geomspace(least_bytes, most_bytes, BUDGETS)]
    found = best_placements(spec.request, spec.model, [(gpu, budget) for budget in given])
    return [
        {
            "size": _size(spec),
            "kind": PLACEMENT,
            "name": each.name,
            "budget_bytes": budget,
            "placement": each.placement,
            "resident_blocks": each.resident_blocks,
            "blocks": each.blocks,
            "peak_bytes": each.peak_bytes,
            "peak_phase": each.peak_phase,
            "seconds": each.predicted_seconds,
            "warm_seconds": each.warm_seconds,
        }
        for budget, each in zip(given, found, strict=True)
    ]


def _measured(names: Mapping[str, str], recorded: RecordedRuns, gpu: str) -> list[dict[str, Any]]:
    rows = []
    for run in recorded.runs:
        spec = spec_of(run)
        plain = run.status == COMPLETE and spec.profiler is ProfilerMode.FULL and not spec.write_video
        placed = spec.policy is not None or spec.request.placement is not None  # not some of the techniques alone
        if plain and placed and _key(spec) in names and _is_of(run, gpu):
            name = names[_key(spec)] or (spec.policy or spec.placement.name)
            cap = f", capped at {spec.vram_cap_bytes / GIB:g} GiB" if spec.vram_cap_bytes else ""
            rows.append({**_point(spec, MEASURED, name + cap, run), "seconds": seconds_of(run)})
    return rows


def _point(spec: RunSpec, kind: str, name: str, run: Run) -> dict[str, Any]:
    peak = run_peak(run)
    known = {"peak_bytes": peak.peak_bytes, "peak_phase": peak.phase} if peak else {}
    return {"size": _size(spec), "kind": kind, "name": name, **known}


def _key(spec: RunSpec) -> str:
    """Equal for runs of the same request, whatever their placement."""
    return spec.with_request(memory=MemoryPolicy.RESIDENT, placement=None).memory_key()


def _size(spec: RunSpec) -> str:
    return f"{spec.request.width}x{spec.request.height}"


def _is_of(run: Run, gpu: str) -> bool:
    try:
        return card_name(card_of(run)) == card_name(gpu)
    except InvalidRequest:  # a CPU
        return False
