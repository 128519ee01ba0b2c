"""The command line as a person or a script meets it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import I2VLabError
from i2v_lab.runs.store import read_run

SMALL = ["--width", "64", "--height", "64", "--frames", "9", "--fps", "120"]
LARGER = ["--width", "192", "--height", "64", "--frames", "9", "--fps", "120"]  # the graph is part of the peak
CLI = [sys.executable, "-m", "i2v_lab.cli"]


@pytest.fixture(scope="module", autouse=True)
def _forked_cli(forked_python):
    """The commands of this module have torch imported already."""
    CLI[:1] = forked_python


def _refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["generate", *arguments])
    assert isinstance(result.exception, I2VLabError), result.output
    assert result.exception.exit_status == 2
    return str(result.exception)


def test_help_shows_examples():
    result = CliRunner().invoke(app, ["generate", "--help"])
    assert result.exit_code == 0
    assert "i2v-lab generate --image data/stills/lighthouse.png" in result.output


def test_bad_options_are_refused_before_anything_is_loaded_and_nothing_is_left(tmp_path, still, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were looked for")

    monkeypatch.setattr("i2v_lab.pipeline.ltx2.weights.resolve_weights", never)
    out = ["--out", str(tmp_path / "video.mp4"), "--image", str(still)]
    assert _refused(*out, "--height", "500") == "height=500 is not a multiple of 64; use 448 or 512"
    assert _refused(*out, "--frames", "24") == "frames=24 is not 8k+1; use 17 or 25"
    assert _refused(*out, "--tile-px", "100") == "tile_px=100 is not a multiple of 32; use 96 or 128"
    assert _refused(*out, "--model", "nothing").startswith("model='nothing' is not a known architecture; use one of")
    assert "does not exist; check the path" in _refused("--image", str(tmp_path / "none.png"), *out[:2])
    assert "does not exist; create it first" in _refused(*out[2:], "--out", str(tmp_path / "none" / "video.mp4"))
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
        [*CLI, "generate", "--image", still, "--out", out, *SMALL, *weights, "--json", "--seed", "3"],
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
    ]
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


def test_inference_mode_ends_with_status_1_torchs_words_and_the_remedy(tmp_path, still):
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
            "128",
            "--height",
            "128",
            "--fps",
            "120",
            "--frames",
            "33",
        ],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    for line in child.stderr:
        if line.startswith("decode_audio"):  # the part file exists from here on
            break
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [entry.name.endswith(".part.mp4") for entry in tmp_path.iterdir()] == [True]
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == status
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_brings_no_torch():
    code = "import sys, i2v_lab; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
    assert "it are an autograd graph" in shown.output
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
    assert "is not empty" in str(again.exception)
