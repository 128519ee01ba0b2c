"""Buttons that change what does not fit into what does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from i2v_lab.lab.answer import Remedy
from i2v_lab.lab.view import answer_while_busy, close_widgets


class RemedyButtons:
    """One button for each remedy.

    Args:
        apply: Called with a remedy's changes when its button is pressed.

    Attributes:
        box: The widget.
    """

    def __init__(self, apply: Callable[[Mapping[str, Any]], None]) -> None:
        import ipywidgets as widgets

        self.box = widgets.HBox([], layout=widgets.Layout(flex_flow="row wrap"))
        self._apply = apply
        self._shown: tuple[Remedy, ...] = ()

    def show(self, remedies: Sequence[Remedy]) -> None:
        """Show these in place of others."""
        import ipywidgets as widgets

        if tuple(remedies) == self._shown:
            return
        self._shown, old = tuple(remedies), self.box.children
        buttons = []
        for remedy in remedies:
            button = widgets.Button(description=remedy.label, icon="wrench", layout=widgets.Layout(width="auto"))
            button.on_click(partial(self._pressed, remedy))
            answer_while_busy(button)
            buttons.append(button)
        self.box.children = buttons
        for each in old:
            close_widgets(each)

    def _pressed(self, remedy: Remedy, _: Any) -> None:
        self._apply(remedy.changes)
