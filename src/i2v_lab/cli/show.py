"""``i2v-lab show``: the phases and the peak of a recorded run, or the difference of two."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from i2v_lab.cli import options
from i2v_lab.cli.output import log, plain_console, print_json
from i2v_lab.errors import InvalidRequest, OutputError
from i2v_lab.extras import require_module
from i2v_lab.files import check_file, check_folder

if TYPE_CHECKING:
    from i2v_lab.runs.store import Run


class Export(StrEnum):
    """Viewers that a run can be written for."""

    PERFETTO = "perfetto"
    MEMORY_VIZ = "memory_viz"


EXAMPLES = """
**Examples**

The phases of a run, and the modules and tensors that hold its peak:

    i2v-lab generate --image stills/lighthouse.png --out video.mp4 --profile runs/escaped --decode-scope escaped
    i2v-lab show runs/escaped

Two runs phase by phase, with their live bytes over time as a figure:

    i2v-lab show runs/escaped runs/no_grad --timeline figures

A run for Perfetto, whose viewer opens the file:

    i2v-lab show runs/escaped --export perfetto --out trace.json

A run as JSON, for a script:

    i2v-lab show runs/escaped --json
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
    export: Annotated[
        Export | None,
        typer.Option(help="Write the run for a viewer: https://ui.perfetto.dev, or https://pytorch.org/memory_viz."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File of --export, .json for perfetto, else .pickle.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the phases of a recorded run and what was live at its peak, or the difference to a second run."""
    from i2v_lab.profiling.records import PhaseRecord, peak_phase
    from i2v_lab.reporting import run_tables
    from i2v_lab.reporting.headlines import difference_headline, headline
    from i2v_lab.reporting.terminal import rich_table
    from i2v_lab.runs.store import read_run

    if timeline is not None:
        check_folder(timeline, "timeline")
        require_module("matplotlib")
    if (export is None) != (out is None):
        raise InvalidRequest(
            f"export={export} and out={out} belong together; give a viewer and a file", export=export, out=out
        )
    if out is not None:
        check_file(out, "out", "run.json")
        if other is not None:
            raise InvalidRequest(f"export={export} is of one run; leave out the second", export=export, other=other)
    console = plain_console()
    first = read_run(run)
    if export is not None and out is not None:
        _export(first, export, out)
        return
    if timeline is not None:
        from i2v_lab.reporting.figures.runs import timeline_figure

        try:
            files = timeline_figure(first, read_run(other) if other else None).save(timeline, "timeline")
        except OSError as error:
            raise OutputError(
                f"timeline='{timeline}' cannot be written ({error.strerror}); choose another folder", folder=timeline
            ) from error
        for file in files:
            log(f"wrote {file}")
    if as_json:
        print_json(_values(first, top) if other is None else [_values(each, top) for each in (first, read_run(other))])
        return
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


def _export(run: Run, export: Export, out: Path) -> None:
    from i2v_lab.reporting.traces import EXPORTS

    try:
        log(f"wrote {EXPORTS[export.value](run, out)}")
    except OSError as error:
        raise OutputError(f"out='{out}' cannot be written ({error.strerror}); name another file", path=out) from error


def _values(run: Run, top: int) -> dict[str, Any]:
    """A run as JSON values: its phases, and what was live at its peak."""
    from dataclasses import asdict

    from i2v_lab.profiling.records import HolderRecord, PhaseRecord, peak_phase
    from i2v_lab.reporting import run_tables

    peak = peak_phase(run.of(PhaseRecord))
    holders = sorted(run_tables.records_at_peak(run, HolderRecord), key=lambda holder: -holder.nbytes)
    names = ("model", "device", "device_name", "started_at", "seed", "versions", "error")
    return {
        "run": str(run.folder),
        "status": run.status,
        **{name: run.metadata.get(name) for name in names},
        "peak_bytes": peak.peak_bytes if peak else None,
        "peak_phase": peak.phase if peak else None,
        "phases": [asdict(phase) for phase in run.of(PhaseRecord)],
        "modules": run_tables.modules_table(run).head(top).to_dict("records"),
        "holders": [asdict(holder) for holder in holders[:top]],
    }


def _described(run: Run) -> str:
    known = run.metadata
    device = known.get("device_name") or known.get("device")
    facts = [known.get("model"), device and f"on {device}", known.get("started_at")]
    return ", ".join([str(run.folder), *(str(fact) for fact in facts if fact)])
