"""A view: widgets while a kernel lives, HTML in a page that was rendered from it."""

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
    """Something to look at and, where there is a front end, to operate.

    In a notebook that runs headlessly (``TQDM_DISABLE`` is set, as ``i2v-lab reproduce`` does) no widget is made.
    """

    def __init__(self) -> None:
        self._widget: Any = None

    @abstractmethod
    def html(self) -> str:
        """What there is to see now, without a script."""

    @abstractmethod
    def _build(self) -> Any:
        """The widgets, wired."""

    @property
    def widget(self) -> Any:
        """The widgets; made when somebody asks for them."""
        if self._widget is None:
            self._widget = self._build()
        return self._widget

    def close(self) -> None:
        """End what is under way, and take the widgets off the page."""
        if self._widget is not None:
            self._widget.close()
            self._widget = None

    def _repr_html_(self) -> str:
        return page(self.html() + f"<p><small><em>{HINT}</em></small></p>")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        widgets = {} if is_quiet(progress=True) else self.widget._repr_mimebundle_(include=include, exclude=exclude)
        return {**widgets, "text/html": self._repr_html_(), "text/plain": repr(self)}


HINT = "Open this notebook in JupyterLab (<code>make lab</code>) to operate it."


def page(body: str) -> str:
    """A part of a page in the style of the views."""
    return f'{STYLE}<div class="i2v-view">{body}</div>'


def sentence(words: str, kind: str = "") -> str:
    """One paragraph of plain words."""
    return f'<p class="{kind}">{escape(words)}</p>' if words else ""
