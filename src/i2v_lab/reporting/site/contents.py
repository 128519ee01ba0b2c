"""The sections of a page: anchors, the list of contents, and what the search finds in them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from html import unescape

HEADING = re.compile(r"<h([23])>(.*?)</h\1>", re.DOTALL)
SECTION = re.compile(r'<h[23][^>]*\sid="([^"]+)"[^>]*>(.*?)</h[23]>', re.DOTALL)
ANCHOR = re.compile(r'<a class="anchor".*?</a>', re.DOTALL)
# Not searched: what is drawn or executed, folded code, and definitions, which are those of every page.
NO_TEXT = re.compile(
    r'<(svg|script|style|nav)\b.*?</\1>|<details class="(?:code|terms)">.*?</details>|<!--.*?-->', re.DOTALL
)
INLINE = re.compile(r"</?(?:a|abbr|b|code|em|i|span|strong|sub|sup)\b[^>]*>")  # no space where these begin and end
OWN_IDS = ("content", "error", "terms", "found")  # of the layout
MOST_TEXT = 6000  # characters of a section: a long table is found by its beginning


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        level: Of its heading, 2 or 3.
        anchor: Its id on the page.
        title: Plain text.
    """

    level: int
    anchor: str
    title: str


@dataclass(frozen=True)
class Found:
    """What the search can find: a section of a page, or what stands before its first one.

    Attributes:
        page: The page's title.
        href: Where it leads to, from any page.
        title: The section's title; empty for what stands before the first one.
        text: Its text, in one line.
    """

    page: str
    href: str
    title: str
    text: str


def with_anchors(body: str) -> tuple[str, list[Section]]:
    """Give every heading of the second and third level an id made from its words, and a link to itself.

    Returns:
        The HTML, and the sections in their order.

    Example:
        >>> with_anchors("<h2>The gap</h2>")[1]
        [Section(level=2, anchor='the-gap', title='The gap')]
    """
    found: list[Section] = []
    used = Counter(OWN_IDS)

    def marked(match: re.Match[str]) -> str:
        title = plain(match[2])
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        anchor = slug
        while used[anchor]:
            used[slug] += 1
            anchor = f"{slug}-{used[slug]}"
        used[anchor] += 1
        found.append(Section(int(match[1]), anchor, title))
        link = f'<a class="anchor" href="#{anchor}" aria-label="Link to this section">#</a>'
        return f'<h{match[1]} id="{anchor}">{match[2]} {link}</h{match[1]}>'

    return HEADING.sub(marked, body), found


def searchable(page: str, href: str, body: str) -> list[Found]:
    """The sections of a page with their text; those without any are left out.

    Args:
        page: Its title, plain.
        href: Its file's name.
        body: HTML, whose headings have ids.
    """
    parts = SECTION.split(NO_TEXT.sub(" ", body))
    entries = [Found(page, href, "", plain(parts[0])[:MOST_TEXT])]
    for anchor, title, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        entries.append(Found(page, f"{href}#{anchor}", plain(title), plain(text)[:MOST_TEXT]))
    return [entry for entry in entries if entry.text or entry.title]


def searchable_text(html: str, href: str) -> list[Found]:
    """The sections of a whole page, by its ``title`` and ``main`` elements."""
    title, main = (re.search(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL) for tag in ("title", "main"))
    return searchable(plain(title[1]) if title else href, href, main[1]) if main else []


def plain(html: str) -> str:
    """The text of HTML in one line."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", INLINE.sub("", ANCHOR.sub("", html)))).split())
