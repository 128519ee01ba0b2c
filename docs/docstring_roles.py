"""A griffe extension: docstrings in the form that the documentation renders.

Roles such as ``:class:`~i2v_lab.request.Tiling``` become links where their target has a page, and plain code
otherwise. ``Example:`` becomes griffe's ``Examples:`` section, so that prompts are shown as code.
"""

from __future__ import annotations

import html
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`(~?)([^`]+)`")
LITERAL = re.compile(r"``([^`\n]+)``")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class DocstringRoles(griffe.Extension):
    """Rewrites the docstring of every object that griffe finds."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with every module, class, function and attribute."""
        if obj.docstring is None:
            return
        text = ROLE.sub(lambda match: _link(obj, match[2], short=bool(match[1])), obj.docstring.value)
        obj.docstring.value = EXAMPLE.sub("Examples:", LITERAL.sub(r"`\1`", text))


def _link(obj: griffe.Object, target: str, *, short: bool) -> str:
    """An optional cross-reference, which mkdocs-autorefs turns into plain code if the target has no page."""
    shown = target.rpartition(".")[2] if short else target
    try:
        path = obj.resolve(target)
    except griffe.NameResolutionError:
        path = target
    return f'<autoref identifier="{html.escape(path)}" optional><code>{html.escape(shown)}</code></autoref>'
