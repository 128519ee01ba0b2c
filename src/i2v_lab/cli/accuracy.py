"""``i2v-lab accuracy``: the error of forecasts against measured runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from i2v_lab.cli import options
from i2v_lab.cli.output import log, plain_console, print_json, say
from i2v_lab.errors import OutputError, RecordError
from i2v_lab.files import check_file

if TYPE_CHECKING:
    import pandas as pd

NO_RUNS = "no runs measured on a GPU here; record one with `i2v-lab generate --device cuda --profile DIR`"
ESTIMATE = "under a minute, or about 20 s for each forecast that is not cached"
EXAMPLES = """
**Examples**

The measured runs that come with the package; then your own, with every phase as CSV:

    i2v-lab accuracy
    i2v-lab accuracy runs/h200 --csv accuracy.csv

Those of one model:

    i2v-lab accuracy --model wan-2.2-ti2v-5b

Predicted seconds in place of bytes:

    i2v-lab accuracy --time

All of it as JSON, for a script:

    i2v-lab accuracy --json
"""


def accuracy(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of recorded runs. [default: those of the package]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only runs of this model. [default: all]")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write every phase of every run to this file.")] = None,
    time: Annotated[bool, typer.Option("--time", help="Compare seconds in place of bytes.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare forecasts with every run that was measured on a GPU; the exit status is 2 if there is none."""
    from i2v_lab.files import write_atomically
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.reporting.terminal import rich_table
    from i2v_lab.studies.accuracy import (
        accuracy_table,
        halves_table,
        measured_table,
        other_versions,
        summary_table,
        whole_runs,
    )

    if csv is not None:
        check_file(csv, "csv", "accuracy.csv")
        if csv.suffix != ".csv":
            raise OutputError(f"csv='{csv}' does not end in .csv; use '{csv.with_suffix('.csv')}'", path=csv)
    if model is not None:
        load_architecture(model)  # refuses what is none
    if time:
        _compare_seconds(folder, model, csv, as_json)
        return
    measured = measured_table(model, folder=folder, diffusers=True)
    if measured.empty:
        raise RecordError(NO_RUNS, folder=folder, model=model)
    log(f"forecasting the runs: {ESTIMATE}")
    table = accuracy_table(measured)
    if csv is not None:
        write_atomically(csv, lambda part: table.to_csv(part, index=False))
    if as_json:
        print_json({"runs": int(table["run"].nunique()), "phases": rows(table), "summary": rows(summary_table(table))})
        return
    console = plain_console()
    worst = table.reindex(table["error"].abs().sort_values(ascending=False).index).head(10)
    columns = ["run", "phase", "peak_bytes", "forecast_bytes", "error"]
    console.print(rich_table(worst[columns], "The ten largest errors"))
    console.print(rich_table(summary_table(table), f"{len(whole_runs(table))} runs, by phase"))
    console.print(rich_table(halves_table(table), "A correction by phase, fitted to half of the specs"))
    for package, found in other_versions(measured).items():
        say(f"some runs had {package} {' or '.join(found)}; these forecasts are of the version installed here")


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON values: one object a row, what is missing is null."""
    values: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return values


def _compare_seconds(folder: Path | None, model: str | None, csv: Path | None, as_json: bool) -> None:
    from i2v_lab.files import write_atomically
    from i2v_lab.reporting.terminal import rich_table
    from i2v_lab.studies.time_accuracy import comparable_runs, runs_table, time_summary, time_table

    if not comparable_runs(folder, model):
        raise RecordError(NO_RUNS, folder=folder, model=model)
    log(f"forecasting the runs: {ESTIMATE}")
    times = time_table(folder, model=model)
    if times.empty:  # their phases are others than forecast
        raise RecordError(NO_RUNS, folder=folder, model=model)
    if csv is not None:
        write_atomically(csv, lambda part: times.to_csv(part, index=False))
    whole = runs_table(times)
    if as_json:
        print_json({"runs": len(whole), "phases": rows(times), "summary": rows(time_summary(times))})
        return
    worst = whole.reindex(whole["error"].abs().sort_values(ascending=False).index).head(10)
    console = plain_console()
    console.print(rich_table(worst, "The ten runs with the largest errors of predicted seconds"))
    console.print(rich_table(time_summary(times), f"{len(whole)} runs, by phase and by card"))
