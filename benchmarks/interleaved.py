"""Interleaved A/B benchmark, in one process: what profilers, the defect, memory policies and upstream's code cost.

    python benchmarks/interleaved.py
    python benchmarks/interleaved.py --arms policies
    python benchmarks/interleaved.py --model ltx-2.3-22b --device cuda --width 1024 --height 768 --frames 97 --rounds 8

Works for every model; arms that a model's runner does not have are left out. After the first
generation it says how long the others take. With --out, the file is whole after every generation, so that an
interrupted benchmark loses one. On a CPU, which counts no allocated bytes by itself, every profiler watches every
storage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from i2v_lab.files import write_text
from i2v_lab.paths import find_still
from i2v_lab.pipeline.contract.generation import resolve_device
from i2v_lab.runs.interleaved import ARMS, ratio_table, run_interleaved
from i2v_lab.runs.spec import DEFAULT_STILL, SMALL_MODEL
from i2v_lab.studies.published import study_request
from i2v_lab.units import format_seconds

console = Console(width=120)


def main(
    model: str = SMALL_MODEL,
    device: str = "cpu",
    width: int = 128,
    height: int = 64,
    frames: int = 17,
    rounds: int = 7,
    arms: Annotated[str, typer.Option(help=f"Which are compared: {' or '.join(ARMS)}.")] = "profilers",
    out: Annotated[Path | None, typer.Option(help="Gets the times as JSON.")] = None,
) -> None:
    if arms not in ARMS:
        raise typer.BadParameter(f"{arms!r} is unknown; use {' or '.join(ARMS)}", param_hint="--arms")
    on = resolve_device(device)
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else "CPU"
    request = study_request(model, width, height, frames, image=str(find_still(DEFAULT_STILL)))
    chosen = ARMS[arms](request, model)
    first = next(iter(chosen.values()))
    weights = first.runner_spec.resolve_weights(first.architecture, request.variant)
    total = rounds * len(chosen)
    title = f"{model}, {width}x{height}, {frames} frames, on {name}"
    console.print(f"{title}: {rounds} rounds of {len(chosen)} arms, and one warm-up generation that does not count")
    measured: list[dict[str, Any]] = []
    for one in tqdm(run_interleaved(chosen, weights, on, rounds), total=total):
        measured.append(one)
        if len(measured) == 1:
            left = format_seconds(one["seconds"] * (total - 1))
            tqdm.write(f"A generation takes {format_seconds(one['seconds'])}: {left} to go.")
        if out is not None:
            asked = {**request.to_json(), "image": DEFAULT_STILL}  # no path of this machine
            values = {"device": name, "torch": torch.__version__, "model": model, "request": asked, "rounds": measured}
            write_text(out, json.dumps(values, indent=1) + "\n")
    print_table(measured, f"{model} on {name}, {rounds} rounds")


def print_table(measured: list[dict[str, object]], title: str) -> None:
    import pandas as pd

    table = Table("arm", "median s", "times", "95 % interval", "in the profiler", title=title)
    for row in ratio_table(pd.DataFrame(measured)).itertuples():
        interval = f"{row.low_ratio:.3f} to {row.high_ratio:.3f}"
        share = "" if pd.isna(row.event_share) else f"{row.event_share:.3%}"
        table.add_row(row.arm, f"{row.median_seconds:.2f}", f"{row.ratio:.3f}", interval, share)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
