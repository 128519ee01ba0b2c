"""Named results of a notebook: shown in its last cell, read back from the executed file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MIME = "application/vnd.i2v-lab.results+json"


def record(**results: Any) -> None:
    """Show the named results of a notebook and keep them in its output; call it once, in the last cell."""
    from IPython.display import display

    text = "\n".join(f"{name} = {value}" for name, value in results.items())
    display({MIME: results, "text/plain": text}, raw=True)


def read_results(notebook: Path) -> dict[str, Any]:
    """The results that :func:`record` left in an executed notebook; empty if it has none."""
    found: dict[str, Any] = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        for output in cell.get("outputs", []):
            found |= output.get("data", {}).get(MIME, {})
    return found
