"""Which card takes which request: forecasts, or runs, held against what cards have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from i2v_lab.capacity.cards import FITS, NO, context_bytes, gpu_memory_bytes, gpu_table, judge
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest
from i2v_lab.runs.sources import Observation
from i2v_lab.runs.spec import RunSpec
from i2v_lab.studies.resolution import frames_specs, resolution_specs
from i2v_lab.studies.verdicts import conclude, no_data
from i2v_lab.units import format_bytes


def map_specs(request: I2VRequest, model: str, sizes: Sequence[str], frames: Sequence[int]) -> list[RunSpec]:
    """Every size with every number of frames, without the graph."""
    by_size = resolution_specs(request, model, sizes)
    return [each for size in by_size for each in frames_specs(size.request, model, frames)]


def card_table(observations: Sequence[Observation], gpus: Sequence[str] = ()) -> pd.DataFrame:
    """Every request on every card.

    Args:
        observations: Of :func:`map_specs`; those without a run are left out.
        gpus: Names of ``data/gpus.csv``; all of them if empty.

    Returns:
        ``gpu, memory_bytes, width, height, frames, needed_bytes, peak_phase, verdict``: ``fits``, ``tight`` or ``no``,
        as in :class:`~i2v_lab.capacity.cards.Fit`. ``needed_bytes`` is what the allocator reserves and the CUDA
        context. The cards are in the order of their memory.
    """
    cards = {gpu: gpu_memory_bytes(gpu) for gpu in gpus or gpu_table()["gpu"]}
    context = context_bytes()
    rows: list[dict[str, Any]] = []
    for gpu, memory_bytes in sorted(cards.items(), key=lambda item: item[1]):
        for each in observations:
            if each.run is None:
                continue
            forecast = Forecast(each.run.records, context, 0.0)
            request = each.spec.request
            rows.append(
                {
                    "gpu": gpu,
                    "memory_bytes": memory_bytes,
                    "width": request.width,
                    "height": request.height,
                    "frames": request.frames,
                    "needed_bytes": forecast.peak_reserved_bytes + context,
                    "peak_phase": forecast.peak.phase,
                    "verdict": judge(forecast, gpu, memory_bytes).verdict,
                }
            )
    columns = ["gpu", "memory_bytes", "width", "height", "frames", "needed_bytes", "peak_phase", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def summary_by_card(table: pd.DataFrame) -> pd.DataFrame:
    """How much of the map each card takes.

    Returns:
        ``gpu, memory_bytes, fitting`` (requests), ``requests, largest_fitting``, such as ``2048x1536, 121 frames``.
    """
    rows = []
    for gpu, part in table.groupby("gpu", sort=False):
        fitting = part[part["verdict"] == FITS].to_dict("records")
        largest = max(fitting, key=lambda row: row["width"] * row["height"] * row["frames"], default=None)
        rows.append(
            {
                "gpu": gpu,
                "memory_bytes": int(part["memory_bytes"].iloc[0]),
                "fitting": len(fitting),
                "requests": len(part),
                "largest_fitting": "none"
                if largest is None
                else f"{largest['width']}x{largest['height']}, {largest['frames']} frames",
            }
        )
    return pd.DataFrame(rows, columns=["gpu", "memory_bytes", "fitting", "requests", "largest_fitting"])


def card_verdict(observations: Sequence[Observation], table: pd.DataFrame, summary: pd.DataFrame) -> dict[str, Any]:
    """The claim that a forecast without a GPU tells which card takes a request, to about 1 %.

    ``confirmed``: in the median over phases the error is within 1 %, and no phase is off by more than 3 %. ``refined``:
    the median is, but a phase is off by more. ``refuted``: the median is not.

    Args:
        observations: Of :func:`map_specs`.
        table: Of :func:`card_table`.
        summary: Of :func:`i2v_lab.studies.accuracy.summary_table`; its last row is of all phases.
    """
    if table.empty or summary.empty:
        return no_data(observations)
    errors = summary.iloc[-1]
    median, worst = float(errors["median_error"]), float(errors["worst_error"])
    verdict = "refuted" if median > 0.01 else "confirmed" if worst <= 0.03 else "refined"
    cards = summary_by_card(table)
    some = cards[cards["fitting"] > 0]
    smallest = some.iloc[0] if len(some) else None
    opened = (
        "no card in the list takes any of these requests"
        if smallest is None
        else f"the smallest card that takes any of these requests is the {smallest['gpu']} "
        f"({format_bytes(int(smallest['memory_bytes']))}), up to {smallest['largest_fitting']}"
    )
    finding = (
        f"Over {int(errors['runs'])} measured phases forecasts are off by {100 * median:.2f} % in the median and "
        f"{100 * worst:.1f} % at worst; {opened}."
    )
    return conclude(
        observations,
        verdict,
        finding,
        median_error=median,
        worst_error=worst,
        share_under=float(errors["share_under"]),
        phases_judged=int(errors["runs"]),
        smallest_fitting_gpu=None if smallest is None else str(smallest["gpu"]),
        requests_fitting_nowhere=int((table.groupby(["width", "height", "frames"])["verdict"].agg(set) == {NO}).sum()),
    )
