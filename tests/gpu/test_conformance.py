"""At full size, on a GPU, our latents are bit for bit those of ltx-pipelines' own pipelines: one request a variant.

The weights are random in the real layout, so nothing has to be downloaded. What the CPU tests in ``tests/conformance``
hold for the tiny model, these hold for the kernels that a GPU chooses at 22B.
"""

from __future__ import annotations

import gc

import pytest
import torch

from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx2 import sampling, upstream
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.pipeline.ltx2.weights import resolve_weights
from i2v_lab.request import I2VRequest, Variant
from i2v_lab.runs.spec import FULL_SIZE_MODEL

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("variant", list(Variant))
@pytest.mark.usefixtures("room_for_22b")
def test_latents_equal_upstreams_at_22b(still, record_latents, variant):
    request = I2VRequest(
        image=str(still),
        prompt="waves roll in below the lighthouse",
        negative_prompt="blurry",
        width=768,
        height=512,
        frames=25,
        seed=7,
        variant=variant,
    )
    module = upstream.MODULES[variant]
    ours = record_latents(sampling, "denoise_stage", lambda latents: (latents.video, latents.audio))
    theirs = record_latents(module, "denoise_audio_video", lambda states: [state.latent for state in states])
    weights = resolve_weights(load_architecture(FULL_SIZE_MODEL))
    frames = []
    for pipeline in (TwoStagePipeline, upstream.UpstreamPipeline):
        with pipeline(weights, "cuda")(request).video as chunks:
            frames.append(torch.cat([chunk.cpu() for chunk in chunks]))
        gc.collect()
        torch.cuda.empty_cache()
    assert len(ours.latents) == len(theirs.latents) == 4  # video and audio, after stage 1 and stage 2
    for mine, their in zip(ours.latents, theirs.latents, strict=True):
        assert torch.equal(mine, their)
        assert mine.isfinite().all()
        assert mine.float().std() > 0.1  # neither of them is empty of anything to compare
    assert torch.equal(*frames)
