"""ltx-video's components: its modules, built from configurations, with our weights assigned to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ltx_video.models.transformers.attention import BasicTransformerBlock

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.ltx_video.layout import STATISTICS_PREFIX, TRANSFORMER_PREFIX, VAE_PREFIX, meta_component
from i2v_lab.pipeline.ltx_video.weights import LtxVideoWeights


def build_text_encoder(weights: LtxVideoWeights, device: torch.device) -> torch.nn.Module:
    """The T5 encoder, in bfloat16."""
    encoder = meta_component(weights.architecture, "text_encoder")
    state = weights.loader.load(weights.text_encoder_shards, "", device)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]  # tied; weight files hold one copy
    encoder.load_state_dict(state, assign=True)
    return encoder.eval()


def build_transformer(weights: LtxVideoWeights, device: torch.device) -> torch.nn.Module:
    """The transformer of both passes, in bfloat16."""
    transformer = meta_component(weights.architecture, "transformer")
    transformer.load_state_dict(weights.loader.load((weights.checkpoint,), TRANSFORMER_PREFIX, device), assign=True)
    return transformer.eval()


def build_upsampler(weights: LtxVideoWeights, device: torch.device) -> torch.nn.Module:
    """The spatial latent upsampler, in float32 as published: the dtype of a pass's latents."""
    upsampler = meta_component(weights.architecture, "spatial_upsampler")
    state = weights.loader.load((weights.upsampler,), "", device, torch.float32)
    upsampler.load_state_dict(state, assign=True)
    return upsampler.eval()


def build_vae(weights: LtxVideoWeights, device: torch.device, half: str = "") -> torch.nn.Module:
    """The VAE with its statistics and at most one of its halves, in bfloat16.

    A half that is not loaded is replaced by a module with its plain attributes, some of which the package reads.

    Args:
        weights: The weight files and their loader.
        device: Where it is built.
        half: ``encoder``, ``decoder``, or neither.
    """
    vae = meta_component(weights.architecture, "vae")
    state = weights.loader.load((weights.checkpoint,), STATISTICS_PREFIX, device)
    for name in ("encoder", "decoder"):
        if name == half:
            state |= weights.loader.load((weights.checkpoint,), f"{VAE_PREFIX}{name}.", device)
        else:
            setattr(vae, name, _AttributesOnly(getattr(vae, name)))
    with _assigning(vae):
        vae.load_state_dict(state)
    return vae.eval()


class _AttributesOnly(torch.nn.Module):
    """The plain attributes of a module, without its submodules and parameters."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if not name.startswith("_"):
                setattr(self, name, value)


@contextmanager
def _assigning(module: torch.nn.Module) -> Iterator[None]:
    """Within this scope ``load_state_dict`` assigns tensors, for a class that overrides it without ``assign``."""

    def assign(part: Any, state: Any, prefix: str, local_metadata: dict[str, Any], *_: Any) -> None:
        local_metadata["assign_to_params_buffers"] = True

    handles = [part.register_load_state_dict_pre_hook(assign) for part in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def memoizable_modules(architecture: Architecture) -> dict[type[torch.nn.Module], Callable[..., Hashable]]:
    """Module classes whose identical calls a forecast may memoize: the transformer's blocks.

    Returns:
        For each class a function of a call's module and arguments: what, besides shapes, decides which operators run.
        That is whether guidance skips layers.
    """
    return {BasicTransformerBlock: _skip_key}


def _skip_key(block: Any, *args: Any, skip_layer_mask: Any = None, **kwargs: Any) -> Hashable:
    return skip_layer_mask is not None
