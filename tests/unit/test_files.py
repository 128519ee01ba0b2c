"""Files are whole or as they were, and written by one process at a time."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import I2VLabError, InvalidRequest, OutputError
from i2v_lab.files import (
    check_file,
    check_folder,
    partial_file,
    private_folder,
    read_json,
    write_atomically,
    write_json,
    write_text,
)
from i2v_lab.locks import exclusive, lock_beside
from i2v_lab.pipeline.contract.media import write_video
from i2v_lab.request import I2VRequest

HOLD = """
import sys, time
from pathlib import Path
from i2v_lab.locks import exclusive
with exclusive(Path(sys.argv[1]), Path("what")):
    print("held", flush=True)
    time.sleep(60)
"""


# --- Whole or as they were ---


def test_a_file_appears_whole_with_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    for name in ("table.csv", "a" * 251 + ".csv", "ä" * 120 + ".csv"):
        path = tmp_path / name
        write_atomically(path, lambda part: part.write_text("new"))
        assert path.read_text() == "new"
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
        with partial_file(path) as one, partial_file(path.with_suffix(".txt")) as two, partial_file(path) as three:
            assert len({one, two, three, path}) == 4
            assert {part.parent for part in (one, two, three)} == {tmp_path}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("write", [write_text, write_json])
def test_a_full_disk_and_a_text_that_is_not_utf8_leave_the_old_file_and_nothing_beside(tmp_path, write):
    path = tmp_path / "old.json"
    path.write_text("the old one")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write(path, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(path)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\udcff")
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_video_may_have_any_name_that_a_file_may_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    for name in ("12:30.mp4", "file:a.mp4", "http://a.mp4".replace("/", "_"), "%d.mp4", "a" * 251 + ".mp4", "-.mp4"):
        write_video([frames], None, Path(name), Fraction(24))
    assert len(list(tmp_path.iterdir())) == 6
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_changed_value_is_none(tmp_path):
    path = tmp_path / "value.json"
    values = [{"records": [1, 2.5, None, "a"], "bytes": 2**60}, [], 0, "ä"]
    for value in values:
        assert read_json(write_json(path, value)) == value
    write_json(path, values[0])
    content = path.read_text()
    for index in range(len(content)):
        path.write_text(content[:index] + ("7" if content[index] != "7" else "8") + content[index + 1 :])
        assert read_json(path) is None or read_json(path) == values[0]
    for damaged in ("", "null", "[]", "{}", '{"sha256": 1, "value": 2}', "[" * 100_000, json.dumps(values[0])):
        path.write_text(damaged)
        assert read_json(path) is None
    path.unlink()
    assert read_json(path) is None


# --- Refused before anything runs ---


@pytest.fixture
def places(tmp_path) -> dict[str, Path]:
    """Places where a folder cannot be written, by what is wrong."""
    (tmp_path / "file").touch()
    return {
        "is a file": tmp_path / "file",
        "choose another": tmp_path / "file" / "below",
        "choose another folder": tmp_path / "file" / "far" / "below",
        "too long": tmp_path / ("a" * 300),
        "too long a name": tmp_path / "none" / ("ä" * 200) / "below",
        "not writable": Path("/proc/i2v"),
    }


def test_a_place_that_cannot_be_written_is_refused_and_others_are_left_as_they_are(tmp_path, places):
    before = sorted(tmp_path.rglob("*"))
    for words, path in places.items():
        with pytest.raises(OutputError, match=words) as caught:
            check_folder(path, "out")
        assert caught.value.fields == {"folder": path}
        with pytest.raises(OutputError) as caught:
            check_file(path / "file.json", "out", "file.json")
        assert caught.value.fields == {"path": path / "file.json"}
    for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "far" / "below"):
        check_folder(path, "out")
        check_file(path / "a", "out", "a")
    with pytest.raises(OutputError):
        check_file(tmp_path, "out", "a")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--image", "stills/lighthouse.png", "--profile"],
        ["forecast", "--profile"],
        ["measure", "--plan", "data/plans/h200.yaml", "--out"],
        ["reproduce", "--out"],
        ["calibrate", "--out"],
        ["accuracy", "--csv"],
        ["show", "none", "--timeline"],
    ],
)
def test_every_command_refuses_a_place_before_it_does_anything(command, places, monkeypatch):
    monkeypatch.setattr("i2v_lab.runs.execute.execute", None)
    monkeypatch.setattr("i2v_lab.reproduce.run._reproduce", None)
    monkeypatch.setattr("i2v_lab.capacity.calibration.calibrate", None)
    for words, path in places.items():
        named = path
        if command[-1] in ("--csv",) or command[0] == "calibrate":
            if words == "is a file":
                continue
            named = path / "file.csv"
        result = CliRunner().invoke(app, [*command, str(named)])
        assert type(result.exception) is OutputError, (named, result.output, result.exception)
        assert named in result.exception.fields.values()


def test_a_profile_goes_into_a_folder_that_is_empty(tmp_path):
    (tmp_path / "mine").touch()
    for command in (["generate", "--image", "stills/lighthouse.png"], ["forecast"]):
        result = CliRunner().invoke(app, [*command, "--profile", str(tmp_path)])
        assert type(result.exception) is OutputError
        assert result.exception.fields == {"folder": tmp_path}


def test_a_prompt_that_is_not_utf8_is_refused(tmp_path):
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(InvalidRequest) as caught:
            I2VRequest(image="stills/lighthouse.png", **{name: "rain \udcff"})
        assert caught.value.fields == {name: "rain \udcff"}


def test_a_full_disk_ends_a_command_in_one_line(tmp_path, forked_python):
    """Also where stdout is what is full."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with Path("/dev/full").open("w") as full:
        command = [*forked_python, "-m", "i2v_lab.cli", "doctor", "--help"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("i2v-lab: there is no room on the disk; free some space")
    assert ended.stderr.count("\n") == 1


# --- One at a time ---


def test_a_second_writer_is_refused_or_waits_and_a_killed_one_holds_nothing(tmp_path):
    lock = lock_beside(tmp_path / ("a" * 250))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError) as caught, exclusive(lock, tmp_path):
            pass
        assert caught.value.fields == {"path": tmp_path, "process": str(holder.pid), "host": os.uname().nodename}
        said: list[str] = []
        threading.Timer(0.3, holder.kill).start()
        start_s = time.monotonic()
        with exclusive(lock, tmp_path, wait=said.append):
            assert 0.2 < time.monotonic() - start_s < 5
            assert holder.poll() is not None
            assert lock.exists()
            with pytest.raises(OutputError) as caught, exclusive(lock, tmp_path):
                pass
            assert caught.value.fields["process"] == str(os.getpid())
    assert len(said) == 1
    assert str(holder.pid) in said[0]
    assert list(tmp_path.iterdir()) == []


