"""Damaged run directories, by the thousand: each is one error of ours, or is read as what it says."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_injection import INPUTS, each
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import I2VLabError, RecordError
from i2v_lab.profiling.record_json import KINDS
from i2v_lab.profiling.records import GraphRecord, HolderRecord, ModuleRecord, PhaseRecord, TimelineRecord
from i2v_lab.reporting.comparison import Comparison, compare_html, find_runs
from i2v_lab.reporting.figures.runs import timeline_figure
from i2v_lab.reporting.headlines import headline
from i2v_lab.reporting.run_tables import holders_table, modules_table, phase_table
from i2v_lab.reporting.terminal import rich_table
from i2v_lab.runs.forecast import forecast_specs
from i2v_lab.runs.interleaved import recorded_rounds
from i2v_lab.runs.provenance import run_metadata
from i2v_lab.runs.recorded import _read_all, recorded_runs, seconds_of, spec_of
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.runs.store import METADATA, RECORDS, Run, RunWriter, read_run
from i2v_lab.studies.accuracy import accuracy_table, halves_table, measured_table, summary_table

SPEC = RunSpec(
    request=make_request("ltx-2.3-tiny", width=64, height=64, frames=9, decode_scope="escaped"), model="ltx-2.3-tiny"
)
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308]
VALUES += ["", "x" * 3000, "\ud800", "\x1b[31m\0", "cuda", "forecast", "12", [], [None], [[]], {}, {"a": None}]
VALUES += [[[[[None]]]], [1, "a", None], {"request": None}, {"image": {}}]
RAW = ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a": 1', "tru", "\x00", '"\\ud800"', "1.5e", "'a'"]
FOREIGN = ["[]", "null", '"run"', "{}", '{"name": "another program", "records": 3}', '{"format": ["i2v-lab run"]}']
FOREIGN += ['{"format": "i2v-lab run"}', '{"format": "i2v-lab run", "format_version": 3}', "a: 1", "<html></html>"]

Damage = Callable[[Path, random.Random], None]


# --- Damages ---


def _rehash(folder: Path) -> None:
    """The metadata say what the records are now, so that what they hold is looked at."""
    content = (folder / RECORDS).read_bytes()
    known = json.loads((folder / METADATA).read_text())
    _write(folder / METADATA, {**known, "records": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()})


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def _place(values: Any, chance: random.Random) -> tuple[Any, Any]:
    """A container within JSON values, and one of its keys."""
    container, key = values, chance.choice(list(values) if isinstance(values, dict) else range(len(values)))
    while isinstance(container[key], dict | list) and container[key] and chance.random() < 0.7:
        container = container[key]
        key = chance.choice(list(container) if isinstance(container, dict) else range(len(container)))
    return container, key


def _change(values: Any, chance: random.Random) -> None:
    container, key = _place(values, chance)
    how = chance.choice(["value", "value", "value", "delete", "rename", "add"])
    if how == "delete" or (how == "rename" and isinstance(container, list)):
        del container[key]
    elif how == "rename":
        container[f"{key}_"] = container.pop(key)
    elif how == "add" and isinstance(container, dict):
        container[chance.choice(["kind", "\ud800", "device", "error", "x"])] = chance.choice(VALUES)
    else:
        container[key] = chance.choice(VALUES)


def metadata_values(folder: Path, chance: random.Random) -> None:
    values = json.loads((folder / METADATA).read_text())
    for _ in range(chance.choice([1, 1, 3])):
        _change(values, chance)
    _write(folder / METADATA, values)


def metadata_of_a_reader(folder: Path, chance: random.Random) -> None:
    """One of those that tables, headlines and studies use."""
    values = json.loads((folder / METADATA).read_text())
    values[chance.choice(["device", "device_name", "model", "error", "spec", "status", "request", "runner"])] = (
        chance.choice(VALUES)
    )
    _write(folder / METADATA, values)


def spec_values(folder: Path, chance: random.Random) -> None:
    values = json.loads((folder / METADATA).read_text())
    _change(values["spec"], chance)
    _write(folder / METADATA, values)


def record_values(folder: Path, chance: random.Random) -> None:
    lines = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
    for _ in range(chance.choice([1, 1, 4])):
        _change(chance.choice(lines), chance)
    (folder / RECORDS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    _rehash(folder)


def record_order(folder: Path, chance: random.Random) -> None:
    """Lines lost, doubled and shuffled: each is whole."""
    lines = (folder / RECORDS).read_text().splitlines(keepends=True)
    chosen = chance.choices(lines, k=chance.randrange(2 * len(lines)))
    (folder / RECORDS).write_text("".join(chosen))
    _rehash(folder)


def raw_text(folder: Path, chance: random.Random) -> None:
    """A value that JSON does not have, or that Python's reader lets through."""
    name = chance.choice([METADATA, RECORDS])
    text = (folder / name).read_text()
    starts = [index for index, letter in enumerate(text) if letter == ":"]
    start = chance.choice(starts) + 1
    end = min(index for index in (text.find(",", start), text.find("}", start), text.find("\n", start)) if index > 0)
    (folder / name).write_text(text[:start] + chance.choice(RAW) + text[end:], encoding="utf-8")
    if name == RECORDS:
        _rehash(folder)


