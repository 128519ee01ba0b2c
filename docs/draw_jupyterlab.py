"""Take the documentation's pictures of JupyterLab, from JupyterLab itself: `make pictures`. Needs Chromium."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from lab_server import LabServer, lab_server
from playwright.sync_api import Page, sync_playwright

from i2v_lab.runs.forecast import forecast_specs
from i2v_lab.studies.placed import base_specs
from i2v_lab.studies.published import study_request

FIGURES = Path(__file__).parent / "figures"
CELLS = {
    "explorer": 'from i2v_lab import Explorer\nExplorer(gpu="RTX 4090")',
    "generate": 'from i2v_lab import Generate\nGenerate("runs", device="cpu")',
}


def take(folder: Path) -> list[Path]:
    """Write the pictures to a folder."""
    forecast_specs(base_specs(study_request("ltx-2.3-22b"), "ltx-2.3-22b"))
    with (
        tempfile.TemporaryDirectory() as place,
        lab_server(Path(place), {}, keep_forecasts=True) as server,
        sync_playwright() as playwright,
    ):
        executable = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 1500})
        page.set_default_timeout(120_000)
        taken = [_explorer(page, server, folder), _generate(page, server, folder)]
        browser.close()
    return taken


def _run_cell(page: Page, server: LabServer, name: str) -> None:
    """A new notebook with one cell, run."""
    import nbformat

    cell = nbformat.v4.new_code_cell(CELLS[name])
    kernel = {"kernelspec": {"name": "python3", "display_name": "i2v-lab", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), server.notebooks / f"{name}.ipynb")
    page.goto(server.page(f"{name}.ipynb"))
    page.get_by_text("i2v-lab | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(f".i2v-{name}").wait_for()


def _explorer(page: Page, server: LabServer, folder: Path) -> Path:
    _run_cell(page, server, "explorer")
    page.locator(".i2v-explorer .answer:not(.older)").wait_for()
    page.wait_for_timeout(500)
    path = folder / "explorer.png"
    page.locator(".i2v-explorer").screenshot(path=path)
    return path


def _generate(page: Page, server: LabServer, folder: Path) -> Path:
    _run_cell(page, server, "generate")
    page.locator(".i2v-generate .verdict").wait_for()
    page.locator(".i2v-generate button", has_text="Generate").click()
    page.locator(".i2v-generate td", has_text="decode audio").wait_for()
    page.wait_for_timeout(1500)
    path = folder / "generate.png"
    page.locator(".i2v-generate").screenshot(path=path)
    return path


if __name__ == "__main__":
    for path in take(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES):
        print(path)
