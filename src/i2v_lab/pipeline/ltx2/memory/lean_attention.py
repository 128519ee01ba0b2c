"""ltx-core's attention over chunks of tokens, and its layers with their weights in the compute dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ltx_core.model.transformer.attention import Attention
from ltx_core.model.transformer.rope import apply_rotary_emb
from torch.nn.functional import linear

from i2v_lab.pipeline.ltx2.memory.token_chunks import Chunk, Chunks

Source = Callable[[Chunk], torch.Tensor]  # what an attention reads of a chunk's tokens: (1, tokens, width)


class ChunkedQuery:
    """An attention's way from a chunk of queries to its output, with weights in the compute dtype for all chunks."""

    def __init__(self, attn: Attention, dtype: torch.dtype) -> None:
        self._attn = attn
        self._to_q, self._to_out = dense(attn.to_q, dtype), dense(attn.to_out[0], dtype)
        self._to_gates = dense(attn.to_gate_logits, dtype) if attn.to_gate_logits is not None else None

    def __call__(
        self,
        x: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor,
        pe: Any,
        *,
        passed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output for queries ``x``; ``passed`` stands for what attention would give, where it is switched off."""
        attn, out = self._attn, passed
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
    attn: Attention, source: Source, chunks: Chunks, pe: Any, *, with_keys: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Keys and values of all tokens."""
    dtype = attn.k_norm.weight.dtype
    to_k, to_v = dense(attn.to_k, dtype), dense(attn.to_v, dtype)
    keys = values = None
    for chunk in chunks:
        x = source(chunk)
        v = to_v(x)
        k = attn.k_norm(to_k(x)) if with_keys else None
        del x
        if k is not None and pe is not None:
            k = apply_rotary_emb(k, at(pe, chunk), attn.rope_type)
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


def dense(layer: torch.nn.Linear, dtype: torch.dtype) -> Any:
    """A layer with its weight in the compute dtype, cast once for all chunks as fp8-cast does in every call."""
    bias = layer.bias.to(dtype) if layer.bias is not None else None
    return partial(linear, weight=layer.weight.to(dtype), bias=bias)


def at(pe: Any, chunk: Chunk) -> Any:
    """The rotary cosines and sines of a chunk of tokens: ``(1, heads, tokens, d)`` or ``(1, tokens, d)``."""
    return None if pe is None else tuple(part[..., chunk.span, :] for part in pe)
