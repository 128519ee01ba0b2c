"""Every command under a locale of ASCII, on a terminal of Latin-1, and with arguments that are not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from i2v_lab.paths import CACHE_VARIABLE, data_dir

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LOCALES = {
    "POSIX": {**ASCII, "LC_ALL": "POSIX"},
    "ascii": {**ASCII, "PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1:strict"},
}
# Several commands in one process, which has to start under the locale; a line on stderr says how each ended.
DRIVER = """
import sys
from i2v_lab.cli.app import main
lines, line = [], []
for word in sys.argv[1:]:
    if word == "--then":
        lines.append(line)
        line = []
    else:
        line.append(word)
for each in [*lines, line]:
    sys.argv = ["i2v-lab", *each]
    try:
        main()
    except SystemExit as ended:
        print(f"status {ended.code}", file=sys.stderr)
"""
COMMANDS = ["generate", "show", "forecast", "fit", "measure", "accuracy", "calibrate", "reproduce", "lab", "doctor"]
SMALL = [b"--width", b"64", b"--height", b"64", b"--frames", b"9"]
STILL = [b"generate", b"--image", b"stills/lighthouse.png", *SMALL]


def _run(locale: str, folder: Path, *lines: list[bytes]) -> tuple[str, list[str]]:
    words = [word for number, line in enumerate(lines) for word in ([b"--then"] if number else []) + line]
    environment = {**os.environ, **LOCALES[locale], CACHE_VARIABLE: os.environ[CACHE_VARIABLE]}
    child = subprocess.run(
        [sys.executable, "-c", DRIVER, *words], capture_output=True, cwd=folder, env=environment, timeout=300
    )
    assert child.returncode == 0, child.stderr
    encoding = "latin-1" if locale == "latin-1" else "ascii"
    return child.stdout.decode(encoding), child.stderr.decode(encoding).splitlines()


@pytest.mark.parametrize("locale", LOCALES)
def test_help_and_refusals_come_in_every_locale(locale, tmp_path):
    name = "nö🎬".encode() + b"\xff"
    refused = [
        [*STILL, b"--prompt", name],
        [b"generate", b"--image", name],
        [*STILL, b"--out", name],
        [*STILL, b"--model", name],
        [b"show", name],
        [b"fit", b"--gpu", name],
        [b"measure", b"--plan", name, b"--out", name],
        [b"accuracy", name],
        [b"calibrate", name],
        [b"reproduce", name],
        [b"reproduce", b"-p", b"prompt", name],
        [b"reproduce", b"-f", name],
    ]
    helped = [[command.encode(), b"--help"] for command in COMMANDS]
    printed, said = _run(locale, tmp_path, [b"--help"], *helped, *refused)
    assert printed.count("Usage:") == 1 + len(COMMANDS)
    assert said[: len(helped) + 1] == ["status 0"] * (1 + len(COMMANDS))
    rest = said[len(helped) + 1 :]
    assert rest[1::2] == ["status 2"] * len(refused)
    assert all(line.startswith("i2v-lab: ") for line in rest[::2])
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_prompt_and_names_are_not_ascii_is_made_and_shown_under_ascii(tmp_path, tiny):
    name = "rün".encode() + b"$\\frac$\xff"
    image = os.fsencode(tmp_path) + "/bild-ü".encode()
    Path(os.fsdecode(image)).write_bytes((data_dir() / "stills" / "tower.png").read_bytes())
    generate = [b"generate", b"--image", image, *SMALL, b"--prompt", "wellen für é".encode()]
    _, said = _run(
        "ascii",
        tmp_path,
        [*generate, b"--out", name + b".mp4", b"--profile", name],
        [b"show", name, b"--timeline", name],
        [b"show", name, name],
    )
    assert [line for line in said if line.startswith(("status", "i2v-lab"))] == ["status 0"] * 3
    folder = tmp_path / os.fsdecode(name)
    assert "f\\u00fcr \\u00e9" in (folder / "metadata.json").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {
        "metadata.json",
        "records.jsonl",
        "timeline.svg",
        "timeline.png",
    }
