"""What is asked of workers is checked before anything runs; what they do is whole, once, and each on its own card."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from fault_injection import running

from i2v_lab.capacity import sweep as sweeping
from i2v_lab.cli.measure import _print_summary, measure
from i2v_lab.cli.sweep import sweep
from i2v_lab.errors import InvalidRequest, OutputError, SweepError, WorkersUnavailable
from i2v_lab.profiling.meters.nvml import visible_cards
from i2v_lab.profiling.records import Forecast, OutOfMemoryRecord, PhaseRecord
from i2v_lab.runs.grids import read_requests
from i2v_lab.runs.measure import measure as measure_here
from i2v_lab.runs.plans import load_plan
from i2v_lab.runs.spec import SMALL_MODEL
from i2v_lab.runs.store import read_run
from i2v_lab.scale import cluster as starting
from i2v_lab.scale import workers as asked
from i2v_lab.scale.plan_runs import _together
from i2v_lab.scale.workers import Workers, chosen_workers

TINY = {"model": SMALL_MODEL, "width": 64, "height": 64, "frames": 9}
SLURM = {"jobqueue": {"slurm": {"cores": 1, "memory": "2GB"}}}


# --- What is asked for ---


def test_one_worker_is_as_without_and_auto_is_one_a_card_or_core(monkeypatch):
    pytest.importorskip("distributed")
    assert chosen_workers(None) is chosen_workers("1") is None
    monkeypatch.setattr(asked, "usable_cores", lambda: 8)
    monkeypatch.setattr(asked, "visible_cards", lambda: ["GPU-a", "GPU-b"])
    assert chosen_workers("auto", on_cards=True) == Workers(2, ("GPU-a", "GPU-b"))
    assert chosen_workers("auto") == Workers(8, threads=1)
    assert chosen_workers("2") == Workers(2, threads=4)
    assert chosen_workers("2", single_threaded=True) == Workers(2, threads=1)
    monkeypatch.setattr(asked, "visible_cards", lambda: ["GPU-a"])
    assert chosen_workers("auto", on_cards=True) is None
    with pytest.raises(InvalidRequest) as caught:
        chosen_workers("3", on_cards=True)
    assert caught.value.fields == {"workers": 3, "cards": 1}


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "", "10001", "9" * 30, "²"])
def test_what_is_no_number_of_workers_is_refused(text):
    with pytest.raises(InvalidRequest) as caught:
        chosen_workers(text)
    assert caught.value.fields == {"workers": text}


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ("[1", "cluster"),
        ("slurm: {cores: 1}", "cluster"),
        ("jobqueue: {pbs: {cores: 1}}", "cluster"),
        ("jobqueue: {slurm: {cores: 1}}", "cluster"),
        ("jobqueue: {slurm: {cores: 1, memory: 2GB, gpus: 1}}", "gpus"),
        ("jobqueue: {slurm: {cores: 4, memory: 2GB, processes: 4}}", "processes"),
    ],
)
def test_a_cluster_file_that_cannot_be_used_is_refused_with_what_is_wrong(tmp_path, content, fields):
    pytest.importorskip("dask_jobqueue")
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(InvalidRequest) as caught:
        chosen_workers("2", path)
    assert set(caught.value.fields) == {fields}


def test_a_cluster_needs_a_number_its_commands_and_the_packages(tmp_path, monkeypatch):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(SLURM))
    with pytest.raises(InvalidRequest):
        chosen_workers("auto", path)
    with pytest.raises(InvalidRequest):
        chosen_workers(None, tmp_path / "none.yaml")
    monkeypatch.setattr(asked.importlib.util, "find_spec", lambda _: None)
    for cluster in (None, path):
        with pytest.raises(WorkersUnavailable) as missing:
            chosen_workers("2", cluster)
        assert missing.value.fields == {"package": "distributed"}
    monkeypatch.undo()
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkersUnavailable) as lacking:
        chosen_workers("2", path)
    assert lacking.value.fields == {"command": "sbatch"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["GPU-0", "GPU-1", "GPU-2"]),
        ("2,0", ["GPU-2", "GPU-0"]),
        ("GPU-1", ["GPU-1"]),
        ("1,-1,2", ["GPU-1"]),
        ("7", []),
        ("", []),
    ],
)
def test_cards_are_those_that_cuda_would_show_by_uuid(monkeypatch, given, expected):
    class NVMLError(Exception):
        pass

    library = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_cards() == expected


def test_runs_that_are_made_in_turns_stay_together(tmp_path):
    plan = tmp_path / "plan.yaml"
    first, second = {"runs": [{}, {"frames": 17}]}, {"runs": [{"width": 128}, {"height": 128}], "rounds": 2}
    plan.write_text(yaml.safe_dump({"defaults": {**TINY, "expected_seconds": 1}, "groups": [first, second]}))
    assert _together(load_plan(plan)) == [
        ["64x64x9"],
        ["64x64x17"],
        ["128x64x9_1", "64x128x9_1", "64x128x9_2", "128x64x9_2"],
    ]


# --- Requests of a sweep ---


def test_a_grid_is_every_combination_and_a_table_every_row(tmp_path):
    grid, table = tmp_path / "grid.yaml", tmp_path / "table.csv"
    grid.write_text(yaml.safe_dump([{**TINY, "width": [64, 128], "frames": [9, 17]}, TINY], sort_keys=False))
    assert [spec.name for _, spec in read_requests(grid)] == [
        "64x64x9",
        "64x64x17",
        "128x64x9",
        "128x64x17",
        "64x64x9",
    ]
    table.write_text(
        f"model,width,height,frames,prompt,techniques\n{SMALL_MODEL},64,64,9,1: rain,\n{SMALL_MODEL},,,,,[row_bands]\n"
    )
    (row, spec), (other, banded) = read_requests(table)
    assert (row["prompt"], spec.request.prompt, spec.request.frames) == ("1: rain", "1: rain", 9)
    assert "techniques" not in row
    assert other == {"model": SMALL_MODEL, "techniques": ["row_bands"]}
    assert [technique.value for technique in banded.technique_set] == ["row_bands"]


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [
        ("a.csv", "model,hight\nltx-2.3-tiny,64\n", {"hight": 64}),
        ("a.csv", "model,height\nltx-2.3-tiny,64\nltx-2.3-tiny,500\n", {"height": 500}),
        ("a.yaml", "{model: ltx-2.3-tiny, height: [64, 500]}", {"height": 500}),
        ("a.csv", "model,height\nltx-2.3-tiny\n", None),
        ("a.csv", "model,height\n", None),
        ("a.yaml", "- 1", None),
        ("a.yaml", "model: []", None),
        ("a.yaml", "a: [1", None),
        ("none.yaml", None, None),
    ],
)
def test_a_request_that_cannot_be_is_refused_before_anything_runs(tmp_path, name, content, fields):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidRequest) as caught:
        sweep(path, tmp_path / "out.csv", workers="1")
    assert caught.value.fields == ({"requests": path} if fields is None else fields)
    assert not (tmp_path / "out.csv").exists()


def test_each_different_request_is_forecast_once_and_a_failure_has_its_row(tmp_path, monkeypatch, capsys):
    """The second time none is forecast at all."""
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({**TINY, "width": [64, 128], "seed": [1, 2]}, sort_keys=False))
    made = []

    def forecast(spec):
        made.append(spec.request.width)
        if spec.request.width == 128:
            raise InvalidRequest("width=128 is no good; use 64", width=128)
        phase = PhaseRecord("decode_video", None, 0, 3 * 2**20, 0, 4 * 2**20, 3 * 2**20, 0, 0.0, 0.1, True)
        return Forecast((phase,), context_bytes=2**20, seconds=0.1)

    monkeypatch.setattr(sweeping, "forecast_spec", forecast)
    monkeypatch.setattr(sweeping, "cached_forecast", lambda spec: None)
    out = tmp_path / "out.csv"
    with pytest.raises(SweepError) as caught:
        sweep(grid, out, workers="1")
    assert caught.value.fields == {"failed": 2, "out": out}
    assert made == [64, 128]
    assert "4 requests, 2 different, 2 failed" in capsys.readouterr().out
    import pandas as pd

    table = pd.read_csv(out)
    assert list(table.columns) == ["model", "width", "height", "frames", "seed", *sweeping.COLUMNS]
    assert list(table["width"]) == [64, 64, 128, 128]
    assert list(table["peak_bytes"][:2]) == [3 * 2**20] * 2
    assert table["peak_bytes"][2:].isna().all()
    assert list(table["error"][2:]) == ["width=128 is no good; use 64"] * 2
    for name in ("out.txt", "out"):
        with pytest.raises(OutputError):
            sweep(grid, tmp_path / name, workers="1")


def test_the_summary_groups_runs_by_the_card_that_made_them(capsys):
    from i2v_lab.cli.measure import _Outcome
    from i2v_lab.runs.store import Run

    def outcome(name, host, card):
        run = Run(Path(name), {"host": host, "device_name": card, "device": "cuda:0"}, (), "complete")
        return _Outcome(name, run, "", reused=False)

    _print_summary([outcome("a", "n1", "H100"), outcome("b", "n2", "H200"), outcome("c", "n1", "H100")])
    words = [line.split()[0].rstrip(",") for line in capsys.readouterr().out.splitlines()]
    assert words == ["run", "n1", "a", "c", "n2", "b"]
    _print_summary([outcome("a", "n1", "H100"), outcome("b", "n1", "H100")])
    words = [line.split()[0].rstrip(",") for line in capsys.readouterr().out.splitlines()]
    assert words == ["run", "a", "b"]


# --- On workers ---


def test_workers_are_encrypted_unless_the_file_asks_for_none_or_there_is_nothing_to_encrypt_with(monkeypatch, capsys):
    """Keys of the user's own come first; without the package, workers of other machines are refused."""
    dask = pytest.importorskip("dask")
    pytest.importorskip("distributed")
    pytest.importorskip("cryptography")
    from i2v_lab.scale.cluster import _security

    assert "BEGIN" in _security(None, loopback=True).tls_worker_key
    assert "BEGIN" in _security("tls://", loopback=False).tls_worker_key
    own = {
        f"distributed.comm.tls.{role}.{part}": f"/{part}"
        for role in ("scheduler", "worker")
        for part in ("cert", "key")
    }
    with dask.config.set({**own, "distributed.comm.tls.ca-file": "/ca"}):
        assert _security("tcp://", loopback=False).tls_worker_key == "/key"
    assert capsys.readouterr().err == ""
    assert _security("tcp://", loopback=False) is None
    assert "protocol=tcp://" in capsys.readouterr().err
    monkeypatch.setattr(asked.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(WorkersUnavailable) as refused:
        _security(None, loopback=False)
    assert refused.value.fields == {"package": "cryptography"}
    assert _security(None, loopback=True) is None
    assert "without encryption" in capsys.readouterr().err


def _environment(path: str) -> tuple[int, str, str]:
    with Path(path).open("a") as file:
        file.write("x")
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]


