"""What a notebook's cells show: tables, figures and sentences, each left as a file too."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import SVG, Markdown
from matplotlib.figure import Figure

from i2v_lab.files import write_atomically
from i2v_lab.reporting.figures.runs import has_timeline, timeline_figure
from i2v_lab.reporting.figures.style import save_figure
from i2v_lab.reporting.tables import readable, save_table
from i2v_lab.runs.store import Run

NOTHING = "*There is no record to show here.*"


class Cells:
    """Shows what a notebook found, and keeps it below ``out_dir`` under the notebook's name.

    Tables go to ``tables``, figures to ``figures``, each figure with the CSV behind it. What there is no record of is
    said, and is no error.

    Args:
        out_dir: The build folder.
        notebook: Its file's name without the suffix.
    """

    def __init__(self, out_dir: str | Path, notebook: str) -> None:
        self.out = Path(out_dir)
        self.notebook = notebook

    def table(self, name: str, table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame | Markdown:
        """Some columns of a tidy table, as :func:`~i2v_lab.reporting.tables.readable` writes them."""
        save_table(table, self.out / "tables", f"{self.notebook}_{name}")
        return readable(table, columns) if len(table) else Markdown(NOTHING)

    def figure(
        self, name: str, draw: Callable[..., Figure], table: pd.DataFrame, *more: Any, **options: Any
    ) -> SVG | Markdown:
        """The figure that ``draw`` makes of a tidy table and whatever else it wants."""
        if not len(table):
            return Markdown(NOTHING)
        save_table(table, self.out / "figures", f"{self.notebook}_{name}")
        return self._shown(name, draw(table, *more, **options))

    def timeline(self, name: str, run: Run | None, other: Run | None = None) -> SVG | Markdown:
        """Live bytes over a run; a second run is laid over it as a line."""
        if run is None or not has_timeline(run) or (other is not None and not has_timeline(other)):
            return Markdown("*No timeline: live storages are followed by forecasts and by runs on a CPU.*")
        save_table(run.frame("timeline"), self.out / "figures", f"{self.notebook}_{name}")
        return self._shown(name, timeline_figure(run, other))

    def video(self, name: str, path: Path) -> Path:
        """A video's place below ``out_dir``; it is copied there."""
        kept = self.out / "videos" / f"{self.notebook}_{name}.mp4"
        return write_atomically(kept, lambda part: shutil.copyfile(path, part))

    def layouts(self, name: str, draw: Callable[..., Figure], layouts: Sequence[Any]) -> SVG:
        """A figure of geometry, which has no table."""
        return self._shown(name, draw(layouts))

    def _shown(self, name: str, figure: Figure) -> SVG:
        svg, _ = save_figure(figure, self.out / "figures", f"{self.notebook}_{name}")
        return SVG(filename=str(svg))


def sentence(results: Mapping[str, Any]) -> Markdown:
    """The verdict in bold, and why."""
    return Markdown(f"**{str(results['verdict']).capitalize()}.** {results['finding']}")


def absent(names: Sequence[str]) -> Markdown:
    """Which experiments there is no record of; nothing if there is one of each."""
    if not names:
        return Markdown("")
    return Markdown(f"*`data/measured` has no record of {', '.join(names)}.*")
