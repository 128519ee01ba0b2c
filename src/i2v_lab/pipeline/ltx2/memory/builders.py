"""Techniques as ltx-core's builders take them: operations on the modules they build, and what reads their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ltx_core.loader import SingleGPUModelBuilder as Builder
from ltx_core.loader.module_ops import ModuleOps

from i2v_lab.memory_policy import Technique, Techniques
from i2v_lab.pipeline.ltx2.memory.lean_decode import ROW_BANDS
from i2v_lab.pipeline.ltx2.memory.lean_text import FEATURE_CHUNKS, TEXT_ONLY, text_only_keys
from i2v_lab.pipeline.ltx2.memory.lean_transformer import SHARED_MODULATIONS, TOKEN_CHUNKS
from i2v_lab.pipeline.ltx2.memory.readers import TensorReader
from i2v_lab.pipeline.ltx2.memory.streaming import StreamedBuilder

TEXT_ENCODER, FEATURES, TRANSFORMER = "text_encoder_builder", "embeddings_processor_builder", "transformer_builder"
VIDEO_ENCODER, VIDEO_DECODER = "vae_encoder_builder", "vae_decoder_builder"

# What is done to a builder's module, in this order.
OPERATIONS: Mapping[Technique, tuple[str, ModuleOps]] = {
    Technique.SHARED_MODULATIONS: (TRANSFORMER, SHARED_MODULATIONS),
    Technique.TOKEN_CHUNKS: (TRANSFORMER, TOKEN_CHUNKS),
    Technique.TEXT_ONLY: (TEXT_ENCODER, TEXT_ONLY),
    Technique.FEATURE_CHUNKS: (FEATURES, FEATURE_CHUNKS),
    Technique.ROW_BANDS: (VIDEO_DECODER, ROW_BANDS),
}
# Whose weights come block by block, each with whether its blocks are called many times.
STREAMED: Mapping[Technique, Mapping[str, bool]] = {
    Technique.STREAMED_TEXT: {TEXT_ENCODER: False, FEATURES: False},
    Technique.STREAMED_TRANSFORMER: {TRANSFORMER: True},
    Technique.STREAMED_VAE: {VIDEO_ENCODER: False, VIDEO_DECODER: True},
}


def with_techniques(
    builders: Mapping[str, Builder[Any]], techniques: Techniques, reader: Callable[[], TensorReader]
) -> dict[str, Builder[Any]]:
    """A ledger's builders, by their names, with what techniques make of them.

    Args:
        builders: As ltx-pipelines' ledger has them.
        techniques: Which.
        reader: Makes what gives single tensors; asked for only where weights are streamed.
    """
    made = dict(builders)
    for technique, (name, operation) in OPERATIONS.items():
        if technique in techniques:
            made[name] = replace(made[name], module_ops=(*made[name].module_ops, operation))
    if Technique.TEXT_ONLY in techniques:
        made[TEXT_ENCODER] = replace(made[TEXT_ENCODER], model_sd_ops=text_only_keys(made[TEXT_ENCODER].model_sd_ops))
    for technique, streamed in STREAMED.items():
        if technique in techniques:
            for name, repeated in streamed.items():
                fields = {field.name: getattr(made[name], field.name) for field in dataclasses.fields(made[name])}
                made[name] = StreamedBuilder(**fields, reader=reader(), repeated=repeated)
    return made
