"""The guard on upstream's own, untouched ``DistilledPipeline``, whose stream is consumed with grad enabled."""

from __future__ import annotations

import gc

import ltx_pipelines.distilled
import pytest
import torch
from ltx_pipelines.utils.args import ImageConditioningInput

from i2v_lab.errors import GradEscape
from i2v_lab.pipeline import ltx2
from i2v_lab.profiling.autograd_graph import GradEscapeWarning, guard_stream, watch
from i2v_lab.profiling.phase_profiler import PhaseProfiler


@pytest.fixture(scope="module")
def upstream(tiny, still):
    """Runs upstream's pipeline inside ``no_grad``, as its users do; hands out its stream, again from the start."""
    with pytest.MonkeyPatch.context() as patch, ltx2.gemma_dimensions(tiny.architecture.gemma):
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        module = ltx_pipelines.distilled
        decode, calls = module.vae_decode_video, []
        patch.setattr(module, "vae_decode_video", lambda *args: calls.append(args) or decode(*args))
        with torch.no_grad():
            video, _ = module.DistilledPipeline(
                distilled_checkpoint_path=tiny.checkpoint,
                gemma_root=tiny.gemma_root,
                spatial_upsampler_path=tiny.upsampler,
                loras=[],
                device=torch.device("cpu"),
            )("waves", 7, 64, 128, 17, 120.0, [ImageConditioningInput(str(still), 0, 1.0)])
    video.close()
    (arguments,) = calls
    stream = lambda: decode(*arguments)  # noqa: E731
    stream.decoder = arguments[1]
    return stream


def _consume(stream) -> tuple[torch.Tensor, int]:
    gc.collect()
    with PhaseProfiler("cpu") as profiler, profiler.phase("decode_video"):
        frames = torch.cat(list(stream))
    return frames, profiler.peak.peak_bytes


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
    with pytest.raises(GradEscape, match="recorded an autograd graph while a stream was consumed"):
        next(guard_stream(upstream(), "raise"))
    stream = upstream()
    with watch(upstream.decoder, "warn"), pytest.warns(GradEscapeWarning, match="VideoDecoder.conv_in.conv was"):
        list(stream)
    stream = upstream()
    with watch(upstream.decoder, "raise"), pytest.raises(GradEscape, match="VideoDecoder.conv_in.conv was called"):
        next(stream)
