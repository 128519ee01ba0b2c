"""Draw the answer page of `make reproduce` for the README: `make pictures`."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chromium import find_chromium, launch_chromium

PICTURE = Path(__file__).parent / "figures" / "fit.png"
CHOSEN = {"gpu": "RTX 3060 12GB", "model": "ltx-2.3-22b", "size": "1024x768", "frames": "97"}


def main(page_file: Path) -> None:
    """Write the picture of the choice that the README shows the command of."""
    executable = find_chromium()
    if executable is None or not page_file.is_file():
        sys.exit(f"Chromium and '{page_file}' are needed: make reproduce")
    with sync_playwright() as playwright:
        browser = launch_chromium(playwright, executable)
        page = browser.new_page(viewport={"width": 1100, "height": 560}, device_scale_factor=1.2)
        page.goto(f"{page_file.absolute().as_uri()}#{urlencode(CHOSEN)}")
        page.get_by_text("fits RTX 3060 12GB").first.wait_for()
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/site/fit.html"))
