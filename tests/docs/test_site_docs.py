"""The documentation builds strictly and without torch, has no broken link, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import i2v_lab

TOP = Path(__file__).parents[2]
# mkdocs in a process in which torch cannot be imported: the reference is made from the source, not from live modules.
BUILD = "import sys; sys.modules['torch'] = None; from mkdocs.__main__ import cli; cli()"
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and "href" in values:
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def built_docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "build", "--strict", "--config-file", TOP / "mkdocs.yml", "--site-dir", folder],
        cwd=TOP,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(built_docs) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in built_docs.rglob("*.html") if path.name != "404.html"}


def broken(source: Path, link: str, pages: dict[Path, Page]) -> bool:
    """Whether a link of a page within the site leads nowhere."""
    parts = urlsplit(link)
    target = (source.parent / unquote(parts.path)).resolve() if parts.path else source
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return True
    anchors = pages[target].anchors if target in pages else set()
    return bool(parts.fragment) and unquote(parts.fragment) not in anchors


def test_every_internal_link_and_anchor_exists(pages):
    assert len(pages) > 30
    internal = [
        (page, link)
        for page, found in pages.items()
        for link in [*found.links, *found.loaded]
        if not urlsplit(link).scheme and not urlsplit(link).netloc
    ]
    assert len(internal) > 1000
    assert [(page.name, link) for page, link in internal if broken(page, link, pages)] == []


def test_a_broken_link_is_noticed(pages):
    index = next(page for page in pages if page.name == "index.html")
    assert not broken(index, "glossary.html", pages)
    assert broken(index, "glossary.html#no-such-term", pages)
    assert broken(index, "no-such-page.html", pages)


def test_a_page_loads_nothing_from_elsewhere(built_docs, pages):
    loaded = {link for page in pages.values() for link in page.loaded if urlsplit(link).netloc}
    assert loaded == set()
    styles = [path for path in built_docs.rglob("*.css") if re.search(r"url\(['\"]?(https?:)?//", path.read_text())]
    assert styles == []


def test_every_public_name_has_its_reference(built_docs, pages):
    anchors = pages[built_docs / "reference" / "public.html"].anchors
    assert [name for name in i2v_lab.__all__ if f"i2v_lab.{name}" not in anchors] == []


def test_docstrings_are_rendered(built_docs):
    text = "".join(path.read_text() for path in (built_docs / "reference").glob("*.html"))
    assert re.findall(r":(?:class|func|meth|mod|data|attr):[`<]", text) == []
    assert "<p>Example:" not in text


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_from_outside_the_site_lead_somewhere(name, built_docs, pages):
    links = [link for link in LINK.findall((TOP / name).read_text()) if not urlsplit(link).scheme]
    assert links
    for link in links:
        path, _, fragment = link.partition("#")
        assert (TOP / path).exists(), link
        if fragment:
            page = built_docs / Path(path).relative_to("docs").with_suffix(".html")
            assert fragment in pages[page].anchors, link
