"""The wheel, installed into a folder without a checkout around it: every command works from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from i2v_lab.cli.app import app

TOP = Path(__file__).parents[2]
TINY = ["--model", "ltx-2.3-tiny", "--width", "64", "--height", "64", "--frames", "9"]
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


class Installed:
    """The installed wheel.

    Attributes:
        site: The folder that it is installed in.
        wheel: The wheel itself.
        work: The current folder of every command; empty at first.
    """

    def __init__(self, top: Path, python: list[str]) -> None:
        self._python = python
        self.site, self.work = top / "site", top / "work"
        self.work.mkdir()
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
        _pip("wheel", *options, "--no-build-isolation", "--wheel-dir", top, TOP)
        (self.wheel,) = top.glob("*.whl")
        _pip("install", *options, "--target", self.site, self.wheel)

    def python(self, *arguments: object, status: int = 0) -> str:
        """Run the interpreter with only the installed package on its path; return stdout, or stderr where it fails."""
        environment = {**os.environ, "PYTHONPATH": str(self.site), "COLUMNS": "200"}
        child = subprocess.run(
            [*self._python, *map(str, arguments)],
            cwd=self.work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == status, child.stderr
        assert "Traceback" not in child.stderr
        return child.stderr if status else child.stdout

    def i2v_lab(self, *arguments: object, status: int = 0) -> str:
        """Run a command."""
        return self.python("-m", "i2v_lab.cli", *arguments, status=status)


def _pip(*arguments: object) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, forked_python: list[str]) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"), forked_python)


def test_the_wheel_contains_the_package_its_data_and_its_notebooks_and_nothing_else(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"i2v_lab"}
    for folder in ("data", "notebooks"):
        expected = {f"i2v_lab/{path.relative_to(TOP)}" for path in (TOP / folder).glob("[!.]*") if path.is_file()}
        assert expected
        assert expected <= set(names)
    assert "i2v_lab/py.typed" in names
    assert {name for name in names if name.startswith("i2v_lab/docs/")} == {"i2v_lab/docs/glossary.md"}
    terms = "from i2v_lab.reporting.site.terms import explained_terms; print(*explained_terms())"
    assert "decode_video" in installed.python("-c", terms).split()
    version = installed.python("-c", "import i2v_lab; print(i2v_lab.__file__, i2v_lab.__version__)").split()
    assert version[0] == str(installed.site / "i2v_lab" / "__init__.py")
    assert installed.wheel.name.startswith(f"i2v_lab-{version[1]}-")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(installed, command):
    assert f"i2v-lab {command}" in installed.i2v_lab(command, "--help").replace("python -m i2v_lab.cli", "i2v-lab")


def test_doctor_knows_the_installed_version(installed):
    report = json.loads(installed.python("-c", "from i2v_lab.cli import main; main()", "doctor", "--json"))
    assert {"torch family", "other requirements", "encoders of av"} <= {check["name"] for check in report["checks"]}


def test_a_generation_is_recorded_and_shown(installed):
    video, run = installed.work / "video.mp4", installed.work / "run"
    options = ["--image", "stills/lighthouse.png", "--out", video, "--profile", run, "--json"]
    report = json.loads(installed.i2v_lab("generate", *options, *TINY))
    assert report["output"] == str(video)
    assert video.stat().st_size > 0
    assert "decode_video" in installed.i2v_lab("show", run)


def test_forecast_and_accuracy(installed, tmp_path):
    report = json.loads(installed.i2v_lab("forecast", *TINY, "--json"))
    assert report["peak_bytes"] > 0
    assert "B200" in {fit["gpu"] for fit in report["fits"]}
    assert "record one with" in installed.i2v_lab("accuracy", tmp_path, status=2)


def test_calibrate_writes_the_model_that_the_package_has(installed, tmp_path):
    installed.i2v_lab("calibrate", "--out", tmp_path / "workspaces.json")
    model = json.loads((tmp_path / "workspaces.json").read_text())
    assert model.keys() == json.loads((TOP / "data" / "workspaces.json").read_text()).keys()


def test_measure_lists_a_plan(installed, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        yaml.safe_dump({"defaults": {"model": "ltx-2.3-tiny"}, "groups": [{"runs": [{"expected_seconds": 5}]}]})
    )
    lines = installed.i2v_lab("measure", "--plan", plan, "--out", tmp_path / "runs", "--device", "cpu", "--dry-run")
    assert len(lines.splitlines()) == 2
    assert not (tmp_path / "runs").exists()


def test_reproduce_executes_a_notebook_of_the_package_and_renders_the_site(installed, tmp_path):
    name = "01_tiling_dead_end"
    size = {"width": 64, "height": 64, "frames": 9, "tilings": ["64/32/16/8"]}
    values = {"source": "forecast", "model": "ltx-2.3-tiny", **size}
    (tmp_path / "parameters.yaml").write_text(json.dumps({name: values}))
    table = installed.i2v_lab("reproduce", name, "-f", tmp_path / "parameters.yaml", "--out", tmp_path / "build")
    assert "done" in table
    assert (tmp_path / "build" / "site" / f"{name}.html").is_file()


def test_lab_serves_copies_of_the_notebooks(installed):
    assert installed.i2v_lab("lab", "--version").strip()[0].isdigit()  # an option of JupyterLab, which ends it
    copies = installed.work / "i2v-lab-notebooks"
    assert {path.name for path in copies.iterdir()} == {path.name for path in (TOP / "notebooks").glob("[!.]*")}
