"""``i2v-lab show``: what a recorded run says, or how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from i2v_lab.runs.store import Run


def show(
    run: Annotated[Path, typer.Argument(help="A folder that `generate --profile` wrote.")],
    other: Annotated[Path | None, typer.Argument(help="A second one, to compare with the first.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many holders of the peak.")] = 10,
    timeline: Annotated[
        Path | None, typer.Option(help="Folder for timeline.svg and .png: live bytes over time.")
    ] = None,
) -> None:
    """Show the phases of a recorded run and what held its peak, or how a second run differs from it."""
    from rich.console import Console

    from i2v_lab.profiling.records import PhaseRecord, peak_phase
    from i2v_lab.reporting import run_tables
    from i2v_lab.reporting.headlines import difference_headline, headline
    from i2v_lab.reporting.terminal import rich_table
    from i2v_lab.runs.store import read_run

    console = Console(highlight=False, markup=False, emoji=False)
    first = read_run(run)
    if timeline is not None:
        from i2v_lab.reporting.figures.runs import timeline_figure
        from i2v_lab.reporting.figures.style import save_figure

        save_figure(timeline_figure(first, read_run(other) if other else None), timeline, "timeline")
    if other is None:
        peak = peak_phase(first.of(PhaseRecord))
        console.print(_described(first), soft_wrap=True)
        console.print(headline(first))
        if peak is None:
            return
        console.print(rich_table(run_tables.phase_table(first), "Phases", bold=peak.phase))
        modules = run_tables.modules_table(first).head(top)
        if len(modules):
            console.print(rich_table(modules, f"Alive at the peak, in {peak.phase}, by module"))
        holders = run_tables.holders_table(first, top=top)
        if len(holders):
            console.print(rich_table(holders, f"The largest tensors alive at the peak, in {peak.phase}"))
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
