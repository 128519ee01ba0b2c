"""A real JupyterLab, its interactive notebooks in a real Chromium: what must change on the page changes."""

from __future__ import annotations

import base64
import io
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from chromium import drag_slider, run_all_cells
from fault_injection import running
from lab_server import LabServer, lab_server
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect
from small_notebooks import SMALL

from i2v_lab.paths import CACHE_VARIABLE, data_dir
from i2v_lab.runs.store import FAILED, read_run

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots" / "jupyterlab"
EVERY = {"model": "ltx-2.3-tiny", "device": "cpu"}
SOURCES = {"00_generate": "measure", "06_will_it_fit": "forecast"}
SLOW = 90_000  # milliseconds: the first run of a cell on a busy machine

# Whether the explorer has waited for a forecast since this was evaluated: it marks the picture of before as older.
WATCH = """() => {
  window.waited = false;
  const look = () => { window.waited ||= document.querySelector(".i2v-explorer .answer.older") !== null; };
  new MutationObserver(look).observe(document.body, {attributes: true, childList: true, subtree: true});
}"""

# Until the code asks for this card; then whether the forecast of the size is still under way.
ASKED_OF = """(card) => new Promise((resolve) => {
  const look = () => {
    const code = document.querySelector(".i2v-explorer .i2v-code textarea").value;
    if (!code.includes(`judge(forecast, "${card}"`)) return requestAnimationFrame(look);
    resolve(document.querySelector(".i2v-explorer .answer.older") !== null);
  };
  look();
})"""

FILE = """(data) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "my tower.avif", {type: "image/avif"}));
  return transfer;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def server(folder: Path, tiny) -> Iterator[LabServer]:
    """One server; when it has ended, nothing that it or its kernels have started is left."""
    parameters = {
        name: {**EVERY, **SMALL[name], "source": source, "out_dir": str(folder / "build")}
        for name, source in SOURCES.items()
    }
    expect.set_options(timeout=SLOW)
    with lab_server(folder, parameters) as server:
        yield server
        started = server.process.children(recursive=True)
    _, alive = psutil.wait_procs([server.process, *started], timeout=10)
    assert list(running(alive).values()) == []


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """What the pages share: JupyterLab's scripts are fetched and compiled once."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page on which nothing may go wrong, and that asks nobody but this machine."""
    page = context.new_page()
    page.set_default_timeout(SLOW)
    problems: list[str] = []
    page.on("console", lambda m: problems.append(f"{m.text} {m.location}") if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: problems.append(r.url) if not re.match(r"http://127\.|data:|blob:", r.url) else None)
    yield page
    page.close()
    assert problems == []


def _turned_photo() -> bytes:
    """The tower, 640x960, with EXIF that says it is to be shown on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(data_dir() / "stills" / "tower.png") as picture:
        picture.save(buffer := io.BytesIO(), "AVIF", exif=exif)
    return buffer.getvalue()


def _large_picture() -> bytes:
    """Noise, which no compression makes small: 7.3 MiB."""
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return buffer.getvalue()


def _kept(page: Page, name: str, at: Locator | None = None) -> None:
    """A picture to be looked at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    if at is not None:
        at.evaluate("part => part.scrollIntoView({block: 'start'})")
        page.wait_for_timeout(300)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_the_server_is_for_this_machine_and_asks_for_its_token(server, page):
    listening = [each for each in server.process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    assert listening
    assert {each.laddr.ip for each in listening} == {"127.0.0.1"}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{server.url.partition('/lab')[0]}/api/contents", timeout=10)
    page.goto(server.url)
    page.locator(".jp-MarkdownViewer h1", has_text="i2v-lab").wait_for()
    assert page.locator(".jp-MarkdownViewer a[href*='06_will_it_fit']").count() >= 1
    page.wait_for_timeout(1000)
    assert page.locator(".jp-toastContainer, .jp-Dialog").count() == 0, "nobody is asked about news"
    _kept(page, "start")


def test_a_moved_slider_is_answered_in_the_background_and_then_at_once(server, page, folder, monkeypatch):
    run_all_cells(page, server, "06_will_it_fit.ipynb")
    explorer = page.locator(".i2v-explorer")
    answer = explorer.locator(".answer:not(.older)")
    answer.wait_for()
    assert answer.get_attribute("data-of") == "64x64x9"
    assert explorer.locator("svg[role=img] line.card").count() == 1
    page.get_by_text("i2v-lab | Idle").wait_for()
    _kept(page, "explorer", explorer)
    slider = explorer.locator(".widget-slider", has_text="size")
    # Nobody has asked this before: the picture stays, the page answers, and then there is another picture.
    slider.locator(".noUi-handle").press("ArrowRight")
    explorer.get_by_text("Forecasting in the background").wait_for()
    assert explorer.locator(".answer.older").get_attribute("data-of") == "64x64x9"
    _kept(page, "explorer-working", explorer)
    card = explorer.locator(".widget-dropdown", has_text="GPU").locator("select")
    for name in ("T4", "H200"):
        card.select_option(name)
        assert page.evaluate(ASKED_OF, name), "the page answers while a forecast is under way"
    answer.wait_for()
    assert answer.get_attribute("data-of") == "128x64x9"
    assert "H200 has" in answer.locator(".verdict").inner_text()
    # Known by now: no forecast to wait for. How quickly, `make bench` measures.
    page.evaluate(WATCH)
    for direction, name in [(-1, "64x64x9"), (1, "128x64x9")]:
        drag_slider(page, slider, direction, options=9)
        page.mouse.up()
        explorer.locator(f".answer:not(.older)[data-of='{name}']").wait_for()
    assert not page.evaluate("window.waited")
    # The same as code, in a cell.
    explorer.get_by_role("button", name="Copy as code").click()
    explorer.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == explorer.locator(".i2v-code textarea").input_value()
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "cache"))
    scope: dict[str, object] = {}
    *body, last = copied.splitlines()
    exec("\n".join(body), scope)
    fit = eval(last, scope)
    assert (fit.gpu, fit.verdict, scope["request"].width) == ("H200", "fits", 128)
    slider.locator(".noUi-handle").press("ArrowRight")  # leaves a forecast under way for the server's end
    explorer.get_by_text("Forecasting in the background").wait_for()


