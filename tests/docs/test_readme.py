"""Every command of the README runs: of the full-size model with the tiny one, with real weights up to the refusal."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import I2VLabError

TOP = Path(__file__).parents[2]
README = (TOP / "README.md").read_text(encoding="utf-8")
SMALL = ["--model", "ltx-2.3-tiny", "--width", "64", "--height", "64", "--frames", "9"]
REPLACED = {"--model", "--width", "--height", "--frames"}


def _commands(program: str) -> list[list[str]]:
    """The words behind the program's name, of every command in a block or in a sentence, in their order."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = [*blocks.splitlines(), *re.findall(r"`((?:\.venv/bin/)?(?:i2v-lab|make) [^`]+)`", README)]
    split = [shlex.split(line.removeprefix(".venv/bin/"), comments=True) for line in lines]
    return [words[1:] for words in split if words[:1] == [program]]


def _small(words: list[str]) -> list[str]:
    """The same command for the tiny model and a small video."""
    kept = [word for before, word in zip(["", *words], words, strict=False) if not {before, word} & REPLACED]
    return [*kept, *SMALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "data").symlink_to(TOP / "data")
    (folder / "still.png").symlink_to(TOP / "data" / "stills" / "lighthouse.png")
    return folder


@pytest.fixture(scope="module")
def ran(folder) -> list[tuple[list[str], Result]]:
    """Every command as the README has it, and how it ended."""
    ended = []
    with contextlib.chdir(folder):
        for words in _commands("i2v-lab"):
            if words == ["show", "runs/mine"]:
                continue  # of the Python code, which tests/unit/test_site_pages.py runs
            small = words[0] in ("generate", "fit") and "cuda" not in words
            ended.append((words, CliRunner().invoke(app, _small(words) if small else words)))
    return ended


def test_every_command_of_the_readme_runs(ran, folder):
    assert {words[0] for words, _ in ran} == {"models", "fit", "generate", "show", "doctor"}
    for words, result in ran:
        if "cuda" in words:  # neither the files nor, here, the card
            assert isinstance(result.exception, I2VLabError), (words, result.output)
            assert "\n" not in str(result.exception)
        else:
            assert result.exit_code in ((0, 1) if words[0] == "doctor" else (0,)), (words, result.output)
    assert (folder / "video.mp4").stat().st_size > 0
    assert (folder / "escaped.mp4").stat().st_size > 0
    shown = [result.output for words, result in ran if words[0] == "generate" and "cuda" not in words]
    assert all("random weights" in output for output in shown)


def test_every_make_target_of_the_readme_is_there():
    targets = {words[-1] for words in _commands("make") if re.fullmatch(r"[a-z-]+", words[-1])}
    assert {"setup", "reproduce", "test", "lab"} <= targets
    done = subprocess.run(["make", "--dry-run", *sorted(targets)], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_its_picture_is_small_and_its_output_is_what_fit_prints(ran):
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 1
    assert (TOP / pictures[0]).stat().st_size < 300_000
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1].splitlines()
    (printed,) = [result.output.splitlines() for words, result in ran if words[0] == "fit"]
    assert shown[0].partition(" on ")[2] == printed[0].partition(" on ")[2]
    assert shown[1].split() in [line.split() for line in printed]
    assert any(line.startswith("run it: i2v-lab generate --device cuda") for line in printed)
