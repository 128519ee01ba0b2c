"""What every committed notebook is like, every one from every source, and what its last cell must say."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from shared_fixtures import made_once
from shared_kernel import SharedKernel, shared_kernel
from small_notebooks import NAMES, SIZES, SMALL

import i2v_lab
from i2v_lab.paths import data_dir
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.reporting.results import read_results
from i2v_lab.reporting.site.render import render_site
from i2v_lab.reproduce.run import NOTEBOOKS
from i2v_lab.runs.store import Run, RunWriter, read_run

pytestmark = pytest.mark.xdist_group("reproduced")

GIB = 2**30


def test_the_notebooks_are_all_there():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_is_thin_has_no_outputs_and_no_measured_figure(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1
    parameters = next(cell.source for cell in code if cell.metadata.get("tags") == ["parameters"])
    assert all(re.match(r"\w+: \w+ = .+  # \w", line) for line in parameters.splitlines())
    assert parameters.startswith('source: str = "forecast"')
    after = code[[cell.metadata.get("tags") for cell in code].index(["parameters"]) + 1]
    assert after.source.splitlines()[-1] == "check_parameters(globals())"  # papermill's cell of values comes before it
    sources = "\n".join(cell.source for cell in code)
    assert not re.search(r"^\s*(def|class|for|plt\.|np\.)", sources, re.MULTILINE)
    assert notebook.cells[0].source.startswith("# ")
    assert "**Claim.**" in notebook.cells[0].source
    assert code[-1].source == "record(**results)"
    for cell in notebook.cells:
        assert not re.search(r"\d\s*(GiB|MiB|GB|seconds|s\b)", cell.source), cell.source


# --- Every notebook from every source ---


@pytest.fixture(scope="module")
def kernel(_cache, forked_kernels) -> Iterator[SharedKernel]:
    """A kernel for many notebooks; ``reproduced`` executes each in one of its own.

    Its forecasts run in itself, as on a machine with one core: their processes' imports cost more here.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # the kernel inherits it
    try:
        with shared_kernel() as kernel:
            os.sched_setaffinity(0, before)
            yield kernel
    finally:
        os.sched_setaffinity(0, before)


def _execute(name: str, out: Path, parameters: Mapping[str, Any], kernel: SharedKernel) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    executed = out / f"{name}.ipynb"
    kernel.execute(NOTEBOOKS / executed.name, executed, {**parameters, "out_dir": str(out)})
    return read_results(executed)


