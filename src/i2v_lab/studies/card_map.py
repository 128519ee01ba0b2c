"""Which request runs on which GPU: the fastest placement within each GPU's memory, and its predicted time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from i2v_lab.capacity.cards import context_bytes, fitting_bytes, gpu_memory_bytes, gpu_table, judge
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import forecast_specs
from i2v_lab.runs.sources import Observation, Source
from i2v_lab.runs.spec import RunSpec
from i2v_lab.studies.placed import NONE, UNSTREAMED, base_specs, best_placements, rates_of
from i2v_lab.studies.resolution import frames_specs, resolution_specs
from i2v_lab.studies.verdicts import NO_DATA, conclude, no_data
from i2v_lab.units import format_bytes, format_seconds

COLUMNS = [
    *("gpu", "memory_bytes", "width", "height", "frames", "resident_needed_bytes", "resident_verdict"),
    *("placement", "name", "resident_blocks", "blocks", "peak_bytes", "peak_phase", "needed_bytes"),
    *("predicted_seconds", "warm_seconds", "rates"),
]


def map_specs(request: I2VRequest, model: str, sizes: Sequence[str], frames: Sequence[int]) -> list[RunSpec]:
    """Every size with every number of frames, decoded inside ``no_grad``."""
    by_size = resolution_specs(request, model, sizes)
    return [each for size in by_size for each in frames_specs(size.request, model, frames)]


def card_table(observations: Sequence[Observation], gpus: Sequence[str] = ()) -> pd.DataFrame:
    """The fastest placement of every request on every GPU.

    Placements are solved from forecasts, whatever the source of the observations; for recorded runs none are.

    Args:
        observations: Of :func:`map_specs`; those without a run are skipped.
        gpus: Names in ``data/gpus.csv``; all of them if empty.

    Returns:
        ``gpu, memory_bytes, width, height, frames``; ``resident_needed_bytes`` and ``resident_verdict`` with everything
        resident: reserved memory, its margin and the CUDA context, and the verdict as in
        :class:`~i2v_lab.capacity.cards.Fit`; then the fields of :class:`~i2v_lab.studies.placed.Placed`, and ``rates``:
        ``measured`` or ``published``, empty where the seconds are not known. GPUs are in ascending order of memory.
    """
    cards = {gpu: gpu_memory_bytes(gpu) for gpu in gpus or gpu_table()["gpu"]}
    budgets = sorted(cards.items(), key=lambda item: item[1])
    context = context_bytes()
    rows: list[dict[str, Any]] = []
    asked = [each for each in observations if each.run is not None and each.source is not Source.RECORDED]
    # All forecasts on all cores at once.
    forecast_specs([spec for each in asked for spec in base_specs(each.spec.request, each.spec.model)])
    for each in asked:
        assert each.run is not None
        resident = Forecast(each.run.records, context, 0.0)
        request = each.spec.request
        found = best_placements(request, each.spec.model, budgets)
        for (gpu, memory_bytes), placed in zip(budgets, found, strict=True):
            rows.append(
                {
                    "gpu": gpu,
                    "memory_bytes": memory_bytes,
                    "width": request.width,
                    "height": request.height,
                    "frames": request.frames,
                    "resident_needed_bytes": fitting_bytes(resident),
                    "resident_verdict": judge(resident, gpu, memory_bytes).verdict,
                    **vars(placed),
                    "rates": rates_of(gpu),
                }
            )
    order = {gpu: index for index, (gpu, _) in enumerate(budgets)}
    kinds = dict.fromkeys(["resident_blocks", "blocks", "peak_bytes"], "Int64")
    kinds |= dict.fromkeys(["predicted_seconds", "warm_seconds"], "Float64")
    table = pd.DataFrame(rows, columns=COLUMNS).astype(kinds)
    return table.sort_values("gpu", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def largest_by_card(table: pd.DataFrame) -> pd.DataFrame:
    """The largest of the requests on every GPU.

    Args:
        table: Of :func:`card_table`.

    Returns:
        Its rows of the request with the most pixels of all frames.
    """
    voxels = table["width"] * table["height"] * table["frames"]
    return table[voxels == voxels.max()].drop_duplicates("gpu")


def _named(row: pd.Series) -> str:
    return f"{row['width']}x{row['height']}, {row['frames']} frames"


def card_verdict(observations: Sequence[Observation], table: pd.DataFrame, summary: pd.DataFrame) -> dict[str, Any]:
    """The claim that a forecast without a GPU predicts which GPU a request fits, to about 1 %.

    ``confirmed``: the median error over phases is at most 1 %, and the error of no phase is above 3 %. ``refined``: the
    median is at most 1 %, but a phase is off by more than 3 %. ``refuted``: the median is above 1 %.

    Args:
        observations: Of :func:`map_specs`.
        table: Of :func:`card_table`.
        summary: Of :func:`i2v_lab.studies.accuracy.summary_table`; its last row is of all phases.
    """
    if all(each.run is None for each in observations):
        return no_data(observations)
    if summary.empty:
        model = observations[0].spec.model
        return conclude(observations, NO_DATA, f"data/measured has no GPU run of {model}.", **_placed(table))
    errors = summary.iloc[-1]
    median, worst = float(errors["median_error"]), float(errors["worst_error"])
    verdict = "refuted" if median > 0.01 else "confirmed" if worst <= 0.03 else "refined"
    placed = _placed(table)
    finding = (
        f"Over {int(errors['runs'])} measured phases, the error of the forecast peak is {100 * median:.2f} % in the "
        f"median and {100 * worst:.1f} % at worst{_placed_words(table, placed)}."
    )
    return conclude(
        observations,
        verdict,
        finding,
        median_error=median,
        worst_error=worst,
        share_under=float(errors["share_under"]),
        phases_judged=int(errors["runs"]),
        **placed,
    )


def _placed(table: pd.DataFrame) -> dict[str, Any]:
    """Named values: on how many pairs of a request and a GPU it runs, and the smallest GPU with all of them."""
    runs = table["placement"] != NONE
    every = runs.groupby(table["gpu"], sort=False).all()
    return {
        "pairs": len(table),
        "pairs_unstreamed": int(table["placement"].isin(UNSTREAMED).sum()),
        "pairs_placed": int(runs.sum()),
        "smallest_gpu_for_all": next((str(gpu) for gpu, whole in every.items() if whole), None),
    }


def _placed_words(table: pd.DataFrame, placed: dict[str, Any]) -> str:
    if table.empty:
        return ""
    some = "" if placed["pairs_placed"] == placed["pairs"] else f"{placed['pairs_placed']} of "
    words = (
        f"; {some or 'all '}{placed['pairs']} pairs of a request and a GPU have a placement that fits, "
        f"{placed['pairs_unstreamed']} without streaming weights"
    )
    smallest = largest_by_card(table[table["gpu"] == placed["smallest_gpu_for_all"]])
    if smallest.empty:
        return words
    row = smallest.iloc[0]
    takes = ""
    if pd.notna(row["predicted_seconds"]):
        takes = (
            f", predicted to take {format_seconds(float(row['predicted_seconds']), rough=True)} by {row['rates']} rates"
        )
    return (
        f"{words}. The smallest GPU with one for all is the {row['gpu']} ({format_bytes(int(row['memory_bytes']))}): "
        f"{_named(row)} with {row['name']}{takes}"
    )
