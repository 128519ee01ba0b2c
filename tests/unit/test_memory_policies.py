"""Memory policies: what they hold, and that they compute what the resident pipeline computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from i2v_lab.pipeline import ltx2
from i2v_lab.pipeline.memory import lean_decode, lean_transformer
from i2v_lab.pipeline.two_stage import TwoStagePipeline
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.request import I2VRequest, Tiling


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks so small that the tiny model has many of them, and some that end early."""
    monkeypatch.setattr(lean_transformer, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(lean_decode, "SLAB_FRAMES", 3)


@pytest.fixture
def request_tiled(still) -> I2VRequest:
    tiling = Tiling(64, 32, 16, 8)  # every frame lies in up to three groups of tiles
    return I2VRequest(image=str(still), prompt="waves", width=128, height=64, frames=33, fps=120, seed=3, tiling=tiling)


def _generate(tiny, request, monkeypatch):
    """Latents of both stages, all frames, and the phases' peaks."""
    latents = []
    stage = ltx2.denoise_stage

    def noted(*args, **kwargs):
        latents.append(stage(*args, **kwargs))
        return latents[-1]

    monkeypatch.setattr(ltx2, "denoise_stage", noted)
    with PhaseProfiler("cpu") as profiler, TwoStagePipeline(tiny, sinks=[profiler])(request).video as chunks:
        frames = torch.cat(list(chunks))
    monkeypatch.setattr(ltx2, "denoise_stage", stage)
    return latents, frames, {record.phase: record.peak_bytes for record in profiler.phases}


def _assert_same(first, second):
    for one, other in zip(first[0], second[0], strict=True):
        assert torch.equal(one.video, other.video)
        assert torch.equal(one.audio, other.audio)
    assert torch.equal(first[1], second[1])


def test_lean_gives_the_same_latents_and_frames_in_less_memory(tiny, request_tiled, monkeypatch):
    resident = _generate(tiny, request_tiled, monkeypatch)
    lean = _generate(tiny, replace(request_tiled, memory="lean"), monkeypatch)
    _assert_same(resident, lean)
    for phase in ("encode_prompt", "denoise_stage_1", "denoise_stage_2", "decode_video"):
        assert lean[2][phase] < resident[2][phase], phase


def test_lean_follows_guidance_that_switches_attention_off(tiny, still, monkeypatch):
    request = I2VRequest(image=str(still), prompt="waves", width=64, height=64, frames=9, fps=120, variant="dev")
    _assert_same(_generate(tiny, request, monkeypatch), _generate(tiny, replace(request, memory="lean"), monkeypatch))


def test_tokens_of_one_stretch_with_several_timesteps_are_refused():
    timesteps = torch.tensor([0.0, 0.0, 1.0, 0.5]).reshape(1, 4, 1)
    with pytest.raises(ValueError, match="tokens 2 to 4 have several timesteps"):
        lean_transformer._distinct(timesteps, (0, 2, 4))
    assert lean_transformer._distinct(timesteps[:, :3], (0, 2, 3)).flatten().tolist() == [0, 1]
