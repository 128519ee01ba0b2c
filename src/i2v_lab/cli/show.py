"""``i2v-lab show``: the phases and the peak of a recorded run, or the difference of two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from i2v_lab.cli.output import plain_console
from i2v_lab.files import check_folder

if TYPE_CHECKING:
    from i2v_lab.runs.store import Run

EXAMPLES = """
**Examples**

The phases of a run, and the modules and tensors that hold its peak:

    i2v-lab generate --image stills/lighthouse.png --out video.mp4 --profile runs/escaped --decode-scope escaped
    i2v-lab show runs/escaped

Two runs phase by phase, with their live bytes over time as a figure:

    i2v-lab show runs/escaped runs/no_grad --timeline figures
"""


def show(
    run: Annotated[
        Path, typer.Argument(help="Run directory, from `generate --profile`, `forecast --profile` or `measure`.")
    ],
    other: Annotated[Path | None, typer.Argument(help="Second run directory, to compare with the first.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of modules and of tensors to list.")] = 10,
    timeline: Annotated[
        Path | None, typer.Option(help="Folder for timeline.svg and timeline.png: live bytes over time.")
    ] = None,
) -> None:
    """Show the phases of a recorded run and what was live at its peak, or the difference to a second run."""
    from i2v_lab.profiling.records import PhaseRecord, peak_phase
    from i2v_lab.reporting import run_tables
    from i2v_lab.reporting.headlines import difference_headline, headline
    from i2v_lab.reporting.terminal import rich_table
    from i2v_lab.runs.store import read_run

    if timeline is not None:
        check_folder(timeline, "timeline")
    console = plain_console()
    first = read_run(run)
    if timeline is not None:
        from i2v_lab.reporting.figures.runs import timeline_figure

        timeline_figure(first, read_run(other) if other else None).save(timeline, "timeline")
    if other is None:
        peak = peak_phase(first.of(PhaseRecord))
        console.print(_described(first), soft_wrap=True)
        console.print(headline(first))
        if peak is None:
            return
        console.print(rich_table(run_tables.phase_table(first), "Phases", bold=peak.phase))
        modules = run_tables.modules_table(first).head(top)
        if len(modules):
            console.print(rich_table(modules, f"Live at the peak, in {peak.phase}, by module"))
        holders = run_tables.holders_table(first, top=top)
        if len(holders):
            console.print(rich_table(holders, f"The largest storages live at the peak, in {peak.phase}"))
        return
    second = read_run(other)
    for name, each in (("first", first), ("other", second)):
        console.print(f"{name}: {_described(each)}", soft_wrap=True)
        console.print(headline(each))
    console.print(difference_headline(first, second))
    console.print(rich_table(run_tables.difference_table(first, second), "Phase by phase"))


def _described(run: Run) -> str:
    known = run.metadata
    device = known.get("device_name") or known.get("device")
    facts = [known.get("model"), device and f"on {device}", known.get("started_at")]
    return ", ".join([str(run.folder), *(str(fact) for fact in facts if fact)])
