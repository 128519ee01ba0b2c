"""A forecast on the terminal and as JSON, of a model or of a script."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from i2v_lab.cli import options
from i2v_lab.cli.output import plain_console

if TYPE_CHECKING:
    from i2v_lab.capacity.cards import Fit
    from i2v_lab.profiling.records import Forecast
    from i2v_lab.runs.store import Run


def verdicts(result: Forecast, vram_cap_gib: float | None) -> list[Fit]:
    """What every card takes of a forecast, a cap on memory first."""
    from i2v_lab.capacity.cards import judge, judge_all

    fits = judge_all(result)
    vram_cap_bytes = options.cap_bytes(vram_cap_gib)
    if vram_cap_bytes is not None:
        fits.insert(0, judge(result, f"cap of {vram_cap_gib:g} GiB", vram_cap_bytes))
    return fits


def report(result: Forecast, fits: list[Fit]) -> dict[str, Any]:
    """The JSON values of a forecast, without what was forecast."""
    return {
        "phases": [
            {
                "phase": phase.phase,
                "start_bytes": phase.start_bytes,
                "peak_bytes": phase.peak_bytes,
                "end_bytes": phase.end_bytes,
                "saved_for_backward_bytes": phase.saved_for_backward_bytes,
            }
            for phase in result.phases
        ],
        "peak_bytes": result.peak.peak_bytes,
        "peak_phase": result.peak.phase,
        "peak_reserved_bytes": result.peak_reserved_bytes,
        "context_bytes": result.context_bytes,
        "host_page_locked_bytes": result.page_locked_bytes,
        "host_pageable_bytes": result.pageable_bytes,
        "fits": [asdict(fit) for fit in fits],
        "notes": [asdict(note) for note in result.notes],
        "assumptions": [asdict(assumption) for assumption in result.assumptions],
        "seconds": result.seconds,
    }


def print_forecast(title: str, run: Run, result: Forecast, fits: list[Fit]) -> None:
    """Print phases, holders of the peak, verdicts and assumptions.

    Args:
        title: What was forecast, in a line.
        run: The same records as a run.
        result: The forecast.
        fits: The verdicts.
    """
    from rich.table import Table

    from i2v_lab.reporting import run_tables
    from i2v_lab.reporting.headlines import headline
    from i2v_lab.reporting.terminal import rich_table
    from i2v_lab.units import format_bytes

    console = plain_console()
    console.print(title, soft_wrap=True)
    console.print(headline(run))
    phases = run_tables.phase_table(run).drop(columns="seconds")
    console.print(rich_table(phases, "Phases, forecast", bold=result.peak.phase))
    modules = run_tables.modules_table(run).head(8)
    console.print(rich_table(modules, f"Live at the peak, in {result.peak.phase}, by module"))
    table = Table("card", "memory", "verdict", box=None, header_style="bold", pad_edge=False)
    colours = {"fits": "green", "tight": "yellow", "no": "red"}
    for fit in fits:
        table.add_row(fit.gpu, format_bytes(fit.memory_bytes), fit.verdict, style=colours[fit.verdict])
    console.print(table)
    console.print(
        f"needs {format_bytes(result.peak.peak_bytes)} allocated, {format_bytes(result.peak_reserved_bytes)} reserved "
        f"by the allocator, and {format_bytes(result.context_bytes)} for the CUDA context",
        soft_wrap=True,
    )
    if result.pageable_bytes:
        console.print(
            f"streaming needs {format_bytes(result.page_locked_bytes)} of page-locked host memory, and "
            f"{format_bytes(result.pageable_bytes)} of pageable host memory for the largest block read from its file",
            soft_wrap=True,
        )
    if result.assumptions:
        console.print("assumed:")
    for each in result.assumptions:
        times = f", {each.count} times" if each.count > 1 else ""
        console.print(f"  {each.operator}, {each.place or each.phase}: {each.answer}{times}", soft_wrap=True)
