"""The fixture ``vram_budget`` in a pytest of its own: which tests it fails, and with what words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest
import torch

from i2v_lab import profile_call
from i2v_lab.errors import InvalidRequest

MIB = 2**20


def allocate(n_bytes):
    return torch.zeros(n_bytes, dtype=torch.uint8)


def test_within(vram_budget):
    with vram_budget("decode_video", "2MiB", device="cpu"):
        allocate(2 * MIB)


def test_over(vram_budget):
    with vram_budget("decode_video", "2MiB", device="cpu"):
        allocate(2 * MIB + 1)


def test_nested(vram_budget):
    with vram_budget("all", 10 * MIB, device="cpu"):
        with vram_budget("inner", MIB):
            allocate(MIB)
        allocate(3 * MIB)


def test_nested_over(vram_budget):
    with vram_budget("all", "10MiB", device="cpu"):
        with vram_budget("inner", "1MiB"):
            allocate(3 * MIB)


def test_a_call(vram_budget):
    vram_budget.check(profile_call(allocate, 3 * MIB), call="3MiB")
    vram_budget.check(profile_call(allocate, 3 * MIB), call="1MiB")


def test_its_own_failure_comes_first(vram_budget):
    with vram_budget("all", "1MiB", device="cpu"):
        allocate(3 * MIB)
        raise KeyError("own")


def test_refused(vram_budget):
    for budget in ("much", "2", -1, True, 1.5):
        with pytest.raises(InvalidRequest), vram_budget("all", budget, device="cpu"):
            raise AssertionError
    with pytest.raises(InvalidRequest):
        vram_budget.check(profile_call(allocate, MIB), other="1MiB")
"""


def test_a_test_fails_whose_phase_exceeds_its_budget(tmp_path):
    (tmp_path / "test_budgets.py").write_text(TESTS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"}
    plugins = ["-p", "no:cacheprovider", "-p", "i2v_lab.runs.vram_budget"]  # an entry point where it is installed
    config = ["-c", os.devnull, "--rootdir", str(tmp_path)]
    words = ["-q", "-rA", "-W", "error", *plugins, *config]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path,
    )
    lines = done.stdout.splitlines()
    outcomes = {line.split("::")[1].split(" ")[0]: line.split(" ")[0] for line in lines if "::" in line}
    assert outcomes == {
        "test_within": "PASSED",
        "test_over": "FAILED",
        "test_nested": "PASSED",
        "test_nested_over": "FAILED",
        "test_a_call": "FAILED",
        "test_its_own_failure_comes_first": "FAILED",
        "test_refused": "PASSED",
    }, done.stdout
    assert "decode_video took 2.0 MiB (2,097,153 bytes), over its budget of 2.0 MiB by 1 B" in lines
    assert "  2.0 MiB other 2097153 uint8 in no module by aten.zeros" in lines
    assert sum("inner took 3.0 MiB" in line for line in lines) >= 1
    assert any("call took 3.0 MiB" in line and "budget of 1.0 MiB" in line for line in lines)
    assert "KeyError: 'own'" in done.stdout


def test_the_entry_point_names_the_plugin():
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\ni2v-lab = "i2v_lab.runs.vram_budget"' in declared
