"""The notebook runner: parameters, up-to-date checks, files and processes after failures and signals."""

from __future__ import annotations

import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from fault_injection import running
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import InvalidRequest, ReproduceError
from i2v_lab.paths import package_dir
from i2v_lab.reproduce.execution import Executor, Stopped
from i2v_lab.reproduce.kernel import InterpreterKernelSpecs
from i2v_lab.reproduce.parameters import Text, declared_parameters, plan_parameters
from i2v_lab.reproduce.run import find_notebooks, reproduce
from i2v_lab.reproduce.stamps import code_digests, input_digests, made_files, read_stamp, stamp_path
from i2v_lab.runs.provenance import RENDERING, runner_packages

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
DECLARED = """
frames: int = 25  # 8k+1
fps: float = 24.0
prompt: str = "a = b"
still: str | None = None
sizes: list[int] = [64, 128]
escaped: bool = False
free = 1
out_dir: str = "build"
"""
DRAW = """
from pathlib import Path
for name in ("drawn_a.svg", "drawn_b/deep.svg"):
    path = Path(out_dir, "figures", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{frames} {prompt} {still}")
"""


def _write(folder: Path, name: str, *sources: str, parameters: str = DECLARED) -> Path:
    cells = [
        nbformat.v4.new_markdown_cell(f"# {name}"),
        nbformat.v4.new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(source) for source in sources),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def _cli(folder: Path, *arguments: object, then: str = "") -> list[str]:
    """The command line over notebooks of a test's own; ``then`` is run after it."""
    code = f"import pathlib, i2v_lab.cli.app, i2v_lab.reproduce.run as r; r.NOTEBOOKS = pathlib.Path({str(folder)!r})\n"
    code += f"r.GRACE_S = 1.0\ntry:\n    i2v_lab.cli.app.main()\nfinally:\n    {then or 'pass'}"
    return [sys.executable, "-c", code, "reproduce", *map(str, arguments)]


# What a parameter may be.


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """A notebook that declares all, and one that declares only ``seed``."""
    return [_write(tmp_path / "nb", "many"), _write(tmp_path / "nb", "few", parameters="seed: int = 10")]


def test_declared_parameters_are_read_as_python_reads_them(two):
    assert {name: each.default for name, each in declared_parameters(two[0]).items()} == {
        "frames": 25,
        "fps": 24.0,
        "prompt": "a = b",
        "still": None,
        "sizes": [64, 128],
        "escaped": False,
        "free": 1,
        "out_dir": "build",
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("frames", "49", 49),
        ("frames", "-1", -1),
        ("fps", "30", 30),
        ("fps", "1e3", 1000.0),
        ("prompt", "1984", "1984"),
        ("prompt", "None", "None"),
        ("prompt", "", ""),
        ("still", "None", None),
        ("still", "a.png", "a.png"),
        ("sizes", "[1, 2]", [1, 2]),
        ("escaped", "True", True),
        ("escaped", "true", True),
        ("free", "3", 3),
        ("free", "None", None),
        ("free", "word", "word"),
    ],
)
def test_text_is_parsed_for_the_declared_type(two, name, text, value):
    plan = plan_parameters(two[:1], two, {name: Text(text)})[0]
    assert plan == {name: value}
    assert type(plan[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("frames", Text("wide")),
        ("frames", Text("64.0")),
        ("frames", Text("True")),
        ("frames", None),
        ("fps", Text("fast")),
        ("prompt", 5),
        ("still", 5),
        ("sizes", Text("64")),
        ("escaped", Text("1")),
    ],
)
def test_a_value_of_another_type_is_refused(two, name, given):
    with pytest.raises(InvalidRequest) as refused:
        plan_parameters(two[:1], two, {name: given})
    assert list(refused.value.fields) == [name]
    assert str(declared_parameters(two[0])[name]) in str(refused.value)


