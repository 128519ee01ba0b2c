"""Which tests are slow, and in which order they run: by their durations in an earlier run.

``tests/durations.json`` holds the seconds of every test, set-up included, that takes 0.3 s or more. Tests that take
:data:`SLOW_S` or more, use a fixture in :data:`SLOW_FIXTURES` or are in a folder in :data:`SLOW_FOLDERS` get the marker
``slow``, which ``make test-quick`` deselects; a test not in the file counts as quick.

With pytest-xdist each worker starts with its share of the long modules, the longest first, and ends with quick tests,
which the workers take from each other. A module stays in one piece, so that its fixtures are made once; so do
the modules of an ``xdist_group``, which need something that one worker makes while the others would wait for it.

``pytest --record-durations``, over the whole suite and in one process, writes the file anew.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

DURATIONS = Path(__file__).with_name("durations.json")
SLOW_FOLDERS = ("tests/browser/", "tests/notebooks/", "tests/conformance/", "tests/gpu/", "tests/faults/")
SLOW_FIXTURES = {"full_size", "measured_once", "forecasts", "answer", "built_docs", "ran"}
"""Made once a module in some ten seconds, which the first test that needs one would pay for."""
SLOW_S = 0.5
RECORDED_S = 0.3
LONG_MODULE_S = 3.0
"""Modules that take less are spread test by test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help=f"write {DURATIONS.name} anew")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-durations"):
        config.pluginmanager.register(Recorder())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known_s = read_durations()
    for item in items:
        slow_fixture = SLOW_FIXTURES & set(getattr(item, "fixturenames", ()))
        if slow_fixture or item.nodeid.startswith(SLOW_FOLDERS) or known_s.get(item.nodeid, 0.0) >= SLOW_S:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True, specname="pytest_collection_modifyitems")
def order_items(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After ``-m`` and ``-k`` have deselected: what is left is shared out."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        items[:] = ordered(items, read_durations(), workers)


def read_durations() -> dict[str, float]:
    """Seconds by test, empty if they were never recorded."""
    return json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}


def ordered(items: list[pytest.Item], known_s: dict[str, float], workers: int) -> list[pytest.Item]:
    """The tests such that each of ``workers`` equal slices, which xdist deals out first, takes about the same time.

    Each slice has whole long modules, the longest first, and is filled up with quick tests.
    """
    modules: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        group = item.get_closest_marker("xdist_group")
        modules[group.args[0] if group else item.nodeid.partition("::")[0]].append(item)
    total_s = {name: sum(known_s.get(item.nodeid, 0.0) for item in tests) for name, tests in modules.items()}
    slices: list[list[pytest.Item]] = [[] for _ in range(workers)]
    taken_s = [0.0] * workers
    quick: list[pytest.Item] = []
    for name in sorted(modules, key=lambda each: (-total_s[each], each)):
        if total_s[name] < LONG_MODULE_S:
            quick += modules[name]
            continue
        index = taken_s.index(min(taken_s))
        slices[index] += modules[name]
        taken_s[index] += total_s[name]
    size = -(-len(items) // workers)
    for part in slices:
        missing = max(0, size - len(part))
        part += quick[:missing]
        del quick[:missing]
    return [item for part in slices for item in part] + quick


class Recorder:
    """Adds up what each test takes."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        kept = {test: round(seconds, 1) for test, seconds in sorted(self._seconds.items()) if seconds >= RECORDED_S}
        DURATIONS.write_text(json.dumps(kept, indent=0) + "\n")
