"""How quickly commands and views answer: wall-clock times beside the most that they may take. About a minute.

    python benchmarks/latency.py

Each is the least of a few repetitions, so that a busy machine disturbs little. Ends with status 1 if one takes too
long. What happens in pages and in JupyterLab is timed in a real Chromium and left out where there is none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chromium import drag_slider, find_chromium, launch_chromium, run_all_cells
from endurance import change_controls
from lab_server import lab_server
from made_notebooks import make_notebooks
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.table import Table
from small_notebooks import SMALL

from i2v_lab.paths import CACHE_VARIABLE
from i2v_lab.reporting.site.render import render_site

REPETITIONS = 3
PATIENCE_MS = 120_000
FORECAST = [sys.executable, "-m", "i2v_lab.cli", "forecast", "--model", "ltx-2.3-tiny", "--json"]
FORECAST += ["--width", "64", "--height", "64", "--frames", "9"]

# From the release of a slider to the frame in which the new picture stands. `name`: the picture's, in data-of.
RELEASE_TO_PICTURE = """(name) => new Promise((resolve) => {
  let released = null;
  document.addEventListener("mouseup", () => { released = performance.now(); }, {once: true, capture: true});
  const look = () => {
    const answer = document.querySelector(".i2v-explorer .answer:not(.older)");
    if (released !== null && answer && answer.dataset.of === name) {
      requestAnimationFrame(() => resolve(performance.now() - released));
    } else requestAnimationFrame(look);
  };
  look();
})"""

# From the choice of a card to the code that asks for it.
CHOICE_TO_CODE = """(card) => new Promise((resolve) => {
  const look = () => document.querySelector(".i2v-explorer .i2v-code textarea").value.includes(`"${card}"`)
    ? resolve(true) : requestAnimationFrame(look);
  look();
})"""

PAINTED = """() => new Promise((resolve) => new PerformanceObserver((list) => resolve(list.getEntries()[0].startTime))
  .observe({type: "paint", buffered: true}))"""


@dataclass(frozen=True)
class Timed:
    """What was timed, the times in seconds, and the most that the least of them may be."""

    what: str
    seconds: list[float]
    most_s: float


def imports() -> Timed:
    def once() -> float:
        command = [sys.executable, "-X", "importtime", "-c", "import i2v_lab"]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(child.stderr.splitlines()[-1].split("|")[1]) / 1e6

    return Timed("import i2v_lab", [once() for _ in range(REPETITIONS)], 0.3)


def cached_forecasts() -> Timed:
    def once() -> float:
        start_s = time.perf_counter()
        subprocess.run(FORECAST, capture_output=True, check=True)
        return time.perf_counter() - start_s

    once()
    return Timed("i2v-lab forecast, cached", [once() for _ in range(REPETITIONS)], 2.0)


def known_answers() -> Timed:
    changes = change_controls(20)
    return Timed("Explorer: a control changes, forecast known", [each / 1000 for each in changes.known_ms], 0.15)


def in_jupyterlab(executable: str) -> Iterator[Timed]:
    name = "06_will_it_fit"
    parameters = {name: {**SMALL[name], "model": "ltx-2.3-tiny", "device": "cpu", "source": "forecast"}}
    with (
        tempfile.TemporaryDirectory() as folder,
        lab_server(Path(folder), parameters) as server,
        sync_playwright() as playwright,
    ):
        browser = launch_chromium(playwright, executable)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        run_all_cells(page, server, f"{name}.ipynb")
        explorer = page.locator(".i2v-explorer")
        answer = explorer.locator(".answer:not(.older)")
        answer.wait_for()
        page.get_by_text("i2v-lab | Idle").wait_for()
        slider = explorer.locator(".widget-slider", has_text="size")
        slider.locator(".noUi-handle").press("ArrowRight")
        explorer.get_by_text("Forecasting in the background").wait_for()
        chosen_s = []
        for card in ("T4", "H200"):
            start_s = time.perf_counter()
            explorer.locator(".widget-dropdown", has_text="card").locator("select").select_option(card)
            page.evaluate(CHOICE_TO_CODE, card)
            chosen_s.append(time.perf_counter() - start_s)
        yield Timed("JupyterLab: another card while a forecast runs", chosen_s, 2.0)
        answer.wait_for()
        released_s = []
        for direction, size in [(-1, "64x64x9"), (1, "128x64x9")] * REPETITIONS:
            drag_slider(page, slider, direction, options=9)
            page.evaluate(f"() => {{ window.taken = ({RELEASE_TO_PICTURE})({size!r}); }}")
            page.mouse.up()
            released_s.append(page.evaluate("() => window.taken") / 1000)
        yield Timed("JupyterLab: from a slider's release to the picture", released_s, 0.15)
        browser.close()


def first_paint(executable: str) -> Timed:
    """Of the slowest page of the site that `make reproduce` left, or of pages made for the tests."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        site = Path("build/site")
        if not (site / "index.html").exists():
            site = render_site(make_notebooks(Path(folder) / "notebooks"), [], Path(folder) / "site").parent
        browser = launch_chromium(playwright, executable)
        seconds = {}
        for path in sorted(site.glob("*.html")):
            seconds[path.name] = []
            for _ in range(REPETITIONS):
                page = browser.new_page()
                page.goto(path.absolute().as_uri())
                seconds[path.name].append(page.evaluate(PAINTED) / 1000)
                page.close()
        browser.close()
        slowest = max(seconds, key=lambda name: min(seconds[name]))
        return Timed(f"first paint of {slowest}, the slowest page", seconds[slowest], 1.0)


def main() -> None:
    console = Console(width=120)
    console.print("How quickly commands and views answer: about a minute")
    table = Table("", "least s", "most s", "allowed s", "")
    slow = False
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault(CACHE_VARIABLE, cache)
        timed = [imports(), cached_forecasts(), known_answers()]
        executable = find_chromium()
        if executable is None:
            console.print("There is no Chromium: pages and JupyterLab are left out")
        else:
            timed += [first_paint(executable), *in_jupyterlab(executable)]
    for each in timed:
        least, late = min(each.seconds), min(each.seconds) > each.most_s
        table.add_row(each.what, f"{least:.3f}", f"{max(each.seconds):.3f}", f"{each.most_s}", "too slow" * late)
        slow |= late
    console.print(table)
    sys.exit(slow)


if __name__ == "__main__":
    main()
