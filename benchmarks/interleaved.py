"""What profilers, the defect, ltx-pipelines' own code and memory policies cost: generations in turns, in one process.

    python benchmarks/turns.py
    python benchmarks/turns.py --ways policies
    python benchmarks/turns.py --model ltx-2.3-22b --device cuda --width 1024 --height 768 --frames 97 --out turns.json

With --out, the file is whole after every turn, so that an interrupted benchmark loses one. On a CPU, which counts no
allocated bytes by itself, every profiler watches every storage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from i2v_lab.files import write_text
from i2v_lab.paths import find_still
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx2.pipeline import resolve_device
from i2v_lab.pipeline.ltx2.weights import resolve_weights
from i2v_lab.request import I2VRequest
from i2v_lab.runs.interleaved import WAYS, take_turns, turns_table
from i2v_lab.runs.spec import DEFAULT_STILL, SMALL_MODEL


def main(
    model: str = SMALL_MODEL,
    device: str = "cpu",
    width: int = 128,
    height: int = 64,
    frames: int = 17,
    rounds: int = 7,
    ways: Annotated[str, typer.Option(help="Which are compared: profilers or policies.")] = "profilers",
    out: Annotated[Path | None, typer.Option(help="Gets the turns as JSON.")] = None,
) -> None:
    if ways not in WAYS:
        raise typer.BadParameter(f"{ways!r} is unknown; use {' or '.join(WAYS)}", param_hint="--ways")
    chosen = WAYS[ways]
    on = resolve_device(device)
    request = I2VRequest(image=str(find_still(DEFAULT_STILL)), width=width, height=height, frames=frames)
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else "CPU"
    turns = []
    weights = resolve_weights(load_architecture(model))
    for turn in tqdm(take_turns(weights, on, request, rounds, chosen), total=rounds * len(chosen)):
        turns.append(turn)
        if out is not None:
            asked = {**request.to_json(), "image": DEFAULT_STILL}  # no path of this machine
            values = {"device": name, "torch": torch.__version__, "model": model, "request": asked, "turns": turns}
            write_text(out, json.dumps(values, indent=1) + "\n")
    print_table(turns, f"{model} on {name}, {rounds} rounds")


def print_table(turns: list[dict[str, object]], title: str) -> None:
    import pandas as pd

    table = Table("way", "median s", "times", "95 % interval", "taking note", title=title)
    for row in turns_table(pd.DataFrame(turns)).itertuples():
        interval = f"{row.low_ratio:.3f} to {row.high_ratio:.3f}"
        told = "" if pd.isna(row.told_share) else f"{row.told_share:.3%}"
        table.add_row(row.way, f"{row.median_seconds:.2f}", f"{row.ratio:.3f}", interval, told)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
