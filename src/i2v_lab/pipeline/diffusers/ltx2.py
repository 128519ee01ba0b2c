"""diffusers' own LTX-2 pipelines, at full size or tiny, with random weights; the only module that talks to diffusers.

Nothing of theirs is changed. Their two-stage generation is what their documentation describes: half the size to a
latent, the latent upsampled, the same pipeline again from there, decoded by it or by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2LatentUpsamplePipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES, STAGE_2_DISTILLED_SIGMA_VALUES
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from diffusers.video_processor import VideoProcessor
from PIL import Image
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from i2v_lab.pipeline.contract.media import load_still
from i2v_lab.pipeline.ltx2 import components as ltx2
from i2v_lab.pipeline.ltx2.weights import Weights
from i2v_lab.request import I2VRequest

Sizes = Mapping[str, Mapping[str, Any]]
# The defaults of diffusers are the size of LTX-2, but for these, which the class derives wrongly from its blocks.
COMPRESSION = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
FULL: Sizes = {"vae": COMPRESSION}
TINY: Sizes = {  # every dimension small; 32 pixels and 8 frames of a latent's position are kept
    "transformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "cross_attention_dim": 64,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 64,
    },
    "vae": {
        **COMPRESSION,
        "block_out_channels": (8, 16, 32, 64),
        "decoder_block_out_channels": (8, 16, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (3, 3, 3, 3),
    },
    "audio_vae": {"ch_mult": (1, 1, 1), "num_res_blocks": 0},  # its 128 base channels are fixed elsewhere
    "connectors": {
        "caption_channels": 64,
        "text_proj_in_factor": 3,
        "video_connector_num_attention_heads": 2,
        "video_connector_attention_head_dim": 32,
        "video_connector_num_layers": 1,
        "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": 32,
        "audio_connector_num_layers": 1,
    },
    "vocoder": {"hidden_channels": 64},
    "latent_upsampler": {"mid_channels": 32, "num_blocks_per_stage": 1},
}


class Offload(StrEnum):
    """Where the weights wait: on the device, or on the CPU, and from there by whole components or by single layers."""

    NONE = "none"
    MODEL = "model"
    GROUP = "group"


@dataclass(frozen=True)
class DiffusersLTX2:
    """diffusers' ``LTX2ImageToVideoPipeline`` and ``LTX2LatentUpsamplePipeline``, called like our pipelines.

    Attributes:
        generate: Both stages.
        upsample: What lies between them; shares the autoencoder.
    """

    generate: Any
    upsample: Any

    def __call__(self, request: I2VRequest, output_type: str = "pt") -> tuple[torch.Tensor, torch.Tensor]:
        """Two stages, without guidance, with the distilled steps.

        Args:
            request: What to generate.
            output_type: diffusers' own: ``pt``, ``np``, ``pil``, or ``latent``, which leaves decoding to the caller.

        Returns:
            Video and audio as ``output_type`` has them.
        """
        common: dict[str, Any] = {
            "prompt": request.prompt,
            "num_frames": request.frames,
            "frame_rate": float(request.fps),
            "image": Image.fromarray(load_still(request.image)),
            "guidance_scale": 1.0,
            "return_dict": False,
        }
        device = self.generate._execution_device
        common["generator"] = torch.Generator(device).manual_seed(request.seed)
        half: dict[str, Any] = {"width": request.width // 2, "height": request.height // 2}
        video, audio = self.generate(**common, **half, sigmas=DISTILLED_SIGMA_VALUES, output_type="latent")
        (video,) = self.upsample(latents=video, **half, output_type="latent", return_dict=False)
        return self.generate(
            **common,
            width=request.width,
            height=request.height,
            latents=video,
            audio_latents=audio,
            sigmas=STAGE_2_DISTILLED_SIGMA_VALUES,
            noise_scale=STAGE_2_DISTILLED_SIGMA_VALUES[0],
            output_type=output_type,
        )


def diffusers_ltx2(
    weights: Weights,
    sizes: Sizes = FULL,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    offload: Offload = Offload.NONE,
    forecast: bool = False,
) -> DiffusersLTX2:
    """Build diffusers' pipelines with random weights.

    Args:
        weights: Whose Gemma is taken: its dimensions and its tokenizer, not its weights.
        sizes: What differs from diffusers' default configuration, by component: :data:`FULL` or :data:`TINY`.
        device: Where the components are built.
        dtype: Of all weights.
        offload: With ``model`` and ``group`` the components wait on the CPU and diffusers moves them to ``device``.
        forecast: For a run under :func:`~i2v_lab.profiling.fake.forecast.forecasting`.
    """
    with ltx2.gemma_dimensions(weights.architecture.gemma):
        gemma = Gemma3Config(**ltx2.gemma_config())

    where = device if offload is Offload.NONE else "cpu"

    def moved(module: torch.nn.Module) -> Any:
        return module.to(where).eval()

    def build(kind: Any, name: str) -> Any:
        return moved(kind(**sizes.get(name, {})))

    # On the device even where they do not stay there: on a CPU, to draw the numbers of 31 B weights takes minutes.
    with torch.random.fork_rng(devices=[]), torch.device(device), _default_dtype(dtype):
        torch.manual_seed(0)
        vae = build(AutoencoderKLLTX2Video, "vae")
        generate = LTX2ImageToVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            audio_vae=build(AutoencoderKLLTX2Audio, "audio_vae"),
            text_encoder=moved(Gemma3ForConditionalGeneration(gemma).to(dtype)),  # its vision part is float32 else
            tokenizer=AutoTokenizer.from_pretrained(weights.gemma_root),
            connectors=build(LTX2TextConnectors, "connectors"),
            transformer=build(LTX2VideoTransformer3DModel, "transformer"),
            vocoder=build(LTX2Vocoder, "vocoder"),
        )
        with torch.device("cpu"):  # its constructor multiplies integers, for which CUDA has no matrix product
            upsampler = build(LTX2LatentUpsamplerModel, "latent_upsampler")
        upsample = LTX2LatentUpsamplePipeline(vae, upsampler)
    if offload is Offload.MODEL:
        for pipeline in (generate, upsample):
            pipeline.enable_model_cpu_offload(device=device)
    elif offload is Offload.GROUP:  # by blocks the autoencoder fails: it is encoded with, not called
        onload = torch.device(device)
        generate.enable_group_offload(onload_device=onload, offload_type="leaf_level")
        upsample.latent_upsampler.to(onload)
    if forecast:
        generate.video_processor = ForecastProcessor(generate.vae_spatial_compression_ratio, resample="bilinear")
    generate.set_progress_bar_config(disable=True)
    return DiffusersLTX2(generate, upsample)


def memoizable_modules() -> dict[type[torch.nn.Module], Callable[..., Hashable]]:
    """Module classes whose identical calls may be memoized without guidance, each with its memory key."""
    return {LTX2VideoTransformerBlock: lambda *args, **kwargs: ()}


class ForecastProcessor(VideoProcessor):
    """Reads a still as diffusers does, but for asking whether it has negative values: a forecast does not know.

    Only a warning follows from the answer, and nothing that is on the device.
    """

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """The still ``(1, 3, H, W)`` in [-1, 1]."""
        resized = self.resize(image, height, width)
        return self.normalize(self.numpy_to_pt(self.pil_to_numpy(resized)))


class _default_dtype:  # noqa: N801 - a context manager
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before)
