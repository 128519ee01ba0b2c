"""Which GPUs a forecast fits."""

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
    """The verdict for one GPU.

    Attributes:
        gpu: Its name.
        memory_bytes: Its memory as CUDA reports it.
        verdict: ``fits``: the caching allocator's peak reserved memory and the CUDA context fit. ``tight``: only peak
            allocated memory and the context do, so the allocator has to release cached blocks during the run. ``no``:
            neither.
    """

    gpu: str
    memory_bytes: int
    verdict: str


def judge(forecast: Forecast, gpu: str, memory_bytes: int) -> Fit:
    """The verdict for a GPU with ``memory_bytes`` that no other process uses.

    Example:
        >>> from i2v_lab.profiling.records import Forecast, PhaseRecord
        >>> phase = PhaseRecord("decode_video", None, 0, 3 * 2**30, 0, 5 * 2**30, 3 * 2**30, 0, 0.0, 0.1, True)
        >>> judge(Forecast((phase,), context_bytes=2**29, seconds=0.1), "a GPU", 4 * 2**30).verdict
        'tight'
    """
    available_bytes = memory_bytes - forecast.context_bytes
    if forecast.peak_reserved_bytes <= available_bytes:
        return Fit(gpu, memory_bytes, FITS)
    return Fit(gpu, memory_bytes, TIGHT if forecast.peak.peak_bytes <= available_bytes else NO)


def context_bytes() -> int:
    """Device memory of the CUDA context and loaded kernels, outside the allocator, from ``data/workspaces.json``."""
    return int(json.loads((data_dir() / "workspaces.json").read_text(encoding="utf-8"))["context_bytes"])


def gpu_table() -> pd.DataFrame:
    """``data/gpus.csv``: ``gpu, kind, memory_bytes, source``."""
    import pandas as pd

    return pd.read_csv(data_dir() / "gpus.csv")


def judge_all(forecast: Forecast) -> list[Fit]:
    """The verdict for every GPU in ``data/gpus.csv``, in ascending order of memory."""
    rows = gpu_table().sort_values("memory_bytes", kind="stable")
    return [judge(forecast, gpu, int(size)) for gpu, size in zip(rows["gpu"], rows["memory_bytes"], strict=True)]


def gpu_memory_bytes(name: str) -> int:
    """A GPU's memory as CUDA reports it, by its name in any case.

    Raises:
        InvalidRequest: It is not in ``data/gpus.csv``; the message lists the names.
    """
    table = gpu_table()
    found = table[table["gpu"].str.lower() == name.strip().lower()]
    if found.empty:
        raise InvalidRequest(f"gpu={name!r} is not in data/gpus.csv; use one of: {', '.join(table['gpu'])}", gpu=name)
    return int(found["memory_bytes"].iloc[0])
