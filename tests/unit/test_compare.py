"""What ``compare`` finds between two runs, two forecasts, and two versions of a library."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from i2v_lab import compare_runs, forecast, profile_call
from i2v_lab.cli.app import app
from i2v_lab.errors import InvalidRequest, MeasureError, RecordError, RunnerUnavailable
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.reporting.growth import Tolerance
from i2v_lab.runs.provenance import run_metadata
from i2v_lab.runs.store import FORECAST, RunWriter, read_run
from i2v_lab.runs.versions import forecast_plan_under, installed_beside, main, unmet_requirements
from i2v_lab.units import MIB

PLANTED = 100 * MIB


class Block(torch.nn.Module):
    """A layer that may allocate so many bytes more while it runs."""

    def __init__(self, extra_bytes: int = 0) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)
        self.extra_bytes = extra_bytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        extra = torch.zeros(self.extra_bytes // 4, device=x.device)
        return self.linear(x) + extra.sum()


def _net(*extra_bytes: int) -> torch.nn.Module:
    return torch.nn.Sequential(*(Block(each) for each in extra_bytes))


def _folder(path: Path, result: object) -> Path:
    with RunWriter(path, run_metadata(FORECAST, model="net")) as writer:
        for record in result.records:
            writer.append(record)
    return path


def _compare(*arguments: object) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments), "--json"], standalone_mode=False)
    assert result.exception is None or result.exit_code == 1, result.output
    return result.return_value or result.exit_code, json.loads(result.stdout)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Two runs, and two forecasts, the second of each with 100 MiB more in its second block."""
    top = tmp_path_factory.mktemp("pairs")
    x = torch.ones(4, 64)
    with torch.no_grad():
        for name, planted in (("run", 0), ("grown", PLANTED)):
            profile_call(_net(0, planted, 0), x, run_dir=top / name)
        forecasts = [
            _folder(top / f"forecast-{planted}", forecast(_net(0, planted, 0), x, device="cuda"))
            for planted in (0, PLANTED)
        ]
    return {"runs": (top / "run", top / "grown"), "forecasts": (forecasts[0], forecasts[1])}


@pytest.mark.parametrize("kind", ["runs", "forecasts"])
def test_a_planted_regression_is_found_with_its_phase_module_and_operator(pairs, kind):
    status, values = _compare(*pairs[kind])
    assert status == 1
    assert values["grown"] is True
    (compared,) = values["comparisons"]
    assert compared["grown"] == ["call"]
    phase, module, operator = compared["phases"][0], compared["modules"][0], compared["operators"][0]
    for row in (phase, module, operator):
        assert abs(row["difference_bytes"] - PLANTED) < MIB  # without it, the peak is at another moment
        assert row["phase"] == "call"
    assert module["module"] == "Sequential.1"
    assert (operator["module"], operator["operator"]) == (module["module"], "aten.zeros")
    assert [row["difference_bytes"] for row in compared["modules"]] == sorted(
        (row["difference_bytes"] for row in compared["modules"]), reverse=True
    )
    status, values = _compare(*reversed(pairs[kind]))
    assert (status, values["grown"], values["comparisons"][0]["grown"]) == (0, False, [])


@pytest.mark.parametrize(
    ("tolerance", "status"), [("0", 1), ("99MiB", 1), ("101MiB", 0), ("1%", 1), ("1000000%", 0), ("1GiB", 0)]
)
def test_a_tolerance_is_of_bytes_or_of_the_first_run(pairs, tolerance, status):
    assert _compare(*pairs["runs"], "--tolerance", tolerance)[0] == status


def test_equal_runs_have_not_grown_and_nothing_is_listed(pairs):
    status, values = _compare(pairs["runs"][0], pairs["runs"][0])
    (compared,) = values["comparisons"]
    assert status == 0
    assert compared["modules"] == compared["operators"] == compared["grown"] == []
    assert compared["differs"] == {}
    text = CliRunner().invoke(app, ["compare", *map(str, pairs["runs"])], standalone_mode=False)
    assert "+100.0 MiB" in text.output
    assert "aten.zeros" in text.output


def test_folders_of_runs_are_compared_run_by_run(pairs, tmp_path):
    first, second = pairs["runs"]
    for side, runs in (("a", (first, first)), ("b", (first, second))):
        for name, run in zip("xy", runs, strict=True):
            shutil.copytree(run, tmp_path / side / name)
    status, values = _compare(tmp_path / "a", tmp_path / "b")
    assert status == 1
    assert {each["run"]: each["grown"] for each in values["comparisons"]} == {"x": [], "y": ["call"]}
    shutil.rmtree(tmp_path / "b" / "x")
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert type(result.exception) is RecordError
    assert result.exception.exit_status == 2


