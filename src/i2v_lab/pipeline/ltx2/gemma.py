"""Gemma 3 as LTX-2's text encoder, with transformers 4.57 or 5: its key map, and the buffers that no file holds.

ltx-core 1.0.0 has both for the module tree of transformers 4.57: it builds no text encoder with transformers 5, which
dropped a level of the vision tower and has the rotary frequencies of all layers in one module. What is here asks the
modules instead, so one key map and one module operation serve both versions. ltx-core is not changed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, TypeGuard

import torch
from ltx_core.loader import ContentReplacement, SDOps
from ltx_core.loader.module_ops import ModuleOps
from ltx_core.text_encoders.gemma import GEMMA_LLM_KEY_OPS, GEMMA_MODEL_OPS
from ltx_core.text_encoders.gemma.encoders.base_encoder import GemmaTextEncoder, module_ops_from_gemma_root
from ltx_core.text_encoders.gemma.tokenizer import LTXVGemmaTokenizer
from ltx_core.utils import find_matching_file
from transformers import AutoImageProcessor, AutoTokenizer, Gemma3Processor, SiglipVisionConfig, SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from i2v_lab.pipeline.contract.weight_folders import reading_folder

MAX_TOKENS = 1024  # of a prompt, as in ltx-core
VISION_LEVEL = "vision_model"  # below the vision tower: in weight files always, in modules with transformers 4.57


@cache
def ltx_core_fits() -> bool:
    """Whether ltx-core's own key map and module operation fit the modules of the installed transformers.

    Example:
        >>> import transformers
        >>> ltx_core_fits() == transformers.__version__.startswith("4.")
        True
    """
    with torch.device("meta"):
        tower = SiglipVisionModel(SiglipVisionConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=0))
    return hasattr(tower, VISION_LEVEL)


def gemma_key_ops() -> SDOps:
    """ltx-core's map from Gemma's checkpoint keys to module keys, for the installed transformers.

    Example:
        >>> gemma_key_ops().apply_to_key("language_model.model.norm.weight")
        'model.model.language_model.norm.weight'
    """
    if ltx_core_fits():
        return GEMMA_LLM_KEY_OPS
    mapping = [
        replace(op, content=f"{op.content}{VISION_LEVEL}.") if _places_vision_tower(op) else op
        for op in GEMMA_LLM_KEY_OPS.mapping
    ]
    return replace(GEMMA_LLM_KEY_OPS, mapping=tuple(mapping))


def _places_vision_tower(op: Any) -> TypeGuard[ContentReplacement]:
    return isinstance(op, ContentReplacement) and op.content == "vision_tower."


def _with_buffers(encoder: Any) -> Any:
    """Gemma with its rotary frequencies, embedding scale and patch positions, which are computed, on the CPU.

    The frequencies are those that transformers computes from each rotary module's configuration.
    """
    model = encoder.model.model
    embedding = model.language_model.embed_tokens
    with torch.device("cpu"):
        for module in model.language_model.modules():
            if isinstance(module, Gemma3RotaryEmbedding):
                _set_buffers(module, dict(Gemma3RotaryEmbedding(module.config).named_buffers()))
        _set_buffers(embedding, {"embed_scale": torch.tensor(embedding.embedding_dim**0.5)})
        for module in model.vision_tower.modules():
            if "position_ids" in module._buffers:
                _set_buffers(module, {"position_ids": torch.arange(module.num_positions)[None]})
    return encoder


def _set_buffers(module: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    assert set(values) == set(module._buffers), f"{type(module).__name__} has other buffers: {set(module._buffers)}"
    for name, value in values.items():
        module.register_buffer(name, value, persistent=False)


def tokenizer_ops(root: str) -> tuple[ModuleOps, ...]:
    """ltx-core's module operations that load Gemma's tokenizer and image processor, which never run code of a folder.

    ltx-core leaves ``trust_remote_code`` to transformers, which then asks on the terminal.

    Args:
        root: Gemma's folder.
    """
    tokenizers, processors = module_ops_from_gemma_root(root)
    tokenizer_root = str(find_matching_file(root, "tokenizer.model").parent)
    processor_root = str(find_matching_file(root, "preprocessor_config.json").parent)

    def load_tokenizer(module: Any) -> Any:
        with reading_folder("--gemma", tokenizer_root, "tokenizer"):
            module.tokenizer = _Tokenizer(tokenizer_root, MAX_TOKENS)
        return module

    def load_processor(module: Any) -> Any:
        with reading_folder("--gemma", processor_root, "image processor"):
            images = AutoImageProcessor.from_pretrained(processor_root, local_files_only=True, trust_remote_code=False)
            module.processor = Gemma3Processor(image_processor=images, tokenizer=module.tokenizer.tokenizer)
        return module

    return tokenizers._replace(mutator=load_tokenizer), processors._replace(mutator=load_processor)


class _Tokenizer(LTXVGemmaTokenizer):
    """ltx-core's tokenizer, with its constructor's one call of transformers."""

    def __init__(self, path: str, max_length: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, model_max_length=max_length, trust_remote_code=False
        )
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.max_length = max_length


GEMMA_BUFFERS = ModuleOps(
    name=GEMMA_MODEL_OPS.name,
    matcher=lambda module: isinstance(module, GemmaTextEncoder) and module.model is not None,
    mutator=_with_buffers,
)
