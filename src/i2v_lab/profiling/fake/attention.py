"""Attention by the kernel that a CUDA device picks; ``FakeTensorMode`` would pick the math kernel."""

from __future__ import annotations

import math

import torch

from i2v_lab.torch_compat import EFFICIENT_ATTENTION, FLASH_ATTENTION


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` by the operator that torch 2.11 picks for compute capability 8 or above.

    Flash attention in half precision without a mask, memory-efficient attention otherwise; neither materialises the
    ``(B, H, L, S)`` scores. Source: ``select_sdp_backend`` and ``preprocess_mask`` in ATen.

    Args:
        query: ``(B, H, L, E)``.
        key: ``(B, H, S, E)``.
        value: ``(B, H, S, E)``.
        attn_mask: Broadcastable to ``(B, H, L, S)``.
        dropout_p: As in torch.
        is_causal: As in torch.
        scale: As in torch.
        enable_gqa: Allow fewer heads in ``key`` and ``value``, each shared by a group of query heads.

    Returns:
        ``(B, H, L, E)``.
    """
    width = query.shape[-1]
    scale = scale if scale is not None else 1 / math.sqrt(width)
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and width <= 256:
        if width % 8:
            query, key, value = (torch.nn.functional.pad(t, (0, 8 - width % 8)) for t in (query, key, value))
        out = FLASH_ATTENTION(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width] if width % 8 else out
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
        padding = -attn_mask.shape[-1] % 8
        if padding:  # the kernel requires rows aligned to 16 bytes
            attn_mask = torch.nn.functional.pad(attn_mask, (0, padding))[..., :-padding]
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return EFFICIENT_ATTENTION(query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)[0]


def safe_softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``_safe_softmax`` by the operators that its kernel runs, each of which allocates: rows that are masked are zero.

    Source: ``_safe_softmax`` in ATen's ``attention.cpp``.

    Args:
        scores: Any shape.
        dim: To sum over.
        dtype: Of the result; that of ``scores`` by default.
    """
    out = torch.softmax(scores, dim, dtype=dtype)
    masked = torch.isneginf(scores)
    masked_rows = masked.all(dim, keepdim=True)
    return torch.where(masked_rows, torch.zeros((), dtype=out.dtype, device=out.device), out, out=out)
