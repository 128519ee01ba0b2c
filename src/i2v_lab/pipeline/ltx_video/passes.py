"""The only place that talks to ltx-video: its modules built from configurations, its pipeline's passes, its decoding.

Nothing of it is rewritten here. Its pipeline is given, in the place of what it would encode again for each pass, what
has been encoded before; and it is asked for latents, since what it decodes itself it decodes at once.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from einops import rearrange
from ltx_video.inference import load_image_to_tensor_with_resize_and_crop
from ltx_video.models.autoencoders.causal_video_autoencoder import CausalVideoAutoencoder
from ltx_video.models.autoencoders.latent_upsampler import LatentUpsampler
from ltx_video.models.autoencoders.vae_encode import vae_decode
from ltx_video.models.transformers.attention import BasicTransformerBlock
from ltx_video.models.transformers.symmetric_patchifier import SymmetricPatchifier
from ltx_video.models.transformers.transformer3d import Transformer3DModel
from ltx_video.pipelines.pipeline_ltx_video import (
    ConditioningItem,
    LTXMultiScalePipeline,
    LTXVideoPipeline,
    adain_filter_latent,
)
from ltx_video.schedulers.rf import RectifiedFlowScheduler
from ltx_video.utils.skip_layer_strategy import SkipLayerStrategy
from PIL import Image
from torch.utils._python_dispatch import _disable_current_modes
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from i2v_lab.pipeline.ltx_video.sizes import SIZES, stage_shape
from i2v_lab.request import I2VRequest, VideoShape

if TYPE_CHECKING:
    from i2v_lab.pipeline.contract.architectures import Architecture
    from i2v_lab.pipeline.ltx_video.weights import LtxVideoWeights

STG_MODES = {
    "attention_values": SkipLayerStrategy.AttentionValues,
    "attention_skip": SkipLayerStrategy.AttentionSkip,
    "residual": SkipLayerStrategy.Residual,
    "transformer_block": SkipLayerStrategy.TransformerBlock,
}
TRANSFORMER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "vae."
STATISTICS_PREFIX = "vae.per_channel_statistics."


# --- Components -------------------------------------------------------------------------------------------------------


def meta_component(architecture: Architecture, name: str) -> torch.nn.Module:
    """One component on the meta device: ``transformer``, ``vae``, ``spatial_upsampler`` or ``text_encoder``."""
    config = copy.deepcopy(architecture.config)
    with torch.device("meta"):
        match name:
            case "transformer":
                return Transformer3DModel.from_config(config["transformer"])
            case "vae":
                return CausalVideoAutoencoder.from_config(config["vae"])
            case "spatial_upsampler":
                return LatentUpsampler.from_config(architecture.upsampler)
            case _:
                return T5EncoderModel(T5Config(**architecture.text_encoder))


def build_text_encoder(weights: LtxVideoWeights, device: torch.device) -> torch.nn.Module:
    """The T5 encoder."""
    encoder = meta_component(weights.architecture, "text_encoder")
    state = weights.loader.load(weights.text_encoder_shards, "", device)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]  # one tensor, of which files hold one copy
    encoder.load_state_dict(state, assign=True)
    return encoder.eval()


def build_transformer(weights: LtxVideoWeights, device: torch.device) -> torch.nn.Module:
    """The transformer of both passes."""
    transformer = meta_component(weights.architecture, "transformer")
    transformer.load_state_dict(weights.loader.load((weights.checkpoint,), TRANSFORMER_PREFIX, device), assign=True)
    return transformer.eval()


def build_upsampler(weights: LtxVideoWeights, device: torch.device) -> torch.nn.Module:
    """The spatial latent upsampler, in float32 as it is published, since that is what a pass leaves its latents in."""
    upsampler = meta_component(weights.architecture, "spatial_upsampler")
    state = weights.loader.load((weights.upsampler,), "", device, torch.float32)
    upsampler.load_state_dict(state, assign=True)
    return upsampler.eval()


def build_vae(weights: LtxVideoWeights, device: torch.device, half: str = "") -> torch.nn.Module:
    """The VAE with one of its halves, ``encoder`` or ``decoder``, or with its statistics alone.

    In the place of a half that is left out stands what the package reads of it besides its weights.
    """
    vae = meta_component(weights.architecture, "vae")
    state = weights.loader.load((weights.checkpoint,), STATISTICS_PREFIX, device)
    for name in ("encoder", "decoder"):
        if name == half:
            state |= weights.loader.load((weights.checkpoint,), f"{VAE_PREFIX}{name}.", device)
        else:
            setattr(vae, name, _Outline(getattr(vae, name)))
    with _assigning(vae):
        vae.load_state_dict(state)
    return vae.eval()


class _Outline(torch.nn.Module):
    """The plain attributes of a module, without its parts."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if not name.startswith("_"):
                setattr(self, name, value)


