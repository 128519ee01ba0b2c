"""Tiny pipelines of diffusers as folders of configuration alone, and built directly."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

Part = tuple[type, dict[str, Any]]


def _t5(kind: type = transformers.T5EncoderModel) -> Part:
    return kind, {"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}


def _clip_vision(size: int = 32) -> Part:
    return transformers.CLIPVisionModelWithProjection, {
        "hidden_size": 32,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": size,
        "intermediate_size": 37,
        "patch_size": 8,
    }


IMAGES: Part = (transformers.CLIPImageProcessor, {"crop_size": 32, "size": 32})
PIPELINES: dict[str, tuple[str, dict[str, Part]]] = {
    "wan": (
        "WanImageToVideoPipeline",
        {
            "vae": (
                diffusers.AutoencoderKLWan,
                {
                    "base_dim": 3,
                    "z_dim": 16,
                    "dim_mult": [1, 1, 1, 1],
                    "num_res_blocks": 1,
                    "temperal_downsample": [False, True, True],
                },
            ),
            "scheduler": (diffusers.UniPCMultistepScheduler, {"flow_shift": 3.0, "use_flow_sigmas": True}),
            "text_encoder": _t5(transformers.UMT5EncoderModel),
            "transformer": (
                diffusers.WanTransformer3DModel,
                {
                    "patch_size": [1, 2, 2],
                    "num_attention_heads": 2,
                    "attention_head_dim": 12,
                    "in_channels": 36,
                    "out_channels": 16,
                    "text_dim": 32,
                    "freq_dim": 256,
                    "ffn_dim": 32,
                    "num_layers": 2,
                    "cross_attn_norm": True,
                    "qk_norm": "rms_norm_across_heads",
                    "rope_max_seq_len": 32,
                    "image_dim": 32,
                },
            ),
            "image_encoder": _clip_vision(),
            "image_processor": IMAGES,
            "tokenizer": (transformers.T5TokenizerFast, {}),
        },
    ),
    "cogvideox": (
        "CogVideoXImageToVideoPipeline",
        {
            "vae": (
                diffusers.AutoencoderKLCogVideoX,
                {
                    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
                    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
                    "block_out_channels": [8, 8, 8, 8],
                    "latent_channels": 4,
                    "layers_per_block": 1,
                    "norm_num_groups": 2,
                    "temporal_compression_ratio": 4,
                },
            ),
            "scheduler": (diffusers.CogVideoXDDIMScheduler, {}),
            "text_encoder": _t5(),
            "transformer": (
                diffusers.CogVideoXTransformer3DModel,
                {
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "in_channels": 8,
                    "out_channels": 4,
                    "time_embed_dim": 2,
                    "text_embed_dim": 32,
                    "num_layers": 1,
                    "sample_width": 8,
                    "sample_height": 8,
                    "sample_frames": 9,
                    "patch_size": 2,
                    "temporal_compression_ratio": 4,
                    "max_text_seq_length": 16,
                    "use_rotary_positional_embeddings": True,
                    "use_learned_positional_embeddings": True,
                },
            ),
            "tokenizer": (transformers.T5TokenizerFast, {}),
        },
    ),
    "ltx": (
        "LTXImageToVideoPipeline",
        {
            "vae": (
                diffusers.AutoencoderKLLTXVideo,
                {
                    "latent_channels": 8,
                    "block_out_channels": [8, 8, 8, 8],
                    "decoder_block_out_channels": [8, 8, 8, 8],
                    "layers_per_block": [1, 1, 1, 1, 1],
                    "decoder_layers_per_block": [1, 1, 1, 1, 1],
                    "spatio_temporal_scaling": [True, True, False, False],
                    "decoder_spatio_temporal_scaling": [True, True, False, False],
                    "decoder_inject_noise": [False] * 5,
                    "upsample_residual": [False] * 4,
                    "upsample_factor": [1] * 4,
                    "patch_size": 1,
                    "patch_size_t": 1,
                },
            ),
            "scheduler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
            "text_encoder": _t5(),
            "transformer": (
                diffusers.LTXVideoTransformer3DModel,
                {
                    "in_channels": 8,
                    "out_channels": 8,
                    "num_attention_heads": 4,
                    "attention_head_dim": 8,
                    "cross_attention_dim": 32,
                    "num_layers": 1,
                    "caption_channels": 32,
                },
            ),
            "tokenizer": (transformers.T5TokenizerFast, {}),
        },
    ),
    "svd": (
        "StableVideoDiffusionPipeline",
        {
            "vae": (
                diffusers.AutoencoderKLTemporalDecoder,
                {
                    "block_out_channels": [32, 64],
                    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
                    "latent_channels": 4,
                },
            ),
            "scheduler": (
                diffusers.EulerDiscreteScheduler,
                {
                    "beta_schedule": "scaled_linear",
                    "prediction_type": "v_prediction",
                    "sigma_max": 700.0,
                    "sigma_min": 0.002,
                    "timestep_type": "continuous",
                    "timestep_spacing": "leading",
                    "use_karras_sigmas": True,
                },
            ),
            "unet": (
                diffusers.UNetSpatioTemporalConditionModel,
                {
                    "block_out_channels": [32, 64],
                    "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
                    "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
                    "layers_per_block": 1,
                    "sample_size": 32,
                    "cross_attention_dim": 32,
                    "num_attention_heads": 8,
                    "projection_class_embeddings_input_dim": 96,
                    "addition_time_embed_dim": 32,
                },
            ),
            "image_encoder": _clip_vision(224),
            "feature_extractor": IMAGES,
        },
    ),
    "hunyuan": (
        "HunyuanVideoPipeline",
        {
            "vae": (
                diffusers.AutoencoderKLHunyuanVideo,
                {
                    "latent_channels": 4,
                    "block_out_channels": [8, 8, 8, 8],
                    "layers_per_block": 1,
                    "norm_num_groups": 4,
                },
            ),
            "scheduler": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 7.0}),
            "text_encoder": (
                transformers.LlamaModel,
                {
                    "vocab_size": 1000,
                    "hidden_size": 16,
                    "intermediate_size": 37,
                    "num_attention_heads": 4,
                    "num_hidden_layers": 2,
                },
            ),
            "text_encoder_2": (
                transformers.CLIPTextModel,
                {
                    "vocab_size": 1000,
                    "hidden_size": 8,
                    "projection_dim": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 37,
                    "max_position_embeddings": 77,
                },
            ),
            "transformer": (
                diffusers.HunyuanVideoTransformer3DModel,
                {
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_attention_heads": 2,
                    "attention_head_dim": 10,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "num_refiner_layers": 1,
                    "patch_size": 1,
                    "text_embed_dim": 16,
                    "pooled_projection_dim": 8,
                    "rope_axes_dim": [2, 4, 4],
                },
            ),
            "tokenizer": (transformers.LlamaTokenizerFast, {}),
            "tokenizer_2": (transformers.CLIPTokenizer, {}),
        },
    ),
}


def write_folder(name: str, folder: Path) -> Path:
    """Write the configuration of a pipeline, without weights and vocabularies."""
    kind, parts = PIPELINES[name]
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": diffusers.__version__}
    for part, (cls, config) in parts.items():
        index[part] = [cls.__module__.partition(".")[0], cls.__name__]
        if "tokenizer" in part:
            continue
        if issubclass(cls, transformers.PreTrainedModel):
            file, config = "config.json", {"model_type": cls.config_class.model_type, "dtype": "float32", **config}
        elif cls is transformers.CLIPImageProcessor:
            file = "preprocessor_config.json"
        else:
            file = "scheduler_config.json" if issubclass(cls, diffusers.SchedulerMixin) else "config.json"
            config = {"_class_name": cls.__name__, **config}
        (folder / part).mkdir(parents=True)
        (folder / part / file).write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def build_directly(name: str, dtypes: dict[str, torch.dtype], tokenizer: Callable[[str, dict[str, Any]], Any]) -> Any:
    """The same pipeline by its constructors, on the CPU; ``dtypes`` by component, ``""`` for the others."""
    kind, parts = PIPELINES[name]
    built: dict[str, Any] = {}
    for part, (cls, config) in parts.items():
        if "tokenizer" in part:
            built[part] = tokenizer(cls.__name__, {})
            continue
        make = partial(cls, **config)
        if issubclass(cls, transformers.PreTrainedModel):
            make = partial(cls, cls.config_class(**config))
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtypes.get(part, dtypes[""]))
        try:
            built[part] = make()
        finally:
            torch.set_default_dtype(before)
        if isinstance(built[part], torch.nn.Module):
            built[part].eval()
            kept = getattr(cls, "_keep_in_fp32_modules", None) or []
            for path, parameter in built[part].named_parameters():
                if issubclass(cls, diffusers.ModelMixin) and set(path.split(".")) & set(kept):
                    parameter.data = parameter.data.float()
    return getattr(diffusers, kind)(**built)
