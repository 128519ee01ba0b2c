"""At full size, on a GPU, policies change no latent, and frames by no more than other convolution kernels round."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch

from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx2 import sampling
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.pipeline.ltx2.weights import resolve_weights
from i2v_lab.request import I2VRequest
from i2v_lab.runs.spec import FULL_SIZE_MODEL

pytestmark = pytest.mark.gpu
LEAST_PSNR_DB = 45


@pytest.mark.usefixtures("room_for_22b")
@pytest.mark.parametrize(("width", "height"), [(1024, 768), (2048, 1536)])
def test_policies_at_22b(still, record_latents, width, height):
    request = I2VRequest(image=str(still), prompt="waves roll in", width=width, height=height, frames=97, seed=7)
    weights = resolve_weights(load_architecture(FULL_SIZE_MODEL))
    recorder = record_latents(sampling, "denoise_stage", lambda made: (made.video, made.audio))
    frames, latents = {}, {}
    for policy in ("resident", "lean", "streamed"):
        with TwoStagePipeline(weights, "cuda")(replace(request, memory=policy)).video as chunks:
            frames[policy] = torch.cat([chunk.cpu() for chunk in chunks])
        latents[policy], recorder.latents = recorder.latents, []
        gc.collect()
        torch.cuda.empty_cache()
    assert [len(each) for each in latents.values()] == [4, 4, 4]  # video and audio, after stage 1 and stage 2
    for policy in ("lean", "streamed"):
        for made, resident in zip(latents[policy], latents["resident"], strict=True):
            assert torch.equal(made, resident)
    assert torch.equal(frames["streamed"], frames["lean"])
    error = (frames["lean"].float() - frames["resident"].float()).square().mean().item()
    psnr_db = 10 * math.log10(255**2 / error) if error else math.inf
    print(f"{width}x{height}: lean against resident {psnr_db:.1f} dB")
    assert psnr_db >= LEAST_PSNR_DB