@contextmanager
def _assigning(module: torch.nn.Module) -> Iterator[None]:
    """Within this scope ``load_state_dict`` assigns tensors, for a class whose own version does not provide for it."""

    def assign(part: Any, state: Any, prefix: str, local_metadata: dict[str, Any], *_: Any) -> None:
        local_metadata["assign_to_params_buffers"] = True

    handles = [part.register_load_state_dict_pre_hook(assign) for part in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def memoizable_modules() -> dict[type[torch.nn.Module], Callable[..., Hashable]]:
    """The modules that run many times alike: the transformer's blocks, some of which guidance perturbs."""
    return {BasicTransformerBlock: _skipped}


def _skipped(block: Any, *args: Any, skip_layer_mask: Any = None, **kwargs: Any) -> Hashable:
    return skip_layer_mask is not None


# --- Passes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contexts:
    """Prompt and negative prompt as the transformer reads them, ``(1, 256, width)`` each, with their masks."""

    prompt_embeds: torch.Tensor
    prompt_attention_mask: torch.Tensor
    negative_prompt_embeds: torch.Tensor
    negative_prompt_attention_mask: torch.Tensor


class _Passes(LTXVideoPipeline):
    """The package's pipeline on a device that none of its components need be on."""

    device_of_run: torch.device

    @property
    def _execution_device(self) -> torch.device:
        return self.device_of_run


OPTIONAL = (
    "tokenizer",
    "text_encoder",
    "transformer",
    "prompt_enhancer_image_caption_model",
    "prompt_enhancer_image_caption_processor",
    "prompt_enhancer_llm_model",
    "prompt_enhancer_llm_tokenizer",
)


def _passes(weights: LtxVideoWeights, device: torch.device, **components: Any) -> _Passes:
    """The package's pipeline with whatever components there are at the moment."""
    passes = _Passes(
        **{**dict.fromkeys(OPTIONAL), **components},
        scheduler=RectifiedFlowScheduler.from_config(weights.architecture.config["scheduler"]),
        patchifier=SymmetricPatchifier(patch_size=1),
    )
    passes.device_of_run = device
    passes.set_progress_bar_config(disable=True)
    return passes


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Within this scope nothing is said of what ltx-video 0.1.2 does in a manner that later versions would not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
        warnings.filterwarnings("ignore", message="Accessing config attribute", category=FutureWarning)
        yield


def still_pixels(pixels: np.ndarray, request: I2VRequest) -> np.ndarray:
    """A still ``(H, W, 3)`` uint8 as the package would load it: cropped, scaled, blurred, compressed.

    Returns:
        ``(1, 3, 1, height, width)`` float32 in [-1, 1].
    """
    with _disable_current_modes():  # it goes to and fro between torch and numpy, which fake tensors cannot
        picture = Image.fromarray(pixels)
        tensor = load_image_to_tensor_with_resize_and_crop(picture, request.height, request.width)
        return np.asarray(tensor.numpy())


def encode_prompt(
    weights: LtxVideoWeights, device: torch.device, vae: Any, text_encoder: Any, request: I2VRequest
) -> Contexts:
    """Prompt and negative prompt through T5, padded to 256 tokens each."""
    tokenizer = T5Tokenizer.from_pretrained(weights.text_encoder, subfolder="tokenizer")
    passes = _passes(weights, device, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    return Contexts(*passes.encode_prompt(request.prompt, True, negative_prompt=request.negative_prompt, device=device))


def encode_still(
    vae: Any, still: torch.Tensor, shape: VideoShape, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """The still at a stage's size as a sample of its latent ``(1, 128, 1, H', W')``, not yet normalized."""
    media = LTXVideoPipeline.resize_tensor(still, shape.height, shape.width)
    sample: torch.Tensor = vae.encode(media.to(device, vae.dtype)).latent_dist.sample(generator=generator)
    return sample


def denoise(
    weights: LtxVideoWeights,
    request: I2VRequest,
    stage: int,
    transformer: Any,
    vae: Any,
    contexts: Contexts,
    still: torch.Tensor,
    generator: torch.Generator,
    on_step: Callable[[int, int], None],
    latents: torch.Tensor | None = None,
) -> torch.Tensor:
    """One pass of the package's pipeline, from noise or from ``latents``, holding the first frame to the still."""
    sampling = weights.architecture.sampling
    settings = sampling[request.variant.value]["second_pass" if stage == 2 else "first_pass"]
    shape = stage_shape(weights.architecture, request, stage)
    steps = step_count(settings)
    # What the package encodes in the midst of each pass has been encoded: its VAE hands that out.
    vae.encode = lambda media: SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: still))
    media = torch.empty((1, 1, 1, 1, 1)).expand(1, 3, 1, shape.height, shape.width)
    run = _passes(weights, still.device, vae=vae, transformer=transformer)
    with _known_warnings():
        result = run(
            **settings,
            height=shape.height,
            width=shape.width,
            num_frames=request.frames,
            frame_rate=request.fps,
            prompt=None,
            negative_prompt=None,
            **vars(contexts),
            latents=latents,
            skip_layer_strategy=STG_MODES[sampling["stg_mode"]],
            generator=generator,
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
    """How many steps a pass takes."""
    if "timesteps" in settings:
        return len(settings["timesteps"])
    skipped = settings.get("skip_initial_inference_steps", 0) + settings.get("skip_final_inference_steps", 0)
    return int(settings["num_inference_steps"] - skipped)


def upsample_latent(
    weights: LtxVideoWeights, device: torch.device, vae: Any, upsampler: Any, latents: torch.Tensor
) -> torch.Tensor:
    """The latent at twice the height and width, with the statistics that it had."""
    both = LTXMultiScalePipeline(_passes(weights, device, vae=vae), upsampler)
    upsampled: torch.Tensor = adain_filter_latent(both._upsample_latents(upsampler, latents), latents)
    return upsampled


def latent_to_decode(
    weights: LtxVideoWeights, request: I2VRequest, latents: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """What the decoder is given: the latent with some noise, its range compressed. Source: the end of its pipeline."""
    sampling = weights.architecture.sampling
    noise = torch.empty_like(latents).normal_(generator=generator)
    scale = torch.tensor([sampling["decode_noise_scale"]]).to(latents.device)[:, None, None, None, None]
    latents = latents * (1 - scale) + noise * scale
    ratio = sampling[request.variant.value]["second_pass"].get("tone_map_compression_ratio", 0.0)
    mapped: torch.Tensor = LTXVideoPipeline.tone_map_latents(latents, ratio)
    return mapped


def decode_video(
    weights: LtxVideoWeights, request: I2VRequest, vae: Any, latents: torch.Tensor
) -> Iterator[torch.Tensor]:
    """The whole video as one chunk ``(F, H, W, 3)`` uint8, decoded when it is asked for."""
    timestep = torch.tensor([weights.architecture.sampling["decode_timestep"]]).to(latents.device)
    decoded = vae_decode(latents, vae, True, vae_per_channel_normalize=True, timestep=timestep)
    images = VaeImageProcessor(vae_scale_factor=SIZES.spatial_scale).postprocess(decoded, output_type="pt")
    del decoded
    frames = torch.nn.functional.interpolate(
        rearrange(images, "b c f h w -> (b f) c h w"),
        size=(request.height, request.width),
        mode="bilinear",
        align_corners=False,
    )
    del images
    yield (rearrange(frames, "f c h w -> f h w c").float() * 255).to(torch.uint8)
