"""Memory techniques applied to ltx-core's builders: module operations, key maps, and streaming of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ltx_core.loader import SingleGPUModelBuilder as Builder

from i2v_lab.memory_policy import Technique
from i2v_lab.pipeline.ltx2.memory.chunked_text import TEXT_ONLY, feature_chunks, text_only_keys
from i2v_lab.pipeline.ltx2.memory.chunked_transformer import SHARED_MODULATIONS, token_chunks
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.memory.in_place_decode import row_bands
from i2v_lab.pipeline.ltx2.memory.readers import TensorReader
from i2v_lab.pipeline.ltx2.memory.streaming import StreamedBuilder
from i2v_lab.placement import STREAMED_COMPONENTS, Placement

TEXT_ENCODER, FEATURES, TRANSFORMER = "text_encoder_builder", "embeddings_processor_builder", "transformer_builder"
VIDEO_ENCODER, VIDEO_DECODER = "vae_encoder_builder", "vae_decoder_builder"

# The module operation that a technique adds to a builder, in the order of application; where it has a size of chunks,
# a function of that.
OPERATIONS: Mapping[Technique, tuple[str, Any]] = {
    Technique.SHARED_MODULATIONS: (TRANSFORMER, SHARED_MODULATIONS),
    Technique.TOKEN_CHUNKS: (TRANSFORMER, token_chunks),
    Technique.TEXT_ONLY: (TEXT_ENCODER, TEXT_ONLY),
    Technique.FEATURE_CHUNKS: (FEATURES, feature_chunks),
    Technique.ROW_BANDS: (VIDEO_DECODER, row_bands),
}
SIZES = {
    Technique.TOKEN_CHUNKS: "chunk_tokens",
    Technique.FEATURE_CHUNKS: "feature_tokens",
    Technique.ROW_BANDS: "band_bytes",
}
# The builders whose weights a technique streams, each with whether its blocks are called more than once.
STREAMED: Mapping[Technique, Mapping[str, bool]] = {
    Technique.STREAMED_TEXT: {TEXT_ENCODER: False, FEATURES: False},
    Technique.STREAMED_TRANSFORMER: {TRANSFORMER: True},
    Technique.STREAMED_VAE: {VIDEO_ENCODER: False, VIDEO_DECODER: True},
}


def with_techniques(
    builders: Mapping[str, Builder[Any]],
    placement: Placement,
    reader: Callable[[], TensorReader],
    host_weights: HostWeights,
) -> dict[str, Builder[Any]]:
    """A ledger's builders with techniques applied.

    Args:
        builders: By their names in ltx-pipelines' ledger.
        placement: The techniques to apply, blocks that stay on the device, and sizes of chunks.
        reader: Creates the reader of single tensors; called only for streamed weights.
        host_weights: Where streamed blocks are in host memory.

    Returns:
        All builders, by the same names.
    """
    result, techniques = dict(builders), placement.techniques
    for technique, (name, own) in OPERATIONS.items():
        if technique in techniques:
            operation = own(getattr(placement, SIZES[technique])) if technique in SIZES else own
            result[name] = replace(result[name], module_ops=(*result[name].module_ops, operation))
    if Technique.TEXT_ONLY in techniques:
        encoder = result[TEXT_ENCODER]
        result[TEXT_ENCODER] = replace(encoder, model_sd_ops=text_only_keys(encoder.model_sd_ops))
    for technique, streamed in STREAMED.items():
        if technique in techniques:
            for (name, repeated), component in zip(streamed.items(), STREAMED_COMPONENTS[technique], strict=True):
                fields = {field.name: getattr(result[name], field.name) for field in dataclasses.fields(result[name])}
                result[name] = StreamedBuilder(
                    **fields,
                    reader=reader(),
                    host_weights=host_weights,
                    repeated=repeated,
                    resident_blocks=placement.resident(component),
                    prefetch=placement.prefetch,
                )
    return result
