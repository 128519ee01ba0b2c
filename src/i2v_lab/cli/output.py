"""Output of commands: lines and JSON that hold nothing a terminal acts on."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from i2v_lab.display import printable

if TYPE_CHECKING:
    from i2v_lab.reporting.console import PlainConsole


def plain_console() -> PlainConsole:
    """Return a console on stdout that prints paths, names and prompts verbatim."""
    from i2v_lab.reporting.console import PlainConsole

    return PlainConsole()


def say(line: str) -> None:
    """Print one line on stdout at once."""
    print(printable(line, lines=False), flush=True)


def log(line: str) -> None:
    """Print one line on stderr at once."""
    print(printable(line, lines=False), file=sys.stderr, flush=True)


def print_json(values: Any) -> None:
    """Print JSON on one line of stdout: ASCII, without control characters."""
    print(json.dumps(values).replace("\x7f", "\\u007f"))
