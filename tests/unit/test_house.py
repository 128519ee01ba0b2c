"""Rules for the source tree that no linter has. The import contracts are in pyproject.toml, for ``make lint``."""

from __future__ import annotations

import ast
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


def test_every_text_file_is_read_and_written_in_utf_8():
    """Whatever the locale: under LC_ALL=C the default is ASCII."""
    without = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            ours = len(node.args) == 2 and name == "write_text"  # i2v_lab.files.write_text
            if name in ("read_text", "write_text") and not (named or ours):
                without.append(f"{path.name}:{node.lineno}")
            pipes = any(keyword.arg in ("text", "universal_newlines") for keyword in node.keywords)
            if pipes and name not in ("encode", "TitleParams") and not named:  # of charts
                without.append(f"{path.name}:{node.lineno}")
            if name == "open" and isinstance(node.func, ast.Attribute) and first in (None, "r", "w", "a") and not named:
                owner = node.func.value
                if not (isinstance(owner, ast.Name) and owner.id in ("os", "Image", "av")):
                    without.append(f"{path.name}:{node.lineno}")
    assert without == []
