"""Bit for bit the same as ltx-pipelines' own pipelines, from the same tiny checkpoint, prompt, still and seed."""

from __future__ import annotations

import ltx_pipelines.distilled
import ltx_pipelines.ti2vid_two_stages
import pytest
import torch
from ltx_core.loader import LTXV_LORA_COMFY_RENAMING_MAP, LoraPathStrengthAndSDOps
from ltx_core.quantization import QuantizationPolicy
from ltx_pipelines.utils.args import ImageConditioningInput

from i2v_lab.pipeline.ltx2 import operations, sampling
from i2v_lab.pipeline.ltx2.components import Ledger
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.request import I2VRequest, Quantization, Tiling, Variant

PROMPT = "waves roll in below the lighthouse"
NEGATIVE = "blurry"
SEED = 7
FPS = 120.0  # short sound: its convolutions are what takes time on a CPU


class Capture:
    """Keeps what one function returns, each time it is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
        original = getattr(module, name)
        self.returned: list[object] = []

        def wrapper(*args: object, **kwargs: object) -> object:
            result = original(*args, **kwargs)
            self.returned.append(result)
            return result

        monkeypatch.setattr(module, name, wrapper)


def _capture_ours(monkeypatch: pytest.MonkeyPatch) -> tuple[Capture, Capture]:
    return Capture(monkeypatch, sampling, "denoise_stage"), Capture(monkeypatch, operations, "upsample_video")


def _assert_same(ours: tuple[Capture, Capture], theirs: tuple[Capture, Capture]) -> None:
    """Latents after stage 1, after the upsampler, after stage 2; video and audio."""
    for mine, (video_state, audio_state) in zip(ours[0].returned, theirs[0].returned, strict=True):
        assert torch.equal(mine.video, video_state.latent)
        assert torch.equal(mine.audio, audio_state.latent)
    assert len(ours[0].returned) == 2
    assert torch.equal(ours[1].returned[0], theirs[1].returned[0])


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.usefixtures("upstream_here")
def test_distilled_equals_upstream(tiny, still, monkeypatch, quantization):
    request = I2VRequest(
        image=str(still),
        prompt=PROMPT,
        width=128,
        height=64,
        frames=17,
        fps=FPS,
        seed=SEED,
        quantization=quantization,
        tiling=Tiling(64, 32, 16, 8),
    )
    captured = _capture_ours(monkeypatch)
    with TwoStagePipeline(tiny)(request).video as chunks:
        frames = torch.cat(list(chunks))

    module = ltx_pipelines.distilled
    theirs = Capture(monkeypatch, module, "denoise_audio_video"), Capture(monkeypatch, module, "upsample_video")
    with torch.no_grad():
        video, _ = module.DistilledPipeline(
            distilled_checkpoint_path=tiny.checkpoint,
            gemma_root=tiny.gemma_root,
            spatial_upsampler_path=tiny.upsampler,
            loras=[],
            device=torch.device("cpu"),
            quantization=QuantizationPolicy.fp8_cast() if quantization is Quantization.FP8_CAST else None,
        )(
            prompt=PROMPT,
            seed=SEED,
            height=64,
            width=128,
            num_frames=17,
            frame_rate=FPS,
            images=[ImageConditioningInput(str(still), 0, 1.0)],
            tiling_config=operations.tiling_config(request.tiling),
        )
        expected = torch.cat(list(video))
    _assert_same(captured, theirs)
    assert torch.equal(frames, expected)
    assert frames.shape == (17, 64, 128, 3)
    assert frames.float().std() > 10  # a picture, not one colour


@pytest.mark.usefixtures("upstream_here")
def test_dev_equals_upstream(tiny, still, monkeypatch):
    request = I2VRequest(
        image=str(still),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        width=64,
        height=128,
        frames=9,
        fps=FPS,
        seed=SEED,
        variant=Variant.DEV,
        tiling=None,
    )
    captured = _capture_ours(monkeypatch)
    with TwoStagePipeline(tiny)(request).video as chunks:
        frames = torch.cat(list(chunks))

    module = ltx_pipelines.ti2vid_two_stages
    theirs = Capture(monkeypatch, module, "denoise_audio_video"), Capture(monkeypatch, module, "upsample_video")
    params = sampling.sampling_params(tiny.architecture)
    with torch.no_grad():
        video, _ = module.TI2VidTwoStagesPipeline(
            checkpoint_path=tiny.checkpoint,
            distilled_lora=[LoraPathStrengthAndSDOps(tiny.lora, 1.0, LTXV_LORA_COMFY_RENAMING_MAP)],
            spatial_upsampler_path=tiny.upsampler,
            gemma_root=tiny.gemma_root,
            loras=[],
            device=torch.device("cpu"),
            quantization=QuantizationPolicy.fp8_cast(),
        )(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            seed=SEED,
            height=128,
            width=64,
            num_frames=9,
            frame_rate=FPS,
            num_inference_steps=params.num_inference_steps,
            video_guider_params=params.video_guider_params,
            audio_guider_params=params.audio_guider_params,
            images=[ImageConditioningInput(str(still), 0, 1.0)],
            tiling_config=None,
        )
        expected = torch.cat(list(video))
    _assert_same(captured, theirs)
    assert torch.equal(frames, expected)


def test_the_lora_changes_stage_2(tiny, still, monkeypatch):
    """The dev comparison above would hold with a LoRA that does nothing; it does something."""
    plain = Ledger(tiny, torch.device("cpu"), Quantization.BF16).transformer()
    fused = Ledger(tiny, torch.device("cpu"), Quantization.BF16, with_lora=True).transformer()
    key = "velocity_model.transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(plain.state_dict()[key], fused.state_dict()[key])
