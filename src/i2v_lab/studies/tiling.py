"""Does finer tiling of the decoder lower the peak, with the autograd graph retained and without it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from i2v_lab.pipeline.ltx2.tiles import TileGrid, tile_grid
from i2v_lab.profiling.records import TimelineRecord
from i2v_lab.request import DecodeScope, I2VRequest, Tiling
from i2v_lab.runs.sources import Observation, has_clock, runs_frame
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import COMPLETE
from i2v_lab.studies.published import beside_published
from i2v_lab.studies.verdicts import CONFIRMED, REFINED, REFUTED, conclude, no_data
from i2v_lab.units import format_bytes

UNCHANGED = 0.10  # a relative change of the peak up to this counts as hardly any


def tiling_specs(request: I2VRequest, model: str, tilings: Sequence[Tiling | None]) -> list[RunSpec]:
    """Each tiling, in the order given, decoded with grad enabled and then inside ``no_grad``."""
    asked = [replace(request, tiling=tiling) for tiling in tilings]
    return [
        RunSpec(request=replace(each, decode_scope=scope), model=model)
        for each in asked
        for scope in (DecodeScope.ESCAPED, DecodeScope.NO_GRAD)
    ]


def tile_layouts(specs: Sequence[RunSpec]) -> list[tuple[str, tuple[int, int, int], TileGrid]]:
    """Each tiling once: its name, the video's ``(width, height, frames)``, and the bounds of its tiles."""
    layouts = {}
    for each in specs:
        shape = each.request.shape
        name = tiling_name(each.request.tiling)
        layouts[name] = (name, (shape.width, shape.height, shape.frames), tile_grid(each.request))
    return list(layouts.values())


def tiling_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """The work and the memory of decoding with each tiling.

    Returns:
        The columns of :func:`~i2v_lab.studies.published.beside_published`, then ``tiling, tiles, voxel_ratio`` (voxels
        decoded over voxels of the video), ``published_end`` (the published outcome, and what was beside it),
        ``decode_peak_bytes`` and ``decode_seconds`` (missing for a forecast without the clock of a card).
    """
    found = [each for each in observations if each.run is not None]
    table = beside_published(runs_frame(observations))
    grids = [tile_grid(each.spec.request) for each in found]
    table["tiling"] = [tiling_name(each.spec.request.tiling) for each in found]
    outcome, note = table["published_outcome"], table["published_note"]
    table["published_end"] = outcome.where(note == "", outcome + ": " + note)
    table["tiles"] = pd.Series([grid.tiles for grid in grids], dtype="int64")
    sizes = [each.spec.request.shape for each in found]
    voxels = [grid.voxels / (s.width * s.height * s.frames) for grid, s in zip(grids, sizes, strict=True)]
    table["voxel_ratio"] = pd.Series(voxels, dtype="float64")
    table["decode_peak_bytes"] = pd.Series([_decode(each, "peak_bytes") for each in found], dtype="Int64")
    table["decode_seconds"] = pd.Series([_decode_seconds(each) for each in found], dtype="Float64")
    return table


def tiling_name(tiling: Tiling | None) -> str:
    """A tiling in words, such as ``768 px, 80 frames, overlap 64, 24``."""
    if tiling is None:
        return "untiled"
    overlap = f"overlap {tiling.tile_overlap_px}, {tiling.tile_overlap_frames}"
    return f"{tiling.tile_px} px, {tiling.tile_frames} frames, {overlap}"


def _decode(observation: Observation, column: str) -> Any:
    assert observation.run is not None
    phases = observation.run.frame("phase")
    decode = phases[phases["phase"] == "decode_video"]
    return decode[column].max() if len(decode) else None


def _decode_seconds(observation: Observation) -> Any:
    assert observation.run is not None
    return _decode(observation, "seconds") if has_clock(observation.run) else None


def hidden_demand(observations: Sequence[Observation], memory_bytes: int) -> pd.DataFrame:
    """What runs with the graph retained report if they run out of a GPU's memory, against what they need.

    A run that fails has allocated nearly all of the GPU's memory, whatever it would have needed: the last reading shows
    the capacity, not the demand. Uses the timeline of live storages, which forecasts and runs on a CPU have.

    Args:
        observations: Of :func:`tiling_specs`.
        memory_bytes: The memory that the process can use.

    Returns:
        One row for each tiling: ``tiling, demanded_bytes, reached_bytes`` (the highest reading before the first that
        exceeds ``memory_bytes``), ``hidden_bytes``, their difference, ``fails``, and ``seconds`` of decoding the whole
        video.
    """
    rows = []
    for each in observations:
        if each.run is None or each.spec.request.decode_scope is not DecodeScope.ESCAPED:
            continue
        moments = each.run.of(TimelineRecord)
        if not moments:
            continue
        totals = [m.weight_bytes + m.saved_bytes + m.activation_bytes + m.other_bytes for m in moments]
        beyond = next((index for index, total in enumerate(totals) if total > memory_bytes), len(totals))
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
                "seconds": _decode_seconds(each),
            }
        )
    columns = ["tiling", "demanded_bytes", "reached_bytes", "hidden_bytes", "fails", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def tiling_verdict(observations: Sequence[Observation]) -> dict[str, Any]:
    """Claim 1: finer tiles hardly lower the peak while the graph is retained.

    ``confirmed``: from the first to the last tiling the peak changes by at most a tenth. ``refined``: it rises by more,
    so that finer tiles are worse than claimed. ``refuted``: it falls by more.
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
    verdict = REFINED if change > UNCHANGED else REFUTED if change < -UNCHANGED else CONFIRMED
    free_before, free_after = int(freed.iloc[0]["decode_peak_bytes"]), int(freed.iloc[-1]["decode_peak_bytes"])
    finding = (
        f"With the graph retained, going from tiles of {first['tiling']}, to {last['tiling']}, "
        f"{'raises' if change > 0 else 'lowers'} the decoder's peak from {format_bytes(before)} to "
        f"{format_bytes(after)}: overlaps included, {last['voxel_ratio']:.2f} times the video's voxels are decoded and "
        f"their activations retained. Without the graph the peak goes from {format_bytes(free_before)} to "
        f"{format_bytes(free_after)}."
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
