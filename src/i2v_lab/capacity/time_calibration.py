"""Fits a card's rates to micro-benchmarks of its operators."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from i2v_lab.capacity.calibration import least_absolute
from i2v_lab.capacity.device_profile import DeviceProfile, Rate, measured_profile, profile_to_json
from i2v_lab.capacity.rate_cases import case
from i2v_lab.capacity.time_model import HOST_KINDS
from i2v_lab.errors import ForecastError, RecordError
from i2v_lab.files import write_text
from i2v_lab.paths import data_dir
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.records import CostRecord, CostRow

MEASUREMENTS = "rates-h100.jsonl"
LARGE_BYTES, SMALL_BYTES = 10**8, 10**6  # beyond the second-level cache; so small that only the launch counts
LAUNCH_BOUND = 1.6  # a time below this many times the host's is the host's
FEWEST = 4  # operators that latency, operations and bytes are fitted to
SPLIT = ("matmul", "convolution", "attention")  # kinds whose float32 has rates of its own
LIMITED_BY_BYTES = ("narrow convolution", "1x1 convolution", "grouped convolution")
LAUNCHES = {
    "matmul": "F.linear",
    "convolution": "nn.Conv2d",
    "attention": "sdpa",
    "norm": "nn.LayerNorm",
    "view": "view",
    "empty": "empty",
    "operator": "add",
}  # what stands for the launches of a kind
COPIES = {
    "copy to device, pageable": "to device, pageable",
    "copy to device, page-locked": "to device, page-locked",
    "copy to host, pageable": "to host, new",
    "copy to host, page-locked": "to host, page-locked",
}
# Not of the micro-benchmarks: what recorded runs take besides kernels and launches (docs/log/time-model.md).
HOST_CHOSEN = {"segment": 3e-4, "module": 2e-5, "weight": 5e-5, "host": 4e-6, "build": 0.05}
ONCE_CHOSEN = {
    "first use of cuBLAS": 0.13,
    "first use of cuDNN": 0.2,
    "first kernel": 25e-3,
    "first configuration of cudnn attention": 0.25,
    "other": 3e-3,
}
CHOSEN = {
    "lookup": Rate(4e-6, None, 1.5e12),
    "matmul float64": Rate(4e-6, 40e12, 2.7e12),
    "scaled matmul": Rate(4e-6, 1.29e15, None),
}  # of kinds that the benchmark does not have

Timed = tuple[float, int, int]  # seconds, operations, bytes


def calibrate_time(measurements: Path | None = None, out: Path | None = None) -> Iterator[str]:
    """Fit a device profile to what ``benchmarks/measure_rates.py`` measured.

    An operator takes ``latency + operations / rate + bytes / rate``; the three are fitted by the least absolute
    relative error. Kinds that are limited by bytes have the median rate of their large operators, which no cache holds,
    and the median time of their small ones.

    Args:
        measurements: JSON lines; by default those in ``data/measured``.
        out: The profile; that of the same card in ``data/devices`` by default.

    Yields:
        Lines of a report: each kind with its rates and the error of the fit, the file written.

    Raises:
        RecordError: The measurements cannot be read, or lack something.
    """
    source = measurements or data_dir() / "measured" / MEASUREMENTS
    try:
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        card = next(row for row in rows if row["kind"] == "device")
        timed = timed_operators(rows)
        operators: dict[str, Rate] = dict(CHOSEN)
        for kind, cases in sorted(timed.items()):
            operators[kind] = fitted_rate(kind, cases)
            errors = np.abs([operators[kind].seconds(f, b) / s - 1 for s, f, b in cases])
            yield f"{kind}: {len(cases)} operators; error of the fit: median {np.median(errors):.0%}"
        if "group norm 32" in operators:  # twice the groups occupy twice the card
            slow = operators["group norm 32"]
            operators["group norm 64"] = Rate(slow.latency_s, None, (slow.bytes_per_s or 0) * 2)
        profile = DeviceProfile(
            name=card["name"],
            source=f"measured on an {card['name']}{_hosts(rows)}, torch {card['torch']}, cuDNN {card['cudnn']}",
            operators=operators,
            copies={kind: _copy_rate(rows, what) for kind, what in COPIES.items()},
            host_s={kind: _launch(rows, what) for kind, what in LAUNCHES.items()} | HOST_CHOSEN,
            once_s={
                "first matmul": _first(rows, "linear"),
                "first convolution": _first(rows, "convolution"),
                "first cudnn attention": _first([r for r in rows if r.get("kernel") == "CUDNN_ATTENTION"], "attention"),
                **ONCE_CHOSEN,
            },
            load={
                "read": _file(rows, "read warm"),
                "disk": _file(rows, "read cold"),
                "encoded_pixels": _encoded(rows),
            },
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration, RecursionError) as error:
        raise RecordError(
            f"measurements '{source}' cannot be used ({' '.join(repr(error).split())[:200]}); measure again with "
            "benchmarks/measure_rates.py",
            path=source,
        ) from error
    name = "-".join(profile.name.lower().split()[:2])
    text = json.dumps(profile_to_json(profile), indent=1) + "\n"
    target = write_text(out or data_dir() / "devices" / f"{name}.json", text)
    yield f"wrote {target}"


def timed_operators(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Timed]]:
    """Measured seconds, operations and bytes of single operators, by the kind that a forecast counts them as.

    Left out are operators that the host could not launch as fast as they ran, and calls of several kinds of operators.
    """
    timed: dict[str, list[Timed]] = {}
    with forecasting("cuda") as profiler, torch.no_grad():
        for row in rows:
            seconds = row.get("graph_s") or row.get("seconds") or 0.0
            call = case(row) if "dtype" in row and seconds else None
            if call is None or not (row.get("graph_s") or seconds > LAUNCH_BOUND * row["host_s"]):
                continue
            try:
                with profiler.phase("case"):
                    call()
            except ForecastError:  # a kernel that the forecast does not know
                continue
            found = [row for record in profiler.records if isinstance(record, CostRecord) for row in record.rows]
            profiler.records.clear()
            kernels = [each for each in found if not each[0].startswith(("first ", *HOST_KINDS))]
            if len(kernels) == 1:
                timed.setdefault(_key(kernels[0]), []).append((seconds, kernels[0][3], kernels[0][4]))
    return timed


def _key(row: CostRow) -> str:
    return f"{row[0]} {row[1]}" if row[1] == "float32" and any(part in row[0] for part in SPLIT) else row[0]


def fitted_rate(kind: str, cases: list[Timed]) -> Rate:
    """The rate of a kind, from measured seconds, operations and bytes.

    Example:
        >>> sizes = [(1, 9), (5**9, 9), (9, 5**9), (9**9, 1)]
        >>> fitted_rate("matmul", [(1e-6 + f / 1e12 + b / 1e11, f, b) for f, b in sizes])
        Rate(latency_s=1e-06, flops_per_s=1000000000000, bytes_per_s=100000000000)
    """
    seconds, flops, nbytes = (np.array(column, dtype=float) for column in zip(*cases, strict=True))
    if not flops.any() or any(part in kind for part in LIMITED_BY_BYTES):
        large = nbytes > LARGE_BYTES if (nbytes > LARGE_BYTES).any() else nbytes > 0
        small = nbytes < SMALL_BYTES
        latency_s = float(np.median(seconds[small])) if small.any() else 2e-6
        return Rate(round(latency_s, 8), None, round(float(np.median((nbytes / seconds)[large]))))
    parts = np.stack([np.full(len(cases), 1e-6), flops / 1e12, nbytes / 1e9], axis=1)
    columns = [0, 1, 2] if len(cases) >= FEWEST else [1]
    while True:
        solution = least_absolute(parts[:, columns] / seconds[:, None], np.ones(len(cases)))
        if (solution >= 0).all():
            break
        columns.pop(int(solution.argmin()))
    factors = np.zeros(3)
    factors[columns] = solution
    latency_s = round(float(factors[0]) * 1e-6, 9) if len(cases) >= FEWEST else 4e-6
    flops_per_s = round(1e12 / factors[1]) if factors[1] else None
    return Rate(latency_s, flops_per_s, round(1e9 / factors[2]) if factors[2] else None)


def _of(rows: Iterable[Mapping[str, Any]], kind: str, what: str | None = None) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["kind"] == kind and what in (None, row.get("what"))]


def _median(values: Iterable[float]) -> float:
    return float(f"{statistics.median(values):.4g}")


def _copy_rate(rows: Iterable[Mapping[str, Any]], what: str) -> Rate:
    """By the smallest and the largest copies; the median where they were measured on several hosts."""
    copies = _of(rows, "copy", what)
    small, large = (pick(row["bytes"] for row in copies) for pick in (min, max))
    latency_s = _median(row["seconds"] for row in copies if row["bytes"] == small)
    return Rate(latency_s, None, round(large / _median(row["seconds"] for row in copies if row["bytes"] == large)))


def _launch(rows: Iterable[Mapping[str, Any]], what: str) -> float:
    return _median(row["host_s"] for row in _of(rows, "launch", what))


def _first(rows: Iterable[Mapping[str, Any]], kind: str) -> float:
    return _median(row["first_s"] - row["seconds"] for row in _of(rows, kind))


def _file(rows: Iterable[Mapping[str, Any]], what: str) -> float:
    return _median(row["bytes"] / row["seconds"] for row in _of(rows, "file", what))


def _encoded(rows: Iterable[Mapping[str, Any]]) -> float:
    videos = _of(rows, "encode")
    if not videos:  # of the host alone
        return measured_profile().load["encoded_pixels"]
    return _median(row["width"] * row["height"] * row["frames"] / row["seconds"] for row in videos)


def _hosts(rows: Iterable[Mapping[str, Any]]) -> str:
    count = len(_of(rows, "device"))
    return f" on {count} hosts" if count > 1 else ""
