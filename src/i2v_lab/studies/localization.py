"""Where is the peak: before the pipeline returns, or while its video is decoded by the caller?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from i2v_lab.events import Phase
from i2v_lab.request import DecodeScope, I2VRequest
from i2v_lab.runs.sources import Observation, phases_frame
from i2v_lab.runs.spec import RunSpec
from i2v_lab.studies.published import published
from i2v_lab.studies.verdicts import CONFIRMED, REFINED, REFUTED, conclude, no_data
from i2v_lab.units import GIB, format_bytes

AFTER_RETURN = Phase.DECODE_VIDEO.value  # runs while the stream is consumed, or when the caller decodes latents
DECODES = (AFTER_RETURN, Phase.DECODE_AUDIO.value)
SCOPES = (DecodeScope.ESCAPED, DecodeScope.NO_GRAD)


def scope_specs(request: I2VRequest, model: str) -> list[RunSpec]:
    """The same request decoded with grad enabled, and inside ``no_grad``."""
    return [RunSpec(request=replace(request, decode_scope=scope), model=model) for scope in SCOPES]


def boundaries_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """The running peak after each phase, as ``max_memory_allocated`` read at phase boundaries.

    Returns:
        One row for each run and phase: the columns of :func:`~i2v_lab.runs.sources.phases_frame`, and
        ``published_so_far_bytes``, for the published request with the graph retained.
    """
    table = phases_frame(observations)
    study = published()
    theirs = {row["phase"]: round(row["peak_so_far_gib"] * GIB) for row in study["boundaries"]}
    same = study["before_after"][0]
    alike = (table["model"] == study["model"]) & (table["decode_scope"] == "escaped")
    for name in ("width", "height", "frames"):
        alike &= table[name] == same[name]
    values = table["phase"].map(theirs).where(alike)
    return table.assign(published_so_far_bytes=values.astype("Int64"))


def late_phases(table: pd.DataFrame) -> list[str]:
    """The phases that run after the pipeline has returned: the decoding of the video, and of sound that follows it.

    A pipeline of diffusers has sound to decode after the video; that of this package has decoded it before.

    Args:
        table: Of :func:`~i2v_lab.runs.sources.phases_frame`.
    """
    order = list(dict.fromkeys(table["phase"]))
    return [name for name in DECODES if name in order and order.index(name) >= order.index(AFTER_RETURN)]


def gap_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """The peak until the pipeline returns, and that of the whole run.

    Returns:
        One row for each run: ``decode_scope, inside_bytes`` (until the return, or until latents are decoded),
        ``whole_bytes, gap_bytes, floor_phase`` (with the highest peak until then), ``inside_seconds, whole_seconds``,
        ``published_inside_bytes, published_whole_bytes``.
    """
    table = boundaries_table(observations)
    late = late_phases(table)
    same = table["published_so_far_bytes"].notna().any()
    study = published()
    ends = {row["phase"]: round(row["peak_so_far_gib"] * GIB) for row in study["boundaries"]}
    fixed = round(study["before_after"][1]["peak_gib"] * GIB)
    rows = []
    for scope, phases in table.groupby("decode_scope", sort=False):
        until = phases[~phases["phase"].isin(late)]
        inside = until.to_dict("records")
        top = max(inside, key=lambda phase: phase["peak_bytes"])
        theirs = (ends[""], ends[AFTER_RETURN]) if scope == "escaped" else (fixed, fixed)
        rows.append(
            {
                "decode_scope": scope,
                "inside_bytes": int(top["peak_bytes"]),
                "whole_bytes": int(phases["peak_bytes"].max()),
                "gap_bytes": int(phases["peak_bytes"].max()) - int(top["peak_bytes"]),
                "floor_phase": top["phase"],
                "inside_seconds": until["seconds"].sum(min_count=1),
                "whole_seconds": phases["seconds"].sum(min_count=1),
                "published_inside_bytes": theirs[0] if same else None,
                "published_whole_bytes": theirs[1] if same else None,
            }
        )
    columns = ["decode_scope", "inside_bytes", "whole_bytes", "gap_bytes", "floor_phase"]
    columns += ["inside_seconds", "whole_seconds"]
    theirs_columns = ["published_inside_bytes", "published_whole_bytes"]
    return pd.DataFrame(rows, columns=[*columns, *theirs_columns]).astype(dict.fromkeys(theirs_columns, "Int64"))


def floor_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """The phases of the run inside ``no_grad``, the highest peak first: what limits the run after the fix.

    Returns:
        ``phase, peak_bytes, seconds``, and ``share`` of the highest peak.
    """
    table = phases_frame([each for each in observations if each.spec.request.decode_scope is SCOPES[1]])
    table = table.sort_values("peak_bytes", ascending=False, kind="stable")[["phase", "peak_bytes", "seconds"]]
    return table.assign(share=table["peak_bytes"] / table["peak_bytes"].max()).reset_index(drop=True)


def localization_verdict(observations: Sequence[Observation]) -> dict[str, Any]:
    """Claim 2: the excess appears after the pipeline has returned.

    ``confirmed``: every phase before the return has the same peak in both runs, and all of the excess is in decoding
    the stream. ``refined``: another phase differs too. ``refuted``: decoding the stream has no excess.
    """
    if any(each.run is None for each in observations):
        return no_data(observations)
    table = phases_frame(observations)
    peaks = table.pivot_table(index="phase", columns="decode_scope", values="peak_bytes", aggfunc="max", sort=False)
    excess = peaks["escaped"] - peaks["no_grad"]
    later = late_phases(table)
    elsewhere = int(excess.drop(later).abs().max())
    late = int(excess[later].max())
    verdict = REFUTED if late <= 0 else CONFIRMED if elsewhere == 0 else REFINED
    gaps: dict[Any, dict[Any, Any]] = gap_table(observations).set_index("decode_scope").to_dict("index")
    floor: dict[Any, Any] = floor_table(observations).to_dict("records")[0]
    lazy = observations[0].spec.runner_spec.lazy_decode
    until, then = ("the pipeline returns", "consuming the stream") if lazy else ("the latents are decoded", "decoding")
    finding = (
        f"Until {until}, the peak is {format_bytes(int(gaps['escaped']['inside_bytes']))} with and without the defect"
        if elsewhere == 0
        else f"Until {until}, peaks differ by up to {format_bytes(elsewhere)}"
    )
    finding += (
        f"; {then} raises it to {format_bytes(int(gaps['escaped']['whole_bytes']))}. After the fix the "
        f"peak is {format_bytes(int(floor['peak_bytes']))}, in {floor['phase']}."
    )
    return conclude(
        observations,
        verdict,
        finding,
        inside_peak_bytes=int(gaps["escaped"]["inside_bytes"]),
        whole_peak_bytes=int(gaps["escaped"]["whole_bytes"]),
        gap_bytes=int(gaps["escaped"]["gap_bytes"]),
        no_grad_whole_peak_bytes=int(gaps["no_grad"]["whole_bytes"]),
        late_excess_bytes=late,
        largest_difference_elsewhere_bytes=elsewhere,
        floor_phase=str(floor["phase"]),
    )
