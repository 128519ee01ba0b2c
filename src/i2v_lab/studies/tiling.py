"""Does a finer tiling of the decoder lower the peak, with the autograd graph retained and without it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from i2v_lab.pipeline.ltx2.tiles import TileGrid, tile_grid
from i2v_lab.profiling.records import TimelineRecord
from i2v_lab.request import DecodeScope, I2VRequest, Tiling
from i2v_lab.runs.sources import Observation, Source, runs_frame
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import COMPLETE
from i2v_lab.studies.published import beside_published
from i2v_lab.studies.verdicts import CONFIRMED, REFINED, REFUTED, conclude, no_data
from i2v_lab.units import format_bytes

HARDLY = 0.10  # a change of the peak below this is "hardly"


def tiling_specs(request: I2VRequest, model: str, tilings: Sequence[Tiling | None]) -> list[RunSpec]:
    """Each tiling with the graph retained, then without, the coarsest first."""
    asked = [replace(request, tiling=tiling) for tiling in tilings]
    return [
        RunSpec(request=replace(each, decode_scope=scope), model=model)
        for each in asked
        for scope in (DecodeScope.ESCAPED, DecodeScope.NO_GRAD)
    ]


def tile_layouts(specs: Sequence[RunSpec]) -> list[tuple[str, tuple[int, int, int], TileGrid]]:
    """Each tiling once: its name, the video's ``(width, height, frames)``, and where its tiles lie."""
    layouts = {}
    for each in specs:
        shape = each.request.shape
        name = tiling_name(each.request.tiling)
        layouts[name] = (name, (shape.width, shape.height, shape.frames), tile_grid(each.request))
    return list(layouts.values())


def tiling_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """Every tiling: how much is decoded, and what it takes.

    Returns:
        The columns of :func:`~i2v_lab.studies.published.beside_published`, then ``tiling, tiles, voxel_ratio`` (voxels
        decoded to voxels of the video) and ``decode_peak_bytes``.
    """
    found = [each for each in observations if each.run is not None]
    table = beside_published(runs_frame(observations))
    grids = [tile_grid(each.spec.request) for each in found]
    table["tiling"] = [tiling_name(each.spec.request.tiling) for each in found]
    table["tiles"] = pd.Series([grid.tiles for grid in grids], dtype="int64")
    sizes = [each.spec.request.shape for each in found]
    voxels = [grid.voxels / (s.width * s.height * s.frames) for grid, s in zip(grids, sizes, strict=True)]
    table["voxel_ratio"] = pd.Series(voxels, dtype="float64")
    table["decode_peak_bytes"] = pd.Series([_decode(each, "peak_bytes") for each in found], dtype="Int64")
    table["decode_seconds"] = pd.Series([_decode_seconds(each) for each in found], dtype="Float64")
    return table


def tiling_name(tiling: Tiling | None) -> str:
    """Such as ``768 px, 80 frames, overlap 64, 24``."""
    if tiling is None:
        return "one piece"
    overlap = f"overlap {tiling.tile_overlap_px}, {tiling.tile_overlap_frames}"
    return f"{tiling.tile_px} px, {tiling.tile_frames} frames, {overlap}"


def _decode(observation: Observation, column: str) -> Any:
    assert observation.run is not None
    phases = observation.run.frame("phase")
    decode = phases[phases["phase"] == "decode_video"]
    return decode[column].max() if len(decode) else None


def _decode_seconds(observation: Observation) -> Any:
    """Of this run, or of the recorded one where this is a forecast."""
    if observation.source is not Source.FORECAST:
        return _decode(observation, "seconds")
    recorded = observation.recorded
    if recorded is None or recorded.status != COMPLETE:
        return None
    return _decode(Observation(observation.spec, Source.RECORDED, recorded), "seconds")


def hidden_demand(observations: Sequence[Observation], room_bytes: int) -> pd.DataFrame:
    """What runs with the graph retained would have said before they ran out of a card's memory.

    A run that fails has allocated nearly all there is, whatever it would have needed: its last figure is the card's,
    not the request's. Reads the timeline of live storages, which forecasts and runs on a CPU have.

    Args:
        observations: Of :func:`tiling_specs`.
        room_bytes: What the card has for this process.

    Returns:
        One row for each tiling: ``tiling, demanded_bytes, reached_bytes`` (the most that was alive before the first
        moment beyond ``room_bytes``), ``hidden_bytes``, ``fails``.
    """
    rows = []
    for each in observations:
        if each.run is None or each.spec.request.decode_scope is not DecodeScope.ESCAPED:
            continue
        moments = each.run.of(TimelineRecord)
        if not moments:
            continue
        totals = [m.weight_bytes + m.saved_bytes + m.activation_bytes + m.other_bytes for m in moments]
        beyond = next((index for index, total in enumerate(totals) if total > room_bytes), len(totals))
        demanded = _decode(each, "peak_bytes")
        reached = max(totals[:beyond], default=0)
        fails = beyond < len(totals)
        rows.append(
            {
                "tiling": tiling_name(each.spec.request.tiling),
                "demanded_bytes": int(demanded),
                "reached_bytes": reached if fails else int(demanded),
                "hidden_bytes": int(demanded) - reached if fails else 0,
                "fails": fails,
            }
        )
    return pd.DataFrame(rows, columns=["tiling", "demanded_bytes", "reached_bytes", "hidden_bytes", "fails"])


def tiling_verdict(observations: Sequence[Observation]) -> dict[str, Any]:
    """Claim 1: finer tiles hardly lower the peak while the graph is retained.

    ``confirmed``: from the first tiling to the last the peak changes by less than a tenth. ``refined``: it rises by
    more, so that the dead end is worse than claimed. ``refuted``: it falls by more.
    """
    table = tiling_table(observations)
    tiled = table[table["tile_px"].notna() & (table["status"] == COMPLETE)]
    retained = tiled[tiled["decode_scope"] == "escaped"]
    freed = tiled[tiled["decode_scope"] == "no_grad"]
    if len(retained) < 2 or len(freed) < 2:
        return no_data(observations)
    first, last = retained.iloc[0], retained.iloc[-1]
    before, after = int(first["decode_peak_bytes"]), int(last["decode_peak_bytes"])
    change = after / before - 1
    verdict = REFINED if change > HARDLY else REFUTED if change < -HARDLY else CONFIRMED
    free_before, free_after = int(freed.iloc[0]["decode_peak_bytes"]), int(freed.iloc[-1]["decode_peak_bytes"])
    finding = (
        f"With the graph retained, going from tiles of {first['tiling']}, to {last['tiling']}, "
        f"{'raises' if change > 0 else 'lowers'} the decoder's peak from {format_bytes(before)} to "
        f"{format_bytes(after)}, since overlaps are decoded, and kept, {last['voxel_ratio']:.2f} times; "
        f"without the graph it goes from {format_bytes(free_before)} to {format_bytes(free_after)}."
    )
    return conclude(
        observations,
        verdict,
        finding,
        retained_first_bytes=before,
        retained_finest_bytes=after,
        retained_change=change,
        no_grad_first_bytes=free_before,
        no_grad_finest_bytes=free_after,
        finest_voxel_ratio=float(last["voxel_ratio"]),
    )
