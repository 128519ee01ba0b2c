"""``i2v-lab accuracy``: the error of forecasts against measured runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from i2v_lab.cli.output import plain_console, say
from i2v_lab.errors import OutputError
from i2v_lab.files import check_file

NO_RUNS = "no runs measured on a GPU here; record one with `i2v-lab generate --device cuda --profile DIR`"
EXAMPLES = """
**Examples**

The measured runs that come with the package; then your own, with every phase as CSV:

    i2v-lab accuracy
    i2v-lab accuracy runs/h200 --csv accuracy.csv

Those of one model:

    i2v-lab accuracy --model wan-2.2-ti2v-5b

Predicted seconds in place of bytes:

    i2v-lab accuracy --time
"""


def accuracy(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of recorded runs. [default: those of the package]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only runs of this model. [default: all]")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write every phase of every run to this file.")] = None,
    time: Annotated[bool, typer.Option("--time", help="Compare seconds in place of bytes.")] = False,
) -> None:
    """Compare forecasts with every run that was measured on a GPU."""
    from i2v_lab.files import write_atomically
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
    if time:
        _compare_seconds(folder, model, csv)
        return
    measured = measured_table(model, folder=folder, diffusers=True)
    if measured.empty:
        say(NO_RUNS)
        return
    table = accuracy_table(measured)
    if csv is not None:
        write_atomically(csv, lambda part: table.to_csv(part, index=False))
    console = plain_console()
    worst = table.reindex(table["error"].abs().sort_values(ascending=False).index).head(10)
    columns = ["run", "phase", "peak_bytes", "forecast_bytes", "error"]
    console.print(rich_table(worst[columns], "The ten largest errors"))
    console.print(rich_table(summary_table(table), f"{len(whole_runs(table))} runs, by phase"))
    console.print(rich_table(halves_table(table), "A correction by phase, fitted to half of the specs"))
    for package, found in other_versions(measured).items():
        say(f"some runs had {package} {' or '.join(found)}; these forecasts are of the version installed here")


def _compare_seconds(folder: Path | None, model: str | None, csv: Path | None) -> None:
    from i2v_lab.files import write_atomically
    from i2v_lab.reporting.terminal import rich_table
    from i2v_lab.studies.time_accuracy import runs_table, time_summary, time_table

    times = time_table(folder, model=model)
    if times.empty:
        say(NO_RUNS)
        return
    if csv is not None:
        write_atomically(csv, lambda part: times.to_csv(part, index=False))
    whole = runs_table(times)
    worst = whole.reindex(whole["error"].abs().sort_values(ascending=False).index).head(10)
    console = plain_console()
    console.print(rich_table(worst, "The ten runs with the largest errors of predicted seconds"))
    console.print(rich_table(time_summary(times), f"{len(whole)} runs, by phase and by card"))
