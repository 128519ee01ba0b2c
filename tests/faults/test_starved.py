"""Commands that are killed, or that run out of disk, memory, descriptors or permissions."""

from __future__ import annotations

import random
import shutil
import signal
from functools import cache
from pathlib import Path

from fault_injection import FAULTS, SMALL, STILL, Room, Tally, each, outcome_of

PLAN = """
process_seconds: 1
defaults: {model: ltx-2.3-tiny, width: 64, height: 64, frames: 9, expected_seconds: 1}
groups:
  - runs:
      - {}
      - {decode_scope: escaped}
"""
GENERATE = ["generate", "--image", STILL, *SMALL, "--prompt", "waves", "--out", "video.mp4", "--profile", "run"]
FORECAST = ["forecast", *SMALL, "--profile", "forecast"]
MEASURE = ["measure", "--plan", "plan.yaml", "--out", "runs", "--device", "cpu"]
SHOW = ["show", "older/run", "--timeline", "timeline.svg"]
COMMANDS = {"generate": GENERATE, "forecast": FORECAST, "measure": MEASURE, "show": SHOW}
KILLABLE = ["generate"] * 4 + ["measure"] * 3 + ["forecast"] * 2 + ["show"]


def _prepare(room: Room, name: str) -> list[str]:
    if name == "measure":
        room.keep("plan.yaml", PLAN.encode())
    return COMMANDS[name]


@cache
def _seconds(python: tuple[str, ...], name: str, folder: Path) -> float:
    """What a command takes undisturbed."""
    room = Room(folder, list(python))
    folder.mkdir()
    ended = room.run(_prepare(room, name) if name != "show" else ["show", "--help"])
    assert ended.status == 0, ended.errors
    shutil.rmtree(folder)
    return ended.seconds


def _again(room: Room, name: str, chance: random.Random) -> list[str]:
    """Now and then: the same command works after the fault, and leaves nothing half."""
    if chance.random() > 0.2 or name == "show":
        return []
    if name == "forecast":
        shutil.rmtree(room.folder / "forecast", ignore_errors=True)  # a run is never overwritten
    if name == "generate":
        shutil.rmtree(room.folder / "run", ignore_errors=True)
    ended = room.run(COMMANDS[name])
    problems = [] if ended.status == 0 else [f"the next run failed: {ended.errors[-500:]}"]
    return [*problems, *room.problems(ended)]


@each(FAULTS, 0.2)
def test_killed(seeds, make_room, tally, tmp_path, forked_python):
    for seed in seeds:
        chance = random.Random(f"killed {seed}")
        name = chance.choice(KILLABLE)
        room = make_room(seed)
        arguments = _prepare(room, name)
        after_s = chance.uniform(0, _seconds(tuple(forked_python), name, tmp_path / f"undisturbed {name}"))
        ended = room.run(arguments, number=signal.SIGKILL, after_s=after_s)
        problems = room.problems(ended) + _again(room, name, chance)
        tally.count("killed" if ended.signalled else "ended before", problems, f"{seed} {name} {after_s:.2f} s")
        shutil.rmtree(room.folder)


def _starve(room: Room, name: str, limits: dict[str, int], chance: random.Random, tally: Tally, case: str) -> None:
    ended = room.run(_prepare(room, name), limits)
    tally.count(outcome_of(ended), room.problems(ended) + _again(room, name, chance), case)
    shutil.rmtree(room.folder)


@each(FAULTS, 0.09)
def test_full_disk(seeds, make_room, tally):
    """Writing fails from some size on, as on a full disk: what a process may write to a file is limited."""
    for seed in seeds:
        chance = random.Random(f"disk {seed}")
        name = chance.choice(["generate", "generate", "measure", "forecast"])
        room = make_room(seed)
        limit = chance.choice([0, 1, 100, 500, 1000, 2000, 4000, 5000, 10000, 30000])
        _starve(room, name, {"RLIMIT_FSIZE": limit}, chance, tally, f"{seed} {name} {limit} bytes")


@each(FAULTS, 0.06)
def test_no_permission(seeds, make_room, tally):
    for seed in seeds:
        chance = random.Random(f"permission {seed}")
        name = chance.choice(["generate", "forecast", "measure", "show"])
        room = make_room(seed)
        arguments = _prepare(room, name)
        if name == "show" and chance.random() < 0.5:
            target = chance.choice([room.folder / "older/run", room.folder / "older/run/records.jsonl"])
        else:
            target = room.folder
        mode = target.stat().st_mode
        target.chmod(chance.choice([0o000, 0o444]) if target.is_file() else chance.choice([0o500, 0o555]))
        ended = room.run(arguments, {"unprivileged": True})
        target.chmod(mode)
        tally.count(outcome_of(ended), room.problems(ended), f"{seed} {name} {target.name}")
        shutil.rmtree(room.folder)


@each(FAULTS, 0.05)
def test_no_memory(seeds, make_room, tally):
    """Host memory: the address space of the process may grow by so much only."""
    for seed in seeds:
        chance = random.Random(f"memory {seed}")
        name = chance.choice(["generate", "generate", "forecast", "show"])
        room = make_room(seed)
        more = chance.choice([1, 4, 16, 32, 64, 128, 256]) * 2**20
        _starve(room, name, {"RLIMIT_AS": more}, chance, tally, f"{seed} {name} {more >> 20} MiB")


@each(FAULTS, 0.05)
def test_no_descriptors(seeds, make_room, tally):
    for seed in seeds:
        chance = random.Random(f"descriptors {seed}")
        name = chance.choice(["generate", "forecast", "measure", "show"])
        room = make_room(seed)
        limit = chance.randrange(5, 40)  # with fewer no Python starts
        _starve(room, name, {"RLIMIT_NOFILE": limit}, chance, tally, f"{seed} {name} {limit} descriptors")


@each(FAULTS, 0.03)
def test_concurrent_writers(seeds, make_room, tally):
    """Two of the same command, on the same files, at about the same time: done or refused, nothing is lost."""
    for seed in seeds:
        chance = random.Random(f"writers {seed}")
        name = chance.choice(["generate", "measure", "measure", "forecast"])
        room = make_room(seed)
        arguments = _prepare(room, name)
        first = room.start(arguments)
        ended = room.run(arguments)
        _printed, errors = first.communicate()
        problems = room.problems(ended)
        if "Traceback" in errors or first.returncode not in (0, 1, 2):
            problems.append(f"the other: status {first.returncode}, {errors[-500:]}")
        if first.returncode and ended.status:
            problems.append(f"both failed: {errors[-300:]} | {ended.errors[-300:]}")
        problems += _again(room, name, chance)
        both = "both right" if not first.returncode and not ended.status else "one refused"
        tally.count(both, problems, f"{seed} {name}")
        shutil.rmtree(room.folder)
