"""Rules for the source tree that no linter has. The import contracts are in pyproject.toml, for ``make lint``."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

import i2v_lab

PACKAGE = Path(i2v_lab.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    """Every import of one of our modules by another, those inside functions and for annotations included."""
    return grimp.build_graph("i2v_lab", cache_dir=None)


def test_no_module_is_longer_than_400_lines():
    lines = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_no_module_or_package_has_a_name_that_says_nothing():
    names = {part for path in SOURCES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert names & EMPTY_NAMES == set()


def test_no_module_imports_itself_through_others(imports):
    """The facade ``i2v_lab/__init__.py`` is left out: it resolves names on first use."""
    graph = {
        module: imports.find_modules_directly_imported_by(module) - {"i2v_lab"}
        for module in imports.modules
        if module != "i2v_lab"
    }
    cycle = None
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1]
    assert cycle is None


def test_modules_import_each_other_and_not_through_the_facade(imports):
    """What a module needs it imports from where it is defined; the facade would hide it from the import contracts."""
    lines = {
        f"{module}: {each['line_contents']}"
        for module in imports.find_modules_that_directly_import("i2v_lab")
        for each in imports.get_import_details(importer=module, imported="i2v_lab")
    }
    assert {line for line in lines if not line.endswith("from i2v_lab import __version__")} == set()
