"""The command line: exit statuses, JSON on stdout, progress on stderr, and files that are left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
import torch
from typer.models import OptionInfo
from typer.testing import CliRunner
from typer.utils import get_params_from_function

import i2v_lab
from i2v_lab import profile_call
from i2v_lab.cli import generate, lab, measure
from i2v_lab.cli.app import app, main
from i2v_lab.cli.progress import ProgressReport
from i2v_lab.cli.reproduce import build_folder
from i2v_lab.errors import I2VLabError, InvalidImage, InvalidRequest, OutputError, UnknownModel
from i2v_lab.paths import CACHE_VARIABLE, notebooks_dir
from i2v_lab.reporting.console import PlainConsole, TerminalTable
from i2v_lab.runs.store import read_run

SMALL = ["--width", "64", "--height", "64", "--frames", "9", "--fps", "120"]
LARGER = ["--width", "192", "--height", "64", "--frames", "9", "--fps", "120"]  # the graph is part of the peak
CLI = [sys.executable, "-m", "i2v_lab.cli"]


COMMANDS = [
    *("generate", "show", "compare", "forecast", "sweep", "fit", "models", "measure"),
    *("accuracy", "calibrate", "reproduce", "lab", "doctor"),
]


@pytest.fixture(scope="module", autouse=True)
def _forked_cli(forked_python):
    """The commands of this module have torch imported already."""
    own = list(CLI)
    CLI[:1] = forked_python
    yield
    CLI[:] = own


def _refused(kind: type[I2VLabError], *arguments: str) -> dict[str, object]:
    """The fields of the error that ``generate`` ends with."""
    result = CliRunner().invoke(app, ["generate", *arguments])
    assert type(result.exception) is kind, result.output
    assert result.exception.exit_status == 2
    return result.exception.fields


def test_every_command_is_registered():
    assert [command.name or command.callback.__name__ for command in app.registered_commands] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_examples(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert f" i2v-lab {command}" in result.output.split("Examples")[1]


def test_bad_options_are_refused_before_anything_is_loaded_and_nothing_is_left(tmp_path, still, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were resolved")

    monkeypatch.setattr("i2v_lab.pipeline.ltx2.weights.resolve_weights", never)
    out = ["--out", str(tmp_path / "video.mp4"), "--image", str(still)]
    assert _refused(InvalidRequest, *out, "--height", "500")["height"] == 500
    assert _refused(InvalidRequest, *out, "--frames", "24")["frames"] == 24
    assert _refused(InvalidRequest, *out, "--tile-px", "100")["tile_px"] == 100
    assert _refused(InvalidRequest, *out, "--vram-cap-gib", "0")["vram_cap_gib"] == 0
    assert _refused(UnknownModel, *out, "--model", "nothing")["model"] == "nothing"
    _refused(InvalidImage, "--image", str(tmp_path / "none.png"), *out[:2])
    _refused(OutputError, *out[2:], "--out", str(tmp_path / "none" / "video.mp4"))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_checkpoint_ends_with_status_2_one_line_and_nothing_left(tmp_path, still, tiny_files):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_files["checkpoint"].read_bytes()[:5000])
    (tmp_path / "out").mkdir()
    child = subprocess.run(
        [*CLI, "generate", "--image", still, "--out", tmp_path / "out" / "video.mp4", "--checkpoint", cut]
        + ["--gemma", tiny_files["gemma"], "--upsampler", tiny_files["upsampler"]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 2
    assert child.stdout == ""
    assert child.stderr.startswith(f"i2v-lab: --checkpoint '{cut}' is truncated or not a safetensors file")
    assert child.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_json_is_one_object_with_every_phase_and_the_file_is_right(tmp_path, still, tiny_files):
    out = tmp_path / "video.mp4"
    weights = [word for name, path in tiny_files.items() for word in (f"--{name}", str(path))]
    child = subprocess.run(
        [
            *CLI,
            "generate",
            "--image",
            still,
            "--out",
            out,
            *SMALL,
            *weights,
            "--json",
            "--seed",
            "3",
            "--prompt",
            "a" * 1030,
        ],
        capture_output=True,
        text=True,
        check=True,
        env=_environment(I2V_LAB_VRAM="1"),
    )
    report = json.loads(child.stdout)
    assert list(report) == [
        "output",
        "model",
        "weights",
        "width",
        "height",
        "frames",
        "fps",
        "seed",
        "decode_scope",
        "memory",
    ] + [
        "peak_bytes",
        "peak_phase",
        "phases",
        "notes",
    ]
    assert report["weights"] == "files"
    assert [(note["topic"], note["count"]) for note in report["notes"]] == [("prompt", 6)]
    assert sum(line == report["notes"][0]["text"] for line in child.stderr.splitlines()) == 1
    phases = [phase["phase"] for phase in report["phases"]]
    assert phases == ["encode_prompt", "encode_image", "denoise_stage_1", "upsample_latent", "denoise_stage_2"] + [
        "decode_audio",
        "decode_video",
    ]
    assert report["peak_bytes"] == max(phase["peak_bytes"] for phase in report["phases"])
    assert (report["width"], report["height"], report["frames"], report["seed"]) == (64, 64, 9, 3)
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
        assert container.streams.audio[0].channels == 2
    lines = [line for line in child.stderr.splitlines() if line.startswith("[vram] ")]
    assert [line.split()[2].rstrip(":") for line in lines] == phases
    assert all(line.split("peak_so_far=")[1].endswith("iB") for line in lines)


def test_inference_mode_ends_with_status_1_the_message_of_torch_and_the_remedy(tmp_path, still):
    out = tmp_path / "video.mp4"
    child = subprocess.run(
        [*CLI, "generate", "--image", still, "--out", out, *SMALL, "--decode-scope", "inference_mode"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 1
    last = child.stderr.splitlines()[-1]
    assert last.startswith("i2v-lab: Inference tensors cannot be saved for backward")
    assert "use decode_scope='no_grad'" in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_nothing_behind(tmp_path, still, number, status):
    out = tmp_path / "video.mp4"
    child = subprocess.Popen(
        [
            *CLI,
            "generate",
            "--image",
            still,
            "--out",
            out,
            "--width",
            "192",
            "--height",
            "192",
            "--fps",
            "120",
            "--frames",
            "121",  # decoding takes a second: long enough to be stopped within
        ],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    for line in child.stderr:
        if line.startswith("decode_audio"):  # the part file exists from here on
            break
    while not list(tmp_path.iterdir()) and child.poll() is None:
        time.sleep(0.01)
    assert [entry.name.endswith(".part.mp4") for entry in tmp_path.iterdir()] == [True]
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == status
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["i2v_lab", "i2v_lab.cli.app"])
def test_importing_the_package_or_its_command_line_imports_nothing_large(module):
    large = {"torch", "numpy", "pandas", "matplotlib", "pydantic", "papermill", "IPython", "av", "pynvml"}
    code = f"import sys, {module}; print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert large & set(child.stdout.split()) == set()
    assert child.stderr == ""


def test_paths_are_printed_verbatim_and_never_as_markup(capsys):
    report = {"output": "[red]a[/red]:bug:.mp4", "width": 64, "height": 64, "frames": 9, "fps": 24.0}
    report |= {"model": "ltx-2.3-tiny", "weights": "random"}
    phase = {"phase": "decode_video", "seconds": 1.0, "peak_bytes": 2**20}
    generate._print_report({**report, "phases": [phase], "peak_bytes": 2**20, "peak_phase": "decode_video"})
    assert "[red]a[/red]:bug:.mp4: 64x64" in capsys.readouterr().out
    measure._print_summary([measure._Outcome("[bold]run[/bold]", None, "", reused=False)])
    assert "[bold]run[/bold]" in capsys.readouterr().out
    with ProgressReport(9) as progress:
        progress.checked("[/red].safetensors", 1, 2)


# --- lab ---


@pytest.mark.parametrize("installed", [False, True])
def test_lab_serves_copies_which_follow_their_notebooks_until_they_are_changed(
    tmp_path, monkeypatch, capsys, installed
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    source, folder = tmp_path / "notebooks", tmp_path / "here"
    shutil.copytree(notebooks_dir(), source, ignore=shutil.ignore_patterns(".*"))
    monkeypatch.setattr(lab, "notebooks_dir", lambda: source)
    monkeypatch.setattr(lab, "checkout_dir", lambda: None if installed else folder)
    copy = lab.editable_notebooks(folder)
    assert copy == folder / (lab.COPY if installed else lab.CHECKOUT_COPY)
    assert capsys.readouterr().err.splitlines() == [
        f"i2v-lab: JupyterLab opens copies of the notebooks, in {copy}; changes are saved there"
    ]
    assert {path.name for path in copy.iterdir()} == {path.name for path in notebooks_dir().glob("[!.]*")}
    (copy / lab.START).write_text("mine")
    (copy / "05_leak.ipynb").unlink()
    for name in (lab.START, "05_leak.ipynb", "06_will_it_fit.ipynb"):
        (source / name).write_text(f"newer {name}")
    lab.editable_notebooks(folder)
    assert (copy / lab.START).read_text() == "mine"
    assert (copy / "05_leak.ipynb").read_text() == "newer 05_leak.ipynb"
    assert (copy / "06_will_it_fit.ipynb").read_text() == "newer 06_will_it_fit.ipynb"
    assert f"i2v-lab: {lab.START}: changed by you" in capsys.readouterr().err
    next((tmp_path / "cache" / "jupyter").glob("copied-*.json")).write_text("{")  # damaged: all count as changed
    (copy / "05_leak.ipynb").write_text("mine too")
    lab.editable_notebooks(folder)
    assert (copy / "05_leak.ipynb").read_text() == "mine too"


def test_lab_starts_as_root_and_without_a_browser_over_ssh(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert lab.complete_options(["--port=1"], {}) == ["--allow-root", "--port=1"]
    assert capsys.readouterr().err.startswith("i2v-lab: running as root")
    for option in ("--allow-root", "--ServerApp.allow_root=True"):
        assert lab.complete_options([option], {}) == [option]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert lab.complete_options([], {}) == []
    assert lab.complete_options(["--port=1"], {"SSH_CONNECTION": "x"}) == ["--no-browser", "--port=1"]
    assert lab.complete_options(["--no-browser"], {"SSH_CONNECTION": "x"}) == ["--no-browser"]
    assert capsys.readouterr().err == ""


def test_lab_without_notebooks_or_a_writable_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "checkout_dir", lambda: None)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as refused:
        lab.editable_notebooks(tmp_path / "file")
    assert refused.value.fields["folder"] == tmp_path / "file" / lab.COPY
    monkeypatch.setattr(lab, "notebooks_dir", lambda: tmp_path / "none")
    result = CliRunner().invoke(app, ["lab"])
    assert type(result.exception) is OutputError
    assert result.exception.fields["folder"] == tmp_path / "none"


def test_calibrate_reports_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / "file" / "model.json")])
    assert type(result.exception) is OutputError
    assert result.exception.fields["out"] == tmp_path / "file" / "model.json"


def _environment(**extra: str) -> dict[str, str]:
    import os

    return {**os.environ, **extra}


def test_the_command_is_installed():
    assert Path(sys.executable).with_name("i2v-lab").exists()


def test_a_profiled_run_is_recorded_whole_and_shown(tmp_path, still):
    for scope in ("escaped", "no_grad"):
        subprocess.run(
            [*CLI, "generate", "--image", still, "--out", tmp_path / "video.mp4", *LARGER, "--decode-scope", scope]
            + ["--profile", tmp_path / scope],
            check=True,
            capture_output=True,
        )
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "escaped")])
    assert shown.exit_code == 0
    assert "of it saved for backward by" in shown.output
    assert all(phase in shown.output for phase in ("encode_prompt", "denoise_stage_2", "decode_video"))
    figures = tmp_path / "figures"
    both = ["show", str(tmp_path / "escaped"), str(tmp_path / "no_grad"), "--timeline", str(figures)]
    assert "decode_video" in CliRunner().invoke(app, both).output
    assert sorted(path.name for path in figures.iterdir()) == ["timeline.png", "timeline.svg"]
    run = read_run(tmp_path / "escaped")
    assert run.status == "complete"
    assert run.metadata["request"]["decode_scope"] == "escaped"
    assert run.frame("phase")["saved_for_backward_bytes"].iloc[-1] > 0
    assert len(run.frame("step")) == 8 + 3 + 1
    again = CliRunner().invoke(
        app,
        ["generate", "--image", str(still), "--out", str(tmp_path / "b.mp4"), "--profile", str(tmp_path / "escaped")],
    )
    assert type(again.exception) is OutputError


# --- What every command line has ---


def test_the_version_completion_and_running_as_a_module():
    for words in (["-m", "i2v_lab"], ["-m", "i2v_lab.cli"]):
        done = subprocess.run([sys.executable, *words, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"i2v-lab {i2v_lab.__version__}\n"
    environment = {**os.environ, "_I2V_LAB_COMPLETE": "complete_bash", "COMP_WORDS": "i2v-lab fore", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "i2v_lab"], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ["forecast"]


MEANT = {
    "forecst": "forecast",
    "forecast --widht 3": "--width",
    "forecast --model wan-2.2-ti2v": "wan-2.2-ti2v-5b",
    "models ltx-2.3-22": "ltx-2.3-22b",
    "fit --gpu RTX4091": "RTX 4090",
    "forecast --memory residnt": "resident",
    "reproduce 03_no_grd_fix": "03_no_grad_fix",
    "accuracy --model ltx-2.3-2b": "ltx-2.3-22b",
}


@pytest.mark.parametrize("words", MEANT)
def test_a_wrong_name_is_answered_with_what_was_probably_meant(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["i2v-lab", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert MEANT[words] in line[line.lower().index("did you mean") :].split("?")[0]


def test_parameters_have_a_build_folder_of_their_own():
    names = {
        build_folder(*given).name
        for given in [([], []), (["seed\0003"], []), (["seed\0004"], []), (["prompt\0a b"], []), (["prompt\0a-b"], [])]
    }
    assert len(names) == 5
    assert {"build", "build-seed-3", "build-seed-4"} <= names
    assert build_folder(["prompt\0" + "x" * 500], [Path("dir/p.yaml")]).name.startswith("build-p-prompt-x")
    assert len(build_folder(["prompt\0../" + "é" * 500], []).name) < 80
    ignored = (Path(__file__).parents[2] / ".gitignore").read_text().splitlines()
    assert {"build/", "build-*/", "/video.mp4"} <= set(ignored)


@pytest.mark.parametrize("columns", ["40", "60"])
def test_a_narrow_terminal_loses_no_column(columns, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    title = "A title that is long enough to fold"
    table = TerminalTable("name", "peak", "other peak", "share under", "module", title=title)
    row = ("decode_video", "1023.00 GiB", "1023.00 GiB", "12.34 %", "transformer.blocks.0.attention.to_out.linear")
    table.add_row(*row)
    for column in table.columns[1:4]:
        column.justify = "right"
    console = PlainConsole(width=int(columns))
    with console.capture() as capture:
        console.print(table)
    shown = capture.get()
    assert max(map(len, shown.splitlines())) <= int(columns)
    flat = "".join(shown.split())
    for text in (*row, "other peak", "share under", title):
        assert "".join(text.split()) in flat
    listed = CliRunner().invoke(app, ["models"]).output
    assert "hunyuanvideo-1.5-i2v" in listed.split()
    assert "decode_video" in listed.split()


def test_show_prints_json_and_says_which_files_it_wrote(tmp_path, capsys):
    profile_call(torch.nn.Linear(2, 2), torch.ones(1, 2), run_dir=tmp_path / "run")
    values = json.loads(CliRunner().invoke(app, ["show", str(tmp_path / "run"), "--json"]).stdout)
    assert (values["status"], values["peak_phase"], values["phases"][0]["phase"]) == ("complete", "call", "call")
    pair = ["show", str(tmp_path / "run"), str(tmp_path / "run"), "--json", "--timeline", str(tmp_path / "figures")]
    result = CliRunner().invoke(app, pair)
    assert [each["status"] for each in json.loads(result.stdout)] == ["complete", "complete"]
    files = [tmp_path / "figures" / name for name in ("timeline.svg", "timeline.png")]
    assert result.stderr.splitlines() == [f"wrote {file}" for file in files]


WRITING = {
    "accuracy": ["--csv"],
    "calibrate": ["--out"],
    "sweep grid.yaml": ["--out"],
    "show run": ["--timeline", "--out"],
    "reproduce 03": ["--out"],
    "measure --plan plan.yaml --dry-run": ["--out"],
    "forecast --model ltx-2.3-tiny": ["--profile"],
    "generate --image stills/lighthouse.png": ["--out", "--profile"],
}
WEIGHTS_READ = {"checkpoint", "gemma", "text_encoder", "upsampler", "weights", "lora"}
READ = {*WEIGHTS_READ, "image", "script", "plan", "cluster", "parameters_file"}


def test_every_option_that_writes_is_known_here():
    """A new option that writes a file has to be tried by the test below."""
    found = {
        f"{command.callback.__name__} --{parameter.name}"
        for command in app.registered_commands
        for parameter in get_params_from_function(command.callback).values()
        if isinstance(parameter.default, OptionInfo)
        and "Path" in str(parameter.annotation)
        and parameter.name not in READ
    }
    assert found <= {f"{words.split()[0]} {option}" for words, options in WRITING.items() for option in options}


@pytest.mark.parametrize("place", ["file/below", "/proc/below", "/dev/full", "x" * 300])
@pytest.mark.parametrize("words", WRITING)
def test_what_cannot_be_written_is_one_line(words, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("grid.yaml").write_text("{model: ltx-2.3-tiny, width: 64, height: 64, frames: 9}\n")
    Path("plan.yaml").write_text(
        "groups: [{runs: [{model: ltx-2.3-tiny, width: 64, height: 64, frames: 9, expected_seconds: 1}]}]\n"
    )
    for option in WRITING[words]:
        other = ["--out", "video.mp4"] if option == "--profile" and words.startswith("generate") else []
        other += ["--export", "perfetto"] if option == "--out" and words.startswith("show") else []
        monkeypatch.setattr(sys, "argv", ["i2v-lab", *words.split(), *other, option, place])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert ended.value.code in (1, 2)
        assert len(output.err.splitlines()) == 1, output.err
        assert output.err.startswith("i2v-lab: ")
