"""Files that state the same facts agree, and the stills are what their script draws."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import i2v_lab

TOP = Path(__file__).parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
DECLARED = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
DIRECT = [Requirement(words) for each in DECLARED for words in each if not words.startswith("i2v-lab[")]
LOCKS = ("setup", "lowest", "highest")


def _locked(name: str, python: str = "3.11") -> dict[str, Version]:
    """What a lock file installs on Linux with this Python."""
    versions = {}
    here = {"python_version": python, "python_full_version": f"{python}.7", "sys_platform": "linux"}
    for line in (TOP / "locks" / f"{name}.txt").read_text().splitlines():
        if found := re.fullmatch(r"([\w.-]+)==(\S+)(?: ; (.+?))? \\", line):
            package, version, marker = found.groups()
            if marker is None or Marker(marker).evaluate(here):
                assert package not in versions
                versions[canonicalize_name(package)] = Version(version)
    return versions


def test_environment_yml_installs_what_pyproject_names():
    dependencies = yaml.safe_load((TOP / "environment.yml").read_text())["dependencies"]
    assert dependencies == [f"python{PROJECT['requires-python']}", "pip", {"pip": ["-e .[dev]"]}]


def test_every_way_of_setting_up_ends_with_ltx_video_without_its_pins():
    command = "pip install --no-deps ltx-video==0.1.2"
    assert command in (TOP / "docs" / "index.md").read_text()
    assert command in (TOP / "environment.yml").read_text().splitlines()[0]
    recipe = (TOP / "Makefile").read_text()
    assert re.search(r"^INSTALL = .* --no-deps$", recipe, re.MULTILINE)
    assert "$(INSTALL) -e . ltx-video==0.1.2\n\ttouch" in recipe


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_every_direct_dependency_in_its_range(lock, python):
    locked = _locked(lock, python)
    outside = [str(each) for each in DIRECT if locked[canonicalize_name(each.name)] not in each.specifier]
    assert outside == []


def test_the_lowest_lock_has_exactly_the_lower_bounds():
    locked = _locked("lowest")
    for each in DIRECT:
        (bound,) = [part.version for part in each.specifier if part.operator in (">=", "==")]
        assert (each.name, locked[canonicalize_name(each.name)]) == (each.name, Version(bound))


def test_the_setup_lock_differs_from_the_highest_in_torch_and_what_torch_brings():
    setup, highest = _locked("setup"), _locked("highest")
    differ = {name for name in setup.keys() & highest.keys() if setup[name] != highest[name]}
    brought = ("torch", "torchvision", "triton", "setuptools", "cuda-", "nvidia-")
    assert "torch" in differ
    assert {name for name in differ if not name.startswith(brought)} == set()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_address_and_has_a_hash_for_every_package(lock):
    text = (TOP / "locks" / f"{lock}.txt").read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)
    entries = re.findall(r"^[\w.-]+==.*\n.*", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^\w", text, re.MULTILINE)) > 100
    assert all("--hash=sha256:" in each for each in entries)


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
