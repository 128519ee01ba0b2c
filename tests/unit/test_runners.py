"""The seam between models and the packages that run them: who imports what, who takes what, and what is refused."""

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
from i2v_lab.pipeline.contract import runner as backends
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


def test_using_one_backend_does_not_import_the_other_and_asking_for_one_imports_neither():
    packages = {"ltx_core", "ltx_pipelines", "ltx_video"}
    use = (
        "from i2v_lab.pipeline.contract.architectures import load_architecture\n"
        "from i2v_lab.pipeline.registry import runner_of\n"
        "architecture = load_architecture('{}'); backend = runner_of(architecture)\n"
    )
    work = "backend.skeleton_weights(architecture); backend.repeats(); backend._part('pipeline')"
    seen = _imports(use.format("ltxv-tiny") + "import i2v_lab.cli.app, i2v_lab.runs.measure; backend.require_package()")
    assert not seen & (packages | {"torch"})
    assert _imports(use.format("ltxv-tiny") + work) & packages == {"ltx_video"}
    assert _imports(use.format("ltx-2.3-tiny") + work) & packages == {"ltx_core", "ltx_pipelines"}


@pytest.mark.parametrize("name", architecture_names())
def test_every_model_has_a_backend_a_first_request_and_its_studies(name):
    architecture = load_architecture(name)
    assert architecture.name == name
    request = study_request(name)
    assert request.quantization is runner_of(architecture).quantizations[0]
    assert (request.tiling is not None) is runner_of(architecture).tiled
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
                "tile_px=768 is not for model='ltxv-tiny', whose decoder works in one piece; use no tiling "
                "(--no-tiling, or tiling=None)"
            ),
        ),
    ],
)
def test_what_a_model_has_not_is_refused_before_anything_is_loaded(model, changes, message):
    request = replace(ASKED, **changes)
    for refuse in (
        lambda: check_request(load_architecture(model), request),
        lambda: forecast_request(request, model),
        lambda: study_request(model, **{"width": 64, "height": 64, **changes}),
    ):
        with pytest.raises(InvalidRequest) as refused:
            refuse()
        assert str(refused.value) == message
    check_request(load_architecture("ltx-2.3-tiny"), request)  # which has all three


GENERATE = ["generate", "--image", STILL, "--out", "never.mp4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*GENERATE, "--model", "ltxv-tiny", "--gemma", "g"],
            (
                "--gemma is not for model='ltxv-tiny', whose backend is ltx-video; use --checkpoint, --text-encoder, "
                "--upsampler"
            ),
        ),
        (
            [*GENERATE, "--model", "ltxv-tiny", "--lora", "l"],
            (
                "--lora is not for model='ltxv-tiny', whose backend is ltx-video; use --checkpoint, --text-encoder, "
                "--upsampler"
            ),
        ),
        (
            [*GENERATE, "--text-encoder", "t"],
            (
                "--text-encoder is not for model='ltx-2.3-tiny', whose backend is ltx-2; use --checkpoint, --gemma, "
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
                "tile_px=512 is not for model='ltxv-13b-0.9.8', whose decoder works in one piece; use no tiling "
                "(--no-tiling, or tiling=None)"
            ),
        ),
    ],
)
def test_commands_refuse_what_belongs_to_the_other_backend_in_one_line(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, I2VLabError)
    assert (result.exception.exit_status, str(result.exception)) == (2, message)


def test_a_missing_package_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    for arguments in ([*GENERATE, "--model", "ltxv-tiny"], ["forecast", "--model", "ltxv-13b-0.9.8"]):
        refused = CliRunner().invoke(app, arguments).exception
        assert isinstance(refused, RunnerUnavailable)
        assert refused.exit_status == 2
        assert str(refused) == (
            "backend='ltx-video' needs the package ltx-video, which is not installed; "
            "run `pip install --no-deps ltx-video==0.1.2`"
        )
    with pytest.raises(RunnerUnavailable, match="pip install ltx-core==1.0.0 ltx-pipelines==1.0.0"):
        RUNNERS["ltx-2"].repeats()


def test_refusals_come_before_torch():
    code = (
        "import sys\nfrom i2v_lab.cli.app import app\nfrom i2v_lab.errors import I2VLabError\n"
        f"try: app({[*GENERATE, '--model', 'ltxv-tiny', '--quantization', 'fp8-cast']!r}, standalone_mode=False)\n"
        "except I2VLabError as error: print(error)\n"
        "else: raise SystemExit('not refused')\n"
    )
    assert "torch" not in _imports(code)
    assert not Path("never.mp4").exists()


def test_a_backend_without_an_upstream_pipeline_says_so():
    with pytest.raises(InvalidRequest, match="has no upstream pipeline to measure; use i2v-lab's own"):
        runner_of(load_architecture("ltxv-tiny")).upstream(None)


def test_each_backend_has_sizes_of_its_own():
    request = replace(ASKED, width=96, pixel_multiple=32)
    check_request(load_architecture("ltxv-tiny"), request)
    with pytest.raises(InvalidRequest, match="width=96 is not for model='ltx-2.3-tiny'; use a multiple of 64"):
        check_request(load_architecture("ltx-2.3-tiny"), request)
    with pytest.raises(InvalidRequest, match="width=100 is not a multiple of 32; use 96 or 128"):
        study_request("ltxv-tiny", 100, 64, 9)
    with pytest.raises(InvalidRequest, match="width=32 is below 64; use that or more"):
        study_request("ltxv-tiny", 32, 64, 9)
    with pytest.raises(InvalidRequest, match="width=96 is not a multiple of 64; use 64 or 128"):
        study_request("ltx-2.3-tiny", 96, 64, 9)
    with pytest.raises(InvalidRequest, match="pixel_multiple=16 is unknown; use 32 or 64"):
        replace(ASKED, pixel_multiple=16)


def test_the_usual_quantization_of_each_backend():
    usual = {name: backend.quantizations[0] for name, backend in RUNNERS.items()}
    assert usual == {"ltx-2": Quantization.FP8_CAST, "ltx-video": Quantization.BF16}
