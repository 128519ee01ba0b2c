"""Outputs of a notebook's cells: tables, figures and sentences, each also written to a file."""

from __future__ import annotations

import base64
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from IPython.core.getipython import get_ipython
from IPython.display import Markdown
from matplotlib.figure import Figure

from i2v_lab.capacity.clock import run_on_clock
from i2v_lab.display import printable
from i2v_lab.files import write_atomically, write_text
from i2v_lab.profiling.records import PhaseRecord, TimelineRecord, peak_phase
from i2v_lab.reporting.figures.chart import Chart
from i2v_lab.reporting.figures.live import NO_TIMELINE
from i2v_lab.reporting.figures.runs import holders_figure, timeline_figure
from i2v_lab.reporting.figures.style import save_figure
from i2v_lab.reporting.run_tables import modules_table
from i2v_lab.reporting.tables import readable, save_table
from i2v_lab.runs.store import Run

NOTHING = "*There is no record to show here.*"
METADATA = "i2v-lab"  # of an output: {"name": of its files below the build folder, without suffix}


@dataclass(frozen=True)
class Drawing:
    """A figure as an output of a cell: SVG, and PNG for what shows no SVG, such as a page of GitHub or a mail.

    Attributes:
        name: Of its files, without suffix.
        svg: The text of the one.
        png: The bytes of the other.
        chart: What both were drawn from, which JupyterLab and the site draw to answer a pointer; ``None`` of a figure
            of matplotlib's.
    """

    name: str
    svg: str
    png: bytes
    chart: Chart | None = None

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        drawn, how = self.chart.interactive() if self.chart else ({}, {})
        png = base64.b64encode(self.png).decode()
        data = {"image/svg+xml": self.svg, "image/png": png, "text/plain": f"<figure {self.name}>"}
        return {**drawn, **data}, {**how, METADATA: {"name": self.name}}


class ShownTable(pd.DataFrame):
    """A table of text as an output of a cell, with the name of its file."""

    _metadata: ClassVar[list[str]] = ["file_name"]
    file_name: str

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        return {"text/html": self.to_html(), "text/plain": repr(self)}, {METADATA: {"name": self.file_name}}


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
        kernel = getattr(get_ipython(), "kernel", None)
        if kernel is not None:  # on Ctrl-C papermill ends it within a cell, which it would log with a traceback
            kernel.log.setLevel(logging.CRITICAL)
        pd.set_option("display.max_rows", None)  # otherwise pandas shows ten rows of a long table
        pd.set_option("display.max_colwidth", None)  # and 50 letters of a reason

    def table(self, name: str, table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame | Markdown:
        """Write a tidy table as CSV and show some of its columns.

        Args:
            name: Of the file, after the notebook's.
            table: Tidy, with whole bytes.
            columns: Heading by column's name, as in :func:`~i2v_lab.reporting.tables.readable`.
        """
        path = save_table(table, self.out / "tables", f"{self.notebook}_{name}")
        if not len(table):
            return Markdown(NOTHING)
        shown = ShownTable(readable(table, columns))
        shown.file_name = path.stem
        return shown

    def data(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write JSON values beside the tables, and return the file's path.

        Args:
            name: Of the file, after the notebook's.
            values: By name.
        """
        return write_text(self.out / "tables" / f"{self.notebook}_{name}.json", f"{json.dumps(values)}\n")

    def figure(
        self, name: str, draw: Callable[..., Figure | Chart], table: pd.DataFrame, *more: Any, **options: Any
    ) -> Drawing | Markdown:
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

    def timeline(self, name: str, run: Run | None, other: Run | None = None) -> Drawing | Markdown:
        """Live bytes by category over a run, or a forecast by predicted time; a second's total is a line over it."""
        if run is None or not all(each.of(TimelineRecord) for each in (run, other) if each is not None):
            return Markdown(f"*{NO_TIMELINE}*")
        run, other = run_on_clock(run), other and run_on_clock(other)
        chart = timeline_figure(run, other)
        save_table(chart.table, self.out / "figures", f"{self.notebook}_{name}")
        return self._shown(name, chart)

    def holders(self, name: str, run: Run | None) -> Drawing | Markdown:
        """What each module holds at a run's peak, by category; a sentence where live storages were not tracked."""
        peak = peak_phase(run.of(PhaseRecord)) if run else None
        if run is None or peak is None:
            return Markdown(NOTHING)
        return self.figure(name, holders_figure, modules_table(run, peak.phase), peak.phase)

    def video(self, name: str, path: Path) -> Path:
        """Copy a video to ``out_dir`` and return its path there."""
        target = self.out / "videos" / f"{self.notebook}_{name}.mp4"
        return write_atomically(target, lambda part: shutil.copyfile(path, part))

    def layouts(self, name: str, draw: Callable[..., Figure], layouts: Sequence[Any]) -> Drawing:
        """Write and show a figure of tile layouts, and the bounds of the tiles as CSV."""
        tiles = [
            {"tiling": tiling, "top": top, "bottom": bottom, "left": left, "right": right, "first": first, "end": end}
            for tiling, _, grid in layouts
            for first, end in grid.groups
            for top, bottom in grid.rows
            for left, right in grid.columns
        ]
        save_table(pd.DataFrame(tiles), self.out / "figures", f"{self.notebook}_{name}")
        return self._shown(name, draw(layouts))

    def _shown(self, name: str, figure: Figure | Chart) -> Drawing:
        folder, stem = self.out / "figures", f"{self.notebook}_{name}"
        chart = figure if isinstance(figure, Chart) else None
        svg, png = figure.save(folder, stem) if isinstance(figure, Chart) else save_figure(figure, folder, stem)
        return Drawing(svg.stem, svg.read_text(encoding="utf-8"), png.read_bytes(), chart)


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