def _fail() -> None:
    raise InvalidRequest("frames=8 is not possible; use 9", frames=8)


def _die(path: str, deaths: int) -> int:
    """Kills its worker so often, in its second part."""
    from i2v_lab.scale.dispatch import tell

    tell("began", task="dies" if deaths > 2 else "recovers", part=f"second of {deaths}")
    with Path(path).open("a") as file:
        file.write("x")
    if Path(path).stat().st_size <= deaths:
        time.sleep(0.1)  # for what it told to be sent
        os.kill(os.getpid(), signal.SIGKILL)
    return deaths


def test_tasks_away_from_deaths_are_done_once_and_a_worker_that_dies_three_times_fails_one_alone(tmp_path):
    """Each worker sees one card, whatever else it inherits, and everybody listens on loopback alone, encrypted."""
    pytest.importorskip("distributed")
    from i2v_lab.scale.dispatch import Task, WorkerDied, dispatch

    addresses, before = set(), set(psutil.Process().children(recursive=True))
    tasks = [Task(f"t{number}", _environment, (str(tmp_path / f"t{number}"),)) for number in range(8)]
    tasks += [Task("fails", _fail), Task("dies", _die, (str(tmp_path / "d"), 9))]
    tasks += [Task("recovers", _die, (str(tmp_path / "r"), 2))]
    ended = {}
    for each in dispatch(Workers(2, ("GPU-a", "GPU-b"), threads=3), tasks, tmp_path):
        ended[each.task.name] = each
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                addresses |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert ended.keys() == {task.name for task in tasks}
    places = [ended[f"t{number}"].value for number in range(8)]
    assert {card for _, card, _ in places} == {"GPU-a", "GPU-b"}
    assert {threads for *_, threads in places} == {"3"}
    often = [(tmp_path / f"t{number}").read_text() for number in range(8)]
    assert often[:-2] == ["x"] * 6
    assert set("".join(often[-2:])) == {"x"}  # their results may still be with the worker that dies next
    assert isinstance(ended["fails"].error, InvalidRequest)
    assert ended["fails"].error.fields == {"frames": 8}
    died = ended["dies"].error
    assert isinstance(died, WorkerDied)
    assert died.fields == {"part": "second of 9", "deaths": 3}
    assert (tmp_path / "d").read_text() == "xxx"
    assert ended["recovers"].value == 2
    assert (tmp_path / "r").read_text().startswith("xxx")  # once more if the other's death took its result along
    assert addresses == {"127.0.0.1"}
    left = running(set(psutil.Process().children(recursive=True)) - before)
    assert [command for command in left.values() if "resource_tracker" not in command] == []


