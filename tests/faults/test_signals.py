"""Commands that are stopped at random moments end at once, in one line, and leave nothing."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from fault_injection import FAULTS, Tally, each, running_in, share
from nbformat.v4 import new_code_cell, new_notebook

from i2v_lab.paths import CACHE_VARIABLE, cache_dir

END_S = 3.0
LINES = {signal.SIGINT: (130, "i2v-lab: interrupted"), signal.SIGTERM: (143, "i2v-lab: terminated")}
# As `i2v-lab`, which says that signals are waited for: a process that is forked has no start to speak of.
COMMAND = "from i2v_lab.stopping import stop_on_signals; stop_on_signals(); print('ready', flush=True); "
COMMAND += "import tempfile; tempfile.tempdir = None; "  # of the server that it was forked from
COMMAND += "import pathlib, i2v_lab.cli.app as cli; import i2v_lab.reproduce.run as run; "
COMMAND += "run.NOTEBOOKS = pathlib.Path('nb'); cli.main()"
PARTIAL = re.compile(r"\.part|\.lock$|^tmp/|^jupyter/kernel")  # files of a moment
SMALL = ["--width", "64", "--height", "64", "--frames", "9"]
WARM = {"generate", "show", "accuracy", "doctor", "calibrate"}  # with the cache of the session, not one of their own
LONGEST_S = {"generate": 3.5, "forecast": 3.0, "measure": 8.0, "reproduce": 9.0, "show": 0.9}
LONGEST_S |= {"fit": 9.0, "accuracy": 2.0, "doctor": 2.0, "calibrate": 1.0}
WEIGHTS = {"generate": 0.2, "forecast": 0.2, "measure": 0.02, "reproduce": 0.008, "show": 0.01, "fit": 0.004}
WEIGHTS |= {"accuracy": 0.004, "doctor": 0.004, "calibrate": 0.004}
PARTS = [(command, part) for command, weight in WEIGHTS.items() for part in share(FAULTS, weight)]
NOTEBOOK = """
from i2v_lab.runs.measure import measure
from i2v_lab.runs.spec import RunSpec, make_request
from pathlib import Path
spec = RunSpec(request=make_request("ltx-2.3-tiny", width=64, height=64, frames=9), model="ltx-2.3-tiny")
measure(spec, Path(out_dir) / "runs" / "one", "cpu")
"""
PLAN = "process_seconds: 1\ndefaults: {model: ltx-2.3-tiny, width: 64, height: 64, frames: 9, expected_seconds: 2}\n"
PLAN += "groups:\n  - rounds: 2\n    runs:\n      - {}\n      - {decode_scope: escaped}\n"


@dataclass(frozen=True)
class Ended:
    """How a command ended: ``stopped`` if the signal came before its own end."""

    status: int
    seconds: float
    errors: str
    left: list[str]
    processes: list[str]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, forked_python, still) -> Path:
    """A run to show."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    command = [*forked_python, "-m", "i2v_lab.cli", "generate", "--image", still, "--out", folder.with_name("v.mp4")]
    subprocess.run([*command, *SMALL, "--profile", folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def top(recorded, still) -> Iterator[Path]:
    """The folder that commands run in, with what they read."""
    with tempfile.TemporaryDirectory(prefix="i2v") as folder:  # a short path: there will be sockets below it
        yield _fill(Path(folder), recorded, still)


def _fill(tmp_path: Path, recorded: Path, still: Path) -> Path:
    (tmp_path / "nb").mkdir()
    (tmp_path / "plan.yaml").write_text(PLAN)
    shutil.copyfile(still, tmp_path / "still.png")
    shutil.copytree(recorded, tmp_path / "recorded")
    parameters = new_code_cell("out_dir: str = 'build'")
    parameters.metadata["tags"] = ["parameters"]
    notebook = new_notebook(cells=[parameters, new_code_cell("import time; time.sleep(1)"), new_code_cell(NOTEBOOK)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "i2v-lab", "language": "python"}
    nbformat.write(notebook, tmp_path / "nb" / "a.ipynb")
    nbformat.write(notebook, tmp_path / "nb" / "b.ipynb")
    return tmp_path


def _arguments(command: str) -> list[str]:
    video = ["--image", "still.png", *SMALL, "--frames", "25"]
    return {
        "generate": ["generate", *video, "--out", "12:30.mp4", "--profile", "profile", "--decode-scope", "escaped"],
        "forecast": ["forecast", *video, "--model", "ltx-2.3-tiny", "--profile", "profile"],
        "measure": ["measure", "--plan", "plan.yaml", "--out", "runs", "--device", "cpu"],
        "reproduce": ["reproduce", "--jobs", "2", "--out", "build"],
        "show": ["show", "recorded", "--timeline", "figures"],
        "fit": ["fit", "--model", "ltx-2.3-tiny", "--gpu", "24GiB"],
        "accuracy": ["accuracy", "--csv", "accuracy.csv"],
        "doctor": ["doctor"],
        "calibrate": ["calibrate", "--out", "workspaces.json"],
    }[command]


def _stop(start: list[str], command: str, top: Path, number: int, after_s: float) -> Ended | None:
    """Start a command, send the signal, and see what is left; ``None`` if it had ended before."""
    environment = {**os.environ, "TMPDIR": str(top / "tmp"), "JUPYTER_RUNTIME_DIR": str(top / "jupyter")}
    (top / "tmp").mkdir()
    (top / "jupyter").mkdir()
    if command not in WARM:
        environment[CACHE_VARIABLE] = str(top / "cache")
        shutil.copytree(cache_dir() / "synthetic", top / "cache" / "synthetic", dirs_exist_ok=True)
    before = set(top.rglob("*"))
    said, errors = top / "stdout", top / "stderr"
    with said.open("wb") as stdout, errors.open("wb") as stderr:
        child = subprocess.Popen(
            [*start, *_arguments(command)],
            cwd=top,
            env=environment,
            stdout=stdout,
            stderr=stderr,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
        )
    while not said.stat().st_size:
        assert child.poll() is None, errors.read_text()
        time.sleep(0.01)
    time.sleep(after_s)
    ended = child.poll() is not None
    start_s = time.monotonic()
    child.send_signal(number)
    try:
        status = child.wait(timeout=30)
    except subprocess.TimeoutExpired:
        child.kill()
        status = child.wait()
    seconds = time.monotonic() - start_s
    deadline = time.monotonic() + 1
    while (left := running_in(top)) and time.monotonic() < deadline:  # the kernel kills what was forked a moment later
        time.sleep(0.05)
    processes = [f"{process.pid} {command}" for process, command in left.items()]
    for process in left:
        process.kill()
    if ended:
        return None
    new = {path.relative_to(top).as_posix() for path in set(top.rglob("*")) - before}
    partial = [name for name in sorted(new) if PARTIAL.search(name) and "torchinductor" not in name]
    return Ended(status, seconds, errors.read_text(), partial, processes)


def _fault(number: int, ended: Ended, after_s: float) -> str | None:
    """What is wrong with an end; a command that was done, in the moment of the signal, ends as it would have."""
    status, line = LINES[signal.Signals(number)]
    lines = ended.errors.splitlines()
    wrong = []
    if ended.status != status and not (ended.status == 0 and ended.seconds < 1):
        wrong.append(f"status {ended.status}")
    if ended.status == status and (not lines or lines[-1] != line or "Traceback" in ended.errors):
        wrong.append(f"said {ended.errors!r}")
    if "Exception ignored" in ended.errors:
        wrong.append("an exception was ignored")
    if ended.seconds > END_S:
        wrong.append(f"took {ended.seconds:.1f} s")
    left = [name for name in ended.left if ended.status != 0 or ".part" in name]
    if left:
        wrong.append(f"left {left}")
    if ended.processes:
        wrong.append(f"left processes {ended.processes}")
    return f"{signal.Signals(number).name} after {after_s:.3f} s: {'; '.join(wrong)}" if wrong else None


@pytest.mark.parametrize(("command", "seeds"), PARTS, ids=[f"{command} {part.start}" for command, part in PARTS])
def test_stopped(command, seeds, top, forked_python, tally):
    _stop_each([*forked_python, "-c", COMMAND], command, seeds, LONGEST_S[command], top, tally, f"stopped {command}")


@each(FAULTS, 0.03)
def test_stopped_while_it_starts(seeds, top, tally):
    """In a process of its own: from its first statement on, and while torch is imported."""
    _stop_each([sys.executable, "-c", COMMAND], "generate", seeds, 2.0, top, tally, "stopped while it starts")


def _stop_each(
    start: list[str], command: str, seeds: range, longest_s: float, top: Path, tally: Tally, kind: str
) -> None:
    for seed in seeds:
        chance = random.Random(f"{kind} {seed}")
        number = (signal.SIGINT, signal.SIGTERM)[seed % 2]
        after_s = chance.uniform(0, longest_s)
        here = top / str(seed)
        shutil.copytree(top, here, ignore=lambda folder, names: [name for name in names if name.isdigit()])
        ended = _stop(start, command, here, number, after_s)
        shutil.rmtree(here)
        fault = None if ended is None else _fault(number, ended, after_s)
        outcome = "ended before" if ended is None else "in time"
        tally.count(outcome, [fault] if fault else [], f"seed {seed}", kind)


@pytest.mark.parametrize("after_s", [0.3, 1.5])
def test_nothing_outlives_a_killed_measure(top, after_s):
    """Neither the fork server, which imports torch for seconds, nor who is forked from it."""
    command = [sys.executable, "-m", "i2v_lab.cli", *_arguments("measure")]
    with (top / "stdout").open("wb") as said, subprocess.Popen(command, cwd=top, stdout=said, stderr=said) as child:
        while not any("multiprocessing.forkserver" in command for command in running_in(top).values()):
            assert child.poll() is None, (top / "stdout").read_text()
            time.sleep(0.05)
        time.sleep(after_s)
        child.kill()
    deadline = time.monotonic() + 2
    while left := running_in(top):
        assert time.monotonic() < deadline, list(left.values())
        time.sleep(0.05)
    assert "Traceback" not in (top / "stdout").read_text()
