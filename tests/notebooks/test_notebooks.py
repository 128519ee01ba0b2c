"""What every committed notebook is like, and one whole reproduction."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from i2v_lab.reporting.figures import boundaries_figure, save_figure
from i2v_lab.reporting.results import read_results
from i2v_lab.reporting.tables import before_after_table, published_table
from i2v_lab.reproduce import NOTEBOOKS, reproduce

ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


def test_the_notebooks_are_all_there():
    assert [path.name for path in ALL] == ["03_no_grad_fix.ipynb"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_committed_notebook_is_thin_and_has_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1
    assert not re.search(r"^\s*(def|class|plt\.)", "\n".join(cell.source for cell in code), re.MULTILINE)
    assert notebook.cells[0].source.startswith("# ")
    assert "**Claim.**" in notebook.cells[0].source
    assert code[-1].source.startswith("record(")


def _phases(escaped: int = 300) -> pd.DataFrame:
    rows = [
        {"decode_scope": scope, "phase": phase, "seconds": 1.0, "peak_bytes": peak * 2**20}
        for scope, peaks in (("escaped", (100, escaped)), ("no_grad", (100, 120)))
        for phase, peak in zip(("encode_prompt", "decode_video"), peaks, strict=True)
    ]
    table = pd.DataFrame(rows)
    table["peak_so_far_bytes"] = table.groupby("decode_scope")["peak_bytes"].cummax()
    return table


def test_tables_and_figures_say_what_the_measurements_say(tmp_path):
    assert before_after_table(_phases()).loc["whole run"].to_list() == ["300.0 MiB", "120.0 MiB", "2.00 s", "2.00 s"]
    assert published_table(_phases(), "m").loc["measured here: m"].to_list() == ["300.0 MiB", "120.0 MiB", "2.50"]
    svg, png = save_figure(boundaries_figure(_phases()), tmp_path, "a")
    again, _ = save_figure(boundaries_figure(_phases()), tmp_path, "b")
    other, _ = save_figure(boundaries_figure(_phases(escaped=400)), tmp_path, "c")
    assert svg.read_bytes() == again.read_bytes() != other.read_bytes()
    assert png.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg", "c.png", "c.svg"]


def test_reproduce_leaves_everything_and_the_results_hold(reproduced):
    results = read_results(reproduced / "notebooks" / "03_no_grad_fix.ipynb")
    assert results["frames_identical"] is True
    assert results["decode_peak_ratio"] > 1.5
    assert results["excess_phase"] == "decode_video"
    assert results["largest_difference_elsewhere_bytes"] == 0
    assert results["verdict"] in ("confirmed", "refined")
    assert results["inference_mode_refused"] is True
    made = {str(path.relative_to(reproduced)) for path in reproduced.rglob("*") if path.is_file()}
    assert made == {
        "figures/03_no_grad_fix_boundaries.png",
        "figures/03_no_grad_fix_boundaries.svg",
        "notebooks/03_no_grad_fix.ipynb",
        "site/03_no_grad_fix.html",
        "site/index.html",
        "stamps/03_no_grad_fix.json",
        "stamps/index.json",
        "tables/03_no_grad_fix_phases.csv",
        "tables/03_no_grad_fix_published.csv",
        "videos/escaped.mp4",
        "videos/no_grad.mp4",
    }
    page, index = ((reproduced / "site" / name).read_text() for name in ("03_no_grad_fix.html", "index.html"))
    assert f"{results['peak_ratio']:.2f} times as high" in page
    assert results["verdict"] in index
    for html in (page, index):
        assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']https?:", html)
        assert str(Path.cwd()) not in re.sub(r"<details>.*?</details>", "", html, flags=re.DOTALL)
