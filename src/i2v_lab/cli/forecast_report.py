"""A forecast on the terminal and as JSON, of a model or of a script."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from i2v_lab.capacity.device_profile import REFERENCE
from i2v_lab.cli import options
from i2v_lab.cli.output import plain_console
from i2v_lab.errors import InvalidRequest
from i2v_lab.units import format_bytes

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


@dataclass(frozen=True)
class OnCard:
    """Whether a forecast fits the card that was asked about.

    Attributes:
        gpu: Its name.
        memory_bytes: Its memory as CUDA reports it.
        verdict: ``fits``, ``tight`` or ``no``, as of :func:`~i2v_lab.capacity.cards.judge`.
        needed_bytes: The smallest memory that it fits, with margins and the CUDA context.
        spare_bytes: What the card has beyond that; negative where it has less.
    """

    gpu: str
    memory_bytes: int
    verdict: str
    needed_bytes: int
    spare_bytes: int

    def in_words(self, remedy: str = "") -> str:
        """The verdict as a sentence.

        Args:
            remedy: A command that finds what fits; empty if there is none.

        Example:
            >>> OnCard("RTX 4090", 24 * 2**30, "fits", 21 * 2**30, 3 * 2**30).in_words()
            'fits RTX 4090 (24.00 GiB) with 3.00 GiB to spare'
        """
        card, needed = f"{self.gpu} ({format_bytes(self.memory_bytes)})", format_bytes(self.needed_bytes)
        if self.verdict == "fits":
            return f"fits {card} with {format_bytes(self.spare_bytes)} to spare"
        if self.verdict == "tight":
            return (
                f"fits {card} tightly: {needed} with what the allocator would keep cached, which it has to release on "
                "the way"
            )
        return f"does not fit {card}: needs {needed}" + (f"; `{remedy}` finds what does" if remedy else "")


def on_card(result: Forecast, gpu: str | None, *, placed: bool = False) -> OnCard | None:
    """Whether a forecast fits a card; ``None`` if none was asked about, or its memory is not known.

    Args:
        result: The forecast.
        gpu: The card's name.
        placed: Whether it was solved for a budget, so that the margins are those of a budget.
    """
    from i2v_lab.capacity.cards import FITS, NO, fitting_bytes, gpu_memory_bytes, judge
    from i2v_lab.capacity.placement import needed_bytes

    if gpu is None:
        return None
    try:
        memory_bytes = gpu_memory_bytes(gpu)
    except InvalidRequest:  # a card whose rates were measured here
        return None
    if placed:
        needs = needed_bytes(result.peak.peak_bytes, result.context_bytes)
        verdict = FITS if needs <= memory_bytes else NO
    else:
        needs, verdict = fitting_bytes(result), judge(result, gpu, memory_bytes).verdict
    return OnCard(gpu, memory_bytes, verdict, needs, memory_bytes - needs)


def measured_on(gpu: str) -> bool | None:
    """Whether the seconds on a card are by rates measured on it; ``None`` where there are none."""
    from i2v_lab.capacity.device_profile import device_profile, has_profile

    return device_profile(gpu).measured if has_profile(gpu) else None


def report(result: Forecast, fits: list[Fit], gpu: str = REFERENCE, card: OnCard | None = None) -> dict[str, Any]:
    """The JSON values of a forecast, without what was forecast.

    Args:
        result: The forecast.
        fits: The verdicts.
        gpu: Seconds of phases are those on this card.
        card: The verdict of the card that was asked about.
    """
    from i2v_lab.capacity.clock import on_clock
    from i2v_lab.capacity.device_profile import device_profile
    from i2v_lab.capacity.time_model import phase_times, predicted_seconds, seconds_from_files, seconds_on

    device = device_profile(gpu)
    times = phase_times(result, device)
    return {
        "card": asdict(card) if card else None,
        "phases": [
            {
                "phase": phase.phase,
                "start_bytes": phase.start_bytes,
                "peak_bytes": phase.peak_bytes,
                "end_bytes": phase.end_bytes,
                "saved_for_backward_bytes": phase.saved_for_backward_bytes,
                "predicted_start_seconds": clocked.start_s,
                "predicted_seconds": time.seconds,
            }
            for phase, clocked, time in zip(result.phases, on_clock(result, device).phases, times, strict=True)
        ],
        "predicted_seconds": sum(time.seconds for time in times if time.parent is None),
        "predicted_seconds_later": predicted_seconds(result, device, first=False),
        "predicted_seconds_warm": predicted_seconds(result, device, first=False, warm=True),
        "predicted_seconds_from_files": seconds_from_files(result, device),
        "predicted_on": {"gpu": device.name, "source": device.source, "measured": device.measured},
        "peak_bytes": result.peak.peak_bytes,
        "peak_phase": result.peak.phase,
        "peak_reserved_bytes": result.peak_reserved_bytes,
        "context_bytes": result.context_bytes,
        "host_page_locked_bytes": result.page_locked_bytes,
        "host_pageable_bytes": result.pageable_bytes,
        "fits": [
            {
                **asdict(fit),
                "predicted_seconds": seconds_on(result, fit.gpu),
                "predicted_measured": measured_on(fit.gpu),
            }
            for fit in fits
        ],
        "notes": [asdict(note) for note in result.notes],
        "assumptions": [asdict(assumption) for assumption in result.assumptions],
        "seconds": result.seconds,
    }


def print_forecast(
    title: str, run: Run, result: Forecast, fits: list[Fit], gpu: str = REFERENCE, verdict: str = ""
) -> None:
    """Print phases, holders of the peak, verdicts and assumptions.

    Args:
        title: What was forecast, in a line.
        run: The same records as a run.
        result: The forecast.
        fits: The verdicts.
        gpu: Seconds of phases are those on this card.
        verdict: Of the card that was asked about, in words; it comes first.
    """
    from i2v_lab.capacity.device_profile import NOT_MEASURED, device_profile
    from i2v_lab.capacity.time_model import phase_times, predicted_seconds, seconds_from_files, seconds_on
    from i2v_lab.reporting import run_tables
    from i2v_lab.reporting.console import TerminalTable
    from i2v_lab.reporting.headlines import headline
    from i2v_lab.reporting.terminal import rich_table

    console = plain_console()
    if verdict:
        console.print(verdict, style="bold", soft_wrap=True)
    console.print(title, soft_wrap=True)
    console.print(headline(run))
    device = device_profile(gpu)
    caveat = f" ({device.caveat})" if device.caveat else ""
    predicted = phase_times(result, device)
    phases = run_tables.phase_table(run)
    phases["seconds"] = [
        sum(time.seconds for time in predicted if (time.phase, time.parent) == (phase, parent))
        for phase, parent in zip(phases["phase"], phases["parent"], strict=True)
    ]
    console.print(rich_table(phases, f"Phases, forecast; seconds on {device.name}{caveat}", bold=result.peak.phase))
    modules = run_tables.modules_table(run).head(8)
    if len(modules):
        console.print(rich_table(modules, f"Live at the peak, in {result.peak.phase}, by module"))
    table = TerminalTable("card", "memory", "verdict", "predicted", box=None, header_style="bold", pad_edge=False)
    colours = {"fits": "green", "tight": "yellow", "no": "red"}
    for fit in fits:
        seconds = seconds_on(result, fit.gpu) if fit.verdict != "no" else None
        shown = "" if seconds is None else f"{seconds:,.0f} s" if measured_on(fit.gpu) else f"{seconds:,.0f} s *"
        shown = "not known" if fit.verdict != "no" and seconds is None else shown
        table.add_row(fit.gpu, format_bytes(fit.memory_bytes), fit.verdict, shown, style=colours[fit.verdict])
    console.print(table)
    console.print(f"* {NOT_MEASURED}")
    total = sum(time.seconds for time in predicted if time.parent is None)
    files = seconds_from_files(result, device)
    later_s, warm_s = (predicted_seconds(result, device, first=False, warm=warm) for warm in (False, True))
    console.print(
        f"takes {total:,.1f} s on {device.name}, without reading weights from a disk and encoding the video "
        f"(rates: {device.source})",
        soft_wrap=True,
    )
    console.print(
        f"a later generation of the process takes {later_s:,.1f} s, and a warm one, whose streamed blocks are in host "
        f"memory, {warm_s:,.1f} s",
        soft_wrap=True,
    )
    if any(time.read_bytes for time in predicted):
        console.print(
            f"with weights from the page cache {files['page cache']:,.1f} s, from a disk {files['disk']:,.1f} s, which "
            f"reads {device.load['disk'] / 1e9:.1f} GB/s; reading overlaps with computing",
            soft_wrap=True,
        )
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
