"""Which GPUs a forecast fits."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from i2v_lab.errors import InvalidRequest, shown
from i2v_lab.paths import data_dir
from i2v_lab.units import GIB

if TYPE_CHECKING:
    import pandas as pd

    from i2v_lab.profiling.records import Forecast

NOISE = {"nvidia", "geforce", "tesla", "gpu", "generation", "graphics", "card", "corporation", "edition", "server"}
NOISE |= {"workstation", "design", "with", "max", "q", "mobile", ""}
USABLE = {"consumer": 0.97, "workstation": 0.92, "data-centre": 0.92}  # of the nominal memory; with ECC less
TOLERANCE = 0.13  # between a nominal memory and what CUDA reports
MOST_PLAIN_GIB, MOST_GIB = 1024, 2**20  # a larger number alone is the name of a card, such as 4090
BUDGET = "the budget of "  # begins the name of what is no card
FITS, TIGHT, NO = "fits", "tight", "no"
RESERVED_MARGIN_PERCENT = 6
"""Of the forecast's reserved bytes. No run of ``data/accuracy.csv`` reserved more than 5.7 % above its forecast."""


@dataclass(frozen=True)
class Fit:
    """The verdict for one GPU.

    Attributes:
        gpu: Its name.
        memory_bytes: Its memory as CUDA reports it.
        verdict: ``fits``: the caching allocator's peak reserved memory, with a margin, and the CUDA context fit
            (:func:`fitting_bytes`). ``tight``: only peak allocated memory and the context do, so the allocator may have
            to release cached blocks during the run. ``no``: neither.
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
    if fitting_bytes(forecast) <= memory_bytes:
        return Fit(gpu, memory_bytes, FITS)
    tight = forecast.peak.peak_bytes + forecast.context_bytes <= memory_bytes
    return Fit(gpu, memory_bytes, TIGHT if tight else NO)


def fitting_bytes(forecast: Forecast) -> int:
    """The smallest memory of a card that a forecast fits: reserved bytes with a margin, and the CUDA context.

    Example:
        >>> from i2v_lab.profiling.records import Forecast, PhaseRecord
        >>> phase = PhaseRecord("decode_video", None, 0, 900, 0, 1000, 900, 0, 0.0, 0.1, True)
        >>> fitting_bytes(Forecast((phase,), context_bytes=50, seconds=0.1))
        1110
    """
    reserved_bytes = forecast.peak_reserved_bytes
    return reserved_bytes + reserved_bytes * RESERVED_MARGIN_PERCENT // 100 + forecast.context_bytes


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


def gpu_memory_bytes(gpu: str) -> int:
    """A GPU's memory as CUDA reports it, by a size or by its name, as ``nvidia-smi`` prints it or shorter.

    Names of ``data/gpus.csv`` have a memory that was measured or published; those of ``data/gpus-nominal.csv`` have
    their nominal one less a margin (:data:`USABLE`). Makers' words, form factors, case and spaces do not count.

    Args:
        gpu: A size such as ``24``, ``24GB``, ``24 GiB``, which is in GiB as makers name it, or a name.

    Raises:
        InvalidRequest: It is neither; the message has the names that are nearest.

    Example:
        >>> gpu_memory_bytes("NVIDIA GeForce RTX 4090") == gpu_memory_bytes("rtx4090")
        True
        >>> gpu_memory_bytes("24 gb") == 24 * GIB
        True
    """
    size = _size(gpu)
    if size is not None:
        if not 0 < size <= MOST_GIB:
            raise InvalidRequest(f"gpu={shown(gpu)} is no size of a card; use one such as 24GiB", gpu=gpu)
        return int(size * GIB)
    return _memory_by_name()[card_name(gpu)]


def is_size(gpu: str) -> bool:
    """Whether a card is given by a size of its memory alone, or by a budget.

    Example:
        >>> is_size("24GiB"), is_size("RTX 4090")
        (True, False)
    """
    return gpu.startswith(BUDGET) or _size(gpu) is not None


def _size(gpu: str) -> float | None:
    """The number of a size; ``None`` for a name."""
    size = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(gib|gb|g)?\s*", gpu, re.IGNORECASE | re.ASCII)
    return float(size[1]) if size is not None and (size[2] or float(size[1]) <= MOST_PLAIN_GIB) else None


def card_name(gpu: str) -> str:
    """The name of a card in our tables, by any of its spellings.

    Args:
        gpu: A name as for :func:`gpu_memory_bytes`.

    Raises:
        InvalidRequest: As there.

    Example:
        >>> card_name("NVIDIA H100 80GB HBM3")
        'H100 80GB'
    """
    known = _memory_by_name()
    keys = {name: _key(name) for name in known}
    base, gib = _key(gpu)
    same = [name for name, key in keys.items() if key[0] in (base, f"rtx{base}")]
    # A name may leave out the memory where there is one card of it, or give it where the table does not.
    fits = [name for name in same if gib is None or keys[name][1] == gib]
    if gib is not None and not fits:
        fits = [n for n in same if keys[n][1] is None and abs(known[n] / GIB / gib - 1) < TOLERANCE]
    if base and len(fits) == 1:
        return fits[0]
    joined = {"".join(map(str, filter(None, key))): name for name, key in keys.items()}
    close = difflib.get_close_matches("".join(map(str, filter(None, (base, gib)))), joined, n=3, cutoff=0.6)
    near = same or [joined[each] for each in close]
    near = near or [name for name, key in keys.items() if base.startswith(key[0]) and len(key[0]) > 2]
    listed = ", ".join(gpu_table()["gpu"])
    remedy = f"did you mean {' or '.join(near)}?" if near else f"use one of: {listed}; or a size such as 24GiB"
    raise InvalidRequest(f"gpu={shown(gpu)} is not in data/gpus.csv; {remedy}", gpu=gpu)


def _memory_by_name() -> dict[str, int]:
    import pandas as pd

    table = gpu_table()
    nominal = pd.read_csv(data_dir() / "gpus-nominal.csv")
    sizes = {
        str(name): int(gib * USABLE[kind] * GIB)
        for name, kind, gib in zip(nominal["gpu"], nominal["kind"], nominal["nominal_gib"], strict=True)
    }
    return sizes | {str(name): int(size) for name, size in zip(table["gpu"], table["memory_bytes"], strict=True)}


def _key(name: str) -> tuple[str, int | None]:
    """A card's name without what its spellings differ in, and the memory in it, in GiB."""
    text = re.sub(r"\((r|tm|c)\)|[®™]", " ", name.lower())
    memory = re.search(r"(?<![\d.])(\d{1,3})\s*gi?b\b", text, re.ASCII)
    if memory is not None:
        text = text[: memory.start()] + " " + text[memory.end() :]
    words = re.split(r"[\s_/-]+", text)
    rest = (word for word in words if word not in NOISE and not re.fullmatch(r"hbm\w*|sxm\w*|pcie|nvlink", word))
    return "".join(rest), int(memory[1]) if memory else None
