"""``i2v-lab measure``: run a plan, one process per run, and record each run in a directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from i2v_lab.capacity.device_profile import REFERENCE
from i2v_lab.cli import options, placed
from i2v_lab.cli.output import log, say
from i2v_lab.errors import I2VLabError, InvalidRequest, MeasureError
from i2v_lab.files import check_folder
from i2v_lab.request import Tiling
from i2v_lab.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from i2v_lab.runs.plans import PlannedRun
    from i2v_lab.runs.store import Run
    from i2v_lab.scale.plan_runs import Measured
    from i2v_lab.scale.workers import Workers

EXAMPLES = """
**Examples**

The full-size study on the GPU of this machine; the same command resumes after an interruption:

    i2v-lab measure --plan data/plans/h200.yaml --out runs/h200

On all cards of this machine, or on four jobs of a Slurm cluster:

    i2v-lab measure --plan data/plans/h200.yaml --out runs/h200 --workers auto
    i2v-lab measure --plan data/plans/h200.yaml --out runs/h200 --workers 4 --cluster cluster.yaml

List the runs that are left, without running them:

    i2v-lab measure --plan data/plans/h200.yaml --out runs/h200 --dry-run
"""


@dataclass(frozen=True)
class _Outcome:
    """The result of one planned run: a recorded run, or the message of an I2VLabError."""

    name: str
    run: Run | None
    message: str
    reused: bool


def measure(
    plan: Annotated[Path, typer.Option(help="YAML file; for its format see data/plans.")],
    out: Annotated[Path, typer.Option(help="Folder of the run directories.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    vram_budget: placed.VramBudget = None,
    explain: placed.Explain = False,
    workers: options.Workers = None,
    cluster: options.Cluster = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs that are left.")] = False,
) -> None:
    """Measure the runs of a plan, one process per run, and record them.

    Out of memory, and a grad mode that torch refuses, are recorded as results. Any other failure does not stop the
    remaining runs. Runs that the folder already holds with the same settings are reused. With a budget, every run is
    placed within it, whatever memory policy the plan names, and its allocator is capped. With workers, runs are made
    side by side, each on a card of its own; those that are made in turns stay together on one.
    """
    from i2v_lab.profiling.meters.nvml import describe_device
    from i2v_lab.runs.measure import reusable_run, run_identity
    from i2v_lab.runs.plans import load_plan

    check_folder(out, "out")
    planned = load_plan(plan)
    chosen = _workers(workers, cluster, device)
    if explain and vram_budget is None:
        raise InvalidRequest("explain=True has nothing to explain; give --vram-budget", explain=True)
    if vram_budget is not None:
        placed.use_expandable_segments()
        budget_bytes = placed.budget_or_free_bytes(vram_budget)
        gpu = describe_device("cuda" if device == "auto" else device)[0] or REFERENCE
        planned = [_placed(each, budget_bytes, explain, gpu) for each in planned]
    todo = [each for each in planned if reusable_run(out / each.name, run_identity(each.spec, device)) is None]
    side_by_side = 1 if chosen is None else chosen.count
    expected = format_seconds(sum(each.expected_seconds for each in todo) / side_by_side, rough=True)
    say(f"{len(planned)} runs, {len(planned) - len(todo)} reused; {len(todo)} to run, in about {expected}")
    if dry_run:
        for each in todo:
            say(f"{each.name:<60} {format_seconds(each.expected_seconds, rough=True):>7}")
        return
    if chosen is None:
        outcomes = _measure_all(planned, {each.name for each in todo}, out, device)
    else:
        outcomes = _measure_on(chosen, planned, todo, out, device)
    _print_summary(outcomes)
    failed = [outcome.name for outcome in outcomes if outcome.run is None]
    if failed:
        raise MeasureError(
            f"{len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}; repeat the command to retry them",
            failed=failed,
        )


def _placed(each: PlannedRun, budget_bytes: int, explain: bool, gpu: str) -> PlannedRun:
    """A planned run within a budget."""
    from i2v_lab.capacity.solver import Fixed
    from i2v_lab.pipeline.contract.architectures import load_architecture

    spec = each.spec
    if not spec.runner_spec.techniques:
        raise placed.not_placed(spec.model)
    tiling = load_architecture(spec.model).request.get("tiling", Tiling())
    asked = placed.Asked(budget_bytes, True, Fixed(tiling=spec.request.tiling != tiling), explain, gpu)
    resolution = placed.solved(spec.request, spec.model, budget_bytes, asked)
    spec = replace(spec, request=resolution.request, techniques=None, vram_cap_bytes=resolution.cap_bytes)
    return replace(each, name=f"{each.name}_budget{budget_bytes / GIB:g}", spec=spec)


def _measure_all(planned: Sequence[PlannedRun], todo: set[str], out: Path, device: str) -> list[_Outcome]:
    from i2v_lab.runs.measure import measure as measure_one

    outcomes: list[_Outcome] = []
    left_s = sum(each.expected_seconds for each in planned if each.name in todo)
    started = 0
    for each in planned:
        if each.name in todo:
            started += 1
            log(f"[{started}/{len(todo)}] {each.name}, about {format_seconds(left_s, rough=True)} left")
            left_s -= each.expected_seconds
        start_s = time.perf_counter()
        run, message = None, ""
        try:
            run = measure_one(each.spec, out / each.name, device)
            message = str(run.metadata.get("error", ""))
        except I2VLabError as error:
            message = str(error)
        outcomes.append(_Outcome(each.name, run, message, reused=each.name not in todo))
        if each.name in todo:
            took = format_seconds(time.perf_counter() - start_s, rough=True)
            took += f" (expected {format_seconds(each.expected_seconds, rough=True)})"
            log(f"    {'failed' if run is None else run.status}, {took}{': ' if message else ''}{message[:160]}")
    return outcomes


def _workers(text: str | None, cluster: Path | None, device: str) -> Workers | None:
    from i2v_lab.scale.workers import chosen_workers

    return chosen_workers(text, cluster, on_cards=device != "cpu")


def _measure_on(
    workers: Workers, planned: Sequence[PlannedRun], todo: Sequence[PlannedRun], out: Path, device: str
) -> list[_Outcome]:
    from i2v_lab.cli.progress import ManyReport
    from i2v_lab.runs.measure import reusable_run, run_identity
    from i2v_lab.runs.store import read_run
    from i2v_lab.scale.plan_runs import measure_on

    with ManyReport(len(todo), "runs") as report:

        def ended(measured: Measured) -> None:
            run = None if measured.error else read_run(out / measured.name)
            place = "" if run is None else f" on {_place(run)}"
            took = "" if measured.seconds is None else f", {format_seconds(measured.seconds, rough=True)}"
            words = f": {measured.error}" if measured.error else ""
            report.ended(measured.name, f"{'failed' if run is None else run.status}{took}{place}{words}")

        results = measure_on(workers, todo, out, device, began=report.began, ended=ended)
    outcomes = []
    for each in planned:
        message = results[each.name].error if each.name in results else ""
        run = None if message else reusable_run(out / each.name, run_identity(each.spec, device))
        if run is None and not message:
            message = "its worker has another version of i2v-lab; install the same one there"
        outcomes.append(_Outcome(each.name, run, message, reused=each.name not in results))
    return outcomes


def _place(run: Run) -> str:
    """The host and the card, or the processor, that made a run."""
    known = run.metadata
    return ", ".join(str(known[key]) for key in ("host", "device_name") if known.get(key)) or str(known.get("device"))


def _print_summary(outcomes: Sequence[_Outcome]) -> None:
    from i2v_lab.profiling.records import OutOfMemoryRecord, PhaseRecord, peak_phase
    from i2v_lab.reporting.console import TerminalTable, wide_console

    table = TerminalTable("run", "outcome", "peak", "phase", "time", box=None, header_style="bold", pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for column in (table.columns[2], table.columns[4]):
        column.justify = "right"
    places = list(dict.fromkeys(_place(outcome.run) for outcome in outcomes if outcome.run is not None))
    if len(places) > 1:  # what was measured on one card is compared with what else was measured there
        outcomes = sorted(
            outcomes, key=lambda each: len(places) if each.run is None else places.index(_place(each.run))
        )
    shown = ""
    for outcome in outcomes:
        if outcome.run is not None and len(places) > 1 and _place(outcome.run) != shown:
            shown = _place(outcome.run)
            table.add_row(shown, style="bold")
        if outcome.run is None:
            table.add_row(outcome.name, "failed", "", "", "")
            continue
        phases = outcome.run.of(PhaseRecord)
        top = peak_phase(phases)
        status = "out of memory" if outcome.run.of(OutOfMemoryRecord) else outcome.run.status
        table.add_row(
            outcome.name,
            f"{status}, reused" if outcome.reused else status,
            format_bytes(top.peak_bytes) if top else "",
            top.phase if top else "",
            format_seconds(max((phase.start_s + phase.seconds for phase in phases), default=0)),
        )
    wide_console().print(table)