def _execute_alone(name: str, out: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """In a kernel that has imported nothing."""
    with shared_kernel() as kernel:
        return _execute(name, out, parameters, kernel)


CHECKS: dict[str, dict[str, Any]] = {  # what the last cell says of the tiny model, measured or forecast
    "00_generate": {"verdict": "confirmed"},
    "01_tiling_dead_end": {"verdict": "refined"},
    "02_peak_localization": {"largest_difference_elsewhere_bytes": 0},
    "03_no_grad_fix": {"frames_identical": True, "inference_mode_refused": True, "guarded_saved_bytes": 0},
    "04_flat_across_resolution": {"pixel_growth": 2.0},
    "05_leak": {"verdict": "refined"},
    "06_will_it_fit": {"verdict": "no data"},  # no run of the tiny model on a GPU is recorded
    "07_what_holds_the_peak": {"verdict": "refined", "techniques": 3},  # tiny weights are little to take away
}


def check(name: str, results: Mapping[str, Any]) -> None:
    """Assert the named results that hold for the tiny model."""
    for key, value in CHECKS[name].items():
        assert results[key] == value, (name, key, results)
    if name == "01_tiling_dead_end":
        assert results["retained_change"] > 0.1, "finer tiles retain more"
        assert results["finest_voxel_ratio"] > 2
    if name == "02_peak_localization":
        assert results["verdict"] == "confirmed"
        assert results["late_excess_bytes"] > 0.3 * results["whole_peak_bytes"]
    if name == "03_no_grad_fix":
        assert results["decode_peak_ratio"] > 1.5
        assert results["excess_phase"] == "decode_video"
        assert results["guarded_peak_bytes"] == results["no_grad_peak_bytes"]
        assert (results["others"], results["others_lazy"], results["others_leaking"]) == (4, 2, 3)
        assert results["others_no_grad_bytes"] == results["others_guarded_bytes"] == 0
    if name == "05_leak":
        assert results["consumed_escaped_growth_bytes"] == results["consumed_no_grad_growth_bytes"] < 1024
        assert results["open_escaped_growth_bytes"] > 1.25 * results["open_no_grad_growth_bytes"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_measured_here_the_named_results_hold(name, reproduced):
    results = read_results(reproduced / "notebooks" / f"{name}.ipynb")
    assert (results["source"], results["model"], results["device"]) == ("measure", "ltx-2.3-tiny", "cpu")
    check(name, results)


def test_a_reproduction_leaves_figures_tables_videos_and_pages(reproduced):
    made = {str(path.relative_to(reproduced)) for path in reproduced.rglob("*") if path.is_file()}
    assert {f"site/{name}.html" for name in [*NAMES, "index"]} <= made
    for figure in (
        "01_tiling_dead_end_peaks",
        "02_peak_localization_timeline",
        "03_no_grad_fix_graph",
        "05_leak_allocated",
        "06_will_it_fit_map",
        "07_what_holds_the_peak_waterfall",
        "07_what_holds_the_peak_frontier",
    ):
        assert {f"figures/{figure}.{suffix}" for suffix in ("svg", "png", "csv")} <= made
    assert {"videos/00_generate_video.mp4", "videos/03_no_grad_fix_no_grad.mp4"} <= made
    assert "tables/03_no_grad_fix_before_after.csv" in made
    for name in [*NAMES, "index"]:
        html = (reproduced / "site" / f"{name}.html").read_text()
        assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']https?:", html)
        shown = re.sub(r"<(details|script)\b.*?</\1>", "", html, flags=re.DOTALL)
        assert str(Path.cwd()) not in shown


VIEWS = {  # what each of a notebook's views shows, in their order
    "00_generate": ['class="still"', 'aria-label="Memory in use', 'aria-label="Peak of each phase of'],
    "06_will_it_fit": ['data-of="64x64x9"'],
}


@pytest.mark.parametrize("name", VIEWS)
def test_headless_every_widget_is_a_static_page(name, reproduced):
    cells = nbformat.read(reproduced / "notebooks" / f"{name}.ipynb", as_version=4).cells
    bundles = [output.data for cell in cells for output in cell.get("outputs", []) if "data" in output]
    views = [bundle for bundle in bundles if "i2v-view" in bundle.get("text/html", "")]
    assert [next(word for word in VIEWS[name] if word in view["text/html"]) for view in views] == VIEWS[name]
    assert all(set(bundle) <= {"text/html", "text/plain"} for bundle in views)
    page = (reproduced / "site" / f"{name}.html").read_text()
    assert all(word in page for word in VIEWS[name])
    assert "vnd.jupyter.widget" not in page


@pytest.mark.parametrize("name", NAMES)
def test_forecast_for_the_tiny_model_the_named_results_are_there(name, reproduced, kernel):
    asked = {**SMALL[name], **SIZES, "source": "forecast", "model": "ltx-2.3-tiny", "device": "cpu"}
    results = _execute(name, reproduced, asked, kernel)  # beside the measured runs, which need not be made again
    assert (results["source"], results["device"]) == ("forecast", "forecast")
    assert results["finding"]
    if name in ("02_peak_localization", "03_no_grad_fix"):  # on a card the decoder's peak is its convolutions' too
        assert results["largest_difference_elsewhere_bytes"] == 0
        assert results["verdict"] in ("confirmed", "refined")


@pytest.fixture(scope="module")
def recorded(session_folder, reproduced, kernel) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Every notebook from the records of the package, and their results: made once, whichever processes ask."""
    small = {key: value for key, value in SMALL["03_no_grad_fix"].items() if key.startswith("small_")}
    extra: dict[str, dict[str, Any]] = {
        "03_no_grad_fix": small,
        "06_will_it_fit": {"judged": 1, "published": SMALL["06_will_it_fit"]["published"]},
        "07_what_holds_the_peak": {"others": ["ltx-pipelines"], "sizes": ["2048x1536"]},
    }

    def make(out: Path) -> None:
        shutil.copytree(reproduced / "runs", out / "runs")
        for name in NAMES:
            _execute(name, out, {"source": "recorded", "device": "cpu", **extra.get(name, {})}, kernel)

    out = made_once(session_folder / "recorded", make)
    return out, {name: read_results(out / f"{name}.ipynb") for name in NAMES}


def test_from_the_committed_records_the_notebooks_say_this_of_full_size(recorded):
    _, results = recorded
    assert {each["source"] for each in results.values()} == {"recorded"}
    assert {each["model"] for each in results.values()} == {"ltx-2.3-22b"}
    fix = results["03_no_grad_fix"]
    assert fix["device"] == "NVIDIA H200"
    assert fix["verdict"] == "confirmed"
    assert fix["escaped_peak_bytes"] / GIB == pytest.approx(102.38, rel=1e-3)
    assert fix["no_grad_peak_bytes"] / GIB == pytest.approx(23.68, rel=1e-3)
    assert fix["peak_ratio"] == pytest.approx(4.32, rel=5e-3)
    assert results["00_generate"]["peak_phase"] == "encode_prompt"
    assert results["00_generate"]["verdict"] == "refined"  # the distilled transformer stays between the stages
    assert results["02_peak_localization"]["verdict"] == "confirmed"
    assert results["02_peak_localization"]["gap_bytes"] / GIB == pytest.approx(78.70, rel=1e-3)
    flat = results["04_flat_across_resolution"]
    assert flat["verdict"] == "refined"
    assert flat["peak_growth"] == pytest.approx(1.11, rel=5e-3)
    assert flat["decode_growth"] == pytest.approx(1.66, rel=5e-3)
    assert flat["largest_peak_phase"] == "denoise_stage_2"
    assert results["06_will_it_fit"]["worst_error"] < 0.03
    held = results["07_what_holds_the_peak"]
    assert held["device"] == "NVIDIA H100 80GB HBM3"
    assert (held["verdict"], held["techniques"]) == ("confirmed", 9)
    assert held["first_peak_bytes"] / GIB == pytest.approx(26.29, rel=1e-3)
    assert held["last_peak_bytes"] / GIB == pytest.approx(3.18, rel=1e-3)


# --- What a page shows is what the records say ---


def _rewrite(run: Run, factor: float) -> None:
    """The same run with other peaks, well-formed and with the right hash."""
    shutil.rmtree(run.folder)
    with RunWriter(run.folder, run.metadata) as writer:
        for phase in run.of(PhaseRecord):
            peak_bytes = round(phase.peak_bytes * factor)
            writer.append(replace(phase, peak_bytes=peak_bytes, peak_so_far_bytes=peak_bytes))


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A copy of the package and its data, which the kernels of this test import."""
    shutil.copytree(Path(i2v_lab.__file__).parent, tmp_path / "src" / "i2v_lab")
    shutil.copytree(data_dir(), tmp_path / "data")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "src"))
    return tmp_path


