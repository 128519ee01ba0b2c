"""Tidy tables as people read them, and as files."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from i2v_lab.paths import data_dir
from i2v_lab.reporting.files import write_atomically
from i2v_lab.units import format_bytes

WORDS = {"escaped": "outside no_grad", "no_grad": "inside no_grad"}


def save_table(table: pd.DataFrame, folder: Path, name: str) -> Path:
    """Write a tidy table as CSV, with whole bytes and seconds."""
    return write_atomically(folder / f"{name}.csv", lambda part: table.to_csv(part, index=False))


def before_after_table(phases: pd.DataFrame) -> pd.DataFrame:
    """Peak and time of every phase, before and after, formatted; the last row is the whole run.

    What is compared stands side by side: first the peaks of all scopes, then their times.

    Args:
        phases: As in :class:`i2v_lab.studies.no_grad.Comparison`.
    """
    rows = {}
    for phase in phases["phase"].unique():
        rows[phase] = phases[phases["phase"] == phase].set_index("decode_scope")
    table = pd.DataFrame(index=[*rows, "whole run"])
    scopes = phases["decode_scope"].unique()
    for scope in scopes:
        peaks = [int(rows[phase].loc[scope, "peak_bytes"]) for phase in rows]
        table[f"peak {WORDS.get(scope, scope)}"] = [format_bytes(n) for n in [*peaks, max(peaks)]]
    for scope in scopes:
        seconds = [float(rows[phase].loc[scope, "seconds"]) for phase in rows]
        table[f"time {WORDS.get(scope, scope)}"] = [f"{s:.2f} s" for s in [*seconds, sum(seconds)]]
    return table


def published_table(phases: pd.DataFrame, model: str) -> pd.DataFrame:
    """Our peaks beside the published ones: outside ``no_grad``, inside, and their ratio."""
    published = json.loads((data_dir() / "published" / "no_grad_study.json").read_text())
    theirs = {row["decode_scope"]: row["peak_gib"] for row in published["before_after"]}
    ours = phases.groupby("decode_scope")["peak_bytes"].max()
    first = published["before_after"][0]
    rows = [
        {
            "run": f"published: {published['run']}, {first['width']}x{first['height']}, {first['frames']} frames",
            WORDS["escaped"]: f"{theirs['escaped']:.2f} GiB",
            WORDS["no_grad"]: f"{theirs['no_grad']:.2f} GiB",
            "ratio": f"{theirs['escaped'] / theirs['no_grad']:.2f}",
        },
        {
            "run": f"measured here: {model}",
            WORDS["escaped"]: format_bytes(int(ours["escaped"])),
            WORDS["no_grad"]: format_bytes(int(ours["no_grad"])),
            "ratio": f"{ours['escaped'] / ours['no_grad']:.2f}",
        },
    ]
    return pd.DataFrame(rows).set_index("run").rename_axis(None)