def test_a_parameter_goes_to_notebooks_that_declare_it_and_is_refused_otherwise(two):
    assert plan_parameters(two, two, {"frames": 9, "seed": 3}) == [{"frames": 9}, {"seed": 3}]
    assert plan_parameters(two[1:], two, {"seed": 3}, named=True) == [{"seed": 3}]
    with pytest.raises(InvalidRequest, match="^no notebook declares a parameter 'widht'; use one of: frames, .* seed"):
        plan_parameters(two, two, {"widht": 9})
    with pytest.raises(InvalidRequest, match="^few.ipynb declares no parameter 'frames'; use one of: seed$"):
        plan_parameters(two, two, {"frames": 9}, named=True)
    with pytest.raises(InvalidRequest, match="'out_dir' is set by --out; use --out FOLDER"):
        plan_parameters(two, two, {"out_dir": "elsewhere"})


def test_files_give_values_to_all_or_to_one_and_the_command_line_takes_precedence(two, tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\nprompt: 2026-11-24\nfps: 30\nmany:\n  fps: 60\n  frames: 9\nfew:\n")
    second.write_text("few: {seed: 2}\nframes: 17\n")
    assert plan_parameters(two, two, {}, [first]) == [
        {"prompt": "2026-11-24", "fps": 60, "frames": 9},
        {"seed": 1},
    ]
    assert plan_parameters(two, two, {"fps": Text("5")}, [first, second]) == [
        {"prompt": "2026-11-24", "fps": 5, "frames": 17},
        {"seed": 2},
    ]
    assert plan_parameters(two[1:], two, {}, [first], named=True) == [{"seed": 1}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht: 3", "no notebook declares a parameter 'widht'; use one of"),
        ("few:\n  frames: 3", "few.ipynb declares no parameter 'frames'; use one of: seed"),
        ("few: 3", "few=3 is no mapping; write lines NAME: VALUE below few:"),
        ("frames: wide", "frames='wide' does not have the type that many.ipynb declares"),
        ("out_dir: x", "'out_dir' is set by --out"),
        ("- frames", "is no mapping; write a line NAME: VALUE"),
        ("frames: [", "cannot be read as YAML"),
        (None, "cannot be read as YAML .*No such file"),
    ],
)
def test_a_file_with_a_mistake_is_refused(two, tmp_path, text, message):
    file = tmp_path / "params.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        plan_parameters(two, two, {}, [file])


def test_a_folder_without_notebooks_broken_ones_and_unknown_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("i2v_lab.reproduce.run.NOTEBOOKS", tmp_path)
    with pytest.raises(InvalidRequest) as refused:
        reproduce(out=tmp_path / "out")
    assert refused.value.fields == {"folder": tmp_path}
    for broken in ("{not json", "{}", "[]", '{"cells": [{"metadata": {"tags": ["parameters"]}, "source": ["x ="]}]}'):
        (tmp_path / "a.ipynb").write_text(broken)
        with pytest.raises(InvalidRequest) as refused:
            reproduce(out=tmp_path / "out")
        assert refused.value.fields == {"notebook": "a.ipynb"}
    with pytest.raises(InvalidRequest) as refused:
        find_notebooks(["nothing"])
    assert refused.value.fields == {"notebook": "nothing"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["-p", "frames=49"], ["-p", "frames"], ["-p", "frames=49", "-p", "seed=3"]])
def test_a_parameter_that_is_not_two_words_is_refused(words):
    result = CliRunner().invoke(app, ["reproduce", *words])
    assert type(result.exception) is InvalidRequest
    assert str(result.exception.fields["parameter"]).startswith("frames")


def test_help_shows_the_options_and_examples():
    shown = CliRunner().invoke(app, ["reproduce", "--help"]).output
    for text in ("NAME VALUE", "--parameters-file", "--jobs", "--force", "reproduce 03_no_grad_fix -p frames 49"):
        assert text in shown


# What runs, what does not, and what is left.

