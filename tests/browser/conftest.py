"""The system's Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from chromium import NAMES, find_chromium, launch_chromium
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        reason = f"none of {', '.join(NAMES)} is on the PATH; apt-get install chromium"
        if os.environ.get("I2V_LAB_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = launch_chromium(playwright, executable)
        yield browser
        browser.close()
