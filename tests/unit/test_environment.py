"""Files that state the same facts agree, and the stills are what their script draws."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

import i2v_lab

TOP = Path(__file__).parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]


def test_environment_yml_installs_what_pyproject_names():
    dependencies = yaml.safe_load((TOP / "environment.yml").read_text())["dependencies"]
    assert dependencies == [f"python{PROJECT['requires-python']}", "pip", {"pip": ["-e .[dev]"]}]


def test_every_way_of_setting_up_ends_with_ltx_video_without_its_pins():
    command = "pip install --no-deps ltx-video==0.1.2"
    assert command in (TOP / "README.md").read_text()
    assert command in (TOP / "environment.yml").read_text().splitlines()[0]
    assert "--no-deps ltx-video==0.1.2" in (TOP / "Makefile").read_text()


def test_versions_and_licence_agree():
    citation = yaml.safe_load((TOP / "CITATION.cff").read_text())
    assert citation["version"] == i2v_lab.__version__
    assert PROJECT["dynamic"] == ["version"]
    assert PROJECT["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (TOP / "LICENSE").read_text()
    assert "LTX-2 community licence" in (TOP / "README.md").read_text()


def test_the_stills_are_what_their_script_draws():
    drawn = subprocess.run(
        [sys.executable, TOP / "data/stills/draw_stills.py", "--check"], capture_output=True, text=True, check=False
    )
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
