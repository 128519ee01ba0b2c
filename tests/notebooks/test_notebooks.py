"""What every committed notebook is like, and one whole reproduction."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from i2v_lab.errors import InvalidRequest, ReproduceError
from i2v_lab.reporting.figures import boundaries_figure, save_figure
from i2v_lab.reporting.results import read_results
from i2v_lab.reporting.tables import before_after_table, published_table
from i2v_lab.reproduce import NOTEBOOKS, check_parameters, execute, find_notebooks, reproduce

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


def test_a_parameter_that_is_not_declared_and_an_unknown_notebook_are_refused():
    with pytest.raises(InvalidRequest, match=r"03_no_grad_fix.ipynb declares no parameter 'widht'; use one of: model"):
        check_parameters(ALL[0], {"widht": 64})
    with pytest.raises(InvalidRequest, match="notebook='nothing' does not exist; use one of: 03_no_grad_fix"):
        find_notebooks(["nothing"])


def test_a_notebook_that_fails_keeps_its_partial_output_and_the_rest_run(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    sources = {"a_fails": "print('so far')\n1 / 0", "b_dies": "import os\nos._exit(1)", "c_works": "print('well')"}
    for name, source in sources.items():
        cells = [
            nbformat.v4.new_markdown_cell(f"# {name}"),
            nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(source),
        ]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")
    monkeypatch.setattr("i2v_lab.reproduce.NOTEBOOKS", folder)
    with pytest.raises(
        ReproduceError, match=r"2 of 3 .* a_fails.ipynb: ZeroDivisionError: .*; b_dies.ipynb: DeadKernel"
    ):
        reproduce(out=tmp_path / "out")
    assert not list((tmp_path / "out" / "notebooks").glob(".*"))
    pages = {path.stem: path.read_text() for path in (tmp_path / "out" / "site").iterdir()}
    assert "so far" in pages["a_fails"]
    assert "well" in pages["c_works"]
    assert "failed" in pages["index"]


def test_a_folder_without_notebooks_and_a_broken_notebook_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("i2v_lab.reproduce.NOTEBOOKS", tmp_path)
    with pytest.raises(InvalidRequest, match="there are no notebooks in .*; they come with a checkout"):
        reproduce(out=tmp_path / "out")
    (tmp_path / "a.ipynb").write_text("{not json")
    with pytest.raises(InvalidRequest, match=r"a.ipynb cannot be read as a notebook \(.*\); restore it"):
        reproduce(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_kernel_is_of_this_interpreter_even_where_another_claims_its_name(tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "other", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    cells = [nbformat.v4.new_code_cell("import sys\nprint(sys.executable)")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "a.ipynb")
    outcome = execute(tmp_path / "a.ipynb", {}, tmp_path / "out" / "a.ipynb")
    assert outcome.error is None
    assert nbformat.read(outcome.notebook, as_version=4).cells[0].outputs[0].text.strip() == sys.executable
