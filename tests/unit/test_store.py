"""Run directories: whole or plainly unfinished, and refused when anything else is wrong with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import get_type_hints

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i2v_lab.errors import OutputError, RecordError
from i2v_lab.profiling.record_json import (
    CATEGORIES,
    KINDS,
    SECONDS_BELOW,
    WHOLE_BELOW,
    record_from_json,
    record_to_json,
)
from i2v_lab.profiling.records import (
    CostRecord,
    CostRow,
    DeviceRecord,
    Forecast,
    GraphRecord,
    HostMemoryRecord,
    OutOfMemoryRecord,
    PhaseRecord,
)
from i2v_lab.runs import store
from i2v_lab.runs.store import FORMAT_VERSION, Run, RunWriter, read_run

WHOLE = st.integers(0, WHOLE_BELOW - 1)
SECONDS = st.floats(0, SECONDS_BELOW, exclude_max=True, allow_nan=False)
OTHERS = st.lists(st.tuples(WHOLE, st.text(), st.none() | WHOLE)).map(tuple)
BY_HINT = {
    str: st.text(),
    str | None: st.none() | st.text(),
    int: WHOLE,
    int | None: st.none() | WHOLE,
    float: SECONDS,
    bool: st.booleans(),
    tuple[int, ...]: st.lists(WHOLE).map(tuple),
    tuple[tuple[int, str, int | None], ...] | None: st.none() | OTHERS,
    tuple[CostRow, ...]: st.lists(st.tuples(st.text(), st.text(), WHOLE, WHOLE, WHOLE)).map(tuple),
}


def _values(name: str, hint: object) -> st.SearchStrategy:
    return st.sampled_from(CATEGORIES) if name == "category" else BY_HINT[hint]


RECORDS = st.one_of(
    *(
        st.builds(kind, **{name: _values(name, hint) for name, hint in get_type_hints(kind).items()})
        for kind in KINDS.values()
    )
)


def _graph(nbytes: int) -> GraphRecord:
    return GraphRecord("decode_video", "video_decoder.conv_in", nbytes)


def _written(folder: Path, count: int = 3) -> Path:
    with RunWriter(folder, {"model": "ltx-2.3-tiny"}) as writer:
        for nbytes in range(count):
            writer.append(_graph(nbytes))
    return folder


def _unfinished(folder: Path, count: int = 3) -> Path:
    """What a kill leaves: the same without the last replacement of the metadata."""
    _written(folder, count)
    _edit(folder, status="running")
    return folder


def _edit(folder: Path, **values: object) -> None:
    path = folder / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _refusal(folder: Path) -> str:
    with pytest.raises(RecordError) as refused:
        read_run(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- There and back ---


@settings(deadline=None, max_examples=60)
@given(st.lists(RECORDS, max_size=8))
def test_every_record_comes_back_as_it_was(records):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "deep" / "run"
        with RunWriter(folder, {"model": "a", "argv": ["b", "ü"]}) as writer:
            for record in records:
                writer.append(record)
            running = read_run(folder)
            assert (running.records, running.status, running.finished) == (tuple(records), "running", False)
        run = read_run(folder)
        assert (run.folder, run.records, run.status, run.finished) == (folder, tuple(records), "complete", True)
        assert run.metadata == {
            "format": "i2v-lab run",
            "format_version": FORMAT_VERSION,
            "status": "complete",
            "model": "a",
            "argv": ["b", "ü"],
            "records": len(records),
            "sha256": hashlib.sha256((folder / "records.jsonl").read_bytes()).hexdigest(),
        }
        assert sorted(path.name for path in folder.iterdir()) == ["metadata.json", "records.jsonl"]
        for kind, record_type in KINDS.items():
            frame = run.frame(kind)
            names = [field.name for field in dataclasses.fields(record_type)]
            assert list(frame.columns) == names
            read = [tuple(None if value is pd.NA else value for value in row) for row in frame.itertuples(index=False)]
            assert read == [
                tuple(getattr(record, name) for name in names) for record in records if type(record) is record_type
            ]


def test_frames_have_the_same_columns_and_types_with_and_without_rows(tmp_path):
    big = 2**53 + 1  # a float would lose it
    row = PhaseRecord("a", None, big, big, big, None, big, big, 0.5, 1.5, True)
    other = dataclasses.replace(row, parent="a", peak_reserved_bytes=big, saved_for_backward_bytes=None)
    with RunWriter(tmp_path / "full", {}) as writer:
        writer.append(row)
        writer.append(other)
    full = read_run(tmp_path / "full").frame("phase")
    empty = read_run(_written(tmp_path / "empty", 0)).frame("phase")
    assert len(empty) == 0
    assert list(empty.columns) == list(full.columns) == [field.name for field in dataclasses.fields(PhaseRecord)]
    assert [str(kind) for kind in full.dtypes] == [str(kind) for kind in empty.dtypes]
    assert full["peak_bytes"].tolist() == [big, big]
    assert full["peak_reserved_bytes"].dtype == "Int64"
    assert full["peak_reserved_bytes"].dropna().tolist() == [big]
    assert read_run(tmp_path / "full").of(PhaseRecord) == [row, other]
    with pytest.raises(RecordError) as refused:
        read_run(tmp_path / "full").frame("phases")
    assert str(refused.value) == (
        "kind='phases' is not a known record; use one of: phase, step, holder, module, operator, timeline, graph, "
        "out_of_memory, generation, device, note, host_memory, assumption, cost"
    )


def test_a_record_of_before_a_field_was_kept_is_read_without_it():
    values = record_to_json(HostMemoryRecord("encode_prompt", "text_encoder", 1, 2, (0, 3), 4))
    del values["peak_bytes"]
    assert record_from_json(values) == HostMemoryRecord("encode_prompt", "text_encoder", 1, 2, (0, 3), None)
    del values["component"]
    with pytest.raises(RecordError, match="missing or unknown fields: component;"):
        record_from_json(values)


def test_a_failed_run_keeps_its_records_and_one_line_of_the_error(tmp_path):
    with pytest.raises(ValueError, match="too large"), RunWriter(tmp_path / "run", {}) as writer:
        writer.append(_graph(1))
        raise ValueError("too large\nsecond line")
    run = read_run(tmp_path / "run")
    assert (run.status, run.finished, run.records) == ("failed", True, (_graph(1),))
    assert run.metadata["error"] == "ValueError: too large"
    assert run.metadata["records"] == 1
    with pytest.raises(KeyboardInterrupt), RunWriter(tmp_path / "stopped", {}):
        raise KeyboardInterrupt
    assert read_run(tmp_path / "stopped").metadata["error"] == "KeyboardInterrupt"


def test_metadata_cannot_pretend_to_be_the_stores_own(tmp_path):
    with RunWriter(tmp_path / "run", {"status": "failed", "records": 7, "error": "none", "format_version": 9}):
        pass
    metadata = read_run(tmp_path / "run").metadata
    assert (metadata["status"], metadata["records"], metadata["format_version"]) == ("complete", 0, FORMAT_VERSION)
    assert "error" not in metadata


def test_an_empty_folder_and_missing_parents_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(read_run(_written(tmp_path / "empty")).records) == 3
    assert len(read_run(str(_written(tmp_path / "a" / "b" / "c"))).records) == 3


# --- Written so that nothing is lost ---


def test_metadata_say_running_before_the_first_record_and_are_only_ever_replaced_whole(tmp_path, monkeypatch):
    folder, seen = tmp_path / "run", []
    replace = os.replace

    def watched(source, target, **options):
        assert (folder / "records.jsonl").exists()
        old = json.loads(Path(target).read_text())["status"] if Path(target).exists() else None
        seen.append((old, json.loads(Path(source).read_text())["status"]))
        replace(source, target, **options)

    monkeypatch.setattr(os, "replace", watched)
    with RunWriter(folder, {}) as writer:
        assert seen == [(None, "running")]
        writer.append(_graph(1))
    assert seen == [(None, "running"), ("running", "complete")]


def test_a_run_that_cannot_be_finished_stays_unfinished_and_says_so(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "run"
    with pytest.raises(OutputError) as refused, RunWriter(folder, {}) as writer:
        writer.append(_graph(1))
        monkeypatch.setattr(os, "replace", full)
    assert str(refused.value) == (f"run '{folder}' cannot be written (No space left on device); give another folder")
    assert (read_run(folder).status, read_run(folder).records) == ("running", (_graph(1),))
    monkeypatch.undo()
    # The error of the run itself is not hidden by that of its ending.
    with pytest.raises(ValueError, match="first"), RunWriter(tmp_path / "other", {}):
        monkeypatch.setattr(os, "replace", full)
        raise ValueError("first")
    assert read_run(tmp_path / "other").status == "running"


def test_a_record_is_one_write_of_one_line(tmp_path, monkeypatch):
    writes, write = [], os.write
    record = OutOfMemoryRecord("decode_video", "", None, 1, None, "two\nlines " + "x" * 100_000)
    with RunWriter(tmp_path / "run", {}) as writer:
        monkeypatch.setattr(os, "write", lambda number, line: writes.append(line) or write(number, line))
        writer.append(record)
        monkeypatch.undo()
        assert [line.count(b"\n") for line in writes] == [1]
        assert writes[0].endswith(b"\n")
        assert (tmp_path / "run" / "records.jsonl").read_bytes() == writes[0]  # on disk as soon as append returns


def test_a_write_that_is_cut_short_leaves_no_half_line(tmp_path, monkeypatch):
    write = os.write
    folder = tmp_path / "run"
    with RunWriter(folder, {}) as writer:
        writer.append(_graph(1))
        monkeypatch.setattr(os, "write", lambda number, line: write(number, line[:20]))
        with pytest.raises(OutputError) as refused:
            writer.append(_graph(2))
        monkeypatch.undo()
        assert str(refused.value) == f"run '{folder}' has no room for a record; free some space"
        writer.append(_graph(3))
    assert read_run(folder).records == (_graph(1), _graph(3))


def test_a_half_line_left_by_an_interrupt_is_trimmed_at_the_end(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunWriter(tmp_path / "run", {}) as writer:
        for nbytes in range(30_000):  # more than one block of the file is hashed
            writer.append(_graph(nbytes))
        with (tmp_path / "run" / "records.jsonl").open("a") as file:
            file.write('{"kind": "gra')
        raise KeyboardInterrupt
    run = read_run(tmp_path / "run")
    assert (run.status, len(run.records)) == ("failed", 30_000)


def test_threads_may_append_together(tmp_path):
    with RunWriter(tmp_path / "run", {}) as writer:
        threads = [
            threading.Thread(target=lambda base: [writer.append(_graph(base + n)) for n in range(100)], args=[base])
            for base in range(0, 400, 100)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(record.nbytes for record in read_run(tmp_path / "run").records) == list(range(400))


def test_the_end_waits_for_a_record_that_another_thread_is_writing(tmp_path, monkeypatch):
    write, writing = os.write, threading.Event()

    def slow(number: int, line: bytes) -> int:
        writing.set()
        time.sleep(0.2)
        return write(number, line)

    with RunWriter(tmp_path / "run", {}) as writer:
        monkeypatch.setattr(store.os, "write", slow)
        thread = threading.Thread(target=writer.append, args=[_graph(1)])
        thread.start()
        assert writing.wait(10)
    thread.join()
    assert read_run(tmp_path / "run").records == (_graph(1),)


KILLED = """
import sys
from i2v_lab.runs import store
from i2v_lab.runs.store import RunWriter
from i2v_lab.profiling.records import OutOfMemoryRecord
folder, total = sys.argv[1], int(sys.argv[2])
def say(word):
    sys.stdout.write(word + "\\n")
    sys.stdout.flush()
