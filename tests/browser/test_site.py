"""The rendered site in a real Chromium: drawn whole, self-contained, readable on a phone and on paper."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_notebooks import FAILED, make_notebooks
from playwright.sync_api import Browser, BrowserContext, Locator, Page

from i2v_lab.reporting.site.render import render_site
from i2v_lab.reproduce.provenance import site_provenance

pytestmark = pytest.mark.xdist_group("reproduced")

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
SIZES = {
    "desktop": {"width": 1280, "height": 800},
    "phone": {"width": 390, "height": 844},
    "tablet": {"width": 768, "height": 1024},
    "wide": {"width": 1600, "height": 1000},
}
MIB = 2**20

# What is drawn: nothing of it may be empty.
EMPTY = """() => {
  const empty = [];
  for (const image of document.images) if (!image.naturalWidth) empty.push(image.outerHTML.slice(0, 80));
  for (const part of document.querySelectorAll("img, svg, video, main table, .bar, .card-line")) {
    const box = part.getBoundingClientRect();
    if (box.width * box.height === 0 && !part.closest("details:not([open])")) empty.push(part.outerHTML.slice(0, 80));
  }
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBBox();
    if (box.width * box.height === 0) empty.push(svg.id);
    for (const use of svg.querySelectorAll("use")) {
      if (!svg.querySelector(`[id="${use.getAttribute("href").slice(1)}"]`)) empty.push(use.outerHTML);
    }
  }
  return empty;
}"""

# WCAG 2: 4.5 to 1, and 3 to 1 for large text. Every element that has text of its own, against what is behind it.
LOW_CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (part) => {
    for (let at = part; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const part of document.querySelectorAll("body *:not(script):not(style):not(svg *)")) {
    if (![...part.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
    const style = getComputedStyle(part);
    const [a, b] = [luminance(channels(style.color)), luminance(behind(part))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) low.push(`${ratio.toFixed(2)}: ${part.outerHTML.slice(0, 100)}`);
  }
  return low;
}"""

# Tables whose last column cannot be brought into sight by scrolling their own box, or whose first one leaves it then.
LOST_COLUMNS = """() => [...document.querySelectorAll("main table")].filter((table) => {
  if (table.closest("details:not([open])")) return false;
  const box = table.closest("[role=region][tabindex='0'][aria-label]");
  if (!box) return true;
  box.scrollLeft = 1e6;
  const lost = [...table.rows].some((row) => {
    const [inside, last] = [box.getBoundingClientRect(), row.cells[row.cells.length - 1].getBoundingClientRect()];
    return last.right > inside.right + 1 || last.width < 1 || inside.right > innerWidth + 1;
  });
  const first = table.rows[table.rows.length - 1].querySelector(".key") ?? table.rows[0].cells[0];
  const gone = first.getBoundingClientRect().left < box.getBoundingClientRect().left - 1;
  box.scrollLeft = 0;
  return lost || gone;
}).map((table) => table.outerHTML.slice(0, 100))"""

# The height in pixels of the smallest letters of the figures that Matplotlib drew.
SMALLEST_TEXT = """() => [...document.querySelectorAll(".drawn svg")].map((svg) => Math.min(
  ...[...svg.querySelectorAll("g[transform*=scale]")].map((part) => part.getScreenCTM())
    .map((seen) => Math.hypot(seen.a, seen.b) * 100)
))"""

PASTE = """() => {
  const area = document.createElement("textarea");
  area.id = "pasted";
  document.body.append(area);
  area.focus();
}"""


