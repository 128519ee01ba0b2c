"""``i2v-lab compare``: which phase, module and operator grew between two runs, two forecasts, or two versions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from i2v_lab.cli import expected, options
from i2v_lab.cli.output import log, plain_console, print_json, say
from i2v_lab.errors import InvalidRequest, RecordError
from i2v_lab.units import format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from i2v_lab.reporting.comparison import Comparison
    from i2v_lab.reporting.growth import Growth, Tolerance

EXAMPLES = """
**Examples**

What grew since a run that was kept, for continuous integration: exit status 1 if a phase did, by more than 1 %:

    i2v-lab compare runs/escaped runs/no_grad --tolerance 1%

Two forecasts, as JSON:

    i2v-lab forecast --model ltx-2.3-tiny --profile runs/before
    i2v-lab forecast --model ltx-2.3-tiny --decode-scope escaped --profile runs/after
    i2v-lab compare runs/before runs/after --json

The forecasts of a plan under two versions of a library, which uv installs beside everything else:

    i2v-lab compare --plan data/plans/diffusers-models.yaml --versions "diffusers==0.41.0" "diffusers==0.42.1"
"""


def compare(
    first: Annotated[
        Path | None,
        typer.Argument(help="Run directory of a run or a forecast, or a folder of several: the baseline."),
    ] = None,
    second: Annotated[Path | None, typer.Argument(help="What is compared with it.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Forecast the runs of this plan under two versions of a library, by --versions.")
    ] = None,
    versions: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="FIRST SECOND",
            help="Two words: requirements that uv installs, each in a folder of its own, such as diffusers==0.41.0; "
            "several in one word are separated by spaces.",
        ),
    ] = None,
    tolerance: Annotated[
        str,
        typer.Option(metavar="SIZE|PERCENT", help="What a phase's peak may grow by, such as 64MiB or 1%."),
    ] = "0",
    top: Annotated[int, typer.Option(min=1, help="Number of modules and of operators to list.")] = 10,
    as_json: options.AsJson = False,
) -> None:
    """Compare two runs: which phase, module and operator grew.

    The exit status is 0 if no phase's peak grew by more than the tolerance, 1 if one did or the second run failed, and
    2 if they cannot be compared. Of two folders of runs, those of the same name are compared.
    """
    from i2v_lab.reporting.growth import Tolerance

    allowed = Tolerance.parse(tolerance)
    if (plan is None) != (versions is None):
        raise InvalidRequest("plan and versions belong together; give both --plan and --versions", plan=plan)
    if plan is not None and versions is not None:
        if first is not None:
            raise InvalidRequest("two runs and a plan are two comparisons; give one of them", plan=plan)
        first, second = _forecast_under(plan, versions)
    if first is None or second is None:
        raise InvalidRequest("nothing to compare; give two run directories, or --plan and --versions", first=first)
    comparisons = {name: _checked(*pair) for name, pair in _pairs(first, second).items()}
    failed = [name for name, each in comparisons.items() if not _is_complete(each)]
    grown = {name: each.grown(allowed) for name, each in comparisons.items()}
    if as_json:
        values = [{"run": name, **_values(each, allowed)} for name, each in comparisons.items()]
        print_json({"grown": any(grown.values()), "failed": failed, "comparisons": values})
    else:
        for name, each in comparisons.items():
            _print(each, grown[name], allowed, top)
    if failed or any(grown.values()):
        raise typer.Exit(1)


def _forecast_under(plan: Path, versions: tuple[str, str]) -> tuple[Path, Path]:
    from i2v_lab.runs.plans import load_plan
    from i2v_lab.runs.versions import forecast_plan_under, installed_beside

    models = [each.spec.model for each in load_plan(plan)]
    folders = [installed_beside(words.split()) for words in versions]  # what is refused is so before the announcement
    took = format_seconds(2 * expected.forecasts_s(models), rough=True)
    log(f"i2v-lab: {len(models)} forecasts under each of two versions, in about {took} if none is cached")
    first, second = (forecast_plan_under(plan, folder) for folder in folders)
    return first, second


def _pairs(first: Path, second: Path) -> dict[str, tuple[Path, Path]]:
    """The runs to compare, by name: the two themselves, or those of the same name in two folders."""
    from i2v_lab.runs.store import METADATA, run_folders

    if not first.is_dir() or not second.is_dir() or (first / METADATA).exists() or (second / METADATA).exists():
        return {str(second): (first, second)}
    names = {run.relative_to(first) for run in run_folders(first)}
    others = {run.relative_to(second) for run in run_folders(second)}
    if not names or names != others:
        lacking = sorted(str(name) for name in names ^ others)
        words = f"; {lacking[0]} is in one of them only" if lacking else ", which hold none"
        raise RecordError(
            f"'{first}' and '{second}' are compared run by run{words}; give folders of the same runs",
            first=first,
            second=second,
        )
    return {str(name): (first / name, second / name) for name in sorted(names)}


def _checked(first: Path, second: Path) -> Comparison:
    from i2v_lab.reporting.comparison import compare_runs
    from i2v_lab.runs.store import COMPLETE, FAILED

    comparison = compare_runs(first, second)
    if comparison.first.status != COMPLETE or comparison.second.status not in (COMPLETE, FAILED):
        wrong = comparison.second if comparison.first.status == COMPLETE else comparison.first
        raise RecordError(
            f"run '{wrong.folder}' is {wrong.status}, so its peaks are not those of the whole run; give one that ended",
            folder=wrong.folder,
            status=wrong.status,
        )
    return comparison


def _is_complete(comparison: Comparison) -> bool:
    from i2v_lab.runs.store import COMPLETE

    return comparison.second.status == COMPLETE


def _values(comparison: Comparison, allowed: Tolerance) -> dict[str, Any]:
    from i2v_lab.reporting.growth import unknown_levels

    return {
        "first": str(comparison.first.folder),
        "second": str(comparison.second.folder),
        "grown": [each.phase for each in comparison.grown(allowed)],
        "tolerance": {"bytes": allowed.nbytes, "share": allowed.share},
        "error": None if _is_complete(comparison) else comparison.second.metadata.get("error"),
        "differs": {
            name: [str(value) if value is not None else None for value in pair]
            for name, pair in comparison.set_up.items()
        },
        "phases": [_row(each, "phase") for each in comparison.phases],
        "modules": [_row(each, "phase", "module", "category") for each in comparison.modules],
        "operators": [_row(each, "phase", "module", "operator") for each in comparison.operators],
        "unknown": unknown_levels(comparison.first, comparison.second),
    }


def _row(growth: Growth, *names: str) -> dict[str, Any]:
    counted = ("first_bytes", "second_bytes", "difference_bytes", "difference_share")
    return {name: getattr(growth, name) for name in (*names, *counted)}


def _print(comparison: Comparison, grown: Sequence[Growth], allowed: Tolerance, top: int) -> None:
    from i2v_lab.reporting.growth import growth_table, unknown_levels
    from i2v_lab.reporting.run_tables import difference_table
    from i2v_lab.reporting.terminal import rich_table

    console = plain_console()
    console.print(f"first: {comparison.first.folder}", soft_wrap=True)
    console.print(f"second: {comparison.second.folder}", soft_wrap=True)
    for name, (before, after) in comparison.set_up.items():
        console.print(f"  {name}: {before} -> {after}", soft_wrap=True)
    console.print(comparison.headline)
    console.print(rich_table(difference_table(comparison.first, comparison.second), "Phase by phase"))
    for level, rows in (("modules", comparison.modules), ("operators", comparison.operators)):
        table = growth_table(rows[:top]).drop(columns=["level", "difference_share"])
        table = table.drop(columns="operator" if level == "modules" else "category")
        if rows:
            console.print(rich_table(table, f"What {level} hold at the peak of a phase, where that differs"))
        elif level in unknown_levels(comparison.first, comparison.second):
            console.print(f"{level} are not compared: the records of at least one run do not know them")
    if not _is_complete(comparison):
        say(f"the second run failed: {comparison.second.metadata.get('error')}")
    for each in grown:
        share = "new" if each.difference_share is None else format_percent(each.difference_share, 1, signed=True)
        change = f"{format_bytes(each.difference_bytes, signed=True)} ({share})"
        say(f"grew: {each.phase} by {change}{_where(comparison, each)}")
    if not grown:
        say(f"no phase grew by more than {allowed}")


def _where(comparison: Comparison, grown: Growth) -> str:
    """The module and the operator that grew most in a phase."""
    module = next((each for each in comparison.modules if each.phase == grown.phase), None)
    operator = next((each for each in comparison.operators if each.phase == grown.phase), None)
    words = ""
    if module is not None and module.difference_bytes > 0:
        held = "saved for backward" if module.category == "saved" else module.category
        name = module.module or "code outside any module"
        words += f"; most in {name} ({held}, {format_bytes(module.difference_bytes, signed=True)})"
    if operator is not None and operator.difference_bytes > 0 and operator.operator:
        words += f"; by {operator.operator} ({format_bytes(operator.difference_bytes, signed=True)})"
    return words
