"""Outputs of a notebook's cells: tables, figures and sentences, each also written to a file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import SVG, Markdown
from matplotlib.figure import Figure

from i2v_lab.capacity.clock import run_on_clock
from i2v_lab.display import printable
from i2v_lab.files import write_atomically
from i2v_lab.reporting.figures.runs import NO_TIMELINE, has_timeline, timeline_figure
from i2v_lab.reporting.figures.style import save_figure
from i2v_lab.reporting.tables import readable, save_table
from i2v_lab.runs.store import Run

NOTHING = "*There is no record to show here.*"


class Cells:
    """Shows the tables, figures and videos of a notebook, and writes them to ``out_dir`` under the notebook's name.

    Tables go to ``tables``, figures to ``figures``, each figure with the CSV that it was drawn from. Where there is no
    record, a sentence says so; it is no error.

    Args:
        out_dir: The build folder.
        notebook: Its file's name without the suffix.

    Example:
        >>> cells = Cells("build", "04_flat_across_resolution")
        >>> rows = pd.DataFrame({"phase": ["decode_video"], "peak_bytes": [2**30]})
        >>> cells.table("peaks", rows, {"phase": "phase", "peak_bytes": "peak"})
                          peak
        decode_video  1.00 GiB
    """

    def __init__(self, out_dir: str | Path, notebook: str) -> None:
        self.out = Path(out_dir)
        self.notebook = notebook
        pd.set_option("display.max_rows", None)  # otherwise pandas shows ten rows of a long table
        pd.set_option("display.max_colwidth", None)  # and 50 letters of a reason

    def table(self, name: str, table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame | Markdown:
        """Write a tidy table as CSV and show some of its columns.

        Args:
            name: Of the file, after the notebook's.
            table: Tidy, with whole bytes.
            columns: Heading by column's name, as in :func:`~i2v_lab.reporting.tables.readable`.
        """
        save_table(table, self.out / "tables", f"{self.notebook}_{name}")
        return readable(table, columns) if len(table) else Markdown(NOTHING)

    def figure(
        self, name: str, draw: Callable[..., Figure], table: pd.DataFrame, *more: Any, **options: Any
    ) -> SVG | Markdown:
        """Write and show a figure, and its table as CSV.

        Args:
            name: Of the files, after the notebook's.
            draw: Given ``table``, ``more`` and ``options``.
            table: Tidy, with whole bytes.
            *more: Further arguments of ``draw``.
            **options: Its keyword arguments.
        """
        if not len(table):
            return Markdown(NOTHING)
        save_table(table, self.out / "figures", f"{self.notebook}_{name}")
        return self._shown(name, draw(table, *more, **options))

    def timeline(self, name: str, run: Run | None, other: Run | None = None) -> SVG | Markdown:
        """Live bytes by category over a run, or a forecast by predicted time; a second's total is a line over it."""
        if run is None or not has_timeline(run) or (other is not None and not has_timeline(other)):
            return Markdown(f"*{NO_TIMELINE}*")
        run, other = run_on_clock(run), other and run_on_clock(other)
        save_table(run.frame("timeline"), self.out / "figures", f"{self.notebook}_{name}")
        return self._shown(name, timeline_figure(run, other))

    def video(self, name: str, path: Path) -> Path:
        """Copy a video to ``out_dir`` and return its path there."""
        target = self.out / "videos" / f"{self.notebook}_{name}.mp4"
        return write_atomically(target, lambda part: shutil.copyfile(path, part))

    def layouts(self, name: str, draw: Callable[..., Figure], layouts: Sequence[Any]) -> SVG:
        """Write and show a figure of tile layouts, which has no table."""
        return self._shown(name, draw(layouts))

    def _shown(self, name: str, figure: Figure) -> SVG:
        svg, _ = save_figure(figure, self.out / "figures", f"{self.notebook}_{name}")
        return SVG(filename=str(svg))


def markdown_text(text: str) -> str:
    r"""Text for Markdown, in which nothing of it is markup, HTML or a formula.

    Example:
        >>> print(markdown_text("[a](b) <c> it's"))
        \[a\]\(b\) &lt;c&gt; it&#x27;s
    """
    return escape(re.sub(r"([\\`*_{}\[\]()#!|$~])", r"\\\1", printable(text)))


def sentence(results: Mapping[str, Any]) -> Markdown:
    """A study's verdict in bold, and the finding behind it, in which nothing is markup."""
    return Markdown(
        f"**{markdown_text(str(results['verdict'])).capitalize()}.** {markdown_text(str(results['finding']))}"
    )


def absent(names: Sequence[str]) -> Markdown:
    """A sentence that lists runs without a record; empty if ``names`` is."""
    if not names:
        return Markdown("")
    return Markdown(f"*`data/measured` has no record of {', '.join(map(markdown_text, names))}.*")
