"""A view: widgets in a live kernel's front end, static HTML in a rendered page."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakSet

from i2v_lab.display import escaped, printable
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
[data-jp-theme-light="false"] .i2v-widgets select {
  background-image: url("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 18 18'%3E%3Cpath \
fill='%23eee' d='M5 7l4 4 4-4z'/%3E%3C/svg%3E");
}
.i2v-widgets.jupyter-widgets-disconnected > * { opacity: .5; pointer-events: none; }
.i2v-widgets.jupyter-widgets-disconnected .jupyter-widgets-disconnected::before { content: none; }
.i2v-widgets.jupyter-widgets-disconnected::before {
  content: "The kernel of this view was restarted or has ended: run the cell again.";
  font: 600 var(--jp-ui-font-size1, 13px) var(--jp-ui-font-family, sans-serif);
  color: var(--jp-ui-font-color1, inherit);
  position: sticky; top: 0; z-index: 2; padding: .5em .8em; border-left: 4px solid #D55E00;
  background: var(--jp-layout-color2, Canvas);
}
</style>"""


class View(ABC):
    """An object that displays itself as widgets, or as static HTML.

    In a notebook that is executed headlessly (``TQDM_DISABLE`` is set, as ``i2v-lab reproduce`` does) no widgets are
    created.
    """

    _opened: ClassVar[WeakSet[View]] = WeakSet()

    def __init__(self) -> None:
        self._widget: Any = None
        self._cell: tuple[str, str] | None = None
        self._drawing = threading.RLock()
        self._kept: frozenset[str] = frozenset()

    @abstractmethod
    def html(self) -> str:
        """The current content as static HTML, without scripts."""

    @abstractmethod
    def _build(self) -> Any:
        """Create the widgets with their callbacks."""

    @property
    def widget(self) -> Any:
        """The widgets, created on first access.

        A view that an earlier run of the same cell has shown is closed: its output is gone from the page.
        """
        if self._widget is None:
            self._cell = _running_cell()
            for view in list(View._opened):
                if self._cell and view._cell and view._cell[0] == self._cell[0] and view._cell[1] != self._cell[1]:
                    view.close()
            self._kept = frozenset(vars(self))
            self._widget = self._build()
            self._widget.add_class("i2v-widgets")
            answer_while_busy(self._widget)
            View._opened.add(self)
        return self._widget

    def close(self) -> None:
        """Cancel background work, and close all widgets; the view may be shown again, with new ones."""
        with self._drawing:
            whole, self._widget = self._widget, None
            if whole is None:
                return
            View._opened.discard(self)
            for name in vars(self).keys() - self._kept:  # widgets that are not closed yet, in part
                delattr(self, name)
        close_widgets(whole, self._foreign_widgets())

    def _foreign_widgets(self) -> Sequence[Any]:
        """Widgets in the tree that belong to another view."""
        return ()

    def _repr_html_(self) -> str:
        return page(self.html() + f"<p><small><em>{HINT}</em></small></p>")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        widgets = {} if is_quiet(progress=True) else self.widget._repr_mimebundle_(include=include, exclude=exclude)
        return {**widgets, "text/html": self._repr_html_(), "text/plain": printable(repr(self))}


def close_widgets(widget: Any, without: Sequence[Any] = ()) -> None:
    """Close a widget and all that it is made of: its children, layouts and styles, which live on if only it is closed.

    Args:
        widget: The outermost.
        without: Widgets inside of it that stay open, with what they are made of.
    """
    for part in _parts(widget, without):
        part.unobserve_all()
        part.close()


def answer_while_busy(widget: Any) -> None:
    """Have a widget, and all that it is made of, answer while the kernel runs a cell.

    JupyterLab sends what is done with a widget to a subshell of the kernel; from ipykernel 7.4 on the kernel hands it
    to where the widget was made instead, which is busy with the cells that follow.

    Args:
        widget: The outermost.
    """
    for part in _parts(widget):
        if hasattr(part.comm, "_reply_subshell_for"):
            part.comm._reply_subshell_for = lambda _, asked: asked


def _parts(widget: Any, without: Sequence[Any] = ()) -> list[Any]:
    """A widget and all that it is made of, children, layouts and styles; some widgets inside of it left out."""
    from ipywidgets import Widget

    todo, found = [widget], {id(each): each for each in without}
    while todo:
        part = todo.pop()
        if id(part) in found:
            continue
        found[id(part)] = part
        for value in (getattr(part, name) for name in part.keys):
            todo += [
                each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Widget)
            ]
    return list(found.values())[len(without) :]


def _running_cell() -> tuple[str, str] | None:
    """The cell that is being run and its run; ``None`` where that cannot be told."""
    from IPython import get_ipython

    parent: dict[str, Any] = getattr(get_ipython(), "get_parent", dict)()
    cell, run = parent.get("metadata", {}).get("cellId"), parent.get("header", {}).get("msg_id")
    return (cell, run) if cell and run else None


HINT = "Interactive in JupyterLab: <code>make lab</code>."


def page(body: str) -> str:
    """An HTML fragment with the views' style sheet, in which JupyterLab looks for no formulas."""
    return f'{STYLE}<div class="i2v-view tex2jax_ignore">{body}</div>'


def sentence(words: str, kind: str = "") -> str:
    """One escaped paragraph; empty for no text."""
    return f'<p class="{escaped(kind)}">{escaped(words)}</p>' if words else ""
