"""The guard on upstream's own, untouched ``DistilledPipeline``, whose stream is consumed with grad enabled."""

from __future__ import annotations

import gc

import ltx_pipelines.distilled
import ltx_pipelines.ti2vid_two_stages
import pytest
import torch
from ltx_core.loader import LTXV_LORA_COMFY_RENAMING_MAP, LoraPathStrengthAndSDOps
from ltx_pipelines.utils.args import ImageConditioningInput

from i2v_lab import profile_call
from i2v_lab.errors import GradEscape
from i2v_lab.pipeline.ltx2.sampling import sampling_params
from i2v_lab.profiling.escape import GradEscapeWarning
from i2v_lab.profiling.guard import guard_stream, watch
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import GraphRecord, ModuleRecord, StepRecord

ARGUMENTS = ("waves", 7, 64, 128, 17, 120.0)  # prompt, seed, height, width, frames, frames per second
STAGES = ["denoise_stage_1", "upsample_latent", "encode_image", "denoise_stage_2", "decode_audio", "decode_video"]


@pytest.fixture(scope="module")
def upstream(tiny, still, upstream_here):
    """Runs upstream's pipeline inside ``no_grad``, as its users do; hands out its stream, again from the start."""
    module = ltx_pipelines.distilled
    decode, calls = module.vae_decode_video, []
    pipeline = module.DistilledPipeline(
        distilled_checkpoint_path=tiny.checkpoint,
        gemma_root=tiny.gemma_root,
        spatial_upsampler_path=tiny.upsampler,
        loras=[],
        device=torch.device("cpu"),
    )
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "vae_decode_video", lambda *args: calls.append(args) or decode(*args))
        call = profile_call(pipeline, *ARGUMENTS, [ImageConditioningInput(str(still), 0, 1.0)])
    for _ in call.result[0]:  # with grad enabled
        pass
    (arguments,) = calls
    stream = lambda: decode(*arguments)  # noqa: E731
    stream.call = call
    stream.decoder = arguments[1]
    return stream


def _consume(stream) -> tuple[torch.Tensor, int]:
    gc.collect()
    with PhaseProfiler("cpu") as profiler, profiler.phase("decode_video"):
        frames = torch.cat(list(stream))
    return frames, profiler.peak.peak_bytes


def test_profile_call_tells_upstreams_phases_peaks_and_what_its_stream_keeps(upstream):
    call = upstream.call
    assert [phase.phase for phase in call.phases] == ["encode_prompt", "encode_image", *STAGES]
    assert sum(phase.seconds for phase in call.phases) == pytest.approx(call.seconds, rel=0.02)
    kept = {phase.phase: phase.saved_for_backward_bytes for phase in call.phases}
    assert kept.pop("decode_video") > 2**21
    assert set(kept.values()) == {0}
    graph = {record.module: record.nbytes for record in call.records if isinstance(record, GraphRecord)}
    assert sum(graph.values()) == call.phases[-1].saved_for_backward_bytes
    assert all(module.startswith("video_decoder") for module in graph)
    assert "video_decoder.conv_in.conv" in graph
    steps = [(r.phase, r.steps) for r in call.records if isinstance(r, StepRecord)]
    assert steps == [("denoise_stage_1", 8)] * 8 + [("denoise_stage_2", 3)] * 3 + [("decode_video", 1)]
    components = {r.module.partition(".")[0] for r in call.records if isinstance(r, ModuleRecord)}
    assert {"gemma_text_encoder", "x0_model", "video_encoder", "audio_decoder", "video_decoder"} <= components


@pytest.mark.usefixtures("upstream_here")
def test_profile_call_on_the_guided_pipeline(tiny, still):
    lora = LoraPathStrengthAndSDOps(tiny.lora, 1.0, LTXV_LORA_COMFY_RENAMING_MAP)
    params = sampling_params(tiny.architecture)
    with torch.no_grad():
        pipeline = ltx_pipelines.ti2vid_two_stages.TI2VidTwoStagesPipeline(
            checkpoint_path=tiny.checkpoint,
            distilled_lora=[lora],
            gemma_root=tiny.gemma_root,
            spatial_upsampler_path=tiny.upsampler,
            loras=[],
            device=torch.device("cpu"),
        )
        call = profile_call(
            pipeline,
            prompt="waves",
            negative_prompt="",
            seed=7,
            height=64,
            width=64,
            num_frames=9,
            frame_rate=120.0,
            num_inference_steps=2,
            video_guider_params=params.video_guider_params,
            audio_guider_params=params.audio_guider_params,
            images=[ImageConditioningInput(str(still), 0, 1.0)],
        )
        list(call.result[0])
    assert [phase.phase for phase in call.phases] == ["encode_prompt", "encode_image", *STAGES]
    assert sum(phase.seconds for phase in call.phases) == pytest.approx(call.seconds, rel=0.02)
    steps = [r.phase for r in call.records if isinstance(r, StepRecord)]
    assert steps.count("denoise_stage_1") == 2 * 4  # conditioned, not, perturbed, and without the other modality
    assert steps.count("denoise_stage_2") == 3
    assert all(phase.saved_for_backward_bytes == 0 for phase in call.phases)


def test_guard_stream_and_watch_catch_and_fix_the_defect(upstream):
    stream = upstream()
    with torch.no_grad():
        expected, no_grad_bytes = _consume(stream)
    escaped, escaped_bytes = _consume(upstream())
    assert torch.equal(escaped, expected)
    assert escaped_bytes > 1.8 * no_grad_bytes

    guarded, guarded_bytes = _consume(guard_stream(upstream(), "fix"))
    assert torch.equal(guarded, expected)
    assert abs(guarded_bytes - no_grad_bytes) <= 0.01 * no_grad_bytes

    stream = upstream()
    with watch(upstream.decoder, "fix") as handle:
        watched, watched_bytes = _consume(stream)
    assert torch.equal(watched, expected)
    assert abs(watched_bytes - no_grad_bytes) <= 0.01 * no_grad_bytes
    assert handle.escaped[0] == "VideoDecoder.conv_in.conv"


def test_guard_stream_and_watch_warn_and_raise(upstream):
    with pytest.warns(GradEscapeWarning, match="recorded an autograd graph while a stream was consumed"):
        list(guard_stream(upstream(), "warn"))
    with pytest.raises(GradEscape) as caught:
        next(guard_stream(upstream(), "raise"))
    assert caught.value.fields.keys() == {"function", "module"}
    stream = upstream()
    with watch(upstream.decoder, "warn"), pytest.warns(GradEscapeWarning, match="VideoDecoder.conv_in.conv was"):
        list(stream)
    stream = upstream()
    with watch(upstream.decoder, "raise"), pytest.raises(GradEscape) as caught:
        next(stream)
    assert caught.value.fields == {"module": "VideoDecoder.conv_in.conv"}
