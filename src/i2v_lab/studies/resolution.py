"""How the peak scales with resolution and number of frames after the fix, and which phase determines it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from i2v_lab.events import Phase
from i2v_lab.request import DecodeScope, I2VRequest
from i2v_lab.runs.sources import Observation, phases_frame, runs_frame
from i2v_lab.runs.spec import RunSpec
from i2v_lab.studies.localization import AFTER_RETURN
from i2v_lab.studies.published import beside_published, to_size
from i2v_lab.studies.verdicts import CONFIRMED, REFINED, REFUTED, conclude, no_data
from i2v_lab.units import format_bytes

FLAT = 1.15  # growth up to this is flat; 33.55 GiB over 29.51 GiB, as published, is 1.137


def resolution_specs(request: I2VRequest, model: str, sizes: Sequence[str]) -> list[RunSpec]:
    """The request at each size, decoded inside ``no_grad``."""
    fixed = replace(request, decode_scope=DecodeScope.NO_GRAD)
    pairs = [to_size(size) for size in sizes]
    return [RunSpec(request=replace(fixed, width=w, height=h), model=model) for w, h in pairs]


def frames_specs(request: I2VRequest, model: str, frames: Sequence[int]) -> list[RunSpec]:
    """The request with each number of frames, decoded inside ``no_grad``."""
    fixed = replace(request, decode_scope=DecodeScope.NO_GRAD)
    return [RunSpec(request=replace(fixed, frames=count), model=model) for count in frames]


def flatness_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """Peak, phase of the peak and time of each run, and the published figures.

    Returns:
        The columns of :func:`~i2v_lab.studies.published.beside_published`, then ``megapixels``, ``size`` such as
        ``1024x768``, and ``decode_peak_bytes``.
    """
    table = beside_published(runs_frame(observations))
    phases = phases_frame(observations)
    decode = phases[phases["phase"] == AFTER_RETURN].set_index("name")["peak_bytes"]
    table["megapixels"] = table["width"] * table["height"] / 1e6
    table["size"] = [f"{width}x{height}" for width, height in zip(table["width"], table["height"], strict=True)]
    table["decode_peak_bytes"] = table["name"].map(decode).astype("Int64")
    return table


def published_difference_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """The published peaks beside this run's, and by how much they exceed the second denoising stage of it.

    Returns:
        One row for each published size: ``size, published_bytes, peak_bytes, peak_phase, stage_2_bytes, seconds`` and
        ``difference_bytes``, the published peak less that of the second stage.
    """
    phases = phases_frame(observations)
    stage = phases[phases["phase"] == Phase.DENOISE_STAGE_2.value].set_index("name")["peak_bytes"]
    table = flatness_table(observations)
    table["stage_2_bytes"] = table["name"].map(stage).astype("Int64")
    table["difference_bytes"] = table["published_bytes"] - table["stage_2_bytes"]
    columns = ["size", "published_bytes", "peak_bytes", "peak_phase", "stage_2_bytes", "difference_bytes", "seconds"]
    return table[table["published_bytes"].notna()][columns].reset_index(drop=True)


def deciding_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """Every phase's peak for every run.

    Returns:
        The columns of :func:`~i2v_lab.runs.sources.phases_frame`, then ``megapixels`` and ``decides``: whether the
        phase has the highest peak of its run.
    """
    table = phases_frame(observations)
    highest = table.groupby("name")["peak_bytes"].transform("max")
    return table.assign(
        megapixels=table["width"] * table["height"] / 1e6, decides=table["peak_bytes"].eq(highest).astype("bool")
    )


def flatness_verdict(by_size: Sequence[Observation], by_frames: Sequence[Observation]) -> dict[str, Any]:
    """Claim 5: the peak is nearly flat over resolution, because tiles are decoded one after another.

    ``refuted``: from the smallest to the largest size the run's peak grows more than 1.15 times. ``confirmed``: neither
    it nor the decoder's peak does. ``refined``: the run's peak is flat, but the decoder's is not: it stays below the
    peak of another phase.
    """
    if any(each.run is None for each in by_size):
        return no_data(by_size)
    table = flatness_table(by_size).sort_values("megapixels", kind="stable")
    small, large = table.iloc[0], table.iloc[-1]
    growth = int(large["peak_bytes"]) / int(small["peak_bytes"])
    decode_growth = int(large["decode_peak_bytes"]) / int(small["decode_peak_bytes"])
    pixel_growth = float(large["megapixels"] / small["megapixels"])
    verdict = REFUTED if growth > FLAT else CONFIRMED if decode_growth <= FLAT else REFINED
    finding = (
        f"From {small['size']} to {large['size']}, {pixel_growth:.1f} times the pixels, the peak goes from "
        f"{format_bytes(int(small['peak_bytes']))} ({small['peak_phase']}) to "
        f"{format_bytes(int(large['peak_bytes']))} ({large['peak_phase']}), {growth:.2f} times; the decoder's "
        f"peak grows {decode_growth:.2f} times, from {format_bytes(int(small['decode_peak_bytes']))}."
    )
    frames = flatness_table(by_frames).sort_values("frames", kind="stable")
    frames_growth = None
    if len(frames) > 1:
        frames_growth = int(frames.iloc[-1]["peak_bytes"]) / int(frames.iloc[0]["peak_bytes"])
    return conclude(
        by_size,
        verdict,
        finding,
        peak_growth=growth,
        pixel_growth=pixel_growth,
        decode_growth=decode_growth,
        frames_growth=frames_growth,
        smallest_peak_bytes=int(small["peak_bytes"]),
        largest_peak_bytes=int(large["peak_bytes"]),
        smallest_peak_phase=str(small["peak_phase"]),
        largest_peak_phase=str(large["peak_phase"]),
    )
