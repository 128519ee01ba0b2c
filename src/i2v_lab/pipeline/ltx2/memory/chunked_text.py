"""Text encoding with Gemma's vision tower not loaded, and features extracted for a chunk of tokens at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from ltx_core.loader.module_ops import ModuleOps
from ltx_core.loader.sd_ops import ContentMatching, SDOps
from ltx_core.text_encoders.gemma.embeddings_processor import EmbeddingsProcessor
from ltx_core.text_encoders.gemma.encoders.base_encoder import GemmaTextEncoder
from ltx_core.text_encoders.gemma.feature_extractor import (
    FeatureExtractorV2,
    _rescale_norm,
    norm_and_concat_per_token_rms,
)

CHUNK_TOKENS = 128
VISION = ("vision_tower", "multi_modal_projector")  # modules of Gemma that a text prompt does not use


class ChunkedFeatureExtractor(FeatureExtractorV2):
    """ltx-core's feature extractor, which stacks the hidden states of all layers for a chunk of tokens at a time.

    Attributes:
        chunk_tokens: Tokens in a chunk.
    """

    chunk_tokens = CHUNK_TOKENS

    def forward(
        self, hidden_states: tuple[torch.Tensor, ...], attention_mask: torch.Tensor, padding_side: str = "left"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Video and audio features, equal to those of ltx-core's own ``forward``.

        Args:
            hidden_states: Of each layer, ``(1, tokens, width)``.
            attention_mask: ``(1, tokens)``.
            padding_side: Not used, as in ltx-core.

        Returns:
            ``(1, tokens, video width)`` and ``(1, tokens, audio width)``; no audio where the model has none.
        """
        tokens = attention_mask.shape[1]
        chunks = [slice(first, first + self.chunk_tokens) for first in range(0, tokens, self.chunk_tokens)]
        normed = torch.cat([self._normed(hidden_states, attention_mask, chunk) for chunk in chunks], dim=1)
        layers = [layer for layer in (self.video_aggregate_embed, self.audio_aggregate_embed) if layer is not None]
        video, *audio = (layer(_rescale_norm(normed, layer.out_features, self.embedding_dim)) for layer in layers)
        return video, audio[0] if audio else None

    @staticmethod
    def _normed(hidden_states: tuple[torch.Tensor, ...], attention_mask: torch.Tensor, chunk: slice) -> torch.Tensor:
        encoded = torch.stack([states[:, chunk] for states in hidden_states], dim=-1)
        return norm_and_concat_per_token_rms(encoded, attention_mask[:, chunk]).to(encoded.dtype)


def text_only_keys(key_ops: SDOps) -> SDOps:
    """Gemma's key map without the keys of its vision tower."""
    rest = [op for op in key_ops.mapping if not (isinstance(op, ContentMatching) and op.prefix.startswith(VISION))]
    return replace(key_ops, mapping=tuple(rest))


def _drop_vision(encoder: Any) -> Any:
    for name in VISION:
        setattr(encoder.model.model, name, None)
    encoder.model.lm_head = None  # tied to the embedding, and not called
    encoder.model.config.text_config.use_cache = False  # nothing is generated, so no key-value cache
    return encoder


TEXT_ONLY = ModuleOps(
    name="text_only", matcher=lambda module: isinstance(module, GemmaTextEncoder), mutator=_drop_vision
)


def feature_chunks(chunk_tokens: int | None) -> ModuleOps:
    """The operation that has text features extracted for so many tokens at a time."""

    def chunk_features(processor: Any) -> Any:
        extractor = processor.feature_extractor
        if type(extractor) is FeatureExtractorV2:
            extractor.__class__ = ChunkedFeatureExtractor
            extractor.chunk_tokens = chunk_tokens or CHUNK_TOKENS
        return processor

    return ModuleOps(
        name="feature_chunks", matcher=lambda module: isinstance(module, EmbeddingsProcessor), mutator=chunk_features
    )
