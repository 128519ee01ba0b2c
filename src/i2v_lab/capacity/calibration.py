"""Fits the model of cuDNN workspaces to measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from i2v_lab.errors import RecordError
from i2v_lab.files import write_text
from i2v_lab.paths import data_dir

MEASUREMENTS = "libraries-h100.json"
COLUMNS = {"contiguous", "grouped", "input_bytes", "weight_bytes", "output_bytes", "workspace_bytes"}
FLAGS = {"contiguous", "grouped"}
DEVICE = {"gpu", "torch", "cudnn", "cublas_bytes", "context_bytes"}
LARGE_BYTES = 8 * 2**20  # below, the allocator's rounding and the choice of algorithm dominate
PARTS = ["input_bytes", "output_bytes", "weight_bytes"]
FEWEST = 4  # convolutions that three factors are fitted to
CUBLASLT_BYTES = 2**20  # parseCUDABlasLtWorkspaceSize: 1,024 KiB
CUBLAS_BYTES = {"9.0": 32 * 2**20, "other": 8_519_680}  # parseChosenWorkspaceSize: 32 MiB, or ":4096:2:16:8"


def calibrate(measurements: Path | None = None, out: Path | None = None) -> Iterator[str]:
    """Fit ``data/workspaces.json`` to what ``benchmarks/measure_libraries.py`` measured.

    Other dtypes and batches than those of the benchmark are in a file of JSON lines of the same name beside it, where
    there is one, of ``benchmarks/measure_convolutions.py``: each dtype has its own factors.

    Minimizes the absolute relative error over ungrouped channels-first convolutions with a workspace of 8 MiB or more.
    Not least squares: some kernels take another 16 MiB for split-k sums, outliers that would bias all factors.

    Args:
        measurements: The benchmark's JSON file; by default that in ``data/measured``. The convolutions are in the CSV
            file of the same name beside it.
        out: The model's file; ``data/workspaces.json`` by default.

    Yields:
        Lines of a report: the factors, the error of the fit, the file written.

    Raises:
        RecordError: The measurements cannot be read, or lack columns.
    """
    source = measurements or data_dir() / "measured" / MEASUREMENTS
    try:
        for file in (source, source.with_suffix(".csv")):
            if file.exists() and not file.is_file():  # to open a pipe would wait for a writer
                raise ValueError(f"{file.name} is no regular file")
        device = json.loads(source.read_text(encoding="utf-8"))
        table = pd.read_csv(source.with_suffix(".csv"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(
            f"measurements '{source}' cannot be read ({' '.join(str(error).split())}); give the JSON file", path=source
        ) from error
    missing = COLUMNS - set(table.columns)
    if missing:
        raise RecordError(f"measurements '{source}' lack columns: {', '.join(sorted(missing))}", path=source)
    lacking = DEVICE - set(device) if isinstance(device, dict) else DEVICE
    if lacking:
        raise RecordError(f"measurements '{source}' lack {', '.join(sorted(lacking))}; measure again", path=source)
    kinds = {name: table[name].dtype.kind for name in COLUMNS}
    odd = sorted(name for name, kind in kinds.items() if kind not in ("b" if name in FLAGS else "iu"))
    if odd:
        raise RecordError(
            f"measurements '{source}' have other values than numbers in {odd[0]}; measure again", path=source
        )
    large = table[table["contiguous"] & ~table["grouped"] & (table["workspace_bytes"] >= LARGE_BYTES)]
    if large.empty:
        raise RecordError(f"measurements '{source}' have no convolution with a workspace of 8 MiB or more", path=source)
    factors = _fitted(large)
    yield f"{len(large)} convolutions of {len(table)}: {_in_words(large, factors)}"
    model: dict[str, Any] = {
        "source": f"fitted by `i2v-lab calibrate` to {source.name}: {device['gpu']}, torch {device['torch']}, "
        f"cuDNN {device['cudnn']}",
        "input_factor": factors[0],
        "output_factor": factors[1],
        "weight_factor": factors[2],
        "cublas_bytes": device["cublas_bytes"],
        "cublas_bytes_by_capability": CUBLAS_BYTES,
        "cublaslt_bytes": CUBLASLT_BYTES,
        "context_bytes": device["context_bytes"],
    }
    lines = source.with_suffix(".jsonl")
    if lines.exists():
        model["factors"] = {}
        for dtype, cell in _by_dtype(lines):
            given = _factors_of_cell(cell)
            if given is not None:
                model["factors"][dtype] = given
                yield f"{dtype}: {len(cell)} convolutions: {_in_words(cell, given)}"
    target = write_text(out or data_dir() / "workspaces.json", json.dumps(model, indent=1) + "\n")
    yield f"wrote {target}"


def _by_dtype(path: Path) -> list[Any]:
    """Dtype, and the large convolutions with channels first that have it, whatever their batch."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        table = pd.DataFrame([row for row in rows if row["kind"] == "convolution"])
        spatial = table["contiguous"] & ~table["grouped"] & (table["kernel"] > 1)  # others are matrix products
        large = table[spatial & (table[PARTS].sum(axis=1) >= LARGE_BYTES)]
        return list(large.groupby("dtype"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(
            f"measurements '{path}' cannot be read ({' '.join(repr(error).split())[:200]}); measure again", path=path
        ) from error


def _factors_of_cell(cell: pd.DataFrame) -> list[float] | None:
    """Factors of one dtype: what a kernel transposes it copies whole, so each is 1 or 0; ``None`` for few convolutions.

    Those with the smallest median error: float32 kernels that write the output where it belongs are a second
    population, between which and the first a least-squares or least-absolute fit would lie.
    """
    if len(cell) < FEWEST:
        return None
    parts, observed = cell[PARTS].to_numpy(float), cell["workspace_bytes"].to_numpy(float)
    scale = np.maximum(observed, LARGE_BYTES)
    return list(
        min(product((1.0, 0.0), repeat=3), key=lambda f: np.median(np.abs(parts @ np.array(f) - observed) / scale))
    )


def _fitted(large: pd.DataFrame) -> list[float]:
    """Factors of input, output and weight, none of which is negative."""
    parts, observed = large[PARTS].to_numpy(float), large["workspace_bytes"].to_numpy(float)
    columns = [0, 1, 2]
    while columns:
        solution = _least_absolute(parts[:, columns] / observed[:, None], np.ones(len(large)))
        if (solution >= 0).all():
            break
        columns.pop(int(solution.argmin()))
    factors = np.zeros(3)
    if columns:
        factors[columns] = solution
    return [round(float(factor), 3) for factor in factors]


def _in_words(large: pd.DataFrame, factors: list[float]) -> str:
    shown = f"factors {', '.join(f'{factor:.3f}' for factor in factors)}"
    held = large[large["workspace_bytes"] > 0]
    if held.empty:
        return f"{shown}; no workspaces"
    errors = np.abs(held[PARTS].to_numpy(float) @ np.array(factors) / held["workspace_bytes"].to_numpy(float) - 1)
    return f"{shown}; error of the fit: median {np.median(errors):.2%}, 95 % below {np.quantile(errors, 0.95):.2%}"


def _least_absolute(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least absolute deviations by iteratively reweighted least squares."""
    weights = np.ones(len(target))
    for _ in range(100):
        root = np.sqrt(weights)
        solution = np.linalg.lstsq(rows * root[:, None], target * root, rcond=None)[0]
        weights = 1 / np.maximum(np.abs(rows @ solution - target), 1e-9)
    return np.asarray(solution)