GIVEN = ["-f", "params.yaml", "-p", "frames", "49"]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory):
    """Notebooks that succeed, fail and kill their kernel, executed three at a time: their folder, and the process."""
    top = tmp_path_factory.mktemp("first_run")
    (top / "still.txt").write_text("rocks")
    _write(top / "nb", "drawn", DRAW)
    _write(top / "nb", "drawn_too", "print(frames)", parameters="frames: int = 25")
    _write(top / "nb", "fails", "print('so far')\n1 / 0", parameters="x = 1")
    _write(top / "nb", "dies", "import os\nos._exit(1)", parameters="x = 1")
    (top / "params.yaml").write_text("drawn:\n  prompt: rain\n  still: still.txt\n")
    command = _cli(top / "nb", "-j", 3, *GIVEN, "--out", "out")
    child = subprocess.run(command, cwd=top, capture_output=True, text=True, check=False)
    return top, child


@pytest.fixture
def build(first_run, tmp_path, monkeypatch) -> Path:
    """A copy of the first run to go on from; the current folder is the one it is in."""
    top = tmp_path / "copy"
    shutil.copytree(first_run[0], top)
    monkeypatch.setattr("i2v_lab.reproduce.run.NOTEBOOKS", top / "nb")
    monkeypatch.chdir(top)
    return top / "out"


def test_all_notebooks_are_executed_although_some_fail_and_a_table_shows_the_outcomes(first_run):
    top, child = first_run
    assert child.returncode == 1
    estimate, *lines = child.stderr.splitlines()
    assert estimate.startswith("4 to execute, into ")
    assert sorted(line for line in lines if line.endswith(": started")) == [
        f"[{number}/4] {name}: started" for number, name in enumerate(("dies", "drawn", "drawn_too", "fails"), start=1)
    ]
    ends = [re.sub(r" \(\d+ s\)$", "", line) for line in lines if not line.endswith(": started")]
    assert sorted(ends[:-1]) == [
        "[1/4] dies: failed: DeadKernelError: Kernel died",
        "[2/4] drawn: done",
        "[3/4] drawn_too: done",
        "[4/4] fails: failed: ZeroDivisionError: division by zero",
    ]
    assert ends[-1].startswith("i2v-lab: 2 of 4 notebooks failed: dies.ipynb: DeadKernelError: ")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in child.stdout.splitlines() if "│" in line]
    assert [row[:2] for row in rows] == [
        ["dies", "failed: DeadKernelError: Kernel died"],
        ["drawn", "done"],
        ["drawn_too", "done"],
        ["fails", "failed: ZeroDivisionError: division by zero"],
    ]
    assert all(re.fullmatch(r"\d+ s", row[2]) for row in rows)
    assert (top / "out/figures/drawn_a.svg").read_text() == "49 rain still.txt"
    made = {path.name for path in (top / "out" / "notebooks").iterdir()}
    assert made == {f"{name}.ipynb" for name in ("dies", "drawn", "drawn_too", "fails")}
    pages = {path.stem: path.read_text() for path in (top / "out" / "site").iterdir()}
    assert "so far" in pages["fails"]
    assert "49" in pages["drawn_too"]
    assert all(f"{name}.html" in pages["index"] for name in ("dies", "drawn", "drawn_too", "fails"))
    assert pages["index"].count("failed") >= 2


def test_workers_execute_notebooks_as_they_are_executed_here(first_run, tmp_path):
    """Outcomes, figures and stamps are equal; a kernel that dies takes no worker with it."""
    pytest.importorskip("distributed")
    top, child = first_run
    command = _cli(top / "nb", "--workers", 2, *GIVEN, "--out", tmp_path / "out")
    there = subprocess.run(command, cwd=top, capture_output=True, text=True, check=False)
    assert there.returncode == 1

    def lines(said: str) -> list[str]:
        return sorted(re.sub(r" \(\d+ s\)$", "", line) for line in said.splitlines())

    assert lines(there.stderr.replace(f"into {tmp_path / 'out'}:", "into out:")) == lines(child.stderr)
    for figure in (top / "out" / "figures").rglob("*.svg"):
        assert (tmp_path / "out" / figure.relative_to(top / "out")).read_bytes() == figure.read_bytes()
    for name in ("drawn", "drawn_too", "fails", "dies"):
        here, other = read_stamp(stamp_path(top / "out", name)), read_stamp(stamp_path(tmp_path / "out", name))
        assert here is not None
        assert other is not None
        assert (other.inputs, other.error, other.files.keys()) == (here.inputs, here.error, here.files.keys())
    assert [path for path in (tmp_path / "out").rglob(".*") if path.name != ".lock"] == []


