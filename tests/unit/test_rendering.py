"""The pages without a browser: their contents follow from the notebooks' results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from made_notebooks import FAILED, GIB, make_notebooks

from i2v_lab.capacity.cards import gpu_memory_bytes
from i2v_lab.paths import data_dir
from i2v_lab.reporting.site.inline_svg import inline_svg
from i2v_lab.reporting.site.render import render_site
from i2v_lab.reporting.site.story import origin
from i2v_lab.reproduce.provenance import site_provenance

PUBLISHED = json.loads((data_dir() / "published" / "no_grad_study.json").read_text())


def _render(folder: Path, **results_of_03) -> dict[str, str]:
    notebooks = make_notebooks(folder / "notebooks", **results_of_03)
    index = render_site(
        notebooks, [path for path in notebooks if path.stem == FAILED], folder / "site", site_provenance()
    )
    assert index == folder / "site" / "index.html"
    return {path.stem: path.read_text() for path in index.parent.iterdir()}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    return _render(tmp_path_factory.mktemp("site"))


def _text(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", "", html).replace("&nbsp;", " ").split())


def _widths(index: str) -> list[float]:
    return [float(width) for width in re.findall(r'class="bar [a-z_]+" style="width: ([\d.]+)%', index)]


def test_ids_are_unique_on_every_page_and_every_reference_is_to_its_own_figure(pages):
    for html in pages.values():
        ids = re.findall(r'\sid="([^"]+)"', html)
        assert len(ids) == len(set(ids))
    svgs = re.findall(r"<svg.*?</svg>", pages["02_peak_localization"], re.DOTALL)
    assert len(svgs) == 2
    for number, svg in enumerate(svgs, start=1):
        references = re.findall(r'(?:href="|url\()#([^")]+)', svg)
        assert len(references) > 20
        assert set(references) <= set(re.findall(r'\sid="([^"]+)"', svg))
        assert all(reference.startswith(f"figure-{number}-") for reference in references)
        assert 'role="img"' in svg
    assert 'aria-label="Boundaries"' in svgs[0]
    assert 'aria-label="Boundaries (2)"' in svgs[1]


def test_a_figure_is_on_its_page_once_without_its_png(pages):
    """A page of many figures would pass 3 MiB otherwise."""
    assert sum(page.count("data:image/png") for page in pages.values()) == 1, "that of the output that is only a PNG"
    assert sum(page.count("<svg") for page in pages.values()) >= 2


def test_a_figure_keeps_its_style_and_its_references_to_itself():
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" id="top" viewBox="0 0 9 9">'
        "<metadata><title>by a program</title></metadata><style>*{fill:red} #a{fill:#ffa}</style>"
        '<clipPath id="a"/><path clip-path="url(#a)" style="fill: #a; stroke: url(#b)"/><use xlink:href="#a"/></svg>'
    )
    assert inline_svg(svg, "f", 'x < "y"') == (
        '<svg id="f" role="img" aria-label="x &lt; &quot;y&quot;" viewBox="0 0 9 9">'
        "<style>#f { *{fill:red} #f-a{fill:#ffa} }</style>"
        '<clipPath id="f-a" /><path clip-path="url(#f-a)" style="fill: #f-a; stroke: url(#b)" /><use href="#f-a" />'
        "</svg>"
    )


def test_a_figures_ink_is_the_pages_and_its_data_keep_their_colours():
    svg = inline_svg('<svg><path style="fill: #ffffff; stroke: #000000"/><path style="fill: #d55e00"/></svg>', "f", "A")
    assert 'style="fill: var(--page); stroke: currentColor"' in svg
    assert 'style="fill: #d55e00"' in svg


def test_every_notebook_has_its_title_claim_badge_and_finding_on_the_index(pages):
    rows = re.findall(r"<li>(.*?)</li>", pages["index"], re.DOTALL)
    verdicts = ["shown", "refuted", "confirmed", "confirmed", "refined", "failed", "no data"]
    assert [re.search(r'class="badge[^>]*>([^<]+)<', row)[1] for row in rows] == verdicts
    assert '<a href="02_peak_localization.html">The peak is in <code>decode_video</code></a>' in rows[2]
    assert "What 02_peak_localization claims is said here in a sentence. A second one says more of it." in _text(
        rows[2]
    )
    assert "confirmed All of it is there. Measured on NVIDIA H200 with the full-size model" in _text(rows[2])
    assert "failed ValueError: height=500 is not a multiple of 64" in _text(rows[5])
    assert '<a href="#error">ValueError: height=500 is not a multiple of 64</a>' in pages[FAILED]
    assert "so far &lt;so good&gt;" in pages[FAILED]


def test_pages_lead_to_one_another(pages):
    page = pages["01_tiling_dead_end"]
    assert re.search(r'rel="prev" href="00_generate.html"', page)
    assert re.search(r'rel="next" href="02_peak_localization.html"', page)
    assert 'href="03_no_grad_fix.html">the fix' in page
    assert 'rel="prev"' not in pages["00_generate"]
    assert 'rel="next"' not in pages["06_will_it_fit"]


def test_the_headline_is_computed_from_the_results(pages, tmp_path):
    index = _text(pages["index"])
    assert "takes the peak from 102.38 GiB to 23.68 GiB" in index
    assert "Forecast for the full-size model (ltx-2.3-22b), without a GPU." in index
    assert "The first peak is 4.32 times the second; the difference is in decode_video." in index
    assert "less than the loop outside needs" in index
    card_bytes = gpu_memory_bytes(PUBLISHED["gpu"])
    lines = {float(left) for left in re.findall(r'class="card-line" style="left: ([\d.]+)%', pages["index"])}
    assert len(lines) == 1
    widths = _widths(pages["index"])
    assert len(widths) == 4
    for width, peak_bytes in zip(widths, (102.38 * GIB, 23.68 * GIB, 83.51 * GIB, 29.51 * GIB), strict=True):
        assert width / lines.copy().pop() == pytest.approx(peak_bytes / card_bytes, abs=2e-4)
    other = _render(
        tmp_path,
        escaped_peak_bytes=60 * GIB,
        no_grad_peak_bytes=40 * GIB,
        excess_phase="elsewhere",
        source="recorded",
        device="NVIDIA H200",
    )["index"]
    assert "takes the peak from 60.00 GiB to 40.00 GiB" in _text(other)
    assert "Measured on NVIDIA H200 with the full-size model" in _text(other)
    assert "The first peak is 1.50 times the second; the difference is in elsewhere." in _text(other)
    assert "less than the loop outside needs" not in _text(other)
    assert _widths(other)[:2] != widths[:2]


def test_a_small_model_gets_a_scale_of_its_own(tmp_path):
    small = {"escaped_peak_bytes": 56 * 2**20, "no_grad_peak_bytes": 28 * 2**20, "source": "measure"}
    index = _render(tmp_path, **small, model="ltx-2.3-tiny")["index"]
    widths = _widths(index)
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.02)
    assert widths[0] > 90
    assert index.count('class="card-line"') == 2
    times = gpu_memory_bytes(PUBLISHED["gpu"]) / (56 * 2**20)
    assert (
        f"The upper pair has a scale of its own: the card has {times:,.0f} times as much as its longer bar. The"
        in _text(index)
    )
    assert "Measured on this machine with the tiny model (ltx-2.3-tiny)." in _text(index)


@pytest.mark.parametrize("peaks", [{"escaped_peak_bytes": None, "no_grad_peak_bytes": None, "peak_ratio": None}, {}])
def test_without_figures_of_its_own_the_index_shows_the_published_ones(tmp_path, peaks):
    if peaks:
        index = _render(tmp_path, **peaks, excess_phase=None, verdict="no data")["index"]
    else:
        index = render_site([], [], tmp_path).read_text()
        assert "No notebook has been run yet" in index
    assert "takes the peak from 83.51 GiB to 29.51 GiB" in _text(index)
    assert "As published; this run has no figures of its own." in _text(index)
    assert len(_widths(index)) == 2


def test_a_notebook_without_results_or_claim_is_still_a_page(tmp_path):
    path = tmp_path / "07_bare.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), path)
    index = render_site([path], [], tmp_path / "site").read_text()
    assert '<a href="07_bare.html">07_bare</a>' in index
    assert ">done</span>" in index


def test_origins_are_given_in_words_from_the_results():
    assert origin({"source": "recorded", "device": "NVIDIA B200", "model": "m"}) == (
        "measured on NVIDIA B200 with the full-size model (m)"
    )
    assert origin({"source": "forecast"}) == "forecast, without a GPU"
    assert origin({"source": "recorded"}) == "measured on a device that is not recorded"
    assert origin({}) == ""


def test_the_footer_says_from_where_and_no_template_holds_a_measured_number(pages):
    for html in pages.values():
        footer = _text(html[html.index("<footer>") :])
        for word in ("Made", "UTC", "Machine", "cores", "torch 2.", "i2v-lab", "Commit"):
            assert word in footer
        assert not re.search(r"<(script|link|img|iframe|source)[^>]+(src|href)=[\"']https?:", html)
    templates = Path(__file__).parents[2] / "src/i2v_lab/reporting/site/templates"
    assert (data_dir() / "gpus.csv").exists()
    for template in templates.rglob("*.j2"):
        assert not re.search(r"\d\s*(&nbsp;)?(GiB|MiB|%\s|times)", template.read_text()), template.name


def test_reporting_does_not_import_torch(tmp_path):
    code = """
import importlib, pkgutil, sys
from i2v_lab import reporting
for module in pkgutil.walk_packages(reporting.__path__, "i2v_lab.reporting."):
    importlib.import_module(module.name)
from i2v_lab.reporting.site.render import render_site
from i2v_lab.reproduce.provenance import site_provenance
from pathlib import Path
render_site([], [], Path(sys.argv[1]))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False, timeout=120).returncode == 0
    assert (tmp_path / "index.html").exists()
