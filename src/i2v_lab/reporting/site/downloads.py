"""What stands under a figure: the files that hold it, and the command that makes it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from i2v_lab.reporting.cells import METADATA

OUT_DIR = "out_dir"  # where a notebook writes; another machine has another
KINDS = {"figures": ("svg", "png", "csv"), "tables": ("csv",)}  # of files, by their folder below the build folder


def downloads(metadata: Mapping[str, Any], out: Path) -> list[tuple[str, str]]:
    """The files of an output that are there, as their kinds and their links from a page of the site.

    Args:
        metadata: Of the output; :class:`~i2v_lab.reporting.cells.Cells` names the files in it.
        out: The build folder, in which the site's is.
    """
    name = metadata.get(METADATA, {}).get("name")
    if not name:
        return []
    files = [(kind, f"{folder}/{name}.{kind}") for folder, kinds in reversed(KINDS.items()) for kind in kinds]
    found = {kind: file for kind, file in files if (out / file).is_file()}  # a figure's own rows before a table's
    return [(kind.upper(), f"../{quote(found[kind])}") for kind in KINDS["figures"] if kind in found]


def figure_rows(metadata: Mapping[str, Any], out: Path) -> Path:
    """Where the CSV of a figure is, if it has one.

    Args:
        metadata: Of the output, as in :func:`downloads`.
        out: The build folder.
    """
    return out / "figures" / f"{metadata.get(METADATA, {}).get('name')}.csv"


def command(notebook: Any, stem: str) -> str:
    """The command that runs an executed notebook again, with the parameters that it was run with.

    Args:
        notebook: Of nbformat.
        stem: Its name.

    Example:
        >>> command({"metadata": {"papermill": {"parameters": {"frames": 49}}}}, "03_no_grad_fix")
        'i2v-lab reproduce 03 -p frames 49'
    """
    given = notebook["metadata"].get("papermill", {}).get("parameters", {})
    words = ["i2v-lab", "reproduce", number if (number := stem.partition("_")[0]).isdigit() else stem]
    for name, value in sorted(given.items()):
        if name != OUT_DIR:
            words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)
