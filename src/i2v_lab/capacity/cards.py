"""Which cards a forecast fits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from i2v_lab.errors import InvalidRequest
from i2v_lab.paths import data_dir

if TYPE_CHECKING:
    import pandas as pd

    from i2v_lab.profiling.records import Forecast

FITS, TIGHT, NO = "fits", "tight", "no"


@dataclass(frozen=True)
class Fit:
    """One card's verdict.

    Attributes:
        gpu: Its name.
        memory_bytes: What CUDA can use of its memory.
        verdict: ``fits``: what the caching allocator would reserve, and the CUDA context, have room. ``tight``: only
            what is allocated has room, so the allocator must return its cache on the way. ``no``: not even that.
    """

    gpu: str
    memory_bytes: int
    verdict: str


def judge(forecast: Forecast, gpu: str, memory_bytes: int) -> Fit:
    """The verdict for a card of ``memory_bytes``, with nobody else on it."""
    room_bytes = memory_bytes - forecast.context_bytes
    if forecast.peak_reserved_bytes <= room_bytes:
        return Fit(gpu, memory_bytes, FITS)
    return Fit(gpu, memory_bytes, TIGHT if forecast.peak.peak_bytes <= room_bytes else NO)


def context_bytes() -> int:
    """What the CUDA context and the libraries take from a card besides tensors, as in ``data/workspaces.json``."""
    return int(json.loads((data_dir() / "workspaces.json").read_text())["context_bytes"])


def gpu_table() -> pd.DataFrame:
    """``data/gpus.csv``: ``gpu, kind, memory_bytes, source``."""
    import pandas as pd

    return pd.read_csv(data_dir() / "gpus.csv")


def judge_all(forecast: Forecast) -> list[Fit]:
    """The verdict for every card in ``data/gpus.csv``, the smallest first."""
    rows = gpu_table().sort_values("memory_bytes", kind="stable")
    return [judge(forecast, gpu, int(size)) for gpu, size in zip(rows["gpu"], rows["memory_bytes"], strict=True)]


def gpu_memory_bytes(name: str) -> int:
    """What CUDA can use of a card, found by its name in any case.

    Raises:
        InvalidRequest: No such card; the message lists those there are.
    """
    table = gpu_table()
    found = table[table["gpu"].str.lower() == name.strip().lower()]
    if found.empty:
        raise InvalidRequest(f"gpu={name!r} is not in data/gpus.csv; use one of: {', '.join(table['gpu'])}", gpu=name)
    return int(found["memory_bytes"].iloc[0])