TWICE = """
from pathlib import Path

from i2v_lab.scale.cluster import started
from i2v_lab.scale.dispatch import Task, dispatch
from i2v_lab.scale.workers import Workers

if __name__ == "__main__":
    for word in ("a", "word"):
        print(*(ended.value for ended in dispatch(Workers(1), [Task(word, len, (word,))], Path())))
    for _ in range(2):
        with started(Workers(1, cluster={"jobqueue": {"slurm": {"cores": 1, "memory": "2GB"}}}), Path()):
            print("started")
"""


def test_a_process_can_use_workers_again(tmp_path):
    """In one that has imported neither distributed nor dask-jobqueue, whose defaults come with their import."""
    pytest.importorskip("dask_jobqueue")
    (tmp_path / "twice.py").write_text(TWICE)
    for name, said in (("sbatch", "Submitted batch job 1"), ("scancel", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {said}\n")
        (tmp_path / name).chmod(0o755)
    ran = subprocess.run(
        [sys.executable, "twice.py"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.split() == ["1", "4", "started", "started"], ran.stderr


def test_a_plan_on_workers_records_what_it_records_without(tmp_path, capfd, forked_by_workers):
    """Peaks to the byte, out of memory too; what is there is reused."""
    pytest.importorskip("distributed")
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    runs = [{}, {"vram_cap_gib": 0.001}]
    plan.write_text(
        yaml.safe_dump({"defaults": {**TINY, "video": False, "expected_seconds": 1}, "groups": [{"runs": runs}]})
    )
    measure(plan, out, "cpu", workers="2")
    said = capfd.readouterr()
    assert "2 runs, 0 reused; 2 to run" in said.out
    lines = sorted(line.partition("] ")[2] for line in said.err.splitlines())
    assert [line.partition(",")[0] for line in lines] == ["64x64x9: complete", "64x64x9_cap0.001: failed"]
    assert all(line.endswith(f" on {platform.node()}") for line in lines)
    here = measure_here(load_plan(plan)[0].spec, tmp_path / "here", "cpu")
    there = read_run(out / "64x64x9")
    assert [(each.phase, each.peak_bytes) for each in there.of(PhaseRecord)] == [
        (each.phase, each.peak_bytes) for each in here.of(PhaseRecord)
    ]
    assert there.metadata["host"] == here.metadata["host"] == platform.node()
    assert len(read_run(out / "64x64x9_cap0.001").of(OutOfMemoryRecord)) == 1
    measure(plan, out, "cpu", workers="2")
    assert "2 runs, 2 reused; 0 to run" in capfd.readouterr().out
    assert {path.name for path in out.iterdir()} == {"64x64x9", "64x64x9_cap0.001"}


SBATCH = """#!/bin/bash
script=$(mktemp "{folder}/job-XXXXXX"); cp "${{@: -1}}" "$script"
setsid bash "$script" > "$script.out" 2>&1 < /dev/null &
echo $! >> "{folder}/jobs"
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/bash
for job in "$@"; do kill -TERM -- "-$job" 2>/dev/null; done
"""


def _job(path: str) -> str:
    with Path(path).open("a") as file:
        file.write("x")
    time.sleep(0.3)
    return " ".join(psutil.Process(os.getppid()).cmdline())


def test_jobs_of_slurm_do_the_tasks_encrypted_and_are_submitted_again_if_they_are_lost(tmp_path, monkeypatch):
    """With commands in the place of Slurm's that start processes of this machine: no more than that was tried."""
    pytest.importorskip("dask_jobqueue")
    pytest.importorskip("cryptography")
    from i2v_lab.scale import dispatch as dispatching
    from i2v_lab.scale.dispatch import Task, dispatch

    commands, out, file = tmp_path / "bin", tmp_path / "out", tmp_path / "cluster.yaml"
    commands.mkdir()
    for name, text in (("sbatch", SBATCH.format(folder=commands)), ("scancel", SCANCEL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    for folder in Path(__file__).parents[:2]:  # where its function is, and what that imports
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(dispatching, "LOOK_S", 0.5)
    file.write_text(yaml.safe_dump({**SLURM, "distributed": {"deploy": {"lost-worker-timeout": "1s"}}}))
    chosen = chosen_workers("1", file, single_threaded=True)
    assert (chosen.count, chosen.threads, chosen.local) == (1, 1, False)
    values, lost = [], False
    for ended in dispatch(
        chosen, [Task(f"t{number}", _job, (str(tmp_path / f"t{number}"),)) for number in range(6)], out
    ):
        assert ended.error is None
        values.append(ended.value)
        if not lost:
            (job,) = (commands / "jobs").read_text().split()
            os.killpg(int(job), signal.SIGKILL)
            lost = True
    assert len(values) == 6
    assert all(" tls://127.0.0.1:" in value and f"{out}/.keys." in value for value in values)
    assert list(out.iterdir()) == []
    jobs = (commands / "jobs").read_text().split()
    assert len(jobs) > 1
    for job in map(int, jobs):
        deadline = time.monotonic() + 10
        while (left := running([job])) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left


def test_sockets_of_workers_have_short_paths_below_any_temporary_folder(tmp_path, monkeypatch):
    for folder in (tmp_path / ("long" * 20), Path("/tmp/short")):
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        name = f"{starting._temporary()}/.i2v-lab.4194304@5bce98f7.part/pymp-abcdefgh/listener-abcdefgh"
        assert len(name) <= 107
