"""Which request fits which GPU: the memory that requests need, against the memory that GPUs have."""

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
from i2v_lab.studies.verdicts import NO_DATA, conclude, no_data
from i2v_lab.units import format_bytes


def map_specs(request: I2VRequest, model: str, sizes: Sequence[str], frames: Sequence[int]) -> list[RunSpec]:
    """Every size with every number of frames, decoded inside ``no_grad``."""
    by_size = resolution_specs(request, model, sizes)
    return [each for size in by_size for each in frames_specs(size.request, model, frames)]


def card_table(observations: Sequence[Observation], gpus: Sequence[str] = ()) -> pd.DataFrame:
    """The verdict for every request on every GPU.

    Args:
        observations: Of :func:`map_specs`; those without a run are skipped.
        gpus: Names in ``data/gpus.csv``; all of them if empty.

    Returns:
        ``gpu, memory_bytes, width, height, frames, needed_bytes, peak_phase, verdict``: ``fits``, ``tight`` or ``no``,
        as in :class:`~i2v_lab.capacity.cards.Fit`. ``needed_bytes`` is the allocator's reserved memory
        plus the CUDA context. GPUs are in ascending order of memory.
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
    """How many of the requests fit each GPU.

    Args:
        table: Of :func:`card_table`.

    Returns:
        ``gpu, memory_bytes``; ``fitting`` of ``requests``; ``largest_fitting``, such as ``2048x1536, 121 frames``.
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
    """The claim that a forecast without a GPU predicts which GPU a request fits, to about 1 %.

    ``confirmed``: the median error over phases is at most 1 %, and the error of no phase is above 3 %. ``refined``: the
    median is at most 1 %, but a phase is off by more than 3 %. ``refuted``: the median is above 1 %.

    Args:
        observations: Of :func:`map_specs`.
        table: Of :func:`card_table`.
        summary: Of :func:`i2v_lab.studies.accuracy.summary_table`; its last row is of all phases.
    """
    if table.empty:
        return no_data(observations)
    if summary.empty:
        model = observations[0].spec.model
        return conclude(observations, NO_DATA, f"data/measured has no GPU run of {model}.")
    errors = summary.iloc[-1]
    median, worst = float(errors["median_error"]), float(errors["worst_error"])
    verdict = "refuted" if median > 0.01 else "confirmed" if worst <= 0.03 else "refined"
    cards = summary_by_card(table)
    usable = cards[cards["fitting"] > 0]
    smallest = usable.iloc[0] if len(usable) else None
    fitting = (
        "none of these requests fits any listed GPU"
        if smallest is None
        else f"the smallest GPU that any of these requests fits is the {smallest['gpu']} "
        f"({format_bytes(int(smallest['memory_bytes']))}), up to {smallest['largest_fitting']}"
    )
    finding = (
        f"Over {int(errors['runs'])} measured phases, the error of the forecast peak is {100 * median:.2f} % in the "
        f"median and {100 * worst:.1f} % at worst; {fitting}."
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
