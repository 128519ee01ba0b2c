"""``i2v-lab forecast --script``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import InvalidRequest, OutputError, ScriptError
from i2v_lab.runs.store import read_run

SCRIPT = """
import sys
import torch
print("said by the script")
rows = int(sys.argv[1]) if sys.argv[1:] else 1024
x = torch.empty(rows, 2**18, device="cuda")
torch.save(x, "latents.pt")
"""
GIB = 2**30


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "my_pipeline.py"
    path.write_text(SCRIPT)
    return path


def _run(*words: object) -> str:
    result = CliRunner().invoke(app, ["forecast", *map(str, words)], catch_exceptions=False, standalone_mode=False)
    assert result.exception is None
    return result.stdout


def test_a_script_is_reported_as_json_with_what_it_assumed(script: Path) -> None:
    report = json.loads(_run("--script", script, "--json", "--vram-cap-gib", "1", "--", "2048"))
    assert (report["script"], report["arguments"]) == (str(script), ["2048"])
    assert (report["peak_bytes"], report["peak_phase"]) == (2 * GIB, "script")
    assert [phase["peak_bytes"] for phase in report["phases"]] == [2 * GIB]
    verdicts = {fit["gpu"]: fit["verdict"] for fit in report["fits"]}
    assert (verdicts["cap of 1 GiB"], verdicts["RTX 4090"]) == ("no", "fits")
    assert report["assumptions"] == [
        {
            "phase": "script",
            "operator": "torch.save('latents.pt')",
            "module": "",
            "place": "my_pipeline.py:7",
            "answer": "nothing is written",
            "count": 1,
        }
    ]


def test_a_script_is_printed_as_any_forecast_and_kept(script: Path, tmp_path: Path) -> None:
    text = _run("--script", script, "--profile", tmp_path / "run")
    assert "said by the script" not in text
    lines = text.splitlines()
    assert lines[0] == "my_pipeline.py"
    assert lines[lines.index("assumed:") + 1] == "  torch.save('latents.pt'), my_pipeline.py:7: nothing is written"
    run = read_run(tmp_path / "run")
    assert (run.is_forecast, run.metadata["model"]) == (True, "my_pipeline.py")
    with pytest.raises(OutputError):
        _run("--script", script, "--profile", tmp_path / "run")


@pytest.mark.parametrize(
    "option", ["--model=ltx-2.3-tiny", "--width=64", "--no-tiling", "--prompt=", "--memory=resident", "--seed=10"]
)
def test_options_of_a_request_are_refused_beside_a_script(option: str, script: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _run("--script", script, option)
    assert caught.value.fields == {"option": option.partition("=")[0]}


def test_arguments_without_a_script_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        _run("--width", "64", "--", "more")
    assert caught.value.fields == {"argument": "more"}


def test_a_script_that_fails_has_exit_status_1(tmp_path: Path) -> None:
    with pytest.raises(ScriptError) as caught:
        _run("--script", tmp_path / "missing.py")
    assert caught.value.exit_status == 1
