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
from typer.testing import CliRunner

from i2v_lab.cli import generate, lab, measure
from i2v_lab.cli.app import app
from i2v_lab.cli.progress import ProgressReport
from i2v_lab.errors import I2VLabError, InvalidImage, InvalidRequest, OutputError, UnknownModel
from i2v_lab.paths import CACHE_VARIABLE, notebooks_dir
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
    assert list(report) == ["output", "model", "width", "height", "frames", "fps", "seed", "decode_scope", "memory"] + [
        "peak_bytes",
        "peak_phase",
        "phases",
        "notes",
    ]
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
