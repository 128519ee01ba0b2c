"""ltx-core's attention over chunks of query tokens, with weights cast to the compute dtype once for all chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ltx_core.model.transformer.attention import Attention
from ltx_core.model.transformer.rope import apply_rotary_emb
from torch.nn.functional import linear

from i2v_lab.pipeline.ltx2.memory.token_chunks import Chunk, Chunks

ChunkInput = Callable[[Chunk], torch.Tensor]  # the input of a layer for a chunk: (1, chunk tokens, width)


class QueryAttention:
    """The query side of an attention, called chunk by chunk: query projection, attention, gates, output projection.

    Args:
        attn: ltx-core's attention, in its own weight dtype.
        dtype: The compute dtype.
    """

    def __init__(self, attn: Attention, dtype: torch.dtype) -> None:
        self._attn = attn
        self._to_q, self._to_out = cast_linear(attn.to_q, dtype), cast_linear(attn.to_out[0], dtype)
        self._to_gates = cast_linear(attn.to_gate_logits, dtype) if attn.to_gate_logits is not None else None

    def __call__(
        self,
        x: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor,
        pe: Any,
        *,
        replacement: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention's output for a chunk of tokens.

        Args:
            x: Input, ``(1, chunk tokens, query width)``.
            keys: Of all tokens, ``(1, tokens, heads * d)``.
            values: Of all tokens, likewise.
            pe: Rotary cosines and sines of the chunk's tokens; ``None`` without.
            replacement: Used instead of the attention's result where guidance skips attention: the chunk's values.

        Returns:
            ``(1, chunk tokens, query width)``.
        """
        attn, out = self._attn, replacement
        if out is None:
            q = attn.q_norm(self._to_q(x))
            q = q if pe is None else apply_rotary_emb(q, pe, attn.rope_type)
            out = attn.attention_function(q, keys, values, attn.heads, None)
            del q
        if self._to_gates is not None:
            gates = 2.0 * torch.sigmoid(self._to_gates(x))
            out = (out.unflatten(-1, (attn.heads, attn.dim_head)) * gates.unsqueeze(-1)).flatten(-2)
        return self._to_out(out)


def keys_and_values(
    attn: Attention, source: ChunkInput, chunks: Chunks, pe: Any, *, with_keys: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Keys and values of all tokens, computed chunk by chunk.

    Args:
        attn: ltx-core's attention.
        source: Its input for a chunk, ``(1, chunk tokens, context width)``.
        chunks: All tokens.
        pe: Rotary cosines and sines of all tokens; ``None`` without.
        with_keys: Whether keys are computed.

    Returns:
        Keys, ``None`` without, and values, ``(1, tokens, heads * d)`` each.
    """
    dtype = attn.k_norm.weight.dtype
    to_k, to_v = cast_linear(attn.to_k, dtype), cast_linear(attn.to_v, dtype)
    keys = values = None
    for chunk in chunks:
        x = source(chunk)
        v = to_v(x)
        k = attn.k_norm(to_k(x)) if with_keys else None
        del x
        if k is not None and pe is not None:
            k = apply_rotary_emb(k, chunk_pe(pe, chunk), attn.rope_type)
        if len(chunks) == 1:
            return k, v
        if values is None:
            values = v.new_empty(v.shape[0], chunks[-1].last, v.shape[2])
            keys = torch.empty_like(values) if with_keys else None
        values[:, chunk.span] = v
        if keys is not None and k is not None:
            keys[:, chunk.span] = k
        del k, v
    assert values is not None
    return keys, values


def cast_linear(layer: torch.nn.Linear, dtype: torch.dtype) -> Any:
    """A linear layer with its weight in the compute dtype, cast once; the layer of fp8-cast casts in every call."""
    bias = layer.bias.to(dtype) if layer.bias is not None else None
    return partial(linear, weight=layer.weight.to(dtype), bias=bias)


def chunk_pe(pe: Any, chunk: Chunk) -> Any:
    """The rotary cosines and sines of a chunk's tokens: ``(1, heads, chunk tokens, d)`` or ``(1, chunk tokens, d)``."""
    return None if pe is None else tuple(part[..., chunk.span, :] for part in pe)
