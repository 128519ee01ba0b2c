"""Fits the model of cuDNN workspaces to measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

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


def calibrate(measurements: Path | None = None, out: Path | None = None) -> Iterator[str]:
    """Fit ``data/workspaces.json`` to what ``benchmarks/measure_libraries.py`` measured.

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
    parts = large[["input_bytes", "output_bytes", "weight_bytes"]].to_numpy(float)
    observed = large["workspace_bytes"].to_numpy(float)
    factors = _least_absolute(parts / observed[:, None], np.ones(len(large)))
    errors = np.abs(parts @ factors / observed - 1)
    yield f"{len(large)} convolutions of {len(table)}: factors {', '.join(f'{factor:.3f}' for factor in factors)}"
    yield f"error of the fit: median {np.median(errors):.2%}, 95 % below {np.quantile(errors, 0.95):.2%}"
    model = {
        "source": f"fitted by `i2v-lab calibrate` to {source.name}: {device['gpu']}, torch {device['torch']}, "
        f"cuDNN {device['cudnn']}",
        "input_factor": round(float(factors[0]), 3),
        "output_factor": round(float(factors[1]), 3),
        "weight_factor": round(float(factors[2]), 3),
        "cublas_bytes": device["cublas_bytes"],
        "context_bytes": device["context_bytes"],
    }
    target = write_text(out or data_dir() / "workspaces.json", json.dumps(model, indent=1) + "\n")
    yield f"wrote {target}"


def _least_absolute(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least absolute deviations by iteratively reweighted least squares."""
    weights = np.ones(len(target))
    for _ in range(100):
        root = np.sqrt(weights)
        solution = np.linalg.lstsq(rows * root[:, None], target * root, rcond=None)[0]
        weights = 1 / np.maximum(np.abs(rows @ solution - target), 1e-9)
    return np.asarray(solution)
