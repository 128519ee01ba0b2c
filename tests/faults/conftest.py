"""Rooms for faults, and the summary of what became of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_injection import COUNTED, SMALL, STILL, Room, Tally
from shared_fixtures import made_once


@pytest.fixture
def tally(record_property, request) -> Iterator[Tally]:
    """Counts the cases of one test, under the name of the test."""
    kind = request.node.originalname.removeprefix("test_").replace("_", " ")
    counted = Tally(record_property, kind)
    yield counted
    counted.close()


@pytest.fixture(scope="session")
def older(session_folder: Path, forked_python: list[str]) -> dict[str, bytes]:
    """An older video and run, by their paths in a room."""

    def make(folder: Path) -> None:
        room = Room(folder, forked_python)
        folder.mkdir()
        ended = room.run(["generate", "--image", STILL, *SMALL, "--out", "video.mp4", "--profile", "run"])
        assert ended.status == 0, ended.errors

    folder = made_once(session_folder / "older", make)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def make_room(tmp_path: Path, forked_python: list[str], older: dict[str, bytes]) -> Callable[[object], Room]:
    """Make a room of a case, with the older files in it."""

    def make(case: object) -> Room:
        folder = tmp_path / str(case)
        folder.mkdir()
        room = Room(folder, forked_python)
        for name, contents in older.items():
            room.keep(f"older/{name}", contents)
        return room

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in (
                getattr(report, "user_properties", ()) if getattr(report, "when", "") == "teardown" else ()
            ):
                if name == COUNTED:
                    counts[value[0]][value[1]] += 1
    if counts:
        terminalreporter.section("faults")
        for kind in sorted(counts):
            outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts[kind].most_common())
            terminalreporter.write_line(f"{sum(counts[kind].values()):6} {kind}: {outcomes}")
        terminalreporter.write_line(f"{sum(sum(each.values()) for each in counts.values()):6} in all")
