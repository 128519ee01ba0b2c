"""The pipeline as a whole: events, laziness, grad scopes, seeds, and what it leaves behind."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace

import pytest
import torch

from i2v_lab.errors import DeviceUnavailable, GradScopeError, InvalidImage
from i2v_lab.events import ComponentBuilt, ComponentReleased, Phase, PhaseEnded, PhaseStarted, StepEnded
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline, require_memory, resolve_device
from i2v_lab.pipeline.ltx2.tiles import chunk_count
from i2v_lab.pipeline.ltx2.weights import synthetic_weights
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.request import DecodeScope, I2VRequest, Quantization, Tiling
from i2v_lab.runs.forecast import forecast_spec
from i2v_lab.runs.spec import RunSpec


@pytest.fixture
def request_64(still) -> I2VRequest:
    return I2VRequest(image=str(still), prompt="waves", width=64, height=64, frames=9, fps=120, seed=3)


def _frames(pipeline: TwoStagePipeline, request: I2VRequest) -> torch.Tensor:
    with pipeline(request).video as chunks:
        return torch.cat(list(chunks))


def test_events_name_every_phase_component_and_step_in_order(tiny, request_64):
    events = []
    generation = TwoStagePipeline(tiny, sinks=[events.append])(request_64)
    assert [e.phase for e in events if isinstance(e, PhaseStarted)] == list(Phase)[:-1]
    list(generation.video)
    assert [e.phase for e in events if isinstance(e, PhaseStarted)] == list(Phase)
    assert [e.phase for e in events if isinstance(e, PhaseEnded) and e.completed] == list(Phase)
    assert [(e.phase.value, e.name) for e in events if isinstance(e, ComponentBuilt)] == [
        ("encode_prompt", "text_encoder"),
        ("encode_prompt", "embeddings_processor"),
        ("encode_image", "video_encoder"),
        ("denoise_stage_1", "transformer"),
        ("upsample_latent", "video_encoder"),
        ("upsample_latent", "spatial_upsampler"),
        ("decode_audio", "audio_decoder"),
        ("decode_audio", "vocoder"),
        ("decode_video", "video_decoder"),
    ]
    built = [e.name for e in events if isinstance(e, ComponentBuilt)]
    assert sorted(built) == sorted(e.name for e in events if isinstance(e, ComponentReleased))
    steps = {p: [(e.step, e.steps) for e in events if isinstance(e, StepEnded) and e.phase is p] for p in Phase}
    assert steps[Phase.DENOISE_STAGE_1] == [(n, 8) for n in range(1, 9)]
    assert steps[Phase.DENOISE_STAGE_2] == [(n, 3) for n in range(1, 4)]
    assert steps[Phase.DECODE_VIDEO] == [(1, 1)]


def test_a_released_component_keeps_no_weights(tiny, request_64):
    modules = []
    sink = lambda e: modules.append(e.module) if isinstance(e, ComponentBuilt) else None  # noqa: E731
    _frames(TwoStagePipeline(tiny, sinks=[sink]), request_64)
    assert len(modules) == 9
    assert [list(itertools.chain(m.parameters(), m.buffers())) for m in modules] == [[]] * 9


def test_the_same_seed_gives_the_same_video_and_another_does_not(tiny, request_64):
    pipeline = TwoStagePipeline(tiny)
    first, again = _frames(pipeline, request_64), _frames(pipeline, request_64)
    assert first.shape == (9, 64, 64, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, _frames(pipeline, replace(request_64, seed=4)))


def test_escaped_holds_a_graph_and_gives_the_same_frames(tiny, still):
    request = I2VRequest(
        image=str(still), width=128, height=64, frames=17, fps=120, seed=3, tiling=Tiling(64, 32, 16, 8)
    )
    peaks, frames = {}, {}
    for scope in (DecodeScope.NO_GRAD, DecodeScope.ESCAPED):
        with PhaseProfiler("cpu") as profiler:
            pipeline = TwoStagePipeline(tiny, sinks=[profiler])
            frames[scope] = _frames(pipeline, replace(request, decode_scope=scope))
        assert [r.phase for r in profiler.phases] == [p.value for p in Phase]
        peaks[scope] = profiler.phases[-1].peak_bytes
    assert torch.equal(frames[DecodeScope.NO_GRAD], frames[DecodeScope.ESCAPED])
    assert peaks[DecodeScope.ESCAPED] > 2 * peaks[DecodeScope.NO_GRAD]


def test_inference_mode_fails_as_published_with_torchs_words_and_the_remedy(tiny, request_64):
    events = []
    generation = TwoStagePipeline(tiny, sinks=[events.append])(
        replace(request_64, decode_scope=DecodeScope.INFERENCE_MODE)
    )
    with pytest.raises(GradScopeError, match="Inference tensors cannot be saved for backward") as caught:
        next(generation.video)
    assert "use decode_scope='no_grad'" in str(caught.value)
    assert caught.value.exit_status == 1
    assert events[-1].completed is False  # the phase was closed, and its decoder released
    assert isinstance(events[-2], ComponentReleased)


@pytest.mark.parametrize("scope", [DecodeScope.NO_GRAD, DecodeScope.ESCAPED])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_grad_mode_is_left_as_it_was(tiny, request_64, scope, enabled):
    with torch.set_grad_enabled(enabled):
        stream = TwoStagePipeline(tiny)(replace(request_64, decode_scope=scope)).video
        assert torch.is_grad_enabled() is enabled
        for _ in stream:
            assert torch.is_grad_enabled() is enabled
        assert torch.is_grad_enabled() is enabled
        assert not torch.is_inference_mode_enabled()


def test_a_stream_closed_early_releases_its_decoder(tiny, still):
    request = I2VRequest(image=str(still), width=64, height=64, frames=33, fps=120, tiling=Tiling(64, 32, 16, 8))
    events = []
    with PhaseProfiler("cpu") as profiler:
        pipeline = TwoStagePipeline(tiny, sinks=[profiler, events.append])
        with pipeline(request).video as stream:
            assert stream.chunks == 4
            assert next(stream).shape[1:] == (64, 64, 3)
    assert events[-1] == PhaseEnded(Phase.DECODE_VIDEO, events[-1].seconds, completed=False)
    assert profiler.phases[-1].completed is False
    with pytest.raises(StopIteration):
        next(stream)


def test_chunks_join_to_the_same_video_as_one_piece_counts(tiny, still):
    request = I2VRequest(image=str(still), width=64, height=64, frames=33, fps=120, tiling=Tiling(64, 32, 16, 8))
    chunks = list(TwoStagePipeline(tiny)(request).video)
    assert len(chunks) == chunk_count(request) == 4
    assert sum(len(chunk) for chunk in chunks) == 33


def test_nothing_but_the_frames_is_allocated_after_a_generation(tiny, request_64):
    with PhaseProfiler("cpu") as profiler:
        frames = _frames(TwoStagePipeline(tiny, sinks=[profiler]), request_64)
        gc.collect()
        allocated = profiler.allocated_bytes()
    cached = 1024  # at most: ltx-core keeps its rotary frequency grids in an lru_cache, 232 bytes at this size
    assert frames.nbytes <= allocated <= frames.nbytes + cached


def test_the_still_is_read_before_any_weight(tiny, request_64):
    events = []
    with pytest.raises(InvalidImage, match="does not exist"):
        TwoStagePipeline(tiny, sinks=[events.append])(replace(request_64, image="missing.png"))
    assert events == []


def test_a_model_too_large_for_this_machine_is_refused_before_it_is_loaded(still, monkeypatch):
    weights = synthetic_weights(load_architecture("ltx-2.3-22b"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 8 * 2**30}))
    with pytest.raises(DeviceUnavailable) as caught:
        require_memory(weights, Quantization.FP8_CAST, torch.device("cpu"))
    fields = caught.value.fields
    assert (fields["component"], fields["free_bytes"]) == ("text_encoder", 8 * 2**30)
    assert fields["needed_bytes"] / 2**30 == pytest.approx(22.70, abs=0.005)
    assert "use --model ltx-2.3-tiny" in str(caught.value)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    unavailable = ["tpu9", "meta"]
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        unavailable.append("cuda")
    for device in unavailable:
        with pytest.raises(DeviceUnavailable) as caught:
            resolve_device(device)
        assert caught.value.fields == {"device": device}


def test_a_forecast_in_the_same_process_changes_no_frame(tiny, request_64):
    before = _frames(TwoStagePipeline(tiny), request_64)
    new = replace(request_64, prompt="in no cache")
    forecast_spec(RunSpec(request=new, model="ltx-2.3-tiny"), "cpu")
    assert torch.equal(_frames(TwoStagePipeline(tiny), request_64), before)
    assert before.float().std() > 1
