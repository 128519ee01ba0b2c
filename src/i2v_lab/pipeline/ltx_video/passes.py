"""ltx-video's passes: its own pipeline's encoding, denoising, upsampling and decoding, one at a time.

Nothing of the package is rewritten here. Its pipeline would encode the still again in each pass: it gets a VAE that
returns the latent encoded before. And it is asked for latents, because it would decode at once, not lazily.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from ltx_video.inference import load_image_to_tensor_with_resize_and_crop
from ltx_video.models.autoencoders.vae_encode import vae_decode
from ltx_video.models.transformers.symmetric_patchifier import SymmetricPatchifier
from ltx_video.pipelines import pipeline_ltx_video
from ltx_video.pipelines.pipeline_ltx_video import (
    ConditioningItem,
    LTXMultiScalePipeline,
    LTXVideoPipeline,
    VaeImageProcessor,
    adain_filter_latent,
)
from ltx_video.schedulers.rf import RectifiedFlowScheduler
from ltx_video.utils.skip_layer_strategy import SkipLayerStrategy
from PIL import Image
from transformers import T5Tokenizer

from i2v_lab.events import EventSink
from i2v_lab.pipeline.contract.prompt_length import note_dropped_tokens
from i2v_lab.pipeline.contract.weight_folders import reading_folder
from i2v_lab.pipeline.ltx_video.sizes import SIZES, stage_shape
from i2v_lab.pipeline.ltx_video.weights import LtxVideoWeights
from i2v_lab.request import I2VRequest
from i2v_lab.torch_compat import disable_current_modes

STG_MODES = {
    "attention_values": SkipLayerStrategy.AttentionValues,
    "attention_skip": SkipLayerStrategy.AttentionSkip,
    "residual": SkipLayerStrategy.Residual,
    "transformer_block": SkipLayerStrategy.TransformerBlock,
}
MAX_TOKENS = 256  # of a prompt, the package's default
OPTIONAL = (  # components that the package's pipeline takes, and that are None outside their phase
    "tokenizer",
    "text_encoder",
    "transformer",
    "prompt_enhancer_image_caption_model",
    "prompt_enhancer_image_caption_processor",
    "prompt_enhancer_llm_model",
    "prompt_enhancer_llm_tokenizer",
)


@dataclass(frozen=True)
class Run:
    """What all passes of one generation share.

    Attributes:
        request: What to generate.
        weights: The weight files and their loader.
        device: Where components run.
        generator: Passed to the package's pipeline, for the noise of its passes.
        global_generator: Replaces torch's global generator, from which the package draws the sample of the still's
            latent and the noise before decoding; seeded alike.
    """

    request: I2VRequest
    weights: LtxVideoWeights
    device: torch.device
    generator: torch.Generator
    global_generator: torch.Generator

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The published settings of the model; see ``Architecture.sampling``."""
        return self.weights.architecture.sampling

    def settings(self, stage: int) -> Mapping[str, Any]:
        """The settings of a pass, 1 or 2, of the request's variant."""
        variant: Mapping[str, Any] = self.sampling[self.request.variant.value]
        settings: Mapping[str, Any] = variant["second_pass" if stage == 2 else "first_pass"]
        return settings

    def pipeline(self, **components: Any) -> LTXVideoPipeline:
        """The package's pipeline with the components that are loaded at the moment."""
        pipeline = _Pipeline(
            **{**dict.fromkeys(OPTIONAL), **components},
            scheduler=RectifiedFlowScheduler.from_config(self.weights.architecture.config["scheduler"]),
            patchifier=SymmetricPatchifier(patch_size=1),
        )
        pipeline.run_device = self.device
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@dataclass(frozen=True)
class Contexts:
    """T5's embeddings of prompt and negative prompt, which the transformer's cross-attention reads.

    Attributes:
        prompt_embeds: ``(1, 256, width)``, bfloat16.
        prompt_attention_mask: ``(1, 256)``.
        negative_prompt_embeds: ``(1, 256, width)``, bfloat16.
        negative_prompt_attention_mask: ``(1, 256)``.
    """

    prompt_embeds: torch.Tensor
    prompt_attention_mask: torch.Tensor
    negative_prompt_embeds: torch.Tensor
    negative_prompt_attention_mask: torch.Tensor


