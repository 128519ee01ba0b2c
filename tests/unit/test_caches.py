"""Caches that several processes and users share: verified, rebuilt, and never in the way."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from i2v_lab.errors import OutputError
from i2v_lab.paths import CACHE_VARIABLE
from i2v_lab.pipeline.contract.weight_cache import cached_folder, cached_layout
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import cached_forecast, forecast_request, forecast_specs
from i2v_lab.runs.spec import DEFAULT_STILL, RunSpec

SPEC = RunSpec(request=I2VRequest(image=DEFAULT_STILL, width=64, height=64, frames=9), model="ltx-2.3-tiny")
FILL = """
import os, sys, time
from pathlib import Path
from i2v_lab.pipeline.contract.weight_cache import cached_folder
def fill(folder):
    (folder / "weights").write_text("mine")
    print("filling", os.getpid(), flush=True)
    time.sleep(float(sys.argv[2]))
if sys.argv[3:]:
    os.setgid(65534)
    os.setuid(65534)
print(cached_folder(sys.argv[1], "recipe", fill), flush=True)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    return tmp_path / "cache"


def _fill(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "weights").write_bytes(bytes(range(256)) * 10)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def test_a_forecast_of_which_anything_has_changed_is_computed_again(cache, monkeypatch):
    record = PhaseRecord("call", None, 0, 123456789, 0, 130000000, 123456789, 0, 0.25, 0.5, True)
    calls: list[object] = []

    def compute(spec: RunSpec, device: str) -> tuple[tuple[PhaseRecord, ...], int]:
        calls.append(spec)
        return (record,), 987654321

    monkeypatch.setattr("i2v_lab.runs.forecast._compute", compute)
    assert forecast_request(SPEC.request, SPEC.model).records == (record,)
    (path,) = (cache / "forecasts").iterdir()
    content = path.read_text()
    values = json.loads(content)
    changed = [
        content[: at.start()] + str((int(at[0]) + 1) % 10) + content[at.end() :] for at in re.finditer(r"\d", content)
    ]
    value, (first,) = values["value"], values["value"]["records"]
    for wrong in (None, "1", [], {}, True, 1.5, -1, "\ud800"):
        changed += [json.dumps({**values, key: wrong}) for key in values]
        changed += [json.dumps({**values, "value": {**value, key: wrong}}) for key in value]
        records = [{**first, key: wrong} for key in first if first[key] is not wrong]
        changed += [json.dumps({**values, "value": {**value, "records": [record]}}) for record in records]
    for text in [*changed, "", "null", content[:-1], content * 2]:
        path.write_text(text)
        assert cached_forecast(SPEC) is None
    before = len(calls)
    found = forecast_specs([SPEC, replace(SPEC, generations=2)], jobs=1, progress=False)
    assert [(each.records, each.context_bytes) for each in found] == [((record,), 987654321)] * 2
    assert len(calls) == before + 2
    assert path.read_text() == content


def test_a_layout_that_has_changed_is_computed_again(cache):
    layout = {"a.weight": (64, 2), "b": ()}
    calls: list[int] = []

    def compute() -> dict[str, tuple[int, ...]]:
        calls.append(1)
        return layout

    assert [cached_layout("file", "recipe", compute) for _ in range(3)] == [layout] * 3
    assert len(calls) == 1
    (path,) = (cache / "layouts").iterdir()
    content = path.read_text()
    for text in (
        content.replace("64", "65"),
        content.replace("64", '"64"'),
        '{"a.weight": [64, 2]}',
        "[]",
        "null",
        "5",
        "",
    ):
        path.write_text(text)
        calls.clear()
        assert cached_layout("file", "recipe", compute) == layout
        assert len(calls) == 1
        assert path.read_text() == content


def test_damaged_weights_are_made_again_and_others_may_read_them(cache):
    folder = cached_folder("tiny", "recipe", _fill)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".contents"}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert cached_folder("tiny", "recipe", lambda _: pytest.fail("it is there")) == folder

    def shorten() -> None:
        (folder / "weights").write_bytes(b"half")

    def change() -> None:
        content = bytearray(before[folder / "weights"])
        content[100] ^= 1
        (folder / "weights").write_bytes(content)

    def empty() -> None:
        for path in before:
            path.unlink()

    faults = [shorten, change, empty, (folder / "tokenizer" / "tokenizer.json").unlink, (folder / ".contents").unlink]
    faults.append(lambda: (folder / ".contents").write_text("{}"))
    for fault in faults:
        fault()
        assert cached_folder("tiny", "recipe", _fill) == folder
        assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in (cache / "synthetic").iterdir()] == [folder.name]


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(cache, forked_python):
    dead = subprocess.Popen([*forked_python, "-c", FILL, "dead", "60"], stdout=subprocess.PIPE, text=True)
    alive = subprocess.Popen([*forked_python, "-c", FILL, "alive", "1.5"], stdout=subprocess.PIPE, text=True)
    with dead, alive:
        words = [child.stdout.readline().split() for child in (dead, alive)]
        os.kill(int(words[0][1]), signal.SIGKILL)
        dead.wait()
        other = cached_folder("other", "recipe", _fill)
        (made,) = alive.stdout.read().splitlines()
        assert alive.wait() == 0
    assert (Path(made) / "weights").read_text() == "mine"
    assert set((cache / "synthetic").iterdir()) == {other, Path(made)}


def test_two_processes_make_weights_once_and_the_second_says_on_whom_it_waits(cache, forked_python):
    command = [*forked_python, "-c", FILL, "same", "0.5"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate() for child in children]
    assert sum(out.count("filling") for out, _ in said) == 1
    assert len({out.splitlines()[-1] for out, _ in said}) == 1
    assert sum("is being written by process" in errors for _, errors in said) == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can be another user")
def test_the_cache_of_another_user_is_read_and_one_s_own_serves_where_that_may_not_be_written(
    cache, tmp_path, forked_python
):
    for parent in [tmp_path, *tmp_path.parents]:
        if not parent.stat().st_mode & stat.S_IXOTH and parent.is_relative_to("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    (tmp_path / "own").mkdir()
    (tmp_path / "own").chmod(0o777)
    ours = cached_folder("ours", "recipe", _fill)

    def as_another(model: str) -> list[str]:
        command = [*forked_python, "-c", FILL, model, "0", "another"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    assert as_another("ours") == [str(ours)]
    own = tmp_path / "own" / "i2v-lab" / "synthetic"
    for _ in range(2):
        assert as_another("theirs")[-1].startswith(f"{own}/theirs-")
    (ours / "weights").write_bytes(b"damaged")
    assert as_another("ours")[-1] == str(own / ours.name)
    assert (own / ours.name / "weights").read_text() == "mine"
    assert [path.name for path in (cache / "synthetic").iterdir()] == [ours.name]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("i2v_lab.runs.forecast._compute", lambda spec, device: ((), 0))
    with pytest.raises(OutputError) as caught:
        forecast_request(SPEC.request, SPEC.model)
    assert caught.value.fields == {"path": tmp_path / "file" / "cache"}
    assert cached_layout("file", "recipe", lambda: {"a": (1,)}) == {"a": (1,)}