say("go")
with RunWriter(folder, {"model": "none"}) as writer:
    for index in range(total):
        writer.append(OutOfMemoryRecord("p", "", None, index, None, "x" * (index * 7919 % 50_000)))
        say(str(index))
say("end")
sys.stdin.read()
"""


def test_a_run_killed_at_a_random_moment_is_whole_or_unfinished_with_every_record(tmp_path):
    total, chance, outcomes = 80, random.Random(), []
    for number in range(50):
        folder = tmp_path / str(number)
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), str(total)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with child:
            at_random = chance.randrange(1, total + 2)
            awaited = {0: 1, 1: total + 1, 2: total + 2}.get(number % 8, at_random)  # around the start and the end too
            lines = [child.stdout.readline() for _ in range(awaited)]
            time.sleep(chance.uniform(0, 0.003))
            child.kill()
            lines += child.stdout.readlines()  # what it had still said
        words = [line.decode().strip() for line in lines if line.endswith(b"\n")]
        said = [int(word) for word in words if word.isdigit()]
        assert words[0] == "go"
        assert said == list(range(len(said)))
        if not (folder / "metadata.json").exists():
            assert said == []
            _refusal(folder)
            outcomes.append("not begun")
            continue
        run = read_run(folder)
        assert [record.alive_bytes for record in run.records] == list(range(len(run.records)))
        assert all(len(record.message) == record.alive_bytes * 7919 % 50_000 for record in run.records)
        assert len(run.records) >= len(said)
        assert run.finished == (run.status == "complete")
        if run.finished:
            assert len(run.records) == total
        if "end" in words:
            assert run.finished
        outcomes.append(run.status if run.records else "empty")
    assert len(outcomes) == 50
    assert outcomes.count("running") >= 20, outcomes  # or else nothing was tested
    assert outcomes.count("complete") >= 6, outcomes


# --- Refused: writing ---


def test_a_folder_that_cannot_be_had_is_refused_and_left_alone(tmp_path):
    full = _written(tmp_path / "full")
    before = {path.name: path.read_bytes() for path in full.iterdir()}
    file = tmp_path / "file"
    file.write_text("mine")
    refusals = {
        full: f"run '{full}' is not empty; give a new folder or empty it",
        file: f"run '{file}' is a file; give a new folder",
        file / "run": f"run '{file / 'run'}' cannot be written (Not a directory); give another folder",
    }
    for folder, message in refusals.items():
        with pytest.raises(OutputError) as refused, RunWriter(folder, {}):
            raise AssertionError("entered")
        assert str(refused.value) == message
    assert {path.name: path.read_bytes() for path in full.iterdir()} == before
    assert file.read_text() == "mine"


def test_of_two_writers_of_one_folder_one_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with RunWriter(folder, {}) as writer:
        monkeypatch.setattr(Path, "iterdir", lambda path: iter(()))  # both looked before either wrote
        with pytest.raises(OutputError) as refused, RunWriter(folder, {}):
            raise AssertionError("entered")
        monkeypatch.undo()
        assert str(refused.value) == f"run '{folder}' is not empty; give a new folder or empty it"
        writer.append(_graph(1))
    assert read_run(folder).records == (_graph(1),)


def test_values_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RecordError) as refused, RunWriter(tmp_path / "run", {"image": Path("still.png")}):
        raise AssertionError("entered")
    assert str(refused.value) == (
        "the metadata are not made of JSON values (Object of type PosixPath is not JSON serializable); "
        "convert them first"
    )
    assert list(tmp_path.iterdir()) == []
    with RunWriter(tmp_path / "run", {}) as writer:
        with pytest.raises(RecordError) as refused:
            writer.append(DeviceRecord(float("nan"), None, None, None, None, None, None, "no driver"))
        writer.append(_graph(1))
    assert str(refused.value).startswith("a device record is not made of JSON values (Out of range float values")
    assert str(refused.value).endswith("; use None for what is not known")
    assert read_run(tmp_path / "run").records == (_graph(1),)


def test_appending_outside_the_with_block_is_refused(tmp_path):
    writer = RunWriter(tmp_path / "run", {})
    message = f"run '{tmp_path / 'run'}' is not open; append inside its with block"
    with pytest.raises(OutputError) as early:
        writer.append(_graph(1))
    with writer:
        pass
    with pytest.raises(OutputError) as late:
        writer.append(_graph(1))
    assert str(early.value) == str(late.value) == message


# --- Refused: reading ---


def test_what_is_not_a_run_is_refused(tmp_path):
    assert _refusal(tmp_path / "none") == f"run '{tmp_path / 'none'}' does not exist; check the path"
    file = tmp_path / "file"
    file.write_text("")
    assert _refusal(file) == f"run '{file}' is a file; give the folder of a run"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    no_metadata = f"run '{foreign}' has no metadata.json; give a folder that `i2v-lab generate --profile DIR` wrote"
    assert _refusal(foreign) == no_metadata
    (foreign / "notes.txt").write_text("x")
    assert _refusal(foreign) == no_metadata
    metadata = foreign / "metadata.json"
    not_ours = f"'{metadata}' is not of an i2v-lab run; give a folder that `i2v-lab generate --profile DIR` wrote"
    for text in ('{"format_version": 1, "status": "complete"}', "[1, 2]", "null", '{"format": "another"}'):
        metadata.write_text(text)
        assert _refusal(foreign) == not_ours


def test_missing_files_are_refused(tmp_path):
    for make in (_written, _unfinished):
        folder = make(tmp_path / make.__name__)
        (folder / "records.jsonl").rename(tmp_path / "kept")
        assert _refusal(folder) == f"run '{folder}' has lost its records.jsonl; restore it or run again"
        (tmp_path / "kept").rename(folder / "records.jsonl")
        (folder / "metadata.json").unlink()
        assert "has no metadata.json" in _refusal(folder)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "records.jsonl").touch()
    (begun / "metadata.json.part").write_text('{"form')
    assert _refusal(begun) == f"run '{begun}' was stopped before it began; delete it and run again"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": "i2v-lab r', "Unterminated string starting at"),
        ("", "Expecting value"),
        pytest.param("[" * 100_000, "RecursionError", id="deep"),
    ],
)
def test_damaged_metadata_are_refused(tmp_path, text, reason):
    folder = _written(tmp_path / "run")
    (folder / "metadata.json").write_text(text)
    assert _refusal(folder) == f"'{folder / 'metadata.json'}' is not JSON ({reason}); restore it or run again"


def test_metadata_that_are_not_text_or_not_readable_are_refused(tmp_path):
    folder = _written(tmp_path / "run")
    path = folder / "metadata.json"
    path.write_bytes(b"{\xff\xfe}")
    assert _refusal(folder) == f"'{path}' is not JSON (UnicodeDecodeError); restore it or run again"
    path.unlink()
    path.mkdir()
    assert _refusal(folder) == f"run '{folder}' cannot be read (Is a directory: '{path}'); check its permissions"


@pytest.mark.parametrize(
    ("key", "value"),
    [("format_version", 0), ("format_version", "1"), ("format_version", True), ("status", "done"), ("status", None)]
    + [("records", None), ("records", "3"), ("sha256", 5)],
)
def test_metadata_with_impossible_values_are_refused(tmp_path, key, value):
    folder = _written(tmp_path / "run")
    _edit(folder, **{key: value})
    path = folder / "metadata.json"
    assert _refusal(folder) == f"'{path}' has {key}={value!r}, which no run has; restore it or run again"


def test_a_newer_format_is_refused_whatever_else_it_holds(tmp_path):
    folder = _written(tmp_path / "run")
    _edit(folder, format_version=FORMAT_VERSION + 1, status="archived")
    (folder / "records.jsonl").unlink()
    path = folder / "metadata.json"
    assert _refusal(folder) == f"'{path}' has format_version=3, newer than 2; upgrade i2v-lab to read it"


def test_a_torn_last_line_is_left_out_of_an_unfinished_run_only(tmp_path):
    folder = _unfinished(tmp_path / "run")
    path = folder / "records.jsonl"
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        path.write_bytes(whole[:-cut])
        run = read_run(folder)
        assert (run.records, run.status, run.finished) == ((_graph(0), _graph(1)), "running", False)
    for status in ("complete", "failed"):
        _edit(folder, status=status)
        assert _refusal(folder) == f"'{path}' has 2 records where metadata.json says 3; restore it or run again"


def test_any_edit_of_a_finished_run_is_refused(tmp_path):
    folder = _written(tmp_path / "run")
    path = folder / "records.jsonl"
    whole = path.read_bytes()
    told = hashlib.sha256(whole).hexdigest()
    edited = whole.replace(b'"nbytes": 1', b'"nbytes": 7')
    path.write_bytes(edited)
    assert _refusal(folder) == (
        f"'{path}' has SHA-256 {hashlib.sha256(edited).hexdigest()[:12]} where metadata.json says {told[:12]}; "
        "restore it or run again"
    )
    path.write_bytes(whole + b'{"torn')
    assert "has SHA-256" in _refusal(folder)
    path.write_bytes(whole + whole.splitlines(keepends=True)[0])
    assert _refusal(folder) == f"'{path}' has 4 records where metadata.json says 3; restore it or run again"
    path.write_bytes(whole)
    _edit(folder, sha256="0" * 64)
    assert _refusal(folder) == (
        f"'{path}' has SHA-256 {told[:12]} where metadata.json says 000000000000; restore it or run again"
    )
    _edit(folder, sha256=told, records=2)
    assert _refusal(folder) == f"'{path}' has 3 records where metadata.json says 2; restore it or run again"


AGAIN = "; restore it or run again"
DAMAGE = {
    "cut": (b'{"kind": "graph", "pha', f" is not JSON (Unterminated string starting at){AGAIN}"),
    "empty": (b"", f" is not JSON (Expecting value){AGAIN}"),
    "bytes": (b'{"kind": "\xff"}', f" is not JSON (UnicodeDecodeError){AGAIN}"),
    "deep": (b"[" * 100_000, f" is not JSON (RecursionError){AGAIN}"),
    "list": (b"[1]", f" is not a JSON object{AGAIN}"),
    "kind": (b'{"kind": "graphs"}', f": kind='graphs' is not a known record; use one of: {', '.join(KINDS)}"),
    "field": (
        b'{"kind": "graph", "phase": "a", "module": ""}',
        ": a graph record has missing or unknown fields: nbytes; was the file edited?",
    ),
    "text": (
        b'{"kind": "graph", "phase": "a", "module": "", "nbytes": "1"}',
        f" has nbytes='1', which is of the wrong type{AGAIN}",
    ),
    "null": (
        b'{"kind": "graph", "phase": null, "module": "", "nbytes": 1}',
        f" has phase=None, which is of the wrong type{AGAIN}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("number", [2, 3])
def test_a_damaged_line_is_refused_even_in_an_unfinished_run(tmp_path, damage, number):
    line, complaint = DAMAGE[damage]
    folder = _unfinished(tmp_path / "run")
    path = folder / "records.jsonl"
    lines = path.read_bytes().splitlines()
    lines[number - 1] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert _refusal(folder) == f"'{path}' line {number}{complaint}"


def test_the_store_brings_neither_torch_nor_pandas():
    code = "import sys, i2v_lab.runs.store; sys.exit(bool({'torch', 'pandas', 'pynvml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_holds_much_has_a_short_repr():
    costs = CostRecord("decode_video", 1, tuple(("matmul", "float32", n, n, n) for n in range(10_000)))
    for value in (costs, Run(Path("runs/a"), {"argv": ["x" * 10_000]}, (costs,) * 1000, "complete")):
        assert len(repr(value)) < 1000
    assert len(repr(Forecast((costs,) * 1000, 0, 0.1))) < 1000
    assert repr(GraphRecord("decode_video", "conv_in", 1)) == (
        "GraphRecord(phase='decode_video', module='conv_in', nbytes=1)"
    )