def test_a_dropped_still_becomes_a_video_and_stop_stops(server, page, folder):
    run_all_cells(page, server, "00_generate.ipynb")
    generate = page.locator(".i2v-generate").first
    generate.locator(".i2v-drop").or_(page.locator(".jp-RenderedText[data-mime-type*=error]")).first.wait_for()
    assert page.locator(".jp-RenderedText[data-mime-type*=error]").all_inner_texts() == []
    page.get_by_text("i2v-lab | Idle").wait_for()
    _kept(page, "generate", generate)
    page.locator(".jp-OutputArea svg[aria-label*='Peak of each phase']").wait_for()  # Compare's
    _kept(page, "compare", page.locator(".jp-OutputArea svg[aria-label*='Peak of each phase']"))
    # Above what a connection takes, a picture is scaled down, and anything else refused; the next one works.
    zone, files = generate.locator(".i2v-drop"), generate.locator(".i2v-drop input[type=file]")
    files.set_input_files({"name": "noise.png", "mimeType": "image/png", "buffer": _large_picture()})
    generate.get_by_text("noise.png is selected.").wait_for()
    generate.locator("img.still[alt=noise]").wait_for()
    files.set_input_files({"name": "video.mov", "mimeType": "video/quicktime", "buffer": bytes(7 * 2**20)})
    generate.get_by_text("'video.mov' has 7.0 MiB and is no picture").wait_for()
    content = base64.b64encode(_turned_photo()).decode()
    zone.dispatch_event("drop", {"dataTransfer": page.evaluate_handle(FILE, content)})
    generate.get_by_text("my tower.avif is selected.").wait_for()
    still = generate.locator("img.still[alt=my_tower]")
    still.wait_for()
    assert still.evaluate("part => part.naturalWidth > part.naturalHeight"), "as the pipeline gets it: turned"
    _kept(page, "dropped", generate)
    generate.locator(".widget-dropdown", has_text="size").locator("select").select_option("128x64")
    frames = generate.locator(".widget-slider", has_text="frames").locator(".noUi-handle")
    frames.press("ArrowLeft")
    frames.press("ArrowLeft")
    start, stop = (generate.get_by_title(name, exact=True) for name in ("Generate", "Stop"))
    seed = generate.locator("input[type=number]")
    seed.fill("-5")
    seed.press("Tab")
    generate.get_by_text("seed=-5 is not between 0").wait_for()
    assert seed.input_value() == "-5"
    expect(start).to_be_disabled()
    seed.fill("3")
    seed.press("Tab")
    generate.get_by_text("seed=-5").wait_for(state="detached")
    expect(start).to_be_enabled()
    expect(stop).to_be_disabled()
    start.click()
    generate.locator("td", has_text="denoise stage 1").wait_for()
    expect(stop).to_be_enabled()
    assert page.locator(".i2v-generate line.mark").count() > 0, "phases are marked while it runs"
    video = generate.locator("video")
    video.wait_for()
    assert video.evaluate("part => part.readyState > 1 || new Promise(done => part.onloadeddata = () => done(true))")
    assert video.evaluate("part => [part.videoWidth, part.videoHeight]") == [128, 64]
    assert generate.locator("table", has_text="allocated at end").locator("tbody tr").count() == 7
    assert generate.locator(".verdict").inner_text().startswith("It fits: this machine has")
    generate.get_by_text("Made with random weights").wait_for()
    _kept(page, "generated", generate.locator(".verdict"))
    start.click()
    generate.locator("td", has_text="denoise stage 1").wait_for()
    _kept(page, "generating", generate.locator(".verdict"))
    stop.click()
    generate.get_by_text("Stopped by the user").wait_for()
    expect(video).to_have_count(0)
    expect(start).to_be_enabled()
    _kept(page, "stopped", generate.locator(".verdict"))
    runs = sorted((folder / "build" / "generated").glob("0*"))
    assert [(run / "video.mp4").exists() for run in runs] == [True, False]
    assert read_run(runs[1]).status == FAILED
    assert {path.suffix for path in runs[1].iterdir()} == {".json", ".jsonl"}
    page.get_by_role("button", name="Look for new runs").click()
    page.locator("option", has_text=runs[0].name).first.wait_for(state="attached")