def test_many_threads_enter_one_after_the_other(tmp_path):
    inside, most = 0, 0
    counted = threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        with exclusive(tmp_path / ".lock", tmp_path, wait=lambda _: None):
            with counted:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with counted:
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_two_commands_do_not_write_one_output(tmp_path, still):
    """Refused in one line by who is first: a video, and a build folder."""
    from i2v_lab.locks import lock_on_this_machine

    out, build = tmp_path / "video.mp4", tmp_path / "build"
    small = ["--image", str(still), "--width", "64", "--height", "64", "--frames", "9"]
    with exclusive(lock_on_this_machine(out), out), exclusive(build / ".lock", build):
        for command in (["generate", *small, "--out", str(out)], ["reproduce", "--out", str(build)]):
            result = CliRunner().invoke(app, command)
            assert isinstance(result.exception, I2VLabError)
            assert result.exception.fields["process"] == str(os.getpid())
    assert not out.exists()
    assert list(build.iterdir()) == []


def test_what_a_killed_process_left_of_a_file_is_removed_by_the_next_that_writes_it(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = {f".video.{os.getppid()}.part.mp4", f".other.{gone.pid}.part.mp4", f".video.{gone.pid}@0.part.mp4"}
    for name in (f".video.{gone.pid}.part.mp4", *kept):
        (tmp_path / name).write_bytes(b"half")
    with partial_file(tmp_path / "video.mp4") as part:
        mine = part.name.replace(str(os.getpid()), str(gone.pid))
        part.with_name(mine).write_bytes(b"half")
        part.write_bytes(b"whole")
    with partial_file(tmp_path / "video.mp4") as part:
        part.write_bytes(b"whole")
    assert (tmp_path / "video.mp4").read_bytes() == b"whole"
    left = {path.name for path in tmp_path.iterdir()} - {"video.mp4"}
    assert left == kept  # of one that runs, of another file, and of another machine


def test_a_private_folder_goes_with_its_scope_and_that_of_a_killed_process_with_the_next(tmp_path):
    """Keys and scratch files of a command: readable by its user alone, and not left for ever by SIGKILL."""
    code = (
        "import os, pathlib, signal; from i2v_lab.files import private_folder\n"
        f"with private_folder(pathlib.Path({str(tmp_path)!r}), 'keys') as folder:\n"
        "    (folder / 'key').write_text('secret'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "key").read_text() == "secret"
    with private_folder(tmp_path, "keys") as first, private_folder(tmp_path, "keys") as second:
        assert set(tmp_path.iterdir()) == {first, second}
        assert first.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
