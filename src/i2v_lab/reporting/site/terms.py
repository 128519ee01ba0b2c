"""The units and phases of a page, explained in the words of the documentation's glossary where they first appear."""

from __future__ import annotations

import re
from functools import cache
from html import escape

from i2v_lab.paths import glossary_file

EXPLAINED = ("Units and bytes", "Phases")
"""Headings of the glossary under which every term is explained on the pages that use it."""
# Text in these is no prose: it is drawn, executed, folded, or leads somewhere already.
SKIPPED = {"svg", "script", "style", "pre", "a", "h1", "h2", "h3", "h4", "button", "summary", "figcaption"}
TAG = re.compile(r"(<!--.*?-->|<[^>]*>)", re.DOTALL)
DEFINITION = re.compile(r"^(\S.*)\n:   (.+(?:\n    .+)*)", re.MULTILINE)


@cache
def explained_terms() -> dict[str, str]:
    """The definition of every unit and phase, plain text, by term; of the glossary's sections in ``EXPLAINED``.

    Raises:
        OSError: The glossary cannot be read.

    Example:
        >>> explained_terms()["MiB"]
        '2^20 bytes, 1,048,576 of them; 1024 MiB are a GiB.'
    """
    text = glossary_file().read_text(encoding="utf-8")
    parts = {part.partition("\n")[0].strip(): part for part in text.split("\n## ")[1:]}
    return {
        term.strip("`"): " ".join(definition.replace("`", "").split())
        for heading in EXPLAINED
        for term, definition in DEFINITION.findall(parts[heading])
    }


def link_terms(body: str) -> tuple[str, dict[str, str]]:
    """Link the first appearance of every unit and phase in a page's text to its definition.

    Args:
        body: HTML.

    Returns:
        The same with links to ``#term-...``, and the definition of each term that appears, by term.

    Example:
        >>> link_terms("<p>2 GiB, and 3 GiB</p>")[0].count("<a ")
        1
    """
    terms = explained_terms()
    left = dict(terms)
    open_tags: list[str] = []
    parts = TAG.split(body)
    for index, part in enumerate(parts):
        if index % 2:
            _follow(part, open_tags)
        elif left and not open_tags and part.strip():
            parts[index] = _linked(part, left)
    return "".join(parts), {term: words for term, words in terms.items() if term not in left}


def _follow(tag: str, open_tags: list[str]) -> None:
    """Keep the skipped elements that are open."""
    found = re.match(r"<(/?)(\w+)", tag)
    if found is None or found[2].lower() not in SKIPPED or tag.endswith("/>"):
        return
    if not found[1]:
        open_tags.append(found[2].lower())
    elif open_tags and open_tags[-1] == found[2].lower():
        open_tags.pop()


def _linked(text: str, left: dict[str, str]) -> str:
    def link(match: re.Match[str]) -> str:
        words = left.pop(match[0], None)
        if words is None:
            return match[0]
        return f'<a class="term" href="#term-{match[0]}" title="{escape(words)}">{match[0]}</a>'

    return re.sub(rf"(?<![\w-])(?:{'|'.join(map(re.escape, left))})(?![\w-])", link, text)