# --- The four views, in both themes and at both widths ---

VIEWS = """from i2v_lab import Compare, Explorer, Generate, I2VRequest, VramMonitor
from i2v_lab.paths import data_dir

still = I2VRequest(image="stills/lighthouse.png", width=64, height=64, frames=9)
explorer = Explorer(still, "ltx-2.3-tiny", "L4", "0.5GiB")
display(explorer)
display(Generate("made", still, "ltx-2.3-tiny", "cpu"))
display(VramMonitor("cpu"))
Compare([data_dir() / "measured"], "nvidia-h200/1024x768x97_1", "nvidia-h200/1024x768x97_escaped_1")"""
BUSY = """import time
while explorer.exploration.question.gpu != "H200":
    time.sleep(0.05)"""
WIDTHS = (1280, 1600)
# What overflows its view or is hidden, and text whose contrast with what is behind it is below 4.5 (WCAG AA); disabled
# controls, and bars and areas of a chart, are exempt.
LOOK = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (part) => {
    for (let at = part; at; at = at.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
      if (a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const view of document.querySelectorAll(".jp-OutputArea-output .i2v-widgets")) {
    const area = view.closest(".jp-OutputArea-output").getBoundingClientRect();
    for (const part of view.querySelectorAll("*")) {
      const box = part.getBoundingClientRect();
      if (!box.width || !box.height || part.closest("[hidden], .noUi-target, video, option")) continue;
      const name = `${part.tagName} ${part.className.baseVal ?? part.className} ${part.textContent.slice(0, 40)}`;
      if (box.right > area.right + 1 || box.left < area.left - 1) found.push(`overflows: ${name}`);
      if (part.closest(":disabled")) continue;
      const own = [...part.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
      const style = getComputedStyle(part);
      if (own && !part.closest("title, style, .jupyter-button.mod-primary")) {
        const colour = part.closest("svg") ? style.fill : style.color;
        const [a, b] = [light(parse(colour)), light(behind(part))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`contrast ${((a + .05) / (b + .05)).toFixed(1)}: ${name}`);
      }
      if (own && part.scrollWidth > part.clientWidth + 1 && style.overflow !== "visible" && part.clientWidth)
        found.push(`cut off: ${name}`);
    }
  }
  return [document.querySelectorAll(".jp-OutputArea-output .i2v-widgets").length, found];
}"""


def test_the_views_are_legible_in_both_themes_and_at_both_widths(server, page):
    cells = [nbformat.v4.new_code_cell(text) for text in (VIEWS, BUSY)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "i2v-lab", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), server.notebooks / "views.ipynb")
    page.set_viewport_size({"width": 1280, "height": 1000})
    run_all_cells(page, server, "views.ipynb")
    explorer = page.locator(".i2v-explorer")
    explorer.locator(".answer:not(.older)").wait_for()
    page.locator(".i2v-generate .verdict").wait_for()
    page.locator(".jp-OutputArea svg[aria-label*='Peak of each phase']").last.wait_for()
    # A view is there, and answers, while the cells behind it run.
    card = explorer.locator(".widget-dropdown", has_text="GPU").locator("select")
    assert page.get_by_text("i2v-lab | Busy").count() == 1
    card.select_option("H200")
    explorer.locator(".answer:not(.older) .verdict", has_text="H200").wait_for()
    page.get_by_text("i2v-lab | Idle").wait_for()
    page.get_by_role("button", name="Start monitor").last.click()
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        page.get_by_role("menuitem", name="Settings", exact=True).click()
        page.locator(".lm-Menu-item", has_text="Theme").first.hover()
        page.locator(".lm-Menu-item", has_text=theme).first.click()
        page.locator(f"body[data-jp-theme-name='{theme}']").wait_for(state="attached")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 1000})
            page.wait_for_timeout(300)
            views, found = page.evaluate(LOOK)
            for number, view in enumerate(page.locator(".jp-OutputArea-output > .i2v-widgets").all()):
                _kept(page, f"view-{number}-{theme.split()[1].lower()}-{width}", view)
            assert views >= 4
            assert found == []
    page.get_by_role("button", name="Stop monitor").last.click()
    # A button under the verdict sets what fits, and the view says what that takes.
    explorer.get_by_role("button", name="Set the budget to").click()
    explorer.locator(".answer:not(.older) .verdict", has_text="It fits: the budget is").wait_for()
    assert "predicted to take" in explorer.locator(".answer").inner_text().lower()
    # A restarted kernel.
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.locator("li[data-command='kernelmenu:restart']").click()
    page.locator(".jp-Dialog button.jp-mod-warn").click()
    page.locator(".i2v-explorer.jupyter-widgets-disconnected").wait_for()
    said = explorer.evaluate("view => getComputedStyle(view, '::before').content")
    assert "run the cell again" in said
    page.get_by_text("i2v-lab | Idle").wait_for()  # a server that is ended while a kernel restarts waits for it