def _page(executed: Path, folder: Path) -> str:
    render_site([executed], [], folder)
    html = (folder / f"{executed.stem}.html").read_text()
    return re.sub(r"<footer.*?</footer>", "", html, flags=re.DOTALL)


def test_other_records_make_another_page(package, recorded):
    out, before = recorded
    for folder in (package / "data" / "measured" / "nvidia-h200").glob("1024x768x97_escaped*"):  # repeats among them
        _rewrite(read_run(folder), 1.5)
    name = "02_peak_localization"
    after = _execute_alone(name, package / "out", {"source": "recorded"})
    assert after["whole_peak_bytes"] == round(1.5 * before[name]["whole_peak_bytes"])
    old, new = (_page(folder / f"{name}.ipynb", folder / "site") for folder in (out, package / "out"))
    figure = f"{before[name]['whole_peak_bytes'] / GIB:.2f} GiB"
    assert figure in old
    assert figure not in new
    assert f"{after['whole_peak_bytes'] / GIB:.2f} GiB" in new


def test_without_records_a_notebook_says_so_and_does_not_fail(package):
    for card in ("nvidia-h200", "nvidia-h100"):
        shutil.rmtree(package / "data" / "measured" / card)
    results = _execute_alone("02_peak_localization", package / "out", {"source": "recorded"})
    assert results["verdict"] == "no data"
    page = _page(package / "out" / "02_peak_localization.ipynb", package / "out" / "site")
    assert "has no record of 1024x768x97_escaped, 1024x768x97" in page
    assert "There is no record to show here" in page


def test_a_notebook_whose_study_is_broken_fails(package):
    study = package / "src" / "i2v_lab" / "studies" / "localization.py"
    text = study.read_text()
    study.write_text(
        text.replace("SCOPES = (DecodeScope.ESCAPED, DecodeScope.NO_GRAD)", "SCOPES = (DecodeScope.NO_GRAD,) * 2")
    )
    assert study.read_text() != text
    with pytest.raises((papermill.PapermillExecutionError, AssertionError)):
        check("02_peak_localization", _execute_alone("02_peak_localization", package / "out", {"source": "recorded"}))