def test_a_stamp_lists_the_inputs_and_the_output_files_of_a_notebook(build):
    stamp = read_stamp(stamp_path(build, "drawn"))
    assert list(stamp.files) == ["figures/drawn_a.svg", "figures/drawn_b/deep.svg", "notebooks/drawn.ipynb"]
    packages = {*runner_packages(), *RENDERING}
    assert {"the notebook", "the code of i2v_lab", "the data of i2v_lab", *packages} < set(stamp.inputs)
    assert stamp.inputs["parameter frames"] == "49"
    assert stamp.inputs["parameter fps"] == "24.0"
    assert "parameter out_dir" not in stamp.inputs
    assert read_stamp(stamp_path(build, "fails")).error == "ZeroDivisionError: division by zero"


def test_a_file_belongs_to_the_notebook_with_the_longest_name_in_front_of_its_own(tmp_path):
    """Whoever wrote it; so no notebook that is committed has the name of another one in front."""
    (tmp_path / "figures").mkdir()
    for name in ("drawn_a.svg", "drawn_too_c.svg"):
        (tmp_path / "figures" / name).write_text("")
    stems = ["drawn", "drawn_too"]
    assert list(made_files(tmp_path, "drawn", stems)) == ["figures/drawn_a.svg"]
    assert list(made_files(tmp_path, "drawn_too", stems)) == ["figures/drawn_too_c.svg"]
    committed = [notebook.stem for notebook in find_notebooks([])]
    assert [(one, other) for one in committed for other in committed if one != other and other.startswith(one)] == []


def test_every_change_makes_a_notebook_stale_and_nothing_else_does(build):
    stamp = read_stamp(stamp_path(build, "drawn"))
    notebook = find_notebooks(["drawn"])[0]
    values = {name: each.default for name, each in declared_parameters(notebook).items() if name != "out_dir"}
    values |= {"frames": 49, "prompt": "rain", "still": "still.txt"}
    code = code_digests()

    def why(**changed: object) -> str | None:
        return stamp.why_stale(input_digests(notebook, {**values, **changed}, code), build)

    assert why() is None
    assert why(frames=9) == "parameter frames changed"
    assert why(frames=49.0) == "parameter frames changed"
    assert why(still=None) == "parameter still changed"
    Path("still.txt").write_text("trees")
    assert why() == "the file of parameter still changed"
    Path("still.txt").unlink()
    assert why() == "the file of parameter still changed"
    Path("still.txt").write_text("rocks")
    code["torch"] = "2.12.0"
    assert why() == "torch changed"
    code = code_digests()
    code["the code of i2v_lab"] = "other"
    assert why() == "the code of i2v_lab changed"
    code = code_digests()
    figure = build / "figures" / "drawn_b" / "deep.svg"
    content = figure.read_text()
    figure.write_text("other")
    assert why() == "figures/drawn_b/deep.svg changed"
    figure.unlink()
    assert why() == "figures/drawn_b/deep.svg is missing"
    figure.write_text(content)
    source = notebook.read_text()
    notebook.write_text(source + " ")
    assert why() == "the notebook changed"
    notebook.write_text(source)
    assert why() is None


def test_the_code_digest_follows_every_file_of_the_package_and_of_its_data(tmp_path, monkeypatch):
    package = package_dir()
    copy = tmp_path / "i2v_lab"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gpus.csv").write_text("card")
    monkeypatch.setattr("i2v_lab.reproduce.stamps.data_dir", lambda: tmp_path / "data")
    real, there = code_digests(), "the code of i2v_lab"
    monkeypatch.setattr("i2v_lab.reproduce.stamps.package_dir", lambda: copy)
    assert code_digests() == real
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "a.pyc").write_text("")
    assert code_digests() == real
    template = copy / "reporting" / "site" / "templates" / "style.css"
    template.write_text(template.read_text() + " ")
    assert {name for name, digest in code_digests().items() if digest != real[name]} == {there}
    (tmp_path / "data" / "new.csv").write_text("")
    assert {name for name, digest in code_digests().items() if digest != real[name]} == {there, "the data of i2v_lab"}


