"""Named results of a notebook: shown by its last cell, and read back from the executed file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MIME = "application/vnd.i2v-lab.results+json"


def record(**results: Any) -> None:
    """Show the named results of a notebook and store them in its output; called once, in the last cell.

    Args:
        **results: JSON values by name.

    Example:
        >>> record(verdict="confirmed", peak_bytes=2**30)  # doctest: +SKIP
        verdict = confirmed
        peak_bytes = 1073741824
    """
    from IPython.display import display

    text = "\n".join(f"{name} = {value}" for name, value in results.items())
    display({MIME: results, "text/plain": text}, raw=True)


def read_results(notebook: Path) -> dict[str, Any]:
    """The results that :func:`record` stored in an executed notebook; empty if there are none.

    Raises:
        OSError: The file cannot be read.
    """
    found: dict[str, Any] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            found |= output.get("data", {}).get(MIME, {})
    return found
