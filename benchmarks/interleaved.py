"""Interleaved A/B benchmark, in one process: what profilers, the defect, memory policies and upstream's code cost.

    python benchmarks/interleaved.py
    python benchmarks/interleaved.py --ways policies
    python benchmarks/interleaved.py --model ltx-2.3-22b --device cuda --width 1024 --height 768 --frames 97 --rounds 8

Works for every model; ways that a model's runner does not have are left out, with the reason. After the first
generation it says how long the others take. With --out, the file is whole after every generation, so that an
interrupted benchmark loses one. On a CPU, which counts no allocated bytes by itself, every profiler watches every
storage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from i2v_lab.errors import InvalidRequest
from i2v_lab.files import write_text
from i2v_lab.paths import find_still
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.contract.generation import resolve_device
from i2v_lab.pipeline.contract.runner import backend_of, check_request
from i2v_lab.request import I2VRequest
from i2v_lab.runs.implementations import Implementation
from i2v_lab.runs.interleaved import WAYS, Way, take_turns, turns_table
from i2v_lab.runs.spec import DEFAULT_STILL, SMALL_MODEL
from i2v_lab.studies.published import study_request

console = Console(width=120)


def main(
    model: str = SMALL_MODEL,
    device: str = "cpu",
    width: int = 128,
    height: int = 64,
    frames: int = 17,
    rounds: int = 7,
    ways: Annotated[str, typer.Option(help=f"Which are compared: {' or '.join(WAYS)}.")] = "profilers",
    out: Annotated[Path | None, typer.Option(help="Gets the times as JSON.")] = None,
) -> None:
    if ways not in WAYS:
        raise typer.BadParameter(f"{ways!r} is unknown; use {' or '.join(WAYS)}", param_hint="--ways")
    on = resolve_device(device)
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else "CPU"
    request = study_request(model, width, height, frames, image=str(find_still(DEFAULT_STILL)))
    architecture = load_architecture(model)
    weights = backend_of(architecture).resolve_weights(architecture, request.variant)
    chosen = available(WAYS[ways], weights, on, request)
    total = rounds * len(chosen)
    title = f"{model}, {width}x{height}, {frames} frames, on {name}"
    console.print(f"{title}: {rounds} rounds of {len(chosen)} ways, and one generation that does not count")
    turns: list[dict[str, Any]] = []
    for turn in tqdm(take_turns(weights, on, request, rounds, chosen), total=total):
        turns.append(turn)
        if len(turns) == 1:
            tqdm.write(f"A generation takes {turn['seconds']:.1f} s: {duration(turn['seconds'] * (total - 1))} to go.")
        if out is not None:
            asked = {**request.to_json(), "image": DEFAULT_STILL}  # no path of this machine
            values = {"device": name, "torch": torch.__version__, "model": model, "request": asked, "turns": turns}
            write_text(out, json.dumps(values, indent=1) + "\n")
    print_table(turns, f"{model} on {name}, {rounds} rounds")


def available(ways: Mapping[str, Way], weights: Any, device: torch.device, request: I2VRequest) -> dict[str, Way]:
    """Those that the model's runner has; says of the others why they are left out."""
    backend = backend_of(weights.architecture)
    found = {}
    for name, way in ways.items():
        try:
            check_request(weights.architecture, replace(request, memory=way.memory, decode_scope=way.scope))
            if way.pipeline is Implementation.UPSTREAM:
                backend.upstream(weights, device)
        except InvalidRequest as error:
            console.print(f"without {name!r}: {error}")
        else:
            found[name] = way
    return found


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def print_table(turns: list[dict[str, object]], title: str) -> None:
    import pandas as pd

    table = Table("way", "median s", "times", "95 % interval", "in the profiler", title=title)
    for row in turns_table(pd.DataFrame(turns)).itertuples():
        interval = f"{row.low_ratio:.3f} to {row.high_ratio:.3f}"
        told = "" if pd.isna(row.told_share) else f"{row.told_share:.3%}"
        table.add_row(row.way, f"{row.median_seconds:.2f}", f"{row.ratio:.3f}", interval, told)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
