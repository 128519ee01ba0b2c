"""The layout of ltx-video's weight files: which tensors each one holds.

Computed from the package's own modules on the meta device.
"""

from __future__ import annotations

import copy
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from ltx_video.models.autoencoders.causal_video_autoencoder import CausalVideoAutoencoder
from ltx_video.models.autoencoders.latent_upsampler import LatentUpsampler
from ltx_video.models.transformers.transformer3d import Transformer3DModel
from transformers import T5Config, T5EncoderModel

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.weight_cache import cached_layout

FILES = {  # the synthetic weight files' paths below their folder
    "checkpoint": "checkpoint.safetensors",
    "text_encoder": "t5/text_encoder/model.safetensors",
    "upsampler": "upsampler.safetensors",
}
TRANSFORMER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "vae."
STATISTICS_PREFIX = "vae.per_channel_statistics."
STATISTICS = ("mean-of-means", "std-of-means")  # those that are read
UNREAD = (  # what published files have and no run reads: other statistics, a copy of the embedding
    *(f"{STATISTICS_PREFIX}{name}" for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")),
    "encoder.embed_tokens.weight",
)


def meta_component(architecture: Architecture, name: str) -> torch.nn.Module:
    """One component on the meta device: shapes and dtypes, no memory.

    Args:
        architecture: The model.
        name: ``transformer``, ``vae``, ``spatial_upsampler`` or ``text_encoder``.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> upsampler = meta_component(load_architecture("ltxv-tiny"), "spatial_upsampler")
        >>> {parameter.device.type for parameter in upsampler.parameters()}
        {'meta'}
    """
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


@cache
def file_layout(architecture: Architecture, file: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of one weight file, cached on disk.

    Args:
        architecture: The model.
        file: ``checkpoint``, ``text_encoder`` or ``upsampler``.
    """
    code = Path(__file__).read_text(encoding="utf-8")
    recipe = f"{architecture.to_json()}:{version('ltx-video')}:{code}"
    return cached_layout(f"ltxv-{file}", recipe, lambda: _compute_layout(architecture, file))


def _compute_layout(architecture: Architecture, file: str) -> dict[str, tuple[int, ...]]:
    def shapes(component: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
        state = meta_component(architecture, component).state_dict()
        return {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}

    if file == "upsampler":
        return shapes("spatial_upsampler")
    if file == "text_encoder":  # its embedding is tied to shared.weight
        return {key: shape for key, shape in shapes(file).items() if key != "encoder.embed_tokens.weight"}
    channels = (architecture.config["vae"]["latent_channels"],)
    statistics = {f"{STATISTICS_PREFIX}{name}": channels for name in STATISTICS}
    return shapes("transformer", TRANSFORMER_PREFIX) | shapes("vae", VAE_PREFIX) | statistics