def _times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_notebooks_that_are_up_to_date_are_not_executed_even_if_moved_and_import_nothing_large(build):
    before, moved = _times(build), build.with_name("moved")
    build.rename(moved)
    heavy = "import sys; print([name for name in ('papermill', 'nbformat', 'torch') if name in sys.modules])"
    command = _cli(build.with_name("nb"), "drawn", "drawn_too.ipynb", *GIVEN, "--out", "moved", then=heavy)
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert child.stderr.splitlines() == ["[1/2] drawn: up to date", "[2/2] drawn_too: up to date"]
    assert child.stdout.count("up to date") == 2
    assert child.stdout.splitlines()[-2:] == ["moved/site/index.html", "[]"]
    assert _times(moved) == before


def test_stale_and_failed_notebooks_are_executed_and_the_site_keeps_the_others(build, capfd):
    (build / "figures" / "drawn_a.svg").unlink()
    before = _times(build)
    outcomes = reproduce(["drawn", "drawn_too"], {"frames": 49}, build, files=[Path("params.yaml")])
    assert [str(outcome) for outcome in outcomes] == ["done", "up to date"]
    assert outcomes[0].seconds is not None
    assert outcomes[1].seconds is None
    printed = capfd.readouterr().err.splitlines()
    assert printed[0].startswith("1 to execute, into ")
    assert printed[1:3] == [
        "[2/2] drawn_too: up to date",
        "[1/2] drawn: started, since figures/drawn_a.svg is missing",
    ]
    after = _times(build)
    assert after["notebooks/drawn_too.ipynb"] == before["notebooks/drawn_too.ipynb"]
    index = (build / "site" / "index.html").read_text()
    assert after["site/index.html"] > before["site/index.html"]
    assert all(f"{name}.html" in index for name in ("dies", "drawn", "drawn_too", "fails"))
    with pytest.raises(ReproduceError, match="^1 of 1 notebooks failed: fails.ipynb: ZeroDivisionError: division by"):
        reproduce(["fails"], out=build)
    assert "fails: started, since it failed" in capfd.readouterr().err
    (build / "site" / "fails.html").unlink()
    forced = reproduce(["drawn_too"], {"frames": 49}, build, force=True)
    assert [str(outcome) for outcome in forced] == ["done"]
    assert "so far" in (build / "site" / "fails.html").read_text()


def test_a_missing_page_is_rendered_although_no_notebook_is_executed(build):
    (build / "site" / "drawn.html").unlink()
    assert reproduce(["drawn_too"], {"frames": 49}, build)[0].seconds is None
    assert "drawn" in (build / "site" / "drawn.html").read_text()


