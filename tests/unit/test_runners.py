"""Runners: which package each one imports, which requests and options it takes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import I2VLabError, InvalidRequest, RunnerUnavailable
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract import runner as runner_module
from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture
from i2v_lab.pipeline.registry import RUNNERS, check_request, runner_of
from i2v_lab.request import I2VRequest, Quantization, Tiling
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.studies.published import study_request, varied

STILL = str(data_dir() / "stills" / "lighthouse.png")


def _imports(code: str) -> set[str]:
    code += "\nimport sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(child.stdout.splitlines()[-1]))


def test_using_one_runner_imports_no_others_package_and_asking_for_one_imports_none():
    packages = {"ltx_core", "ltx_pipelines", "ltx_video"}
    use = (
        "from i2v_lab.pipeline.contract.architectures import load_architecture\n"
        "from i2v_lab.pipeline.registry import runner_of\n"
        "architecture = load_architecture('{}'); runner = runner_of(architecture)\n"
    )
    work = "runner.skeleton_weights(architecture); runner.memoizable_modules(architecture); runner._part('pipeline')"
    asked = "import i2v_lab.cli.app, i2v_lab.runs.measure; [runner.require_package() for runner in RUNNERS.values()]"
    seen = _imports("from i2v_lab.pipeline.registry import RUNNERS\n" + asked)
    assert not seen & (packages | {"torch", "diffusers"})
    assert _imports(use.format("ltxv-tiny") + work) & packages == {"ltx_video"}
    assert _imports(use.format("ltx-2.3-tiny") + work) & (packages | {"diffusers"}) == {"ltx_core", "ltx_pipelines"}
    assert _imports(use.format("ltx-2-tiny") + work) & (packages | {"diffusers"}) == {"diffusers"}


@pytest.mark.parametrize("name", architecture_names())
def test_every_model_has_a_runner_and_a_first_request(name):
    architecture = load_architecture(name)
    assert architecture.name == name
    request = study_request(name)
    assert request.quantization is runner_of(architecture).quantizations[0]
    assert (request.tiling is not None) is runner_of(architecture).tiles(architecture)
    assert runner_of(architecture).is_own


@pytest.mark.parametrize(
    "name", [name for name in architecture_names() if load_architecture(name).runner != "diffusers"]
)
def test_every_model_of_this_package_has_its_studies(name):
    for what in ("tilings", "sizes", "frames", "map_sizes", "map_frames"):
        assert varied(name, what)


ASKED = I2VRequest(image=STILL, width=64, height=64, frames=9, quantization="bf16", tiling=None)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("ltxv-tiny", {"memory": "lean"}, "memory='lean' is not for model='ltxv-tiny'; use resident"),
        ("ltxv-tiny", {"quantization": "fp8-cast"}, "quantization='fp8-cast' is not for model='ltxv-tiny'; use bf16"),
        (
            "ltxv-2b-0.9.8-distilled",
            {"variant": "dev"},
            "variant='dev' is not for model='ltxv-2b-0.9.8-distilled'; use distilled",
        ),
        (
            "ltxv-tiny",
            {"frames": 1},
            (
                "frames=1 at 64x64 is not for model='ltxv-tiny', whose transformer needs more than one latent "
                "position; use 9 frames, or 128 pixels or more"
            ),
        ),
        (
            "ltxv-tiny",
            {"tiling": Tiling()},
            (
                "tile_px=768 is not for model='ltxv-tiny', whose decoder does not tile; use no tiling "
                "(--no-tiling, or tiling=None)"
            ),
        ),
    ],
)
def test_what_a_model_does_not_support_is_refused_before_anything_is_loaded(model, changes, message):
    request = replace(ASKED, **changes)
    for refuse in (
        lambda: check_request(load_architecture(model), request),
        lambda: forecast_request(request, model),
        lambda: study_request(model, **{"width": 64, "height": 64, **changes}),
    ):
        with pytest.raises(InvalidRequest) as refused:
            refuse()
        assert str(refused.value) == message
        assert refused.value.fields == changes
    if request.frames > 1:
        check_request(load_architecture("ltx-2.3-tiny"), request)  # which supports all else


GENERATE = ["generate", "--image", STILL, "--out", "never.mp4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*GENERATE, "--model", "ltxv-tiny", "--gemma", "g"],
            (
                "--gemma is not for model='ltxv-tiny', whose runner is ltx-video; use --checkpoint, --text-encoder, "
                "--upsampler"
            ),
        ),
        (
            [*GENERATE, "--model", "ltxv-tiny", "--lora", "l"],
            (
                "--lora is not for model='ltxv-tiny', whose runner is ltx-video; use --checkpoint, --text-encoder, "
                "--upsampler"
            ),
        ),
        (
            [*GENERATE, "--text-encoder", "t"],
            (
                "--text-encoder is not for model='ltx-2.3-tiny', whose runner is ltx-2; use --checkpoint, --gemma, "
                "--upsampler, --lora"
            ),
        ),
        (
            [*GENERATE, "--model", "ltxv-tiny", "--quantization", "fp8-cast"],
            "quantization='fp8-cast' is not for model='ltxv-tiny'; use bf16",
        ),
        (
            ["forecast", "--model", "ltxv-2b-0.9.8-distilled", "--variant", "dev"],
            "variant='dev' is not for model='ltxv-2b-0.9.8-distilled'; use distilled",
        ),
        (
            ["fit", "--gpu", "L4", "--model", "ltxv-13b-0.9.8", "--quantization", "fp8-cast"],
            "quantization='fp8-cast' is not for model='ltxv-13b-0.9.8'; use bf16",
        ),
        (
            ["forecast", "--model", "ltxv-13b-0.9.8", "--tile-px", "512"],
            (
                "tile_px=512 is not for model='ltxv-13b-0.9.8', whose decoder does not tile; use no tiling "
                "(--no-tiling, or tiling=None)"
            ),
        ),
    ],
)
def test_commands_refuse_what_belongs_to_another_runner_in_one_line(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, I2VLabError)
    assert (result.exception.exit_status, str(result.exception)) == (2, message)


def test_a_missing_package_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(runner_module, "find_spec", lambda name: None)
    for arguments in ([*GENERATE, "--model", "ltxv-tiny"], ["forecast", "--model", "ltxv-13b-0.9.8"]):
        refused = CliRunner().invoke(app, arguments).exception
        assert isinstance(refused, RunnerUnavailable)
        assert (refused.exit_status, refused.fields) == (2, {"pipeline": "ltx-video"})
        assert "pip install --no-deps ltx-video==0.1.2`" in str(refused)
    for runner in RUNNERS.values():
        with pytest.raises(RunnerUnavailable) as caught:
            runner.memoizable_modules(load_architecture("ltx-2.3-tiny"))
        assert caught.value.fields == {"pipeline": runner.name}
        assert f"run `{runner.install}`" in str(caught.value)


def test_refusals_come_before_torch():
    code = (
        "import sys\nfrom i2v_lab.cli.app import app\nfrom i2v_lab.errors import I2VLabError\n"
        f"try: app({[*GENERATE, '--model', 'ltxv-tiny', '--quantization', 'fp8-cast']!r}, standalone_mode=False)\n"
        "except I2VLabError as error: print(error)\n"
        "else: raise SystemExit('not refused')\n"
    )
    assert "torch" not in _imports(code)
    assert not Path("never.mp4").exists()


def test_a_runner_runs_only_the_models_that_name_it_or_the_one_it_stands_beside():
    for runner in RUNNERS.values():
        for name in architecture_names():
            architecture = load_architecture(name)
            request = study_request(name)
            if architecture.runner == runner.models:
                runner.check_request(architecture, request)
                continue
            with pytest.raises(InvalidRequest) as refused:
                runner.check_request(architecture, request)
            assert refused.value.fields == {"pipeline": runner.name, "model": name}


@pytest.mark.parametrize(
    ("model", "width", "message"),
    [
        ("ltx-2.3-tiny", 96, "width=96 is not a multiple of 64; use 64 or 128"),
        ("ltx-2-tiny", 96, "width=96 is not a multiple of 64; use 64 or 128"),
        ("ltxv-tiny", 100, "width=100 is not a multiple of 32; use 96 or 128"),
        ("ltxv-tiny", 32, "width=32 is below 64; use that or more"),
    ],
)
def test_each_runner_has_sizes_of_its_own(model, width, message):
    with pytest.raises(InvalidRequest) as refused:
        study_request(model, width, 64, 9)
    assert (str(refused.value), refused.value.fields) == (message, {"width": width})
    study_request("ltxv-tiny", 96, 64, 9)


def test_the_usual_quantization_of_each_runner():
    assert {name: runner.quantizations[0] for name, runner in RUNNERS.items()} == {
        "ltx-2": Quantization.FP8_CAST,
        "ltx-pipelines": Quantization.FP8_CAST,
        "ltx-video": Quantization.BF16,
        "diffusers": Quantization.BF16,
    }
