"""What a page of the site has besides its notebook: contents, terms, downloads, commands, search, colours."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from html import unescape
from pathlib import Path

import pytest
import torch
from made_notebooks import FAILED, make_notebooks
from torch import nn

from i2v_lab.events import Phase
from i2v_lab.paths import glossary_file
from i2v_lab.reporting.site import contents, terms
from i2v_lab.reporting.site.inline_svg import inline_svg
from i2v_lab.reporting.site.render import TEMPLATES, data_block, render_site

LIGHT_DARK = re.compile(r"--([\w-]+): (?:light-dark\((#\w+), (#\w+)\)|(#\w+))")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    notebooks = make_notebooks(out / "notebooks")
    site = out / "site"
    site.mkdir()
    (site / "fit.html").write_text(
        "<title>Will it fit my card?</title>"
        '<main id="content"><p>Choose.</p><h2 id="by-card">By card</h2><p>12GB</p></main>'
    )
    render_site(notebooks, [path for path in notebooks if path.stem == FAILED], site)
    return site


@pytest.fixture(scope="module")
def pages(folder) -> dict[str, str]:
    return {path.stem: path.read_text() for path in folder.glob("*.html")}


def test_every_section_has_an_anchor_and_a_line_in_the_contents(pages):
    page = pages["02_peak_localization"]
    listed = re.search(r'<nav class="contents".*?</nav>', page, re.DOTALL)[0]
    assert re.findall(r'<a href="#([\w-]+)">([^<]+)</a>', listed) == [
        ("boundaries", "Boundaries"),
        ("the-gap", "The gap"),
        ("boundaries-2", "Boundaries"),
    ]
    assert re.findall(r'<h([23]) id="([\w-]+)"', page) == [("2", "boundaries"), ("3", "the-gap"), ("2", "boundaries-2")]
    assert '<nav class="contents"' not in pages["01_tiling_dead_end"]


def test_anchors_collide_neither_with_each_other_nor_with_the_layouts():
    body, sections = contents.with_anchors("<h2>Content</h2><h2>A</h2><h2>A-2</h2><h2>A</h2><h3>?</h3><h3>!</h3>")
    anchors = [section.anchor for section in sections]
    assert anchors == ["content-2", "a", "a-2", "a-3", "section", "section-2"]
    assert re.findall(r'id="([^"]+)"', body) == anchors


def test_terms_are_linked_once_in_text_and_defined_in_the_glossarys_words(pages):
    page = pages["02_peak_localization"]
    linked = re.findall(r'<a class="term" href="#term-([\w-]+)"', page)
    assert {"GiB", "decode_video"} < set(linked)
    assert len(set(linked)) == len(linked)
    assert sorted(re.findall(r'<dt id="term-([\w-]+)"', page)) == sorted(linked)
    body, found = terms.link_terms(
        "<h2>GiB</h2><pre>GiB</pre><svg><text>GiB</text><style>GiB</style></svg><p title='GiB'>a_GiB 1 GiB, 2 GiB</p>"
    )
    assert list(found) == ["GiB"]
    assert body.count("<a ") == 1
    assert re.search(r'1 <a class="term" href="#term-GiB" title="2\^30 bytes[^"]*">GiB</a>, 2 GiB', body)
    text = " ".join(glossary_file().read_text().replace("`", "").split())
    for term, words in terms.explained_terms().items():
        assert f"{term} : {words}" in text
        assert "](" not in words
        assert unescape(words) == words


def test_every_phase_of_our_own_is_defined():
    assert {str(phase.value) for phase in Phase} <= terms.explained_terms().keys()


def test_figures_and_tables_offer_the_files_that_are_there(pages, folder):
    for stem, expected in {
        "02_peak_localization": ["../figures/one.svg", "../figures/one.png", "../tables/one.csv"],
        "01_tiling_dead_end": ["../tables/01_tiling_dead_end_peaks.csv"],
    }.items():
        links = re.findall(r'(?:href|data-csv)="(\.\./[^"]+)"', pages[stem])
        assert links == expected
        assert all((folder / link).is_file() for link in links)


def test_headings_of_tables_say_what_they_head(pages):
    table = re.search(r"<table.*?</table>", pages["01_tiling_dead_end"], re.DOTALL)[0]
    head, body = table.split("<tbody>")
    assert re.findall(r"<th\b[^>]*>", head) == ['<th scope="col">'] * 4
    assert re.findall(r"<th\b[^>]*>", body) == ['<th scope="row">'] * 2


def test_the_command_under_a_figure_runs_the_page_again_with_its_parameters(pages):
    found = re.findall(r'class="again">.*?<code>(.*?)</code>', pages["02_peak_localization"])
    assert len(found) == 2
    words = shlex.split(unescape(found[0]))
    assert words[:3] == ["i2v-lab", "reproduce", "02"]
    given = ["-p", "frames", "49", "-p", "prompt", "rain on a 'lake'", "-p", "tilings", '["none"]']
    assert words[3:] == given
    assert "<code>i2v-lab reproduce 03</code>" in pages["03_no_grad_fix"]


def test_the_search_finds_every_section_of_every_page_and_of_the_answer_page(pages):
    data = re.search(r'<script type="application/json" id="search-index">(.*?)</script>', pages["index"])[1]
    entries = json.loads(data)
    for entry in entries:
        page, _, anchor = entry["href"].partition("#")
        assert not anchor or f'id="{anchor}"' in pages[Path(page).stem]
    found = {(entry["href"], entry["title"]) for entry in entries}
    assert ("02_peak_localization.html#the-gap", "The gap") in found
    assert ("fit.html#by-card", "By card") in found
    assert ("index.html#fix", "What to do: put the loop inside no_grad") in found
    assert {entry["href"].partition("#")[0] for entry in entries} == {f"{stem}.html" for stem in pages}
    text = next(entry["text"] for entry in entries if entry["href"].endswith("#the-gap"))
    assert text.startswith("It is 2 GiB in decode_video, and 1 GiB < 3 GiB.")
    assert "show(figure" not in data
    assert json.loads(data_block({"a": "</script><!--"})) == {"a": "</script><!--"}
    assert "<" not in data_block({"a": "</script><!--"})


def test_the_index_leads_to_the_answer_page_where_there_is_one(pages, tmp_path):
    assert '<a href="fit.html">' in pages["index"]
    assert '<a href="fit.html">' in pages["01_tiling_dead_end"]
    assert "fit.html" not in render_site([], [], tmp_path).read_text()


def test_the_policy_allows_exactly_the_scripts_of_the_page(pages):
    for stem in pages.keys() - {"fit"}:
        policy = unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', pages[stem])[1])
        scripts = re.findall(r"<script>(.*?)</script>", pages[stem], re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
        allowed = re.search(r"script-src ([^;]*);", policy)[1].split()
        assert allowed == [f"'sha256-{digest}'" for digest in digests]
        assert re.search(r"default-src 'none';.*form-action 'none'", policy)
        assert "unsafe-eval" not in policy


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_has_enough_contrast_in_both_themes():
    css = (TEMPLATES / "style.css").read_text()
    colours = {name: (light or plain, dark or plain) for name, light, dark, plain in LIGHT_DARK.findall(css)}
    texts = ("ink", "quiet", "link", "escaped-ink", "no-grad-ink", "string", "number", "error")
    pairs = [(text, ground) for text in texts for ground in ("page", "soft")] + [("ink", "found")]
    for theme in (0, 1):
        for text, ground in pairs:
            low, high = sorted(_luminance(colours[name][theme]) for name in (text, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground, theme)


@pytest.mark.parametrize(
    ("inner", "width"),
    [
        ('<g transform="translate(3 4) scale(0.1 -0.1)"/><g transform="rotate(-90) scale(0.08 -0.08)"/>', 563),
        ('<text font-size="10px">a</text>', 450),
        ('<path d="M0 0"/>', None),
    ],
)
def test_a_figure_is_never_so_narrow_that_its_text_cannot_be_read(inner, width):
    svg = inline_svg(f'<svg viewBox="0 0 500 300">{inner}</svg>', "f", "A figure")
    assert re.findall(r"min-width: (\d+)px", svg) == ([str(width)] if width else [])


class Toy:
    """A pipeline of the index's kind."""

    def __init__(self) -> None:
        self.transformer, self.vae_decoder = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 32), nn.SiLU())

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, prompt: str):
        latent = self.transformer(image)
        return (self.vae_decoder(latent) for _ in prompt.split())


@pytest.mark.parametrize("where", ["index", "README"])
def test_the_code_of_index_and_readme_finds_the_defect_in_a_pipeline_that_has_it(
    where, pages, tmp_path, monkeypatch, capsys
):
    from i2v_lab.errors import GradEscape

    monkeypatch.chdir(tmp_path)
    block = re.search(r'<h2 id="your-code">.*?<pre[^>]*>(.*?)</pre>', pages["index"], re.DOTALL)[1]
    code = unescape(re.sub(r"<[^>]+>", "", block))
    if where == "README":
        readme = (Path(__file__).parents[2] / "README.md").read_text()
        code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert len(code.splitlines()) <= 10
    video: list[torch.Tensor] = []
    names = {"pipeline": Toy(), "image": torch.ones(4, 8), "prompt": "two words"}
    names["video"] = type("Video", (), {"write": staticmethod(video.append)})
    with pytest.raises(GradEscape):
        exec(code, names)
    phase, saved = capsys.readouterr().out.splitlines()
    assert phase.startswith("decode_video ")
    assert int(saved) > 0
    assert len(video) == 2
    assert (tmp_path / "runs" / "mine").is_dir()
