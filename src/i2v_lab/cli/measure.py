"""``i2v-lab measure``: a plan of runs, each in a process of its own, kept as run directories."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from i2v_lab.errors import I2VLabError, MeasureError

if TYPE_CHECKING:
    from i2v_lab.runs.plans import PlannedRun
    from i2v_lab.runs.store import Run

MEASURE_EXAMPLES = """
**Examples**

The study at full size, on the GPU of this machine; the same command again goes on where it was stopped:

    i2v-lab measure --plan data/plans/h200.yaml --out runs/h200

What is ahead, without running anything:

    i2v-lab measure --plan data/plans/h200.yaml --out runs/h200 --dry-run
"""


@dataclass(frozen=True)
class _Outcome:
    """How one planned run ended: with a run, or with an error of ours."""

    name: str
    run: Run | None
    message: str
    kept: bool


def measure(
    plan: Annotated[Path, typer.Option(help="A YAML file: see data/plans.")],
    out: Annotated[Path, typer.Option(help="Gets one run directory for each run.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run, and for how long.")] = False,
) -> None:
    """Measure the runs of a plan, one process each, and keep their records.

    A run that runs out of memory, or whose grad mode torch refuses, is a result like any other. One that fails in
    another way does not stop the rest. What is in the folder already is not run again.
    """
    from i2v_lab.runs.measure import reusable_run, run_identity
    from i2v_lab.runs.plans import load_plan

    planned = load_plan(plan)
    todo = [each for each in planned if reusable_run(out / each.name, run_identity(each.spec, device)) is None]
    seconds = sum(each.expected_seconds for each in todo)
    print(
        f"{len(planned)} runs, {len(planned) - len(todo)} of them kept from before; {len(todo)} to make, in about "
        f"{_duration(seconds)}",
        flush=True,
    )
    if dry_run:
        for each in todo:
            print(f"{each.name:<60} {each.expected_seconds:5.0f} s")
        return
    outcomes = _measure_all(planned, {each.name for each in todo}, out, device)
    _print_summary(outcomes)
    failed = [outcome.name for outcome in outcomes if outcome.run is None]
    if failed:
        raise MeasureError(
            f"{len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}; run the same command again for these",
            failed=failed,
        )


def _measure_all(planned: Sequence[PlannedRun], todo: set[str], out: Path, device: str) -> list[_Outcome]:
    from i2v_lab.runs.measure import measure as measure_one

    outcomes: list[_Outcome] = []
    left_s = sum(each.expected_seconds for each in planned if each.name in todo)
    begun = 0
    for each in planned:
        if each.name in todo:
            begun += 1
            _tell(f"[{begun}/{len(todo)}] {each.name}, about {_duration(left_s)} left")
            left_s -= each.expected_seconds
        start_s = time.perf_counter()
        run, message = None, ""
        try:
            run = measure_one(each.spec, out / each.name, device)
            message = str(run.metadata.get("error", ""))
        except I2VLabError as error:
            message = str(error)
        outcomes.append(_Outcome(each.name, run, message, kept=each.name not in todo))
        if each.name in todo:
            took = f"{time.perf_counter() - start_s:.0f} s (expected {each.expected_seconds:.0f})"
            _tell(f"    {'failed' if run is None else run.status}, {took}{': ' if message else ''}{message[:160]}")
    return outcomes


def _print_summary(outcomes: Sequence[_Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    from i2v_lab.profiling.records import OutOfMemoryRecord, PhaseRecord, peak_phase
    from i2v_lab.units import format_bytes

    table = Table("run", "outcome", "peak", "phase", "seconds", box=None, header_style="bold", pad_edge=False)
    for column in (table.columns[2], table.columns[4]):
        column.justify = "right"
    for outcome in outcomes:
        if outcome.run is None:
            table.add_row(outcome.name, "failed", "", "", "")
            continue
        phases = outcome.run.of(PhaseRecord)
        top = peak_phase(phases)
        status = "out of memory" if outcome.run.of(OutOfMemoryRecord) else outcome.run.status
        table.add_row(
            outcome.name,
            f"{status}, kept" if outcome.kept else status,
            format_bytes(top.peak_bytes) if top else "",
            top.phase if top else "",
            f"{max((phase.start_s + phase.seconds for phase in phases), default=0):.1f}",
        )
    Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 120).print(table)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
