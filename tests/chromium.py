"""The system's Chromium, by Playwright, and what a person does in it with a notebook."""

from __future__ import annotations

import os
import shutil

from lab_server import LabServer
from playwright.sync_api import Browser, Locator, Page, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """Its executable, if there is one on the PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def launch_chromium(playwright: Playwright, executable: str) -> Browser:
    """Start it, headless."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # as root it has no sandbox and refuses to start with one
    return playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"] if root else [])


def run_all_cells(page: Page, server: LabServer, notebook: str) -> None:
    """Open a notebook in JupyterLab and run it from its menu."""
    page.goto(server.page(notebook))
    page.locator(".jp-Notebook-cell").first.wait_for()
    page.get_by_text("i2v-lab | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def drag_slider(page: Page, slider: Locator, direction: int, options: int) -> None:
    """Take a slider's handle to the next option, and hold it there."""
    handle, whole = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + direction * whole["width"] / (options - 1), y, steps=3)
