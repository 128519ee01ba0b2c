"""``i2v-lab sweep``: the forecasts of many requests as one table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from i2v_lab.capacity.device_profile import REFERENCE
from i2v_lab.cli import expected, options
from i2v_lab.cli.output import say
from i2v_lab.errors import InvalidRequest, OutputError, SweepError
from i2v_lab.files import check_file, write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from i2v_lab.runs.spec import RunSpec

CSV, PARQUET = ".csv", ".parquet"

EXAMPLES = """
**Examples**

Every combination of a grid, on all cores; the same command goes on where it was stopped:

    i2v-lab sweep grid.yaml --out forecasts.csv

grid.yaml, with a value or a list of values for each field of a request:

    model: ltx-2.3-22b
    width: [768, 1024, 1536]
    height: 768
    frames: [49, 97, 121]
    memory: [resident, streamed]

A request in each row of a table, on 32 jobs of a Slurm cluster, into Parquet:

    i2v-lab sweep requests.csv --out forecasts.parquet --workers 32 --cluster cluster.yaml
"""


def sweep(
    requests: Annotated[Path, typer.Argument(help="A grid in YAML, or a CSV with a request in each row.")],
    out: Annotated[Path, typer.Option(help="The table: .csv or .parquet.")],
    gpu: Annotated[str, typer.Option(help="Predict seconds on this card, as nvidia-smi names it.")] = REFERENCE,
    workers: Annotated[
        str, typer.Option(metavar="auto|N", help="Workers side by side, on one core each; auto: one for each core.")
    ] = "auto",
    cluster: options.Cluster = None,
) -> None:
    """Forecast many requests, each different one once, into a table with a row for each.

    Forecasts are cached as they end: the same command after an interruption computes only those that are missing.
    """
    from i2v_lab.capacity.device_profile import device_profile
    from i2v_lab.capacity.sweep import forecast_rows
    from i2v_lab.cli.progress import ManyReport
    from i2v_lab.runs.forecast import cache_path
    from i2v_lab.runs.grids import read_requests
    from i2v_lab.scale.workers import chosen_workers

    _check_out(out)
    device_profile(gpu)  # refused before anything runs
    asked = read_requests(requests)
    chosen = chosen_workers(workers, cluster, single_threaded=True)
    specs = [spec for _, spec in asked]
    different = len({cache_path(spec) for spec in specs})
    expected.announce_forecasts(specs, 1 if chosen is None else chosen.count)
    with ManyReport(different, "forecasts") as report:

        def ended(spec: RunSpec, error: str) -> None:
            report.ended(f"{spec.model} {spec.full_name}", f"failed: {error}" if error else "")

        rows = forecast_rows(specs, gpu, chosen, out.absolute().parent, ended)
    _write(out, [{**given, **row} for (given, _), row in zip(asked, rows, strict=True)])
    failed = sum(row["error"] is not None for row in rows)
    say(f"{len(rows)} requests, {different} different, {failed} failed: {out}")
    if failed:
        raise SweepError(
            f"{failed} of {len(rows)} forecasts failed; see the column error of '{out}'", failed=failed, out=out
        )


def _check_out(out: Path) -> None:
    if out.suffix.lower() not in (CSV, PARQUET):
        raise OutputError(f"out='{out}' is neither {CSV} nor {PARQUET}; use one of these names", path=out)
    if out.suffix.lower() == PARQUET and importlib.util.find_spec("pyarrow") is None:
        raise InvalidRequest(f"out='{out}' needs pyarrow, which is not installed; install it, or use {CSV}", out=out)
    check_file(out, "out", "forecasts.csv")


def _write(out: Path, rows: list[dict[str, object]]) -> None:
    import pandas as pd

    from i2v_lab.capacity.sweep import COLUMNS

    given = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    table: pd.DataFrame = pd.DataFrame(rows, columns=[*given, *COLUMNS])
    for name in COLUMNS:
        if name.endswith("_bytes"):
            table[name] = table[name].astype("Int64")
    for name in given:  # settings, tiles and techniques, as the requests name them
        if any(isinstance(row.get(name), dict | list) for row in rows):
            table[name] = [str(row.get(name, "")) for row in rows]
    try:
        if out.suffix.lower() == CSV:
            write_atomically(out, lambda part: table.to_csv(part, index=False))
        else:
            write_atomically(out, lambda part: table.to_parquet(part, index=False))
    except OSError as error:
        raise OutputError(f"'{out}' cannot be written ({error.strerror}); give another place", path=out) from error
