"""Applies memory settings to a pipeline of diffusers, by diffusers' own methods."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_settings import GROUP_OFFLOADS, MemorySettings, Offload

DENOISERS = ("transformer", "transformer_2", "unet")


def set_autoencoder(vae: Any, settings: MemorySettings, model: str) -> None:
    """Let an autoencoder tile or slice.

    Args:
        vae: Of diffusers.
        settings: ``vae_tiling``, ``vae_tile`` and ``vae_slicing`` of them.
        model: For the error.

    Raises:
        InvalidRequest: It can not, or its ``enable_tiling`` has no such argument.
    """
    if settings.vae_tiling:
        known = [name for name in inspect.signature(vae.enable_tiling).parameters if name != "use_tiling"]
        for name, value in settings.vae_tile:
            if name not in known:
                raise InvalidRequest(
                    f"vae_tile: {name}={value} is no argument of {type(vae).__name__}.enable_tiling; use "
                    f"{', '.join(known) or 'none'}",
                    **{name: value},
                )
        _enable(vae, "tiling", model, **dict(settings.vae_tile))
    if settings.vae_slicing:
        _enable(vae, "slicing", model)


def check_tiles(vae: Any, width: int, height: int) -> None:
    """Refuse a video whose last tiles are one latent position wide or high where the decoder pads by reflection.

    Args:
        vae: Of diffusers, tiling or not.
        width: Of the video, pixels.
        height: Of the video, pixels.

    Raises:
        InvalidRequest: With the side.
    """
    if not getattr(vae, "use_tiling", False) or vae.config.get("decoder_spatial_padding_mode") != "reflect":
        return
    scale = vae.spatial_compression_ratio
    sides = {"width": width, "height": height}
    if all(side <= getattr(vae, f"tile_sample_min_{name}") for name, side in sides.items()):
        return  # one tile
    for name, side in sides.items():
        stride = getattr(vae, f"tile_sample_stride_{name}") // scale
        if side // scale % stride == 1:
            raise InvalidRequest(
                f"{name}={side} leaves a tile of {scale} px, which {type(vae).__name__} cannot pad; use {side - scale} "
                f"or {side + scale}, or another tile_sample_stride_{name}",
                **{name: side},
            )


def _enable(vae: Any, what: str, model: str, **options: Any) -> None:
    try:
        getattr(vae, f"enable_{what}")(**options)
    except (AttributeError, NotImplementedError) as error:
        raise InvalidRequest(
            f"vae_{what}=True is not for model={model!r}, whose {type(vae).__name__} has none; leave it out",
            **{f"vae_{what}": True},
        ) from error


def cast_layers(pipeline: Any, dtype: torch.dtype) -> None:
    """Keep the weights of the denoisers in float8, and cast each layer to ``dtype`` while it runs."""
    for name in DENOISERS:
        module = getattr(pipeline, name, None)
        if module is not None:
            module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)


def offload(pipeline: Any, settings: MemorySettings, device: torch.device) -> None:
    """Let weights wait on the CPU until they are needed.

    Args:
        pipeline: Of diffusers; its components are on the CPU.
        settings: ``offload``, ``offload_stream`` and ``offload_blocks`` of them.
        device: Where they are needed.
    """
    if settings.offload is Offload.MODEL:
        pipeline.enable_model_cpu_offload(device=device)
    elif settings.offload is Offload.SEQUENTIAL:
        pipeline.enable_sequential_cpu_offload(device=device)
    elif settings.offload in GROUP_OFFLOADS:
        by_blocks = settings.offload is Offload.GROUP_BLOCK
        pipeline.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level" if by_blocks else "leaf_level",
            num_blocks_per_group=settings.offload_blocks if by_blocks else None,
            use_stream=settings.offload_stream,
        )