def damaged_bytes(folder: Path, chance: random.Random) -> None:
    name = chance.choice([METADATA, RECORDS])
    content = bytearray((folder / name).read_bytes())
    start = chance.randrange(len(content))
    how = chance.choice(["flip", "cut", "zero", "noise", "not UTF-8", "empty", "BOM"])
    if how == "flip":
        content[start] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del content[start:]
    elif how == "zero":
        content[start : start + 64] = bytes(len(content[start : start + 64]))
    elif how == "noise":
        content[start:start] = chance.randbytes(20)
    elif how == "not UTF-8":
        content[start:start] = b"\xff\xfe"
    elif how == "BOM":
        content[:0] = b"\xef\xbb\xbf"
    else:
        content.clear()
    (folder / name).write_bytes(content)
    if name == RECORDS and chance.random() < 0.7:
        _rehash(folder)


def unfinished(folder: Path, chance: random.Random) -> None:
    """As a kill leaves it, and then damaged."""
    values = json.loads((folder / METADATA).read_text())
    values["status"] = chance.choice(["running", "failed"])
    del values["sha256"]
    _write(folder / METADATA, values)
    content = (folder / RECORDS).read_bytes()
    (folder / RECORDS).write_bytes(content[: chance.randrange(len(content))])


def other_files(folder: Path, chance: random.Random) -> None:
    """What lies there is no file, or not readable, or not there."""
    name = chance.choice([METADATA, RECORDS])
    path = folder / name
    how = chance.choice(["missing", "folder", "loop", "dangling", "pipe", "device", "unreadable", "empty"])
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    elif how == "dangling":
        path.symlink_to(folder / "gone")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "unreadable":
        path.touch(mode=0)
    elif how == "empty":
        path.touch()


def other_folders(folder: Path, chance: random.Random) -> None:
    """The run is a file, or nothing, or leads to itself."""
    shutil.rmtree(folder)
    how = chance.choice(["missing", "file", "loop", "pipe", "empty"])
    if how == "file":
        folder.write_text("")
    elif how == "loop":
        folder.symlink_to(folder)
    elif how == "pipe":
        os.mkfifo(folder)
    elif how == "empty":
        folder.mkdir()


def foreign(folder: Path, chance: random.Random) -> None:
    (folder / METADATA).write_text(chance.choice(FOREIGN))


DAMAGES: list[Damage] = [
    *(metadata_values, metadata_of_a_reader, spec_values, record_values, record_values, record_order, raw_text),
    *(damaged_bytes, unfinished, other_files, other_folders, foreign),
]


# --- Readers: everything that a user can open a run with ---