@pytest.fixture(scope="module", params=["made", "reproduced"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``made``: by hand, with every kind of output. ``reproduced``: what the notebooks of this checkout show."""
    return request.getfixturevalue(f"{request.param}_site")


@pytest.fixture(scope="module")
def made_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    notebooks = make_notebooks(folder / "notebooks", charts=True)
    return render_site(
        notebooks, [path for path in notebooks if path.stem == FAILED], folder / "site", site_provenance()
    ).parent


@pytest.fixture(scope="module")
def reproduced_site(reproduced: Path) -> Path:
    return reproduced / "site"


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport=SIZES["desktop"])
    context.set_default_timeout(5000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


def _screenshots(site: Path) -> Path:
    """``build/screenshots/made`` or ``reproduced``: to be looked at."""
    folder = SCREENSHOTS / site.parent.name.rstrip("0123456789")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _pages(site: Path) -> list[Path]:
    found = sorted(site.glob("*.html"))
    assert len(found) >= 2
    assert site / "index.html" in found
    return found


def test_every_page_is_drawn_whole_and_stays_on_this_machine(site, page):
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url[:100]))
    page.on(
        "request", lambda r: problems.append(r.url[:100]) if r.url.partition(":")[0] not in ("file", "data") else None
    )
    for path in _pages(site):
        for name, size in SIZES.items():
            page.set_viewport_size(size)
            page.goto(path.as_uri())
            assert page.evaluate(EMPTY) == []
            for video in page.query_selector_all("video"):
                video.evaluate("video => video.readyState > 1 || new Promise(done => video.onloadeddata = done)")
                assert video.evaluate("video => video.videoWidth") > 0
            wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert wide[0] <= wide[1] == size["width"], path.name
            assert page.evaluate(LOST_COLUMNS) == [], (path.name, name)
            assert all(height >= 9 for height in page.evaluate(SMALLEST_TEXT)), (path.name, name)
            page.screenshot(path=_screenshots(site) / f"{path.stem}-{name}.png", full_page=True)
        assert problems == [], path.name
        assert path.stat().st_size < 3 * MIB, path.name
    assert sum(path.stat().st_size for path in site.iterdir()) < 15 * MIB


def test_every_link_leads_somewhere_and_back(site, page):
    ids: dict[str, list[str]] = {}
    links: dict[str, list[str]] = {}
    for path in _pages(site):
        page.goto(path.as_uri())
        ids[path.name] = page.evaluate("[...document.querySelectorAll('[id]')].map(part => part.id)")
        links[path.name] = page.evaluate("[...document.links].map(link => link.getAttribute('href'))")
        assert len(set(ids[path.name])) == len(ids[path.name]), path.name
    for name, hrefs in links.items():
        for href in hrefs:
            if href.startswith(("https:", "http:")):
                continue
            if href.startswith("../"):  # a file to download, beside the site
                assert (site / href).is_file(), f"{name}: {href}"
                continue
            target, _, anchor = href.partition("#")
            assert (target or name) in ids, f"{name}: {href}"
            assert not anchor or anchor in ids[target or name], f"{name}: {href}"
    names = [path.name for path in _pages(site) if path.name != "index.html"]
    assert set(names) <= set(links["index.html"])
    names = [name for name in names if name != "fit.html"]  # the answer page, which is in no order
    page.goto((site / names[0]).as_uri())
    for name in names[1:]:
        page.locator("main nav a[rel=next]").click()
        assert page.url.endswith(name)
        assert page.locator("header nav a[rel=prev]").count() == 1
    assert page.locator("a[rel=next]").count() == 0


def test_every_page_can_be_read_by_everybody(site, page):
    for path in _pages(site):
        page.goto(path.as_uri())
        assert page.locator("html").get_attribute("lang") == "en"
        assert page.title()
        for landmark in ("main", "body > header", "footer", "h1"):
            assert page.locator(landmark).count() == 1, f"{path.name}: {landmark}"
        unnamed = "img:not([alt]), img[alt=''], svg:not([role=img][aria-label]), video:not([aria-label])"
        assert page.locator(unnamed).count() == 0, path.name
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(LOW_CONTRAST) == [], (path.name, scheme)
        for word in ("Made", "Machine", "Versions", "Commit"):
            assert page.locator("footer dt", has_text=word).count() == 1


def test_folded_code_opens_one_by_one_and_together(site, page):
    page.goto(next(path for path in _pages(site) if path.name != "index.html").as_uri())
    code = page.locator("details.code")
    assert code.count() > 0
    assert not code.first.locator("pre").is_visible()
    code.first.locator("summary").click()
    assert code.first.locator("pre").is_visible()
    page.get_by_role("button", name="Show all code").click()
    assert all(part.is_visible() for part in code.locator("pre").all())
    page.get_by_role("button", name="Hide all code").click()
    assert not any(part.is_visible() for part in code.locator("pre").all())


@pytest.mark.parametrize("clipboard", ["there", "missing", "refused"])
def test_a_table_is_copied_as_tab_separated_text(made_site, context, clipboard):
    replaced = {
        "missing": "Object.defineProperty(navigator, 'clipboard', {value: undefined})",
        "refused": "navigator.clipboard.writeText = () => Promise.reject(new Error('no'))",
    }
    if clipboard == "there":
        context.grant_permissions(["clipboard-read", "clipboard-write"])
    else:
        context.add_init_script(replaced[clipboard])
    page = context.new_page()
    page.goto((made_site / "04_flat_across_resolution.html").as_uri())
    assert page.evaluate("navigator.clipboard === undefined") == (clipboard == "missing")
    button = page.get_by_role("button", name="Copy").nth(1)
    button.click()
    page.locator("button", has_text="Copied").wait_for(timeout=2000)
    page.evaluate(PASTE)
    page.keyboard.press("Control+V")
    assert page.locator("#pasted").input_value() == (
        "\t\tpeak (GiB)\tnote\n"
        "weights\tscope\t\t\n"
        "fp8\tescaped\t1.50\ta < b\n"
        "\tno_grad\t2.00\tc\n"
        "bf16\tescaped\t3.25\td\n"
        "\tno_grad\t4.00\tNaN\n"
    )


def test_a_figure_is_enlarged_by_a_click_or_a_key_and_put_back(made_site, page):
    page.set_viewport_size(SIZES["phone"])
    page.goto((made_site / "02_peak_localization.html").as_uri())
    whole = page.locator("main").inner_html()
    svg, button = page.locator("#figure-1"), page.get_by_role("button", name="Enlarge").first
    narrow = svg.bounding_box()["width"]
    svg.click(position={"x": 40, "y": 40})
    assert page.locator("dialog:modal #figure-1").count() == 1
    assert svg.bounding_box()["width"] > 1.5 * narrow
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    assert page.locator("main").inner_html().replace(' style=""', "") == whole
    button.press("Enter")
    page.get_by_role("button", name="Close").press("Enter")
    page.locator("dialog").wait_for(state="detached")
    assert button.evaluate("button => document.activeElement === button")


def test_the_theme_is_the_systems_until_it_is_chosen_and_then_remembered(made_site, context):
    page = context.new_page()
    background = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto((made_site / "index.html").as_uri())
        seen[scheme] = page.evaluate(background)
    assert seen["light"] == "rgb(255, 255, 255)" != seen["dark"]
    page.evaluate("document.addEventListener('themechange', (event) => { window.told = event.detail; })")
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate("window.told") == "light"
    page.goto((made_site / "01_tiling_dead_end.html").as_uri())
    assert page.locator("html").get_attribute("data-theme") == "light"
    assert page.evaluate(background) == seen["light"]
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(background) == seen["dark"]


def test_without_storage_the_theme_is_chosen_for_the_page(made_site, context):
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('no'); }})")
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((made_site / "index.html").as_uri())
    page.get_by_role("button", name="Dark theme").click()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert problems == []


def test_the_search_leads_from_any_page_to_a_section_by_keys_alone(made_site, page):
    page.goto((made_site / "04_flat_across_resolution.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type("GAP decode_video")
    page.keyboard.press("Enter")
    page.wait_for_url("**/index.html?q=*")
    links = page.locator("#found a")
    assert links.first.inner_text() == "The peak is in decode_video: The gap"
    assert page.locator("#found mark").all_inner_texts()[0].lower() in ("gap", "decode_video")
    page.keyboard.press("ArrowDown")
    assert links.first.evaluate("link => document.activeElement === link")
    page.keyboard.press("Enter")
    page.wait_for_url("**/02_peak_localization.html#the-gap")
    page.goto((made_site / "index.html").as_uri())
    field = page.get_by_role("searchbox")
    field.fill("no such word")
    assert page.get_by_role("status").inner_text() == "Nothing found"
    field.fill("<b>x</b> \\ [")
    assert page.locator("#found a").count() == 0
    field.press("Escape")
    assert not page.locator("#found").is_visible()


def test_contents_stand_beside_the_text_or_fold_above_it(made_site, page):
    page.goto((made_site / "02_peak_localization.html").as_uri())
    contents = page.get_by_role("navigation", name="Contents", exact=True)
    assert contents.get_by_role("link").all_inner_texts() == ["Boundaries", "The gap", "Boundaries"]
    box, main = contents.bounding_box(), page.locator("main").bounding_box()
    assert box["x"] + box["width"] <= main["x"]
    page.evaluate("scrollTo(0, 600)")
    assert contents.get_by_role("link").first.bounding_box()["y"] >= 0
    page.set_viewport_size(SIZES["phone"])
    assert contents.get_by_role("link").count() == 0
    contents.get_by_text("Contents").click()
    contents.get_by_role("link").nth(2).click()
    assert page.url.endswith("#boundaries-2")
    assert contents.get_by_role("link").count() == 0


def test_a_term_leads_to_its_definition_which_unfolds(made_site, page):
    page.goto((made_site / "02_peak_localization.html").as_uri())
    definition = page.locator("#term-GiB")
    assert not definition.is_visible()
    page.locator("a.term", has_text="GiB").click()
    assert definition.is_visible()


def test_every_page_prints_without_code_and_within_the_paper(site, page):
    for path in _pages(site):
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        page.emulate_media(media="null")  # as it comes: on paper for a PDF
        pdf = page.pdf(prefer_css_page_size=True)
        assert pdf.startswith(b"%PDF-")
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 1
        (_screenshots(site) / f"{path.stem}.pdf").write_bytes(pdf)
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 680, "height": 962})  # A4 at 96 dots an inch, less its margins
        assert page.evaluate("document.documentElement.scrollWidth") <= 680, path.name
        assert not any(part.is_visible() for part in page.locator("details.code, button, main nav").all())
        tall = "[...document.querySelectorAll('figure')].map(part => part.getBoundingClientRect().height)"
        assert all(height < 962 for height in page.evaluate(tall))


# --- Charts ---

TEXT_PIXELS = """(figure) => {
  const svg = figure.querySelector("svg");
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const sizes = [...svg.querySelectorAll("text")].filter((part) => part.textContent).map((part) => part.getAttribute("font-size"));
  return scale * Math.min(...sizes.map(parseFloat));
}"""  # noqa: E501
CHARTS = "07_what_holds_the_peak.html"


def _draw_charts(page: Page, site: Path) -> list[Locator]:
    """The charts of the page, each drawn for a pointer; nothing is said on the console and nothing is asked for."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url[:100]))
    page.goto((site / CHARTS).as_uri())
    said.clear()  # of the page itself
    charts = page.locator("figure.chart").all()
    assert len(charts) == 4
    for number, chart in enumerate(charts):
        chart.scroll_into_view_if_needed()
        page.wait_for_function("figure => figure.dataset.live", arg=chart.element_handle())
        assert chart.evaluate(TEXT_PIXELS) >= 9
        chart.screenshot(path=_screenshots(site) / f"chart-{number}-{page.viewport_size['width']}.png")
    assert said == []
    return charts


def _told(page: Page, chart: Locator, across: float, down: float) -> dict[str, str]:
    """What the tooltip says where a pointer is over a chart's plot, by name."""
    box = chart.locator(".live svg .root > g > path.background").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + across * box["width"] - 3, box["y"] + down * box["height"])
    page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
    page.locator("#vg-tooltip-element.visible").wait_for()
    rows = page.locator("#vg-tooltip-element tr").all()
    return {row.locator(".key").inner_text(): row.locator(".value").inner_text() for row in rows}


def test_a_pointer_over_a_chart_is_told_exact_bytes_phase_and_module(made_site, page):
    timeline, modules, cards, _ = _draw_charts(page, made_site)
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy
    timeline.scroll_into_view_if_needed()
    assert _told(page, timeline, 1.5 / 1.8, 0.5) == {
        "phase": "decode_video",
        "time": "1.40 s",
        "saved for backward": "29.00 GiB (31,138,512,896 bytes)",
        "activations": "0.00 GiB (0 bytes)",
        "weights": "1.00 GiB (1,073,741,824 bytes)",
        "other": "0.00 GiB (0 bytes)",
        "all": "30.00 GiB (32,212,254,720 bytes)",
        "most at the phase's peak": "video_decoder.up_blocks",
        "that module": "29.00 GiB (31,138,512,896 bytes)",
    }
    modules.scroll_into_view_if_needed()
    told = _told(page, modules, 0.2, 0.02)
    assert (told["module"], told["bytes"]) == ("video_decoder.part_0", "30.00 GiB (32,212,254,720 bytes)")
    cards.scroll_into_view_if_needed()
    told = _told(page, cards, 0.1, 0.1)
    assert (told["GPU"], told["predicted time"]) == ("RTX 3060 12GB, 12.00 GiB", "21 s")
    assert told["peak"] == "2.00 GiB (2,147,483,648 bytes)"


def test_a_chart_is_zoomed_reset_and_its_series_hidden(made_site, page):
    timeline = _draw_charts(page, made_site)[0]
    timeline.scroll_into_view_if_needed()
    ticks = timeline.locator(".live .role-axis-label").first

    def shown() -> list[str | None]:
        return ticks.locator("text").evaluate_all("texts => texts.map(text => text.textContent)")

    whole = shown()
    assert whole[0] == "0.0"
    timeline.get_by_role("button", name="Zoom in").press("Enter")
    page.wait_for_function(
        "([part, text]) => !part.textContent.startsWith(text)", arg=[ticks.element_handle(), whole[0]]
    )
    timeline.get_by_role("button", name="Reset").click()
    page.wait_for_timeout(300)
    assert shown() == whole
    area = timeline.locator(".live .mark-area path").first
    before = area.get_attribute("d")
    timeline.locator(".live .role-legend-label text", has_text="weights").click()
    page.wait_for_function("([part, path]) => part.getAttribute('d') !== path", arg=[area.element_handle(), before])
    assert area.bounding_box() is not None


def test_a_chart_reads_on_a_phone_in_the_dark_on_paper_and_without_scripts(made_site, browser):
    inks = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport=SIZES["phone"], color_scheme=scheme)
        page = context.new_page()
        charts = _draw_charts(page, made_site)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        text = charts[0].locator(".live svg text").first
        inks[scheme] = text.evaluate("part => getComputedStyle(part).fill")
        assert inks[scheme] == page.evaluate("getComputedStyle(document.body).color")
        table = charts[0].locator("details.behind")
        table.locator("summary").press("Enter")
        rows = table.locator("tr").evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")
        kept = made_site.parent / "figures" / "07_what_holds_the_peak_timeline.csv"
        assert rows == list(csv.reader(kept.read_text(encoding="utf-8").splitlines()))
        assert table.locator("th:not([scope])").count() == 0
        context.close()
    assert inks["light"] != inks["dark"]
    context = browser.new_context(viewport=SIZES["phone"], java_script_enabled=False)
    page = context.new_page()
    page.goto((made_site / CHARTS).as_uri())
    for chart in page.locator("figure.chart").all():
        assert chart.locator("svg[role=img][aria-label]").bounding_box()["width"] > 350
    page.emulate_media(media="print")
    assert page.locator("figure.chart svg").first.is_visible()
    context.close()


def test_pages_and_the_site_stay_small(site):
    sizes = {path.name: path.stat().st_size for path in site.iterdir()}
    assert max(sizes.values()) < 3 * 2**20
    assert sum(sizes.values()) < 15 * 2**20
