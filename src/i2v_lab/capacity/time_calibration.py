"""Fits a card's rates to micro-benchmarks of its operators, which it runs on the card that is here."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from i2v_lab.capacity.calibration import least_absolute
from i2v_lab.capacity.device_profile import (
    DeviceProfile,
    Rate,
    derived_profile,
    has_peaks,
    measured_profile,
    profile_to_json,
)
from i2v_lab.capacity.rate_cases import case
from i2v_lab.capacity.rate_measurement import RateMeasurement
from i2v_lab.capacity.time_model import HOST_KINDS
from i2v_lab.errors import DeviceUnavailable, ForecastError, RecordError
from i2v_lab.files import write_text
from i2v_lab.paths import user_devices_dir
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.records import CostRecord, CostRow

GROUPS = {"launch": "launches", "copy": "copies", "lock": "page-locking", "file": "a file", "encode": "a video"}
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
HOST_CHOSEN = {"segment": 1e-4, "module": 6e-5, "weight": 1.1e-4, "host": 4e-6, "build": 0.03}
ONCE_CHOSEN = {
    "first use of cuBLAS": 0.13,
    "first use of cuDNN": 0.2,
    "first kernel": 12e-3,
    "first cudnn attention": 0.05,
    "first matmul": 3e-3,
    "first convolution": 4e-3,
    "first configuration of cudnn attention": 0.2,
    "other": 3e-3,
}
CHOSEN = {
    "lookup": Rate(4e-6, None, 1.5e12),
    "matmul float64": Rate(4e-6, 40e12, 2.7e12),
    "scaled matmul": Rate(4e-6, 1.29e15, None),
}  # of kinds that the benchmark does not have

Timed = tuple[float, int, int]  # seconds, operations, bytes


def calibrate_time(
    measurements: Path | None = None, out: Path | None = None, measurement: RateMeasurement | None = None
) -> Iterator[str]:
    """Measure a card's rates, and fit a device profile to them, which forecasts use from then on.

    An operator takes ``latency + operations / rate + bytes / rate``; the three are fitted by the least absolute
    relative error. Kinds that are limited by bytes have the median rate of their large operators, which no cache holds,
    and the median time of their small ones.

    Args:
        measurements: JSON lines that were measured before; by default the card that is here is measured, in one to two
            minutes.
        out: The profile; in the user's data folder by default.
        measurement: What is measured.

    Yields:
        Lines of a report: what is being measured, each kind with the error of its fit, the files written. What was
        measured is written beside the profile.

    Raises:
        DeviceUnavailable: There is no card.
        RecordError: The measurements cannot be read, or lack something.
    """
    source: Path | str = "of this card" if measurements is None else measurements
    try:
        if measurements is None:
            rows: list[Any] = []
            yield from _measured(measurement or RateMeasurement(), rows)
        else:
            rows = [json.loads(line) for line in measurements.read_text(encoding="utf-8").splitlines()]
        profile, report = fitted_profile(rows)
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration, RecursionError) as error:
        raise RecordError(
            f"measurements '{source}' cannot be used ({' '.join(repr(error).split())[:200]}); measure again with "
            "i2v-lab calibrate --time",
            path=measurements,
        ) from error
    yield from report
    target = out or user_devices_dir() / f"{re.sub(r'[^A-Za-z0-9]+', '-', profile.name.lower()).strip('-')}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    if measurements is None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        yield f"wrote {write_text(target.with_suffix('.jsonl'), lines)}"
    yield f"wrote {write_text(target, json.dumps(profile_to_json(profile), indent=1) + chr(10))}"


def _measured(measurement: RateMeasurement, rows: list[Any]) -> Iterator[str]:
    """Fill ``rows``; a line for each kind of measurement, and for every fifth part of the operators."""
    if measurement.device == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable(
            "device=cuda is not available, and rates are measured on a card; run i2v-lab calibrate --time where one "
            "is, or give it a file of measurements",
            device="cuda",
        )
    operators, every = len(measurement.cases), max(1, len(measurement.cases) // 5)
    done = 0
    for row in measurement.rows():
        if "dtype" in row:
            done += 1
        if row["kind"] == "device":
            yield f"measuring {row['name']}: launches, {operators} operators, copies, a file, a video"
        elif "dtype" in row and done % every == 0:
            yield f"{done} of {operators} operators"
        elif "dtype" not in row and (not rows or row["kind"] != rows[-1]["kind"]) and row["kind"] in GROUPS:
            yield GROUPS[row["kind"]]
        rows.append(row)


def fitted_profile(rows: Sequence[Mapping[str, Any]]) -> tuple[DeviceProfile, list[str]]:
    """A device profile from measurements, and a line for each kind with the error of its fit.

    What no row is about has the rate that published peaks give, and else that of an H100.

    Args:
        rows: Of :class:`~i2v_lab.capacity.rate_measurement.RateMeasurement`.
    """
    card = next(row for row in rows if row["kind"] == "device")
    base = derived_profile(card["name"]) if has_peaks(card["name"]) else measured_profile()
    operators: dict[str, Rate] = dict(CHOSEN)
    report = []
    for kind, cases in sorted(timed_operators(rows).items()):
        operators[kind] = fitted_rate(kind, cases)
        errors = np.abs([operators[kind].seconds(f, b) / s - 1 for s, f, b in cases])
        report.append(f"{kind}: {len(cases)} operators; error of the fit: median {np.median(errors):.0%}")
    if "group norm 32" in operators:  # twice the groups occupy twice the card
        slow = operators["group norm 32"]
        operators["group norm 64"] = Rate(slow.latency_s, None, (slow.bytes_per_s or 0) * 2)
    first = {
        "first matmul": _first(rows, "linear"),
        "first convolution": _first(rows, "convolution"),
        "first cudnn attention": _first([r for r in rows if r.get("kernel") == "CUDNN_ATTENTION"], "attention"),
        "first use of cuBLAS": _once(rows, "F.linear"),
        "first use of cuDNN": _once(rows, "nn.Conv2d"),
    }
    profile = DeviceProfile(
        name=card["name"],
        source=f"measured on an {card['name']}{_hosts(rows)}, torch {card['torch']}, cuDNN {card['cudnn']}",
        operators={**base.operators, **operators},
        copies={kind: _copy_rate(rows, what) for kind, what in COPIES.items()},
        host_s={kind: _launch(rows, what) for kind, what in LAUNCHES.items()} | HOST_CHOSEN,
        once_s=ONCE_CHOSEN | {kind: seconds for kind, seconds in first.items() if seconds is not None},
        load={
            "read": _file(rows, "read warm by threads") or measured_profile().load["read"],
            "disk": _file(rows, "read cold") or measured_profile().load["disk"],
            "lock": _locked(rows),
            "encoded_pixels": _encoded(rows),
        },
    )
    return profile, report


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
    """By the smallest and the largest copies. Of several hosts the median, but the fastest for page-locked memory.

    There the link is the limit, and what is slower had others on it.
    """
    copies = _of(rows, "copy", what)
    sizes = [row["bytes"] for row in copies]
    of: Callable[[Iterable[float]], float] = min if what.endswith("page-locked") else _median
    small_s, large_s = (of(row["seconds"] for row in copies if row["bytes"] == pick(sizes)) for pick in (min, max))
    return Rate(small_s, None, round(max(sizes) / large_s))


def _launch(rows: Iterable[Mapping[str, Any]], what: str) -> float:
    return _median(row["host_s"] for row in _of(rows, "launch", what))


def _first(rows: Iterable[Mapping[str, Any]], kind: str) -> float | None:
    """Median of what first calls take beyond others; ``None`` without any."""
    excess = [max(0.0, row["first_s"] - row["seconds"]) for row in _of(rows, kind) if "first_s" in row]
    return _median(excess) if excess else None


def _once(rows: Iterable[Mapping[str, Any]], what: str) -> float | None:
    seconds = [row["seconds"] for row in _of(rows, "once", what)]
    return _median(seconds) if seconds else None


def _file(rows: Iterable[Mapping[str, Any]], what: str) -> float | None:
    files = [row["bytes"] / row["seconds"] for row in _of(rows, "file", what)]
    return _median(files) if files else None


def _encoded(rows: Iterable[Mapping[str, Any]]) -> float:
    videos = _of(rows, "encode")
    if not videos:  # of the host alone
        return measured_profile().load["encoded_pixels"]
    return _median(row["width"] * row["height"] * row["frames"] / row["seconds"] for row in videos)


def _locked(rows: Iterable[Mapping[str, Any]]) -> float:
    locks = _of(rows, "lock", "cudaHostRegister")
    if not locks:
        return measured_profile().load["lock"]
    largest = max(row["bytes"] for row in locks)
    return _median(row["bytes"] / row["seconds"] for row in locks if row["bytes"] == largest)


def _hosts(rows: Iterable[Mapping[str, Any]]) -> str:
    count = len(_of(rows, "device"))
    return f" on {count} hosts" if count > 1 else ""
