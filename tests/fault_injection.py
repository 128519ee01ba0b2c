"""Commands that are killed, starved or given damaged files, and what must hold afterwards.

``I2V_LAB_FAULTS`` sizes ``tests/faults``: that many faults, and ten times as many damaged inputs; some dozens by
default, 1000 for a night. Each kind gets its share, in parts that pytest-xdist spreads. What became of each is counted
by kind, in pytest's summary.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

FAULTS = int(os.environ.get("I2V_LAB_FAULTS", "8"))
INPUTS = 10 * FAULTS
PART = 25  # cases a test
PATIENCE_S = 60.0
GONE_S = 5.0
COUNTED = "fault"
STILL = "stills/lighthouse.png"
SMALL = ["--model", "ltx-2.3-tiny", "--width", "64", "--height", "64", "--frames", "9"]

PROLOGUE = """
import atexit, ctypes, json, os, resource, runpy, sys
if "torch._dynamo.utils" in sys.modules:  # torch's own report at the exit, which imports another package
    atexit.unregister(sys.modules["torch._dynamo.utils"].dump_compile_times)
limits = json.loads(sys.argv.pop(1))
if limits.pop("unprivileged", False) and os.geteuid() == 0:  # root again bound by permissions: without all capabilities
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")
for name, value in limits.items():
    if name == "RLIMIT_AS":
        value += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(getattr(resource, name), (value, value))
