"""The ltx-video runner: what it makes, when it holds what, what it refuses, and forecasts against real runs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import CheckpointError, DeviceUnavailable, GradScopeError
from i2v_lab.events import ComponentBuilt, ComponentReleased, PhaseEnded, StepEnded
from i2v_lab.lab.generation_job import GenerationJob, State
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx_video.components import memoizable_modules
from i2v_lab.pipeline.ltx_video.layout import meta_component
from i2v_lab.pipeline.ltx_video.pipeline import LtxVideoPipeline
from i2v_lab.pipeline.ltx_video.sizes import stage_shape
from i2v_lab.pipeline.ltx_video.weights import resolve_weights, skeleton_weights, synthetic_weights
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.fake.workspaces import load_workspaces
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.request import DecodeScope, I2VRequest, Variant
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.measure import measure
from i2v_lab.runs.spec import RunSpec

PHASES = ["encode_prompt", "encode_image", "denoise_stage_1", "upsample_latent", "denoise_stage_2", "decode_video"]
STILLS = ["stills/lighthouse.png", "stills/tower.png"]
EXAMPLES = int(os.environ.get("I2V_LAB_EXAMPLES", "2"))
SMALL = I2VRequest(image=str(data_dir() / STILLS[0]), width=64, height=64, frames=9, quantization="bf16", tiling=None)


def _frames(pipeline: LtxVideoPipeline, request: I2VRequest) -> torch.Tensor:
    return torch.cat(list(pipeline(request).video))


# --- What it makes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(192, 128, 25), (128, 192, 9), (320, 192, 49)])
def test_generate_writes_a_video_of_the_size_asked_for_without_sound(tmp_path, size):
    width, height, frames = size
    out = tmp_path / "video.mp4"
    asked = ["--width", str(width), "--height", str(height), "--frames", str(frames)]
    result = CliRunner().invoke(
        app,
        ["generate", "--image", SMALL.image, "--model", "ltxv-tiny", "--out", str(out), "--json", *asked],
        catch_exceptions=False,
    )
    report = json.loads(result.stdout)
    assert [phase["phase"] for phase in report["phases"]] == PHASES
    with av.open(str(out)) as container:
        assert not container.streams.audio
        shown = [(frame.width, frame.height) for frame in container.decode(video=0)]
    assert shown == [(width, height)] * frames


def test_the_same_seed_gives_the_same_frames_and_the_callers_randomness_is_left_alone(ltxv_tiny):
    pipeline = LtxVideoPipeline(ltxv_tiny)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = _frames(pipeline, SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(_frames(pipeline, SMALL), first)
    assert not torch.equal(_frames(pipeline, replace(SMALL, seed=11)), first)
    assert not torch.equal(_frames(pipeline, replace(SMALL, prompt="a storm")), first)
    assert not torch.equal(_frames(pipeline, replace(SMALL, image=str(data_dir() / STILLS[1]))), first)


def test_the_video_is_decoded_when_it_is_consumed_and_holds_a_graph_only_where_it_escapes(ltxv_tiny):
    frames, graphs, peaks = {}, {}, {}
    for scope in (DecodeScope.NO_GRAD, DecodeScope.ESCAPED):
        with PhaseProfiler("cpu") as profiler:
            generation = LtxVideoPipeline(ltxv_tiny, sinks=[profiler])(replace(SMALL, decode_scope=scope))
            assert [phase.phase for phase in profiler.phases] == PHASES[:-1]
            assert generation.audio is None
            frames[scope] = torch.cat(list(generation.video))
        assert [phase.phase for phase in profiler.phases] == PHASES
        graphs[scope] = [phase.saved_for_backward_bytes for phase in profiler.phases]
        peaks[scope] = profiler.phases[-1].peak_bytes
    assert torch.equal(frames["no_grad"], frames["escaped"])
    assert graphs["no_grad"] == [0] * 6
    assert graphs["escaped"][:-1] == [0] * 5
    assert peaks["escaped"] > peaks["no_grad"] + graphs["escaped"][-1] / 2 > peaks["no_grad"]


def test_a_pipeline_in_inference_mode_is_refused_outside_it(ltxv_tiny):
    stream = LtxVideoPipeline(ltxv_tiny)(replace(SMALL, decode_scope="inference_mode")).video
    with pytest.raises(GradScopeError, match="use decode_scope='no_grad'"):
        next(stream)


@pytest.mark.parametrize(("variant", "steps"), [("distilled", (7, 3)), ("dev", (8, 2))])
def test_components_are_built_and_released_in_their_phase_and_the_transformer_spans_both_stages(
    ltxv_tiny, variant, steps
):
    events: list = []
    _frames(LtxVideoPipeline(ltxv_tiny, sinks=[events.append]), replace(SMALL, variant=variant))
    order = [(type(e) is ComponentBuilt, e.name) for e in events if isinstance(e, ComponentBuilt | ComponentReleased)]
    assert order == [
        (True, "text_encoder"),
        (False, "text_encoder"),
        (True, "video_encoder"),
        (False, "video_encoder"),
        (True, "transformer"),
        (True, "spatial_upsampler"),
        (False, "spatial_upsampler"),
        (False, "transformer"),
        (True, "video_decoder"),
        (False, "video_decoder"),
    ]
    assert all(not list(event.module.parameters()) for event in events if isinstance(event, ComponentBuilt))
    steps_ended = [(e.phase, e.step, e.steps) for e in events if isinstance(e, StepEnded)]
    expected = [("denoise_stage_1", steps[0]), ("denoise_stage_2", steps[1]), ("decode_video", 1)]
    assert steps_ended == [(phase, step, count) for phase, count in expected for step in range(1, count + 1)]
    assert all(event.completed for event in events if isinstance(event, PhaseEnded))


def test_the_first_stage_is_at_two_thirds_of_the_size_and_the_second_at_twice_that(ltxv_tiny):
    for width in range(64, 2049, 32):
        request = replace(SMALL, width=width)
        first, second = (stage_shape(ltxv_tiny.architecture, request, stage) for stage in (1, 2))
        assert first.width % 32 == 0
        assert second.width == 2 * first.width >= width - 32
        assert first.width <= width * 2 / 3


def test_a_large_model_is_refused_on_a_cpu_before_it_is_built():
    weights = synthetic_weights(load_architecture("ltxv-13b-0.9.8"))
    assert weights.is_synthetic
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeviceUnavailable) as caught:
        patch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**30}))
        LtxVideoPipeline(weights)(SMALL)
    assert caught.value.fields["component"] == "transformer"
    assert caught.value.fields["needed_bytes"] / 2**30 == pytest.approx(24.29, abs=0.005)
    assert "use --model ltxv-tiny" in str(caught.value)


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(ltxv_tiny, tmp_path, monkeypatch) -> dict[str, Path]:
    """Copies of the synthetic weights, as a user would name them; without records of verified files."""
    monkeypatch.setenv("I2V_LAB_CACHE", str(tmp_path / "cache"))
    paths = {name: Path(getattr(ltxv_tiny, name)) for name in ("checkpoint", "text_encoder", "upsampler")}
    for name, path in paths.items():
        copy = tmp_path / name
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        paths[name] = copy
    return paths


def test_files_by_path_make_what_the_cached_ones_make(ltxv_tiny, files):
    weights = resolve_weights(ltxv_tiny.architecture, **files)
    assert torch.equal(_frames(LtxVideoPipeline(weights), SMALL), _frames(LtxVideoPipeline(ltxv_tiny), SMALL))


def test_the_published_sizes_of_the_files():
    """6.34 and 28.58 GB are those of the published 0.9.8 checkpoints, 505 MB that of the upsampler in float32."""
    found = {}
    for name in ("ltxv-2b-0.9.8-distilled", "ltxv-13b-0.9.8"):
        transformer, vae, upsampler, text_encoder = (
            sum(p.numel() for p in meta_component(load_architecture(name), part).parameters())
            for part in ("transformer", "vae", "spatial_upsampler", "text_encoder")
        )
        found[name] = round((transformer + vae) * 2 / 1e9, 2)
        assert (round(upsampler * 4 / 1e6), round(text_encoder * 2 / 1e9, 2)) == (505, 9.52)
    assert found == {"ltxv-2b-0.9.8-distilled": 6.34, "ltxv-13b-0.9.8": 28.58}


def _refused(architecture, files) -> dict[str, object]:
    with pytest.raises(CheckpointError) as caught:
        resolve_weights(architecture, **files)
    assert "\n" not in str(caught.value)
    return caught.value.fields


def test_bad_weights_are_refused_with_the_option_and_the_fault(ltxv_tiny, files, tmp_path):
    tiny, checkpoint = ltxv_tiny.architecture, files["checkpoint"]

    def refused(path: Path) -> dict[str, object]:
        fields = dict(_refused(tiny, {**files, "checkpoint": path}))
        assert (fields.pop("option"), fields.pop("path")) == ("--checkpoint", path)
        return fields

    assert _refused(tiny, {"checkpoint": checkpoint}) == {"missing": ["--text-encoder", "--upsampler"]}
    large = load_architecture("ltxv-2b-0.9.8-distilled")
    assert _refused(large, files)["fault"] == "architecture"
    (tmp_path / "pickled.ckpt").write_bytes(b"\x80\x04" + bytes(100))
    assert refused(tmp_path / "pickled.ckpt") == {"fault": "format", "kind": "pickle"}
    with safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(checkpoint)
    key = next(key for key in tensors if key.startswith("model.diffusion_model.transformer_blocks"))
    fewer = {name: tensor for name, tensor in tensors.items() if name != key}
    save_file(fewer, tmp_path / "fewer", metadata=metadata)
    assert refused(tmp_path / "fewer") == {"fault": "incomplete", "missing": [key]}
    save_file(tensors, tmp_path / "bare")
    assert refused(tmp_path / "bare") == {"fault": "config"}
    tensors[key] = torch.full_like(tensors[key], torch.nan)
    save_file(tensors, tmp_path / "nan", metadata=metadata)
    assert refused(tmp_path / "nan") == {"fault": "values", "tensor": key, "kind": "NaN"}
    (files["text_encoder"] / "tokenizer" / "spiece.model").unlink()
    fields = _refused(tiny, files)
    assert (fields["option"], fields["missing"]) == ("--text-encoder", "tokenizer/spiece.model")


# --- Forecasts --------------------------------------------------------------------------------------------------------


requests = st.builds(
    I2VRequest,
    image=st.sampled_from(STILLS),
    prompt=st.text(max_size=40),
    negative_prompt=st.sampled_from(["", "blurry"]),
    width=st.sampled_from([64, 96, 128, 192]),
    height=st.sampled_from([64, 96, 128]),
    frames=st.sampled_from([9, 17, 25]),
    fps=st.sampled_from([24.0, 30.0]),
    seed=st.integers(0, 2**63 - 1),
    variant=st.sampled_from(Variant),
    quantization=st.just("bf16"),
    tiling=st.none(),
    decode_scope=st.sampled_from([DecodeScope.NO_GRAD, DecodeScope.ESCAPED]),
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 10,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(requests)
def test_a_forecast_on_the_cpu_is_what_a_real_run_measures(ltxv_tiny, request_):
    real_request = replace(request_, image=str(data_dir() / request_.image))
    with PhaseProfiler("cpu") as profiler:
        for _ in LtxVideoPipeline(ltxv_tiny, "cpu", sinks=[profiler])(real_request).video:
            pass
    found = forecast_request(request_, "ltxv-tiny", device="cpu")
    for real, fake in zip(profiler.phases, found.phases, strict=True):
        assert fake.phase == real.phase
        assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=1e-3), real
        assert fake.saved_for_backward_bytes == pytest.approx(real.saved_for_backward_bytes, rel=1e-3), real
    graph = found.phases[-1].saved_for_backward_bytes
    assert (graph == 0) is (request_.decode_scope is DecodeScope.NO_GRAD)


@pytest.mark.parametrize("variant", list(Variant))
def test_memoization_changes_no_byte(variant):
    request = replace(SMALL, width=128, frames=17, variant=variant)
    weights = skeleton_weights(load_architecture("ltxv-tiny"))
    found = []
    for memoize in (None, memoizable_modules(load_architecture("ltxv-tiny"))):
        with forecasting("cuda", memoize=memoize, workspaces=load_workspaces()) as profiler:
            for _ in LtxVideoPipeline(weights, "cuda", sinks=[profiler])(request).video:
                pass
        found.append(
            [(p.phase, p.start_bytes, p.peak_bytes, p.end_bytes, p.peak_reserved_bytes) for p in profiler.phases]
        )
    assert found[0] == found[1]


def test_a_full_size_forecast_says_where_the_peak_is():
    asked = {"width": 1216, "height": 704, "frames": 121}
    found = forecast_request(replace(SMALL, **asked), "ltxv-2b-0.9.8-distilled")
    assert [phase.phase for phase in found.phases] == PHASES
    assert found.peak.phase == "decode_video"
    peaks = {phase.phase: phase.peak_bytes / 2**30 for phase in found.phases}
    assert peaks["encode_prompt"] > 8.87  # T5-XXL in bfloat16 alone
    assert peaks["denoise_stage_1"] > 3.58  # the transformer alone


# --- Through the studies ----------------------------------------------------------------------------------------------


def test_a_measured_run_and_one_in_the_background(tmp_path):
    run = measure(RunSpec(request=SMALL, model="ltxv-tiny"), tmp_path / "measured", device="cpu")
    assert run.status == "complete"
    assert list(run.frame("phase")["phase"]) == PHASES
    generating = GenerationJob(tmp_path / "runs", device="cpu")
    generating.start(SMALL, "ltxv-tiny")
    assert generating.wait(120)
    assert (generating.state, generating.message.split(" ")[0]) == (State.DONE, "Done")
    assert generating.video is not None
