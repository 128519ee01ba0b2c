"""The layout of LTX-2's weight files: which tensors each one holds, and which component reads them.

Computed from ltx-core's own modules on the meta device and its own key maps, read backwards. One thing of ltx-core's is
replaced: the dimensions of Gemma, which it keeps in a module constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ltx_core.loader import ContentMatching, ContentReplacement, SDOps
from ltx_core.model.audio_vae import (
    AUDIO_VAE_DECODER_COMFY_KEYS_FILTER,
    AUDIO_VAE_ENCODER_COMFY_KEYS_FILTER,
    VOCODER_COMFY_KEYS_FILTER,
    AudioDecoderConfigurator,
    AudioEncoderConfigurator,
    VocoderConfigurator,
)
from ltx_core.model.transformer import LTXV_MODEL_COMFY_RENAMING_MAP, LTXModelConfigurator
from ltx_core.model.upsampler import LatentUpsamplerConfigurator
from ltx_core.model.video_vae import (
    VAE_DECODER_COMFY_KEYS_FILTER,
    VAE_ENCODER_COMFY_KEYS_FILTER,
    VideoDecoderConfigurator,
    VideoEncoderConfigurator,
)
from ltx_core.text_encoders.gemma import (
    EMBEDDINGS_PROCESSOR_KEY_OPS,
    EmbeddingsProcessorConfigurator,
    GemmaTextEncoderConfigurator,
)
from ltx_core.text_encoders.gemma.encoders import encoder_configurator

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.weight_cache import cached_layout
from i2v_lab.pipeline.ltx2 import gemma
from i2v_lab.pipeline.ltx2.gemma import gemma_key_ops
from i2v_lab.thread_patches import patched_here, unpatched

FILES = {  # the synthetic weight files' paths below their folder
    "checkpoint": "checkpoint.safetensors",
    "gemma": "gemma/model.safetensors",
    "upsampler": "upsampler.safetensors",
    "lora": "distilled-lora.safetensors",
}
UNREAD = ("language_model.lm_head.weight",)  # a copy of the embedding, which the head is tied to; in some exports


@dataclass(frozen=True)
class ComponentSpec:
    """How ltx-core builds one component.

    Attributes:
        file: The weight file with its tensors: ``checkpoint``, ``gemma`` or ``upsampler``.
        configurator: ltx-core's class that makes the module from a configuration.
        key_ops: ltx-core's map from checkpoint keys to module keys; ``None`` where they are the same.
    """

    file: str
    configurator: type[Any]
    key_ops: SDOps | None


COMPONENTS: Mapping[str, ComponentSpec] = {
    "transformer": ComponentSpec("checkpoint", LTXModelConfigurator, LTXV_MODEL_COMFY_RENAMING_MAP),
    "embeddings_processor": ComponentSpec("checkpoint", EmbeddingsProcessorConfigurator, EMBEDDINGS_PROCESSOR_KEY_OPS),
    "video_encoder": ComponentSpec("checkpoint", VideoEncoderConfigurator, VAE_ENCODER_COMFY_KEYS_FILTER),
    "video_decoder": ComponentSpec("checkpoint", VideoDecoderConfigurator, VAE_DECODER_COMFY_KEYS_FILTER),
    "audio_encoder": ComponentSpec("checkpoint", AudioEncoderConfigurator, AUDIO_VAE_ENCODER_COMFY_KEYS_FILTER),
    "audio_decoder": ComponentSpec("checkpoint", AudioDecoderConfigurator, AUDIO_VAE_DECODER_COMFY_KEYS_FILTER),
    "vocoder": ComponentSpec("checkpoint", VocoderConfigurator, VOCODER_COMFY_KEYS_FILTER),
    "text_encoder": ComponentSpec("gemma", GemmaTextEncoderConfigurator, gemma_key_ops()),
    "spatial_upsampler": ComponentSpec("upsampler", LatentUpsamplerConfigurator, None),
}


@contextmanager
def gemma_dimensions(overrides: Mapping[str, Any]) -> Iterator[None]:
    """Within this scope ltx-core builds Gemma, and what reads its hidden states, at the given size in this thread.

    ltx-core 1.0.0 takes the dimensions of Gemma 3 12B from a module constant; with empty ``overrides`` it is unchanged.

    Args:
        overrides: Fields of Gemma's configuration, sections as mappings; see ``Architecture.gemma``.
    """
    original = unpatched(encoder_configurator, "GEMMA3_CONFIG_FOR_LTX")
    sections = {
        key: replace(getattr(original, key), **value) if isinstance(value, Mapping) else value
        for key, value in overrides.items()
    }
    with patched_here(encoder_configurator, "GEMMA3_CONFIG_FOR_LTX", replace(original, **sections)):
        yield


def gemma_config() -> dict[str, Any]:
    """Gemma's configuration as ltx-core has it, at the size of the enclosing :func:`gemma_dimensions`."""
    config: dict[str, Any] = encoder_configurator.GEMMA3_CONFIG_FOR_LTX.to_dict()
    return config