sys.argv[0] = "i2v-lab"
runpy.run_module("i2v_lab.cli", run_name="__main__", alter_sys=True)
"""


def share(total: int, weight: float) -> list[range]:
    """Seeds of one kind, in parts: ``weight`` of ``total``, one at least."""
    count = max(1, round(total * weight))
    return [range(start, min(start + PART, count)) for start in range(0, count, PART)]


def each(total: int, weight: float) -> pytest.MarkDecorator:
    """Parametrize a test by ``seeds``."""
    parts = share(total, weight)
    return pytest.mark.parametrize("seeds", parts, ids=[f"{part.start}-{part.stop - 1}" for part in parts])


class Tally:
    """What became of each case, for pytest's summary; raises at the end of a test what did not hold."""

    def __init__(self, record_property: Callable[[str, object], None], kind: str) -> None:
        self._record, self._kind = record_property, kind
        self._problems: list[str] = []

    def count(self, outcome: str, problems: Sequence[str] = (), case: object = "", kind: str = "") -> None:
        """Add a case.

        Args:
            outcome: In a word or two.
            problems: What did not hold.
            case: Which it was, for the message.
            kind: If not that of the test.
        """
        kind = kind or self._kind
        self._record(COUNTED, (kind, "did not hold" if problems else outcome))
        self._problems += [f"{kind}, {case}: {problem}" for problem in problems]

    def close(self) -> None:
        """Raise with what did not hold, if anything did not."""
        assert not self._problems, f"{len(self._problems)} did not hold:\n" + "\n".join(self._problems[:20])


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        status: Its exit status; negative: the signal that ended it.
        printed: Standard output.
        errors: Standard error.
        seconds: From its start.
        after_signal_s: From the signal that it was sent to its end.
        signalled: It was still there when the signal was to be sent.
    """

    status: int
    printed: str
    errors: str
    seconds: float
    after_signal_s: float = 0.0
    signalled: bool = False


@dataclass(frozen=True)
class Room:
    """A folder that a command works in: an older video and run of its own lie there, which it must not damage.

    Attributes:
        folder: Also its current directory, by which processes that it leaves behind are found.
        python: What stands for ``[sys.executable]``.
        kept: Files that must stay as they are, with their contents.
    """

    folder: Path
    python: list[str]
    kept: dict[Path, bytes] = field(default_factory=dict)

    def keep(self, name: str, contents: bytes) -> Path:
        """Put an older file there."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
        self.kept[path] = contents
        return path

    def start(self, arguments: Sequence[object], limits: dict[str, Any] | None = None) -> subprocess.Popen[str]:
        """Start ``i2v-lab ARGUMENTS`` there, under resource limits by their names in :mod:`resource`.

        ``RLIMIT_AS`` is counted from what the process has already; ``unprivileged`` takes root's capabilities away.
        """
        return subprocess.Popen(
            [*self.python, "-c", PROLOGUE, json.dumps(limits or {}), *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        arguments: Sequence[object],
        limits: dict[str, Any] | None = None,
        number: int = 0,
        after_s: float = 0.0,
    ) -> Ended:
        """Start a command, send it signal ``number`` after ``after_s`` seconds, and wait for its end."""
        began_s = time.perf_counter()
        process = self.start(arguments, limits)
        signalled, sent_s = False, 0.0
        if number:
            try:
                process.wait(after_s)
            except subprocess.TimeoutExpired:
                signalled, sent_s = True, time.perf_counter()
                process.send_signal(number)
        try:
            printed, errors = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, errors = process.communicate()
            errors += f"\nTraceback: still there after {PATIENCE_S:g} s"
        ended_s = time.perf_counter()
        return Ended(
            process.returncode, printed, errors, ended_s - began_s, ended_s - sent_s if signalled else 0.0, signalled
        )

    def problems(self, ended: Ended | None = None) -> list[str]:
        """What does not hold in this folder, and of the command that ended: empty if all is well."""
        found = [f"a process is left: {name}" for name in self._processes_left()]
        for path, contents in self.kept.items():
            if not path.exists() or path.read_bytes() != contents:
                found.append(f"{path.name} is not what it was")
        killed = ended is not None and ended.status == -signal.SIGKILL
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and path not in self.kept:
                found += _problems_of_file(path, killed)
        if ended is not None and not killed:
            found += _problems_of_ending(ended)
        return found

    def _processes_left(self) -> list[str]:
        deadline_s = time.monotonic() + GONE_S
        while left := running_in(self.folder):
            if time.monotonic() > deadline_s:
                return [f"{process.pid} {command[:80]}" for process, command in left.items()]
            time.sleep(0.05)
        return []


def running(processes: Iterable[psutil.Process | int]) -> dict[psutil.Process, str]:
    """Those that still run, and their command lines; a zombie, which has ended but is not waited for, does not."""
    found = {}
    for each in processes:
        with suppress(psutil.Error):
            process = psutil.Process(each) if isinstance(each, int) else each
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = " ".join(process.cmdline())
    return found


def running_in(folder: Path) -> dict[psutil.Process, str]:
    """The processes whose current directory is a folder or below it, and their command lines."""
    inside = []
    for process in psutil.process_iter(["cwd"]):
        where = process.info["cwd"]
        if where and Path(where).is_relative_to(folder):
            inside.append(process)
    return running(inside)


def _problems_of_file(path: Path, killed: bool) -> list[str]:
    """A file under its final name is whole; one in the making is left by SIGKILL only."""
    name = path.name
    if name.startswith(".") or ".part" in name:
        return [] if killed or name.endswith(".lock") else [f"{name} is left"]
    if name in ("metadata.json", "records.jsonl"):
        return _problems_of_run(path.parent) if name == "metadata.json" else []
    try:
        if path.suffix == ".mp4":
            import av

            with av.open(str(path)) as container:
                frames = sum(1 for _ in container.decode(video=0))
            return [] if frames == 9 else [f"{name} has {frames} frames"]
        if path.suffix in (".json", ".ipynb"):
            json.loads(path.read_bytes())
        elif path.suffix in (".csv", ".svg", ".html", ".md") and not path.stat().st_size:
            return [f"{name} is empty"]
    except Exception as error:
        return [f"{name} cannot be read: {error!r}"]
    return []


def _problems_of_run(folder: Path) -> list[str]:
    from i2v_lab.errors import I2VLabError
    from i2v_lab.runs.store import read_run

    try:
        read_run(folder)
    except I2VLabError as error:
        return [f"run {folder.name}: {error}"]
    return []


def _problems_of_ending(ended: Ended) -> list[str]:
    found = []
    if "Traceback" in ended.errors or "Exception ignored" in ended.errors:
        found.append(f"status {ended.status}, stderr: …{ended.errors[-1500:]}")
    if ended.status < 0:
        found.append(f"ended by signal {-ended.status}; stderr: …{ended.errors[-300:]}")
    said = [line for line in ended.errors.splitlines() if line.startswith(("i2v-lab: ", "Error:"))]
    if ended.status > 0 and not said and "Traceback" not in ended.errors:
        found.append(f"status {ended.status} without a word: {ended.errors[-300:]!r}")
    return found


def outcome_of(ended: Ended) -> str:
    """How a command ended, for the tally."""
    if ended.status == 0:
        return "a right result"
    return f"signal {-ended.status}" if ended.status < 0 else f"one line, status {ended.status}"


def damage(contents: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Contents cut short, flipped, zeroed, grown, swapped or replaced; with a word for which."""
    how = chance.choice(["cut", "flip", "zero", "grow", "swap", "empty", "text", "noise"])
    size = len(contents)
    if how == "cut":
        return how, contents[: chance.randrange(size)] if size else b""
    if how == "empty":
        return how, b""
    if how == "text":
        return how, chance.choice(
            [b"<!doctype html><p>404", b"version https://git-lfs.github.com/spec/v1\n", b"\xff\xfe", b"null"]
        )
    if how == "noise":
        return how, chance.randbytes(chance.randrange(1, 2000))
    if how == "grow":
        return how, contents + chance.randbytes(chance.randrange(1, 100))
    if not size:
        return "empty", b""
    changed = bytearray(contents)
    # Most often where the meaning is: near the start.
    place = chance.randrange(min(size, 2000)) if chance.random() < 0.6 else chance.randrange(size)
    length = min(chance.choice([1, 1, 4, 64, 4096]), size - place)
    if how == "flip":
        for offset in range(length):
            changed[place + offset] ^= 1 << chance.randrange(8)
    elif how == "zero":
        changed[place : place + length] = bytes(length)
    else:
        other = chance.randrange(size - length + 1)
        changed[place : place + length], changed[other : other + length] = (
            changed[other : other + length],
            changed[place : place + length],
        )
    return how, bytes(changed)
