"""Our ltx-video pipeline against the package's own ``LTXMultiScalePipeline``, untouched: equal frames, bit for bit."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from ltx_video.inference import (
    create_latent_upsampler,
    create_ltx_video_pipeline,
    load_image_to_tensor_with_resize_and_crop,
)
from ltx_video.pipelines.pipeline_ltx_video import ConditioningItem, LTXMultiScalePipeline
from ltx_video.utils.skip_layer_strategy import SkipLayerStrategy
from PIL import Image

from i2v_lab.pipeline.ltx_video.pipeline import LtxVideoPipeline
from i2v_lab.request import I2VRequest


@pytest.fixture(scope="module")
def untouched(ltxv_tiny) -> LTXMultiScalePipeline:
    pipeline = create_ltx_video_pipeline(
        ltxv_tiny.checkpoint, "bfloat16", ltxv_tiny.text_encoder, sampler="from_checkpoint", device="cpu"
    )
    pipeline.set_progress_bar_config(disable=True)
    return LTXMultiScalePipeline(pipeline, create_latent_upsampler(ltxv_tiny.upsampler, "cpu"))


def _theirs(untouched: LTXMultiScalePipeline, sampling: dict, request: I2VRequest) -> torch.Tensor:
    """The last half of the package's own ``infer``, which reads a configuration of its own and writes a file."""
    torch.manual_seed(request.seed)
    still = load_image_to_tensor_with_resize_and_crop(
        Image.open(request.image).convert("RGB"), request.height, request.width
    )
    passes = sampling[request.variant.value]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = untouched(
            downscale_factor=sampling["downscale_factor"],
            first_pass=passes["first_pass"],
            second_pass=passes["second_pass"],
            decode_timestep=sampling["decode_timestep"],
            decode_noise_scale=sampling["decode_noise_scale"],
            stochastic_sampling=sampling["stochastic_sampling"],
            skip_layer_strategy=SkipLayerStrategy.AttentionValues,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="pt",
            height=request.height,
            width=request.width,
            num_frames=request.frames,
            frame_rate=request.fps,
            prompt=request.prompt,
            prompt_attention_mask=None,
            negative_prompt=request.negative_prompt,
            negative_prompt_attention_mask=None,
            media_items=None,
            conditioning_items=[ConditioningItem(still, 0, 1.0)],
            is_video=True,
            vae_per_channel_normalize=True,
            image_cond_noise_scale=sampling["image_cond_noise_scale"],
            mixed_precision=False,
            offload_to_cpu=False,
            device="cpu",
            enhance_prompt=False,
        ).images
    frames = images[0].permute(1, 2, 3, 0).cpu().float().numpy()
    return torch.from_numpy((frames * 255).astype("uint8"))


@pytest.mark.parametrize(
    ("variant", "width", "height", "frames"),
    # The second is made larger than it is asked for, and scaled down at the end.
    [("distilled", 192, 128, 9), ("distilled", 128, 64, 17), ("dev", 96, 64, 9)],
)
def test_frames_are_those_of_the_packages_own_pipeline(ltxv_tiny, still, untouched, variant, width, height, frames):
    request = I2VRequest(
        image=str(still),
        prompt="waves roll in",
        negative_prompt="blurry",
        width=width,
        height=height,
        frames=frames,
        fps=30,
        seed=7,
        variant=variant,
        quantization="bf16",
        tiling=None,
    )
    ours = torch.cat(list(LtxVideoPipeline(ltxv_tiny)(request).video))
    theirs = _theirs(untouched, ltxv_tiny.architecture.sampling, request)
    assert ours.shape == (frames, height, width, 3)
    assert ours.float().std() > 10  # a picture, not one grey
    assert torch.equal(ours, theirs)
    other = torch.cat(list(LtxVideoPipeline(ltxv_tiny)(replace(request, seed=8)).video))
    assert not torch.equal(other, theirs)