def meta_component(architecture: Architecture, name: str) -> torch.nn.Module:
    """One component on the meta device: shapes and dtypes, no memory.

    Args:
        architecture: The model.
        name: A key of :data:`COMPONENTS`.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> upsampler = meta_component(load_architecture("ltx-2.3-tiny"), "spatial_upsampler")
        >>> {parameter.device.type for parameter in upsampler.parameters()}
        {'meta'}
    """
    spec = COMPONENTS[name]
    config = architecture.upsampler if spec.file == "upsampler" else architecture.config
    with gemma_dimensions(architecture.gemma), torch.device("meta"):
        module: torch.nn.Module = spec.configurator.from_config(config)
    return module


@cache
def file_layout(architecture: Architecture, file: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of one weight file, cached on disk.

    Args:
        architecture: The model.
        file: ``checkpoint``, ``gemma``, ``upsampler`` or ``lora``.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> file_layout(load_architecture("ltx-2.3-tiny"), "checkpoint")["model.diffusion_model.scale_shift_table"]
        (2, 64)
    """
    code = "".join(Path(source).read_text(encoding="utf-8") for source in (__file__, str(gemma.__file__)))
    recipe = f"{architecture.to_json()}:{version('ltx-core')}:{code}"
    return cached_layout(file, recipe, lambda: _compute_layout(architecture, file))


def _compute_layout(architecture: Architecture, file: str) -> dict[str, tuple[int, ...]]:
    layout: dict[str, tuple[int, ...]] = {}
    if file == "lora":
        for name, module in meta_component(architecture, "transformer").named_modules():
            if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks."):
                layout[f"diffusion_model.{name}.lora_A.weight"] = (architecture.lora_rank, module.in_features)
                layout[f"diffusion_model.{name}.lora_B.weight"] = (module.out_features, architecture.lora_rank)
        return layout
    for name, spec in COMPONENTS.items():
        if spec.file == file:
            for key, tensor in meta_component(architecture, name).state_dict().items():
                source = checkpoint_key(spec.key_ops, key)
                if source is not None:
                    layout[source] = tuple(tensor.shape)
    return layout


def checkpoint_key(key_ops: SDOps | None, module_key: str) -> str | None:
    """The checkpoint's name for a module's tensor: the key that ``key_ops`` maps to ``module_key``.

    Returns:
        The name, or ``None`` if no checkpoint key maps there (Gemma's tied ``lm_head``, made from the embedding).

    Example:
        >>> checkpoint_key(COMPONENTS["video_decoder"].key_ops, "conv_in.conv.bias")
        'vae.decoder.conv_in.conv.bias'
    """
    if key_ops is None:
        return module_key
    replacements = [op for op in key_ops.mapping if isinstance(op, ContentReplacement)]
    replacements.sort(key=lambda op: len(op.replacement), reverse=True)
    candidates = [
        op.content + module_key[len(op.replacement) :] for op in replacements if module_key.startswith(op.replacement)
    ]
    candidates += [op.prefix + module_key for op in key_ops.mapping if isinstance(op, ContentMatching)]
    probe = torch.empty(0, device="meta")
    for candidate in candidates:
        mapped = key_ops.apply_to_key(candidate)
        if mapped is not None and key_ops.apply_to_key_value(mapped, probe)[0].new_key == module_key:
            return candidate
    return None


@cache
def transformer_key_ops(architecture: Architecture) -> SDOps:
    """ltx-core's key map of the transformer, narrowed to the transformer's own tensors.

    The embeddings connectors lie under the transformer's prefix: ltx-core's map lets them through, and its builder
    loads them, 3 GiB at full size, only to drop them.
    """
    (prefix,) = (op.prefix for op in LTXV_MODEL_COMFY_RENAMING_MAP.mapping if isinstance(op, ContentMatching))
    own = {
        key.removeprefix(prefix).partition(".")
        for key in file_layout(architecture, "checkpoint")
        if key.startswith(prefix) and EMBEDDINGS_PROCESSOR_KEY_OPS.apply_to_key(key) is None
    }
    matchers = [ContentMatching(prefix + name + dot) for name, dot, _ in sorted(own)]
    rest = [op for op in LTXV_MODEL_COMFY_RENAMING_MAP.mapping if not isinstance(op, ContentMatching)]
    return replace(LTXV_MODEL_COMFY_RENAMING_MAP, mapping=(*dict.fromkeys(matchers), *rest))
