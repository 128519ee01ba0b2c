"""The answer page in Chromium: what somebody finds who has never seen it, by how many clicks, on which screens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from i2v_lab.capacity.cards import gpu_table
from i2v_lab.reporting.site.answer import render_answer
from i2v_lab.units import GIB

CARDS = gpu_table().sort_values("memory_bytes")
ASKED = "RTX 3060 12GB"
MODELS = ("cogvideox-5b-i2v", "ltx-2.3-22b", "wan-2.2-i2v-a14b")


def _way(name: str, gib: float, seconds: float, options: str = "") -> dict[str, object]:
    times = dict.fromkeys([*CARDS["gpu"], "H100 80GB"], seconds)
    del times["T4"]  # whose rates are not known
    size = {"needed_bytes": int(gib * GIB), "peak_bytes": int((gib - 1) * GIB), "peak_phase": "denoise_stage_1"}
    return {"name": name, **size, "host_bytes": 20 * GIB if options else 0, "options": options, "seconds": times}


def _answer() -> dict[str, object]:
    ways = [
        _way("resident", 70, 100.0),
        _way("offload-model", 33, 200.0, "--offload model"),
        _way("offload-group-leaf_stream", 9.5, 300.0, "--offload group-leaf --offload-stream"),
    ]
    points = []
    for model in MODELS:
        for width, height in ((832, 480), (1280, 704)):
            best = {
                gpu: next((i for i, way in enumerate(ways) if way["needed_bytes"] <= size), None)
                for gpu, size in zip(CARDS["gpu"], CARDS["memory_bytes"], strict=True)
            }
            shape = {"model": model, "width": width, "height": height, "frames": 81, "placed": model.startswith("ltx")}
            points.append({**shape, "ways": ways, "best": best, "least_bytes": int(9.5 * GIB)})
    cards = [
        {"name": gpu, "memory_bytes": int(size), "rates": "" if gpu == "T4" else "published"}
        for gpu, size in zip(CARDS["gpu"], CARDS["memory_bytes"], strict=True)
    ]
    caveat = "not measured: from published rates"
    rest = {"models": list(MODELS), "unavailable": {}, "reference": "H100 80GB", "caveat": caveat}
    return {"cards": cards, "points": points, **rest}


@pytest.fixture(scope="module")
def fit_page(tmp_path_factory) -> Path:
    return render_answer(_answer(), tmp_path_factory.mktemp("site"), {"versions": "these"})


@pytest.fixture
def page(browser: Browser, fit_page: Path) -> Page:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.wrong = []
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.on(
        "request", lambda asked: page.wrong.append(asked.url) if not asked.url.startswith(("file:", "data:")) else 0
    )
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(fit_page.as_uri())
    yield page
    assert page.wrong == []
    page.close()


def test_the_best_placement_for_a_card_is_found_in_three_choices(page, fit_page):
    """By somebody who has never seen the project: each choice is one click on a list and one on its entry at most."""
    page.get_by_label("Card", exact=True).select_option(ASKED)
    page.get_by_label("Model", exact=True).select_option("wan-2.2-i2v-a14b")
    page.get_by_label("Size", exact=True).select_option("832x480")
    result = page.locator("#result")
    for words in (ASKED, "offload-group-leaf_stream", "9.50 GiB", "20.00 GiB", "5 min", "not measured"):
        assert words in result.inner_text()
    assert "--width 832 --height 480 --frames 81 --offload group-leaf --offload-stream" in result.inner_text()
    assert page.locator("#line").inner_text() == f"Every model on {ASKED}"
    kept = page.url  # the address keeps the choice
    other = page.context.browser.new_page()
    other.goto(kept)
    assert other.locator("#result").inner_text() == result.inner_text()
    other.close()
    # Without any choice but the card, its own line has the answer.
    row = page.locator("#every-model tr", has_text="wan-2.2-i2v-a14b").filter(has_text="832x480")
    assert "offload-group-leaf_stream" in row.inner_text()


def test_the_keyboard_alone_a_typed_size_and_what_was_not_forecast(page):
    page.get_by_label("Card", exact=True).focus()
    page.keyboard.press("End")  # another: type its memory
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("40")
    result = page.locator("#result")
    assert "fits 40 GiB: offload-model" in result.inner_text()
    assert "3 min on an H100 80GB" in result.inner_text()
    page.keyboard.press("Control+A")
    page.keyboard.type("9")
    assert "needs 9.50 GiB at least" in result.inner_text()
    page.keyboard.press("Control+A")
    page.keyboard.type("-1")
    assert "no size" in result.inner_text()
    page.get_by_label("Card", exact=True).select_option("T4")
    assert "not known" in result.inner_text()
    page.get_by_label("Frames", exact=True).select_option("another")
    assert 'i2v-lab fit --gpu "T4" --model cogvideox-5b-i2v' in result.inner_text()
    assert "GiB" not in result.inner_text()  # nothing is interpolated
    page.get_by_label("Card", exact=True).select_option("RTX 4050 Laptop 6GB")
    page.get_by_label("Model", exact=True).select_option("ltx-2.3-22b")
    assert "does not fit" in result.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_whole_on_every_screen(page, fit_page, tmp_path, width, scheme):
    assert fit_page.stat().st_size < 3 * 2**20
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for table in page.locator(".scroll").all():
        assert table.bounding_box()["width"] <= width
    page.screenshot(path=Path(os.environ.get("I2V_LAB_SCREENSHOTS", tmp_path)) / f"fit-{width}-{scheme}.png")
