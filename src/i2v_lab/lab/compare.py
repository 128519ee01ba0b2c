"""``Compare``: two run directories side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from i2v_lab.lab.view import View, page, sentence
from i2v_lab.reporting.comparison import compare_html, find_runs

TOO_FEW = "There is no pair of runs to compare yet: record two, or give other folders."


class Compare(View):
    """Phase bars, timelines and differences of two runs, selected from those below some folders.

    Args:
        folders: Searched for run directories; a button searches them again.
        first: A run's name in the list; by default the last but one.
        second: Likewise; by default the last one.

    Example:
        >>> from i2v_lab import Compare
        >>> Compare(["runs"])  # as the last line of a cell  # doctest: +SKIP
    """

    def __init__(self, folders: Sequence[str | Path], first: str | None = None, second: str | None = None) -> None:
        super().__init__()
        self.folders = [Path(folder) for folder in folders]
        self.runs = find_runs(self.folders)
        names = list(self.runs)
        self.first = first if first in self.runs else next(iter(names[-2:]), None)
        self.second = second if second in self.runs else next(reversed(names), None)

    def __repr__(self) -> str:
        return f"Compare({self.first}, {self.second})"

    def html(self) -> str:
        """The comparison as static HTML."""
        if self.first is None or self.second is None or len(self.runs) < 2:
            return sentence(TOO_FEW)
        return compare_html(self.runs[self.first], self.runs[self.second])

    def _build(self) -> Any:
        import ipywidgets as widgets

        layout = widgets.Layout(width="420px")
        self._choices = [
            widgets.Dropdown(description=label, options=list(self.runs), value=value, layout=layout)
            for label, value in (("first", self.first), ("second", self.second))
        ]
        refresh = widgets.Button(description="Look for new runs", icon="refresh", layout=widgets.Layout(width="auto"))
        refresh.on_click(lambda _: self.refresh())
        self._picture = widgets.HTML(page(self.html()))
        for choice in self._choices:
            choice.observe(self._chosen, "value")
        return widgets.VBox([widgets.HBox([widgets.VBox(self._choices), refresh]), self._picture])

    def refresh(self) -> None:
        """Search the folders again; the selection stays."""
        self.runs = find_runs(self.folders)
        chosen = [name if name in self.runs else None for name in (self.first, self.second)]
        if self._widget is not None:
            for choice, name in zip(self._choices, chosen, strict=True):
                choice.options = list(self.runs)
                choice.value = name
        self.first, self.second = chosen

    def _chosen(self, _: Any) -> None:
        self.first, self.second = (choice.value for choice in self._choices)
        self._picture.value = page(self.html())
