"""diffusers' LTX-2, LTX-2.3 and LTX-2.5: what each is made of, that it generates, and what it needs.

The tiny models that the installed diffusers and transformers have are run; that others are refused is tested always.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import InvalidRequest, RunnerUnavailable
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract import runner as runner_module
from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture
from i2v_lab.pipeline.diffusers.ltx2 import CLASSES, DiffusersLTX2, component, text_encoder
from i2v_lab.pipeline.diffusers.weights import resolve_weights
from i2v_lab.pipeline.registry import RUNNERS
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.runs.execute import Mode, execute
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.plans import load_plan
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.runs.store import read_run
from i2v_lab.studies.published import varied


def _is_of_two_stages(architecture):
    return architecture.runner == "diffusers" and not architecture.pipeline


STILL = str(data_dir() / "stills" / "lighthouse.png")
RUNNER = RUNNERS["diffusers"]
MODELS = [name for name in architecture_names() if _is_of_two_stages(load_architecture(name))]
PHASES = [
    "encode_prompt",
    "encode_image",
    "denoise_stage_1",
    "upsample_latent",
    "encode_prompt",
    "denoise_stage_2",
    "decode_video",
    "decode_audio",
]


def _is_installed(model: str) -> bool:
    try:
        RUNNER.require_package(load_architecture(model))
    except RunnerUnavailable:
        return False
    return True


INSTALLED = [model for model in MODELS if _is_installed(model)]
TINY = [model for model in INSTALLED if "tiny" in model]
FULL_SIZE = [model for model in INSTALLED if "tiny" not in model and model != "ltx-2-19b"]  # forecast below


def _spec(model: str, **asked: object) -> RunSpec:
    request = make_request(model, **{"image": STILL, "width": 128, "height": 128, "frames": 9, "fps": 120, **asked})
    return RunSpec(request=request, model=model, write_video=False)


@cache
def _forecast(model: str) -> Any:
    return execute(_spec(model), Mode.FAKE, "cpu")


# --- What they need ---


def test_a_model_that_is_newer_than_what_is_installed_is_refused_with_both_versions(monkeypatch):
    monkeypatch.setattr(runner_module, "version", {"diffusers": "0.39.0", "transformers": "4.57.6"}.__getitem__)
    asked = ["--model", "ltx-2.5-22b-diffusers"]
    for arguments in (
        ["generate", "--image", STILL, "--out", "never.mp4", *asked],
        ["forecast", *asked],
        ["fit", "--gpu", "L4", *asked],
    ):
        refused = CliRunner().invoke(app, arguments).exception
        assert isinstance(refused, RunnerUnavailable)
        installed = {"diffusers": "0.39.0", "transformers": "4.57.6"}
        assert refused.fields == {"model": "ltx-2.5-22b-diffusers", "installed": installed}
        assert "'diffusers>=0.42' 'transformers>=5.10'" in str(refused)
    for refuse in (
        lambda: execute(_spec("ltx-2.5-tiny-diffusers"), Mode.REAL, "cpu"),
        lambda: forecast_request(make_request("ltx-2.5-tiny-diffusers", image=STILL), "ltx-2.5-tiny-diffusers"),
        lambda: RUNNER.skeleton_weights(load_architecture("ltx-2.5-tiny-diffusers")),
    ):
        with pytest.raises(RunnerUnavailable):
            refuse()
    RUNNER.require_package(load_architecture("ltx-2.3-22b-diffusers"))


@pytest.mark.parametrize(
    ("installed", "old"),
    [
        ({"diffusers": "0.42.1", "transformers": "5.10.0"}, set()),
        ({"diffusers": "0.100", "transformers": "5.10"}, set()),
        ({"diffusers": "0.42.0.dev0", "transformers": "6"}, set()),
        ({"diffusers": "0.42.1", "transformers": "5.9.9"}, {"transformers"}),
        ({"diffusers": "0.4", "transformers": "5.24.0+local"}, {"diffusers"}),
        ({"diffusers": "0.42.1", "transformers": None}, {"transformers"}),
    ],
)
def test_versions_are_compared_by_their_numbers(monkeypatch, installed, old):
    def version(package: str) -> str:
        if installed[package] is None:
            raise runner_module.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(runner_module, "version", version)
    architecture = load_architecture("ltx-2.5-22b-diffusers")
    if not old:
        RUNNER.require_package(architecture)
        return
    with pytest.raises(RunnerUnavailable) as refused:
        RUNNER.require_package(architecture)
    assert refused.value.fields["installed"] == {package: installed[package] for package in old}


def test_it_is_refused_before_torch_is_imported():
    code = (
        "import sys\nfrom i2v_lab.cli.app import app\nfrom i2v_lab.errors import InvalidRequest, RunnerUnavailable\n"
        "from i2v_lab.pipeline.contract import runner\nrunner.version = lambda package: '0.1'\n"
        "try: app(['forecast', '--model', 'ltx-2.5-22b-diffusers'], standalone_mode=False)\n"
        "except RunnerUnavailable: raise SystemExit('torch' in sys.modules)\n"
        "raise SystemExit('not refused')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- What they are made of ---

# Parameters of the transformer, the connectors and the text encoder: 22 billion are the first two.
COUNTS = {
    "ltx-2-19b": (18_876_174_592, 1_431_475_200, 12_187_325_040),
    "ltx-2.3-22b-diffusers": (18_988_838_144, 3_172_227_584, 12_187_325_040),
    "ltx-2.5-22b-diffusers": (18_987_859_200, 3_172_227_584, 11_959_730_176),
    "ltx-2.5-22b-diffusion-decoder": (18_987_859_200, 3_172_227_584, 11_959_730_176),
}


@pytest.mark.parametrize("model", FULL_SIZE)
def test_full_size_models_have_the_published_numbers_of_parameters(model):
    architecture = load_architecture(model)
    with torch.device("meta"):
        parts = [component(architecture, "transformer"), component(architecture, "connectors")]
        parts.append(text_encoder(architecture))
    assert tuple(sum(weight.numel() for weight in part.parameters()) for part in parts) == COUNTS[model]


def test_every_full_size_model_has_a_tiny_one_with_the_same_components():
    for full, tiny in (
        ("ltx-2-19b", "ltx-2-tiny"),
        ("ltx-2.3-22b-diffusers", "ltx-2.3-tiny-diffusers"),
        ("ltx-2.5-22b-diffusers", "ltx-2.5-tiny-diffusers"),
        ("ltx-2.5-22b-diffusion-decoder", "ltx-2.5-tiny-diffusion-decoder"),
    ):
        ours, small = load_architecture(full), load_architecture(tiny)
        assert set(ours.config) <= set(small.config) <= set(CLASSES)
        for name, config in ours.config.items():
            assert config.get("_class_name") == small.config[name].get("_class_name")
        assert ours.gemma["architectures"] == small.gemma["architectures"]
        assert (ours.sampling, ours.requires) == (small.sampling, small.requires)
        for model in (full, tiny):
            assert varied(model, "sizes")
            assert varied(model, "map_frames")


def test_the_rotary_frequencies_of_gemma_3_are_those_of_its_configuration():
    """transformers 5 keeps them in another layout than the configuration, which is of version 4."""
    tiny = load_architecture("ltx-2-tiny")
    text = {**tiny.gemma["text_config"], "num_hidden_layers": 6}  # every sixth layer attends globally
    encoder = text_encoder(replace(tiny, gemma={**tiny.gemma, "text_config": text}))
    found = {
        name.rpartition("rotary_emb")[2]: buffer
        for name, buffer in encoder.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }
    by_position = 1 / torch.tensor([10_000.0, 1_000_000.0])[:, None] ** (torch.arange(0, 16, 2) / 16)
    local = found.get("_local.inv_freq", found.get(".sliding_attention_inv_freq"))
    everywhere = found.get(".inv_freq", found.get(".full_attention_inv_freq"))
    torch.testing.assert_close(local, by_position[0])
    torch.testing.assert_close(everywhere, by_position[1] / 8)


# --- That they generate ---


@pytest.mark.parametrize("model", TINY)
def test_a_tiny_model_generates_in_the_phases_and_with_the_peaks_of_its_forecast(model, tmp_path):
    spec = _spec(model)
    execute(spec, Mode.REAL, "cpu", run_dir=tmp_path / "run")
    real = sorted(read_run(tmp_path / "run").of(PhaseRecord), key=lambda phase: phase.start_s)
    fake = _forecast(model).phases
    assert [phase.phase for phase in real] == [phase.phase for phase in fake] == PHASES
    assert [phase.peak_bytes for phase in fake] == [phase.peak_bytes for phase in real]


@pytest.mark.parametrize("model", [model for model in TINY if "decoder" not in model])
def test_without_guidance_each_step_is_one_call_of_the_transformer(model):
    pipeline = DiffusersLTX2(resolve_weights(load_architecture(model)))
    calls = []
    pipeline.generate.transformer.register_forward_hook(lambda *_: calls.append(1))
    video, audio = pipeline.run(_spec(model, width=64, height=64).request)
    assert len(calls) == 8 + 3
    assert video.shape == (1, 9, 3, 64, 64)
    assert audio.shape[:2] == (1, 2)
    assert video.isfinite().all()
    assert audio.isfinite().all()


def test_both_decoders_decode_the_same_latent_and_tiles_lower_the_peak():
    for model in [model for model in TINY if "decoder" in model]:
        other = model.replace("diffusion-decoder", "diffusers")
        request: I2VRequest = _spec(model).request
        decoded = {}
        for name in (model, other):
            pipeline = DiffusersLTX2(resolve_weights(load_architecture(name)))
            latent, sound = pipeline.run(request, "latent")
            decoded[name] = (latent, sound, *pipeline.run(request))
        latent, sound, video, audio = decoded[model]
        assert torch.equal(latent, decoded[other][0])
        assert torch.equal(sound, decoded[other][1])
        assert video.shape == decoded[other][2].shape == (1, 9, 3, 128, 128)
        assert not torch.equal(video, decoded[other][2])
        assert torch.equal(audio, decoded[other][3])

        peaks = [run.peak for run in (_forecast(model), execute(_spec(model, tiling=None), Mode.FAKE, "cpu"))]
        assert [peak.phase for peak in peaks] == ["decode_video"] * 2
        assert peaks[0].peak_bytes < 0.2 * peaks[1].peak_bytes


def test_tiles_are_for_the_diffusion_decoder_alone():
    for model in MODELS:
        architecture = load_architecture(model)
        request = replace(make_request(model, image=STILL), tiling=Tiling())
        if "diffusion_decoder" in architecture.config:
            RUNNER.check_request(architecture, request)
            continue
        with pytest.raises(InvalidRequest) as refused:
            RUNNER.check_request(architecture, request)
        assert refused.value.fields == {"tiling": Tiling()}


@pytest.mark.parametrize(
    ("model", "changes", "smallest"),
    [
        ("ltx-2.5-22b-diffusion-decoder", {"width": 192}, 256),
        ("ltx-2.5-22b-diffusion-decoder", {"height": 192}, 256),
        ("ltx-2.5-22b-diffusion-decoder", {"frames": 9}, 17),
        ("ltx-2.5-tiny-diffusion-decoder", {"height": 64}, 128),
        ("ltx-2.5-tiny-diffusion-decoder", {"frames": 1}, 9),
    ],
)
def test_a_video_smaller_than_the_windows_of_the_diffusion_decoder_is_refused(model, changes, smallest):
    architecture = load_architecture(model)
    request = make_request(model, image=STILL)
    with pytest.raises(InvalidRequest) as refused:
        RUNNER.check_request(architecture, replace(request, **changes))
    assert refused.value.fields == changes
    assert str(refused.value).endswith(f"use {smallest} or more")
    RUNNER.check_request(architecture, replace(request, **dict.fromkeys(changes, smallest)))
    other = model.replace("diffusion-decoder", "diffusers")
    RUNNER.check_request(load_architecture(other), replace(request, **changes, tiling=None))


# --- At full size ---


@pytest.mark.parametrize("model", FULL_SIZE)
def test_a_forecast_at_full_size_has_all_phases_above_all_weights(model):
    request = make_request(model, image=STILL, width=256, height=256, frames=17)
    phases = execute(RunSpec(request=request, model=model), Mode.FAKE, "cuda").phases
    assert [phase.phase for phase in phases] == PHASES
    assert min(phase.start_bytes for phase in phases) > 2 * sum(COUNTS[model])


def test_the_forecast_of_ltx_2_is_the_same_with_every_version_of_diffusers():
    """As with diffusers 0.39, with which it was compared with measured runs, and with the 1 MiB of cuBLASLt."""
    peaks = [phase.peak_bytes for phase in forecast_request(make_request("ltx-2-19b"), "ltx-2-19b").phases]
    assert peaks == [
        71_322_902_016,
        69_458_005_504,
        70_151_247_872,
        68_978_695_168,
        71_326_669_824,
        72_869_042_688,
        78_248_257_024,
        69_779_346_944,
    ]


def test_the_plan_measures_every_model_offloaded_and_resident():
    runs = load_plan(data_dir() / "plans" / "diffusers.yaml")
    assert len({run.name for run in runs}) == len(runs)
    measured = {(run.spec.model, run.spec.request.settings.name) for run in runs}
    models = {name for name in MODELS if "tiny" not in name} - {"ltx-2-19b"}  # which policies.yaml has
    assert measured == {(model, name) for model in models for name in ("", "offload-model")}
    assert {run.spec.model in run.name for run in runs if run.spec.model != "ltx-2.5-22b-diffusion-decoder"} == {True}