def _phase(name: str, peak: int) -> PhaseRecord:
    return PhaseRecord(name, None, 0, peak, 0, None, peak, None, 0.0, 1.0, True)


def _stored(path: Path, *records: object, error: BaseException | None = None) -> Path:
    try:
        with RunWriter(path, {"device": "cuda:0"}) as writer:
            for record in records:
                writer.append(record)
            if error is not None:
                raise error
    except RuntimeError:
        pass
    return path


def test_a_new_phase_is_growth_one_that_is_gone_is_not_and_what_failed_is_no_success(tmp_path):
    both = _stored(tmp_path / "both", _phase("a", 10), _phase("b", 20))
    one = _stored(tmp_path / "one", _phase("a", 10))
    failed = _stored(tmp_path / "failed", _phase("a", 10), error=RuntimeError("out of memory"))
    empty = _stored(tmp_path / "empty")
    status, values = _compare(one, both)
    assert status == 1
    assert values["comparisons"][0]["phases"][0] == {
        "phase": "b",
        "first_bytes": None,
        "second_bytes": 20,
        "difference_bytes": 20,
        "difference_share": None,
    }
    assert values["comparisons"][0]["unknown"] == ["modules", "operators"]
    assert _compare(both, one)[0] == 0
    status, values = _compare(both, failed)
    assert (status, values["grown"], len(values["failed"])) == (1, False, 1)
    for pair in ((failed, both), (both, empty), (both, tmp_path / "none")):
        result = CliRunner().invoke(app, ["compare", *map(str, pair)])
        assert type(result.exception) is RecordError
    for words in ([f"--tolerance={each}"] for each in ("much", "-1", "5", "nan%", "-1%", "%")):
        result = CliRunner().invoke(app, ["compare", str(both), str(one), *words])
        assert type(result.exception) is InvalidRequest
    for words in ([], [str(both)], ["--plan", "p.yaml"], [str(both), str(one), "--plan", "p.yaml"]):
        assert type(CliRunner().invoke(app, ["compare", *words]).exception) is InvalidRequest


def test_runs_forecasts_and_calls_are_compared_in_python(pairs):
    x = torch.ones(4, 64)
    calls = [profile_call(_net(each), x) for each in (0, PLANTED)]
    comparison = compare_runs(*calls)
    assert [each.phase for each in comparison.grown("64MiB")] == ["call"]
    assert comparison.grown(Tolerance(nbytes=2 * PLANTED)) == []
    frame = comparison.to_frame()
    assert set(frame["level"]) == {"phase", "module", "operator"}
    assert frame["difference_bytes"].dtype == "Int64"
    assert compare_runs(pairs["forecasts"][0], forecast(_net(0), x)).second.is_forecast


# --- Two versions of a library ---

PLAN = """
groups:
  - runs:
      - {model: ltx-2.3-tiny, width: 64, height: 64, frames: 9, expected_seconds: 1}
"""


def test_without_uv_and_for_what_is_no_requirement_versions_are_refused(tmp_path, monkeypatch):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    result = CliRunner().invoke(app, ["compare", "--plan", str(plan), "--versions", "einops==0.8.0", "einops==0.8.1"])
    assert type(result.exception) is RunnerUnavailable
    assert result.exception.fields == {"package": "uv"}
    assert result.output == "", "nothing is announced that is refused"
    for words in ("no requirement!", ""):
        with pytest.raises(InvalidRequest):
            installed_beside(words.split() if not words else [words])


def _distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_requirements_that_neither_the_folder_nor_this_environment_meets_are_found(tmp_path):
    _distribution(tmp_path, "planted", "2.0", "torch>=2", "numpy>=999", "absent; extra == 'all'", "beside>=1")
    _distribution(tmp_path, "beside", "1.5")
    (tmp_path / "left_behind-1.0.dist-info").mkdir()
    assert unmet_requirements(tmp_path) == ["numpy>=999"]


def test_a_plan_is_forecast_with_what_a_folder_has_before_everything_else(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    _distribution(tmp_path / "beside", "beside", "1.5")
    assert main(str(plan), str(tmp_path / "runs"), str(tmp_path / "beside")) == 0
    assert "beside" in read_run(tmp_path / "runs" / "64x64x9").metadata["versions"]
    status, values = _compare(tmp_path / "runs", tmp_path / "runs")
    assert (status, [each["run"] for each in values["comparisons"]]) == (0, ["64x64x9"])
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("raise SystemExit('planted')\n")  # imported before anything else
    with pytest.raises(MeasureError) as refused:
        forecast_plan_under(plan, folder)
    assert "planted" in str(refused.value).splitlines()[0]