PATIENT = """
import os, time
from pathlib import Path
part = Path(out_dir, "patient.part")
try:
    part.write_text("half")
    time.sleep(100)
finally:
    part.unlink()
"""
PARENT = """
import subprocess, sys
code = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(100)"
subprocess.run([sys.executable, "-c", code, f"{out_dir}/parent.ready"])
"""
STUBBORN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
open(f"{out_dir}/stubborn.ready", "w").close()
while True:
    try:
        time.sleep(100)
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_no_process_and_no_partial_file(tmp_path, number, status):
    for name, source in {"a_patient": PATIENT, "b_parent": PARENT, "c_stubborn": STUBBORN, "d_waits": "1"}.items():
        _write(tmp_path / "nb", name, source, parameters="out_dir: str = 'build'")
    child = subprocess.Popen(
        _cli(tmp_path / "nb", "-j", 3, "--out", tmp_path / "out"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    ready = [tmp_path / "out" / name for name in ("patient.part", "parent.ready", "stubborn.ready")]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in ready):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(child.pid).children(recursive=True)
    assert len(started) >= 5  # three kernels and two programs
    child.send_signal(number)
    printed = child.communicate(timeout=60)[1]
    assert child.returncode == status
    assert running(psutil.wait_procs(started, timeout=5)[1]) == {}
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {"parent.ready", "stubborn.ready"}
    assert "d_waits" not in printed
    assert "i2v_lab" not in printed  # no traceback of this package


def test_a_full_disk_leaves_the_executed_notebook_and_the_next_run_works(tmp_path, monkeypatch, forked_kernels):
    """Its outputs do not fit: the error is that, the copy is the one before, and the folder is as good as ever."""
    _write(tmp_path / "nb", "a", "print('x' * size)", parameters="size: int = 1")
    monkeypatch.setattr("i2v_lab.reproduce.run.NOTEBOOKS", tmp_path / "nb")
    out = tmp_path / "out"
    reproduce(out=out)
    executed = out / "notebooks" / "a.ipynb"
    before = executed.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(ReproduceError, match=r"failed: a\.ipynb: File too large") as caught:
            reproduce(["a"], {"size": 500_000}, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert executed.read_bytes() == before
    assert not [path for path in out.rglob("*") if ".part" in path.name or path.name == ".lock"]
    assert read_stamp(stamp_path(out, "a")).error is not None
    executed.write_bytes(b"")  # what an earlier version left
    _write(tmp_path / "nb", "b", "1", parameters="size: int = 1")
    assert [outcome.error for outcome in reproduce(["b"], out=out)] == [None]
    assert [outcome.error for outcome in reproduce(out=out)] == [None, None]
    assert nbformat.read(executed, 4).cells[-1].outputs[0].text == "x\n"


def test_a_parameter_may_be_too_long_for_a_path_and_must_be_utf8(two, tmp_path):
    for prompt in ("rain " * 100, "a\0b", "ä" * 200, "/" * 5000):
        assert input_digests(two[0], {"prompt": prompt}, {})["parameter prompt"] == repr(prompt)
    for value in ("rain \udcff", {"a": ["\ud800"]}):
        name = "prompt" if isinstance(value, str) else "free"
        with pytest.raises(InvalidRequest) as caught:
            plan_parameters(two[:1], two, {name: value})
        assert caught.value.fields == {name: value}


def test_a_terminal_shows_bars_and_whole_lines(tmp_path):
    _write(tmp_path / "nb", "a", "1", "2", "import time; time.sleep(0.3)", parameters="x = 1")
    controller, terminal = pty.openpty()
    command = _cli(tmp_path / "nb", "--out", tmp_path / "out")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "90"}
    with subprocess.Popen(command, stderr=terminal, stdout=subprocess.DEVNULL, env=environment) as child:
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(controller, 65536):
                shown += chunk
        except OSError:  # the terminal's other end has closed
            pass
    os.close(controller)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert child.returncode == 0
    assert re.search(r"all +━+ 0/1 notebooks", text)
    assert re.search(r"  a +━+.* [1-4]/5 cells", text)
    assert re.search(r"all +━+ 1/1 notebooks", text)
    assert "[1/1] a: started" in text
    assert re.search(r"\[1/1\] a: done \(\d+ s\)", text)


def test_the_kernel_is_of_this_interpreter_and_runs_nothing_once_it_is_stopped(tmp_path, monkeypatch):
    for name in ("python3", "other"):
        spec = tmp_path / "jupyter" / "kernels" / name
        spec.mkdir(parents=True)
        (spec / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "other", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = _write(tmp_path, "a", "import sys\nprint(sys.executable)", parameters="x = 1")
    cells: list[tuple[int, int]] = []
    executor = Executor()
    error = executor.execute(notebook, {}, tmp_path / "out" / "a.ipynb", lambda *at: cells.append(at))
    executor.interrupt()
    with pytest.raises(Stopped):  # a kernel that was starting gets no cell to run
        executor.execute(notebook, {}, tmp_path / "out" / "b.ipynb", lambda *at: cells.append(at))
    assert error is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.ipynb"]
    executed = nbformat.read(tmp_path / "out" / "a.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.strip() == sys.executable
    assert cells == [(0, 3), (1, 3), (2, 3)]
    assert InterpreterKernelSpecs().get_kernel_spec("other").argv == ["/bin/false"]
    assert (Path(InterpreterKernelSpecs().get_kernel_spec("python3").resource_dir) / "logo-svg.svg").is_file()
