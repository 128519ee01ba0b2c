"""A view: widgets in a live kernel's front end, static HTML in a rendered page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from html import escape
from typing import Any

from i2v_lab.runs.forecast import is_quiet

STYLE = """<style>
.i2v-view { color: var(--jp-ui-font-color1, inherit); line-height: 1.45; max-width: 720px; }
.i2v-view p { margin: .35em 0; }
.i2v-view .verdict { border-left: 4px solid; padding: .2em .6em; font-weight: 600; }
.i2v-view table { border-collapse: collapse; font-size: 12px; margin: .4em 0; }
.i2v-view th, .i2v-view td { text-align: right; padding: .15em .6em; }
.i2v-view .older { opacity: .45; }
.i2v-view .i2v-drop { border: 2px dashed currentColor; border-radius: 6px; padding: .7em; text-align: center; }
.i2v-view .i2v-drop.over { background: rgba(0, 114, 178, .15); }
.i2v-view .bar { display: inline-block; width: 160px; height: 9px; background: rgba(128, 128, 128, .25); }
.i2v-view .bar > span { display: block; height: 9px; background: #0072B2; }
</style>"""


class View(ABC):
    """An object that displays itself as widgets, or as static HTML.

    In a notebook that is executed headlessly (``TQDM_DISABLE`` is set, as ``i2v-lab reproduce`` does) no widgets are
    created.
    """

    def __init__(self) -> None:
        self._widget: Any = None

    @abstractmethod
    def html(self) -> str:
        """The current content as static HTML, without scripts."""

    @abstractmethod
    def _build(self) -> Any:
        """Create the widgets with their callbacks."""

    @property
    def widget(self) -> Any:
        """The widgets, created on first access."""
        if self._widget is None:
            self._widget = self._build()
        return self._widget

    def close(self) -> None:
        """Cancel background work and close the widgets."""
        if self._widget is not None:
            self._widget.close()
            self._widget = None

    def _repr_html_(self) -> str:
        return page(self.html() + f"<p><small><em>{HINT}</em></small></p>")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        widgets = {} if is_quiet(progress=True) else self.widget._repr_mimebundle_(include=include, exclude=exclude)
        return {**widgets, "text/html": self._repr_html_(), "text/plain": repr(self)}


HINT = "Interactive in JupyterLab: <code>make lab</code>."


def page(body: str) -> str:
    """An HTML fragment with the views' style sheet."""
    return f'{STYLE}<div class="i2v-view">{body}</div>'


def sentence(words: str, kind: str = "") -> str:
    """One escaped paragraph; empty for no text."""
    return f'<p class="{kind}">{escape(words)}</p>' if words else ""
