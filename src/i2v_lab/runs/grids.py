"""Requests by the hundred, from a table or as the combinations of a grid."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import yaml

from i2v_lab.errors import I2VLabError, InvalidRequest, shown
from i2v_lab.plain_yaml import load_yaml
from i2v_lab.runs.plans import REQUEST_FIELDS, SPEC_FIELDS, spec_of_fields
from i2v_lab.runs.spec import RunSpec

FIELDS = (REQUEST_FIELDS | SPEC_FIELDS) - {"profiler", "video"}
TEXTS = {"image", "prompt", "negative_prompt", "model", "pipeline"}
MOST_REQUESTS = 1_000_000

Row = dict[str, Any]


def read_requests(path: Path) -> list[tuple[Row, RunSpec]]:
    """Read and check requests, each with the values that were given for it.

    A ``.csv`` file has a field of a plan's run in each column and a request in each row; an empty cell stands for the
    model's default. A YAML file is a grid: a mapping of fields to a value or to a list of values, of which every
    combination is a request, or a list of such mappings.

    Raises:
        InvalidRequest: The file cannot be read, or a request breaks a rule; with its row.

    Example:
        >>> [spec.name for _, spec in read_requests(Path("grid.yaml"))]  # doctest: +SKIP
        ['1024x768x97', '1024x768x121']
    """
    try:
        rows = list(_table(path) if path.suffix.lower() == ".csv" else _grid(path))
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InvalidRequest(
            f"requests='{path}' cannot be read ({reason}); give a CSV or YAML file", requests=path
        ) from error
    if not rows:
        raise InvalidRequest(f"requests='{path}' has no request; give at least one", requests=path)
    return [(row, _spec(row, f"requests='{path}', row {number}")) for number, row in enumerate(rows, start=1)]


def _spec(row: Mapping[str, Any], where: str) -> RunSpec:
    for name, value in row.items():
        if name not in FIELDS:
            words = f"{where}: {shown(name).strip(chr(39))}={shown(value)} is unknown; use {', '.join(sorted(FIELDS))}"
            raise InvalidRequest(words, **{str(name): value})
    try:
        return spec_of_fields(row)
    except (I2VLabError, TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{where}: {error}", **getattr(error, "fields", {})) from error


def _table(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for number, cells in enumerate(reader, start=1):
            if None in cells or None in cells.values():
                raise ValueError(f"row {number} has another number of cells than the first line")
            if number > MOST_REQUESTS:
                raise ValueError(f"more than {MOST_REQUESTS} requests")
            yield {name: _value(name, cell) for name, cell in cells.items() if cell.strip()}


def _value(name: str, cell: str) -> Any:
    if name in TEXTS:
        return cell
    try:
        return yaml.safe_load(cell)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}={shown(cell)} is no value") from error


def _grid(path: Path) -> Iterator[Row]:
    loaded = load_yaml(path)
    grids = loaded if isinstance(loaded, list) else [loaded]
    for grid in grids:
        if not isinstance(grid, dict):
            raise ValueError("a grid is a mapping of fields to values")
        values = [_values(name, value) for name, value in grid.items()]
        if prod(map(len, values)) > MOST_REQUESTS:
            raise ValueError(f"more than {MOST_REQUESTS} requests")
        for chosen in itertools.product(*values):
            yield dict(zip(grid, chosen, strict=True))


def _values(name: str, value: Any) -> list[Any]:
    """The values of a field; techniques are a list themselves, so that several of them are a list of lists."""
    if name == "techniques" and isinstance(value, list) and not any(isinstance(each, list) for each in value):
        return [value]
    return value if isinstance(value, list) else [value]
