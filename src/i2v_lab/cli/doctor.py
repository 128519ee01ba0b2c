"""``i2v-lab doctor``: check the machine and its packages, and say how to repair what is broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from i2v_lab.cli import options
from i2v_lab.cli.output import plain_console, print_json
from i2v_lab.display import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from i2v_lab.doctor.checks import Check

EXAMPLES = """
**Examples**

A table for people, and JSON for a script or a bug report:

    i2v-lab doctor
    i2v-lab doctor --json
"""
STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}


def doctor(as_json: options.AsJson = False) -> None:
    """Check Python, GPU, packages, encoders, disk and memory, with advice for each.

    The exit status is 1 if a check is broken, so that a run would fail. A machine without a GPU is not broken.
    """
    from i2v_lab.doctor.checks import State, examine

    checks = examine()
    broken = any(check.state is State.BROKEN for check in checks)
    if as_json:
        print_json({"ok": not broken, "checks": [asdict(check) for check in checks]})
    else:
        console = plain_console()
        console.print(doctor_table(checks))
        console.print(verdict(checks))
    if broken:
        raise typer.Exit(1)


def doctor_table(checks: Sequence[Check]) -> RenderableType:
    """Return the checks as a table for a terminal."""
    from rich.text import Text

    from i2v_lab.reporting.console import TerminalTable

    table = TerminalTable("check", "state", "found", "advice", header_style="bold")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for check in checks:
        state = Text(check.state.value, style=STYLES[check.state.value])
        table.add_row(Text(check.name), state, Text(printable(check.found)), Text(printable(check.advice)))
    return table


def verdict(checks: Sequence[Check]) -> str:
    """Return one sentence over all checks."""
    by_state = {state: [check.name for check in checks if check.state == state] for state in STYLES}
    words = [f"{state}: {', '.join(by_state[state])}" for state in ("broken", "warning") if by_state[state]]
    if by_state["broken"]:
        return f"A run would fail. {'; '.join(words)}."
    return f"A run has everything that it needs{'; ' + words[0] if words else ''}."
