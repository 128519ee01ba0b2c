"""A plan on workers, of which any process is killed at any moment: the same command again completes it, once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from fault_injection import FAULTS, each, running, running_in

from i2v_lab.runs.store import COMPLETE, METADATA, read_run

pytest.importorskip("distributed")

PLAN = """
defaults: {model: ltx-2.3-tiny, width: 64, height: 64, frames: 9, video: false, expected_seconds: 2}
groups:
  - runs: [{}, {decode_scope: escaped}, {width: 128}]
  - rounds: 2
    runs: [{height: 128}]
"""
NAMES = {"64x64x9", "64x64x9_escaped", "128x64x9", "64x128x9_1", "64x128x9_2"}
VICTIMS = ("client", "worker", "run")
ROUNDS = 40  # of the command, until a plan is complete; far more than kills can need


class _Plan:
    """A folder of a plan, and the command that is at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "plan.yaml").write_text(PLAN)
        self.out = folder / "out"
        self.client: psutil.Popen | None = None
        self.whole: dict[str, bytes] = {}  # metadata of the runs that were complete once

    def start(self) -> None:
        command = [sys.executable, "-m", "i2v_lab.cli", "measure", "--plan", "plan.yaml", "--out", "out"]
        with (self.folder / "said").open("ab") as said:
            self.client = psutil.Popen(
                [*command, "--device", "cpu", "--workers", "2"],
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=said,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
            )

    def kill(self, kind: str, chance: random.Random) -> bool:
        """Kill one process of a kind; false if there is none at the moment."""
        assert self.client is not None
        with suppress(psutil.Error):
            found = {"client": [self.client], "worker": [], "run": []}
            children = running(self.client.children(recursive=True))
            for process, command in children.items():
                depth = len([parent for parent in process.parents() if parent in children])
                if "resource_tracker" not in command and depth in (0, 2):
                    found["worker" if depth == 0 else "run"].append(process)
            if found[kind]:
                chance.choice(found[kind]).kill()
                return True
        return False

    def look(self) -> list[str]:
        """What does not hold of the runs that are there."""
        wrong = []
        for name in NAMES:
            path = self.out / name / METADATA
            if not path.exists():
                continue
            text = path.read_bytes()
            if json.loads(text)["status"] == COMPLETE:
                read_run(path.parent)  # raises what is torn
                if self.whole.setdefault(name, text) != text:
                    wrong.append(f"{name} was complete, and was made again")
        return wrong


@each(FAULTS, 0.05)
def test_killed_while_a_plan_runs_on_workers(seeds, tmp_path, tally):
    kills, number, plan = 0, 0, _Plan(tmp_path / "0")
    while kills < len(seeds):
        chance = random.Random(f"workers {seeds.start} {kills} {number}")
        if plan.client is None or plan.client.poll() is not None:
            if plan.client is not None and plan.client.poll() == 0:
                number += 1
                plan = _Plan(tmp_path / str(number))
            plan.start()
        time.sleep(chance.uniform(0.5, 6.0))
        kind = VICTIMS[(seeds.start + kills) % len(VICTIMS)]
        if plan.client is not None and plan.kill(kind, chance):
            if kind == "client":
                plan.client.wait()
            kills += 1
            tally.count(kind, plan.look(), (seeds.start + kills, number))
    for _ in range(ROUNDS):
        if plan.client is not None and plan.client.wait() == 0:
            break
        plan.start()
    wrong = plan.look()
    if plan.whole.keys() != NAMES:
        wrong.append(f"only {sorted(plan.whole)} are complete")
    left = [path.name for path in plan.out.iterdir() if path.name not in NAMES and not path.name.endswith(".lock")]
    tally.count("completed", [*wrong, *(f"left {name}" for name in left)], number)


@each(FAULTS, 0.01)
def test_a_plan_on_workers_is_stopped(seeds, tmp_path, tally, forked_by_workers):
    """It ends at once, in one line, and leaves no process, no partial file and no lock."""
    for seed in seeds:
        chance = random.Random(f"stopped workers {seed}")
        number, status = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[seed % 2]
        folder, temporary = tmp_path / str(seed), tmp_path / f"tmp{seed}" / ("long" * 20 if seed % 2 else "")
        temporary.mkdir(parents=True)
        os.environ["TMPDIR"], before = str(temporary), os.environ.get("TMPDIR")
        try:
            plan = _Plan(folder)
            plan.start()
        finally:
            del os.environ["TMPDIR"]
            os.environ |= {} if before is None else {"TMPDIR": before}
        assert plan.client is not None
        ended_runs = chance.randrange(4)  # of five: so it is at a run still, however fast the machine
        while (folder / "said").read_text().count("complete, ") < ended_runs:
            assert plan.client.poll() is None
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 0.8) if ended_runs else chance.uniform(2.0, 3.0))
        processes = {*plan.client.children(recursive=True), *running_in(folder)} - {plan.client}
        start_s = time.monotonic()
        plan.client.send_signal(number)
        ended, took_s = plan.client.wait(), time.monotonic() - start_s
        psutil.wait_procs(processes, timeout=1)
        said = (folder / "said").read_text().splitlines()
        wrong = plan.look()
        wrong += [f"status {ended}, said {said}"] if ended != status else []
        wrong += [f"took {took_s:.1f} s"] if took_s > 3 else []
        wrong += [f"said {line}" for line in said if "Traceback" in line or "Warning" in line]
        wrong += [f"left {command}" for command in running(processes).values()]
        names = NAMES if plan.out.exists() else set()
        left = [*temporary.iterdir(), *(each for each in plan.out.glob("*") if each.name not in names)]
        wrong += [f"left {each.name}" for each in left]
        tally.count("stopped", wrong, seed)