def _show(folder: Path, whole: Path) -> None:
    for arguments in ([folder], [whole, folder], [folder, whole]):
        result = CliRunner().invoke(app, ["show", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception


def _read(folder: Path, whole: Path) -> None:
    run = read_run(folder)
    assert isinstance(run, Run)
    for kind in KINDS:
        run.frame(kind)
    assert run._repr_html_()
    assert headline(run)
    for table in (phase_table(run), modules_table(run), holders_table(run)):
        rich_table(table, "table")
    seconds_of(run)


def _compare(folder: Path, whole: Path) -> None:
    assert compare_html(whole, folder)
    assert compare_html(folder, whole)
    find_runs([folder.parent])
    Comparison.read(folder, whole).html()


def _draw(folder: Path, whole: Path) -> None:
    run = read_run(folder)
    timeline_figure(run, read_run(whole))


def _recorded(folder: Path, whole: Path) -> None:
    _read_all.cache_clear()
    runs = recorded_runs(folder.parent)
    runs.find(SPEC)
    runs.find_capped(SPEC)
    measured = measured_table(folder=folder.parent)
    if len(measured) and {spec.memory_key() for spec in measured["spec"]} == {SPEC.memory_key()}:  # forecast already
        table = accuracy_table(measured)
        for each in (summary_table(table), halves_table(table)):
            rich_table(each, "table")


READERS = (_show, _read, _compare, _recorded)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with records of many kinds, as on a card: those of its forecast, a few of each kind in each phase."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    (forecast,) = forecast_specs([SPEC])
    metadata = run_metadata("cuda", spec=SPEC) | {"device_name": "a card"}
    with RunWriter(folder, metadata) as writer:
        counts: Counter[object] = Counter()
        for record in forecast.records:
            kind = type(record), getattr(record, "phase", "")
            counts[kind] += 1
            if counts[kind] <= 3:
                writer.append(record)
    kinds = {type(record) for record in read_run(folder).records}
    assert {PhaseRecord, ModuleRecord, HolderRecord, TimelineRecord, GraphRecord} <= kinds
    return folder


@each(INPUTS, 0.3)
def test_damaged_run_directories(seeds, whole, tmp_path, tally):
    for seed in seeds:
        chance = random.Random(seed)
        damage = DAMAGES[seed % len(DAMAGES)]
        folder = tmp_path / f"{seed}" / "run"
        shutil.copytree(whole, folder)
        damage(folder, chance)
        readers = READERS if seed % 25 else (*READERS, _draw)
        outcomes = {_outcome(reader, folder, whole, f"seed {seed}, {damage.__name__}") for reader in readers}
        kind = f"damaged run directories: {damage.__name__.replace('_', ' ')}"
        tally.count("one line" if "refused" in outcomes else "a right result", kind=kind)


def _outcome(reader: Callable[[Path, Path], None], folder: Path, whole: Path, case: str) -> str:
    error: Exception | None = None
    try:
        reader(folder, whole)
    except Exception as problem:
        error = problem
    if error is None:
        return "read"
    assert isinstance(error, I2VLabError), f"{case}: {reader.__name__} ended in {error!r}"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.fields) == (type(error), str(error), error.fields), case
    words = str(error)
    assert ("\n" in words, len(words) < 600, "run" in words) == (False, True, True), f"{case}: {words}"
    return "refused"


def test_the_undamaged_run_is_read_by_all(whole):
    assert [_outcome(reader, whole, whole, "none") for reader in (*READERS, _draw)] == ["read"] * 5
    assert spec_of(read_run(whole)).memory_key() == SPEC.memory_key()


def test_accuracy_needs_a_folder_of_our_own_runs(tmp_path, whole):
    gone = CliRunner().invoke(app, ["accuracy", str(tmp_path / "gone")])
    assert (type(gone.exception), gone.exception.fields) == (RecordError, {"folder": tmp_path / "gone"})
    foreign_run = tmp_path / "foreign"
    foreign_run.mkdir()
    (foreign_run / METADATA).write_text('{"name": "another program"}')
    refused = CliRunner().invoke(app, ["accuracy", str(tmp_path)])
    assert (type(refused.exception), refused.exception.fields) == (RecordError, {"path": foreign_run / METADATA})
    file = tmp_path / "file"
    file.touch()
    assert type(CliRunner().invoke(app, ["accuracy", str(file)]).exception) is RecordError
    (tmp_path / "empty").mkdir()
    none = CliRunner().invoke(app, ["accuracy", str(tmp_path / "empty")])
    assert (type(none.exception), none.exit_code) == (RecordError, 1), "no runs are no success"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"request": {}}', '{"rounds": [[1]], "request": 3}', "NaN", "\\xff"])
def test_damaged_rounds_are_one_error(text, tmp_path):
    (tmp_path / "rounds.json").write_text(text)
    with pytest.raises(RecordError) as refused:
        recorded_rounds(["rounds.json"], tmp_path)
    assert refused.value.fields == {"path": tmp_path / "rounds.json"}
