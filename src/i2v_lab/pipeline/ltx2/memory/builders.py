"""Memory techniques applied to ltx-core's builders: module operations, key maps, and streaming of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ltx_core.loader import SingleGPUModelBuilder as Builder
from ltx_core.loader.module_ops import ModuleOps

from i2v_lab.memory_policy import Technique, Techniques
from i2v_lab.pipeline.ltx2.memory.chunked_text import FEATURE_CHUNKS, TEXT_ONLY, text_only_keys
from i2v_lab.pipeline.ltx2.memory.chunked_transformer import SHARED_MODULATIONS, TOKEN_CHUNKS
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.memory.in_place_decode import ROW_BANDS
from i2v_lab.pipeline.ltx2.memory.readers import TensorReader
from i2v_lab.pipeline.ltx2.memory.streaming import StreamedBuilder

TEXT_ENCODER, FEATURES, TRANSFORMER = "text_encoder_builder", "embeddings_processor_builder", "transformer_builder"
VIDEO_ENCODER, VIDEO_DECODER = "vae_encoder_builder", "vae_decoder_builder"

# The module operation that a technique adds to a builder, in the order of application.
OPERATIONS: Mapping[Technique, tuple[str, ModuleOps]] = {
    Technique.SHARED_MODULATIONS: (TRANSFORMER, SHARED_MODULATIONS),
    Technique.TOKEN_CHUNKS: (TRANSFORMER, TOKEN_CHUNKS),
    Technique.TEXT_ONLY: (TEXT_ENCODER, TEXT_ONLY),
    Technique.FEATURE_CHUNKS: (FEATURES, FEATURE_CHUNKS),
    Technique.ROW_BANDS: (VIDEO_DECODER, ROW_BANDS),
}
# The builders whose weights a technique streams, each with whether its blocks are called more than once.
STREAMED: Mapping[Technique, Mapping[str, bool]] = {
    Technique.STREAMED_TEXT: {TEXT_ENCODER: False, FEATURES: False},
    Technique.STREAMED_TRANSFORMER: {TRANSFORMER: True},
    Technique.STREAMED_VAE: {VIDEO_ENCODER: False, VIDEO_DECODER: True},
}


def with_techniques(
    builders: Mapping[str, Builder[Any]],
    techniques: Techniques,
    reader: Callable[[], TensorReader],
    host_weights: HostWeights,
) -> dict[str, Builder[Any]]:
    """A ledger's builders with techniques applied.

    Args:
        builders: By their names in ltx-pipelines' ledger.
        techniques: Those to apply.
        reader: Creates the reader of single tensors; called only for streamed weights.
        host_weights: Where streamed blocks are in host memory.

    Returns:
        All builders, by the same names.
    """
    result = dict(builders)
    for technique, (name, operation) in OPERATIONS.items():
        if technique in techniques:
            result[name] = replace(result[name], module_ops=(*result[name].module_ops, operation))
    if Technique.TEXT_ONLY in techniques:
        encoder = result[TEXT_ENCODER]
        result[TEXT_ENCODER] = replace(encoder, model_sd_ops=text_only_keys(encoder.model_sd_ops))
    for technique, streamed in STREAMED.items():
        if technique in techniques:
            for name, repeated in streamed.items():
                fields = {field.name: getattr(result[name], field.name) for field in dataclasses.fields(result[name])}
                result[name] = StreamedBuilder(**fields, reader=reader(), host_weights=host_weights, repeated=repeated)
    return result