class _Pipeline(LTXVideoPipeline):
    """The package's pipeline with an explicit device; its own takes that of its components."""

    run_device: torch.device

    @property
    def _execution_device(self) -> torch.device:
        return self.run_device


@contextmanager
def _known_warnings_ignored() -> Iterator[None]:
    """Within this scope deprecation warnings that ltx-video 0.1.2 is known to cause are ignored."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
        warnings.filterwarnings("ignore", message="Accessing config attribute", category=FutureWarning)
        yield


# --- Encoding ---------------------------------------------------------------------------------------------------------


def still_pixels(pixels: np.ndarray, request: I2VRequest) -> np.ndarray:
    """The still as the package loads it: cropped, scaled, blurred, compressed.

    Args:
        pixels: ``(H, W, 3)``, uint8.
        request: For the size.

    Returns:
        ``(1, 3, 1, height, width)`` float32 in [-1, 1].
    """
    with disable_current_modes():  # it converts between torch and numpy, which fake tensors cannot
        picture = Image.fromarray(pixels)
        tensor = load_image_to_tensor_with_resize_and_crop(picture, request.height, request.width)
        return np.asarray(tensor.numpy())


def encode_prompt(run: Run, vae: Any, text_encoder: Any, emit: EventSink) -> Contexts:
    """Prompt and negative prompt through T5, padded or cut to 256 tokens each, which is reported."""
    folder = run.weights.text_encoder
    with reading_folder("--text-encoder", folder, "tokenizer"):
        tokenizer = T5Tokenizer.from_pretrained(
            folder, subfolder="tokenizer", local_files_only=True, trust_remote_code=False
        )
    pipeline = run.pipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    request = run.request
    for topic in ("prompt", "negative_prompt"):
        note_dropped_tokens(emit, tokenizer, topic, getattr(request, topic), MAX_TOKENS)
    logger = logging.getLogger(pipeline_ltx_video.__name__)
    logger.addFilter(_is_no_truncation)  # it names another encoder, and not the negative prompt
    try:
        return Contexts(
            *pipeline.encode_prompt(request.prompt, True, negative_prompt=request.negative_prompt, device=run.device)
        )
    finally:
        logger.removeFilter(_is_no_truncation)


def _is_no_truncation(record: logging.LogRecord) -> bool:
    return "was truncated" not in record.getMessage()


def encode_still(run: Run, vae: Any, still: torch.Tensor, stage: int) -> torch.Tensor:
    """A sample of the still's latent at a stage's size, not yet normalized.

    Args:
        run: The generation.
        vae: With its encoder.
        still: ``(1, 3, 1, height, width)``, float32 in [-1, 1].
        stage: 1 or 2.

    Returns:
        ``(1, 128, 1, H', W')``.
    """
    shape = stage_shape(run.weights.architecture, run.request, stage)
    media = LTXVideoPipeline.resize_tensor(still, shape.height, shape.width)
    distribution = vae.encode(media.to(run.device, vae.dtype)).latent_dist
    sample: torch.Tensor = distribution.sample(generator=run.global_generator)
    return sample


# --- Denoising and upsampling -----------------------------------------------------------------------------------------


def denoise(
    run: Run,
    stage: int,
    transformer: Any,
    vae: Any,
    contexts: Contexts,
    still: torch.Tensor,
    on_step: Callable[[int, int], None],
    latents: torch.Tensor | None = None,
) -> torch.Tensor:
    """One pass of the package's pipeline, with the still as the first latent frame.

    Args:
        run: The generation.
        stage: 1 or 2.
        transformer: Of both passes.
        vae: For its statistics; its ``encode`` is replaced.
        contexts: From :func:`encode_prompt`.
        still: From :func:`encode_still` for this stage.
        on_step: Called after each step with its number, from 1, and the number of steps.
        latents: ``(1, 128, F', H', W')`` that the pass starts from; pure noise without.

    Returns:
        The denoised latent, ``(1, 128, F', H', W')``.
    """
    settings, sampling = run.settings(stage), run.sampling
    shape = stage_shape(run.weights.architecture, run.request, stage)
    steps = step_count(settings)
    # The package encodes the conditioning item in each pass; this returns the latent that has been encoded already.
    vae.encode = lambda media: SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: still))
    media = torch.empty((1, 1, 1, 1, 1)).expand(1, 3, 1, shape.height, shape.width)  # only its shape is read
    pipeline = run.pipeline(vae=vae, transformer=transformer)
    with _known_warnings_ignored():
        result = pipeline(
            **settings,
            height=shape.height,
            width=shape.width,
            num_frames=run.request.frames,
            frame_rate=run.request.fps,
            prompt=None,
            negative_prompt=None,
            **vars(contexts),
            latents=latents,
            skip_layer_strategy=STG_MODES[sampling["stg_mode"]],
            generator=run.generator,
            output_type="latent",
            callback_on_step_end=lambda pipeline, index, timestep, values: on_step(index + 1, steps),
            conditioning_items=[ConditioningItem(media, 0, 1.0)],
            is_video=True,
            vae_per_channel_normalize=True,
            image_cond_noise_scale=sampling["image_cond_noise_scale"],
            stochastic_sampling=sampling["stochastic_sampling"],
        )
    denoised: torch.Tensor = result.images
    return denoised


def step_count(settings: Mapping[str, Any]) -> int:
    """The number of steps of a pass with these settings.

    Example:
        >>> step_count({"num_inference_steps": 30, "skip_initial_inference_steps": 17})
        13
    """
    if "timesteps" in settings:
        return len(settings["timesteps"])
    skipped = settings.get("skip_initial_inference_steps", 0) + settings.get("skip_final_inference_steps", 0)
    return int(settings["num_inference_steps"] - skipped)


def upsample_latent(run: Run, vae: Any, upsampler: Any, latents: torch.Tensor) -> torch.Tensor:
    """The latent ``(1, 128, F', H', W')`` at twice the height and width, normalized to its own statistics (AdaIN)."""
    pipeline = LTXMultiScalePipeline(run.pipeline(vae=vae), upsampler)
    upsampled: torch.Tensor = adain_filter_latent(pipeline._upsample_latents(upsampler, latents), latents)
    return upsampled


# --- Decoding ---------------------------------------------------------------------------------------------------------


def latent_to_decode(run: Run, latents: torch.Tensor) -> torch.Tensor:
    """The decoder's input: the latent with noise added and tone-mapped.

    Source: the end of ``LTXVideoPipeline.__call__``.
    """
    noise = torch.empty_like(latents).normal_(generator=run.global_generator)
    scale = torch.tensor([run.sampling["decode_noise_scale"]]).to(latents.device)[:, None, None, None, None]
    latents = latents * (1 - scale) + noise * scale
    mapped: torch.Tensor = LTXVideoPipeline.tone_map_latents(
        latents, run.settings(2).get("tone_map_compression_ratio", 0.0)
    )
    return mapped


def decode_video(run: Run, vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """Decode the video lazily, in one piece.

    Args:
        run: The generation.
        vae: With its decoder.
        latents: ``(1, 128, F', H', W')``, from :func:`latent_to_decode`.

    Yields:
        One chunk ``(F, H, W, 3)``, uint8, scaled to the request's size.
    """
    timestep = torch.tensor([run.sampling["decode_timestep"]]).to(latents.device)
    decoded = vae_decode(latents, vae, True, vae_per_channel_normalize=True, timestep=timestep)
    images = VaeImageProcessor(vae_scale_factor=SIZES.spatial_scale).postprocess(decoded, output_type="pt")
    del decoded
    frames = torch.nn.functional.interpolate(
        rearrange(images, "b c f h w -> (b f) c h w"),
        size=(run.request.height, run.request.width),
        mode="bilinear",
        align_corners=False,
    )
    del images
    yield (rearrange(frames, "f c h w -> f h w c").float() * 255).to(torch.uint8)
