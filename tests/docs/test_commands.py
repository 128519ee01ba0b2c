"""Every command in the documentation exists, with every option that is shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", *sorted((TOP / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(?:\.venv/bin/)?((?:i2v-lab|make) [^`]+)`")
OTHERS_OPTIONS = {"lab"}  # hands its options on to JupyterLab


def commands_of(page: Path) -> list[list[str]]:
    """The words of every ``i2v-lab`` and ``make`` command of a page, in blocks and in sentences."""
    text = page.read_text()
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in [*lines, *INLINE.findall(text)]]
    named = [[words[0].removeprefix(".venv/bin/"), *words[1:]] for words in found if words]
    return [words for words in named if words[0] in ("i2v-lab", "make")]


@cache
def help_of(command: str) -> str:
    """What a command says of itself; empty if there is none of that name."""
    environment = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "i2v_lab.cli", command, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.stdout if done.returncode == 0 else ""


def test_every_command_of_the_command_line_exists():
    shown = defaultdict(set)
    for page in PAGES:
        for program, command, *rest in commands_of(page):
            if program == "i2v-lab":
                shown[command].update(word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word))
    assert {"generate", "forecast", "fit", "show", "measure", "reproduce"} <= shown.keys()
    unknown = sorted(command for command in shown if not help_of(command))
    assert unknown == []
    missing = [
        f"{command} {option}"
        for command in sorted(shown.keys() - OTHERS_OPTIONS)
        for option in sorted(shown[command])
        if not re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(command))
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))
    shown = {word for program, *rest in commands_of(page) if program == "make" for word in rest}
    named = {word for word in shown if not re.search(r"[=.]", word)}
    assert named - targets == set()


def test_the_readme_is_short():
    assert len((TOP / "README.md").read_text().splitlines()) < 150
