"""Attention by the kernel that a CUDA device picks; ``FakeTensorMode`` would pick the math kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend

from i2v_lab.errors import ForecastError
from i2v_lab.torch_compat import CUDNN_ATTENTION, EFFICIENT_ATTENTION, FLASH_ATTENTION, MATH_ATTENTION

HALF = (torch.float16, torch.bfloat16)
ORDER = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)  # in which torch tries them, unless the code sets another
CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, *ORDER[:-1])  # on Hopper and data-centre Blackwell
CUDNN_CAPABILITIES = ((9, 0), (10, 0))
MAX_OUTPUT_WIDTH = 128  # above it, efficient attention in half precision accumulates its output in float32
ENABLED = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}


def usual_order(capability: tuple[int, int]) -> tuple[SDPBackend, ...]:
    """The order in which torch tries kernels on a card, unless the code sets another.

    Source: ``check_prefer_cudnn_attention`` in ATen's ``sdp_utils.cpp``; it holds for torch 2.11 on an H100.

    Args:
        capability: The card's compute capability.

    Example:
        >>> usual_order((9, 0))[0].name, usual_order((8, 9))[0].name
        ('CUDNN_ATTENTION', 'FLASH_ATTENTION')
    """
    return CUDNN_FIRST if capability in CUDNN_CAPABILITIES else ORDER


def chosen_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    order: Sequence[SDPBackend] = ORDER,
) -> SDPBackend:
    """The kernel of ``scaled_dot_product_attention`` that torch picks for compute capability 8 or above.

    Among those that ``torch.nn.attention.sdpa_kernel`` and ``torch.backends.cuda.enable_*_sdp`` allow, the first that
    can run. Source: ``select_sdp_backend`` in ATen's ``sdp_utils.cpp``.

    Args:
        query: ``(B, H, L, E)``.
        key: ``(B, H, S, E)``.
        value: ``(B, H, S, E)``.
        attn_mask: Broadcastable to ``(B, H, L, S)``.
        is_causal: As in torch.
        enable_gqa: As in torch.
        order: In which kernels are tried.

    Raises:
        ForecastError: None of the allowed kernels can run, which fails on a card too.

    Example:
        >>> query = torch.empty(1, 8, 64, 64, dtype=torch.bfloat16, device="meta")
        >>> chosen_kernel(query, query, query).name, chosen_kernel(query.double(), query.double(), query.double()).name
        ('FLASH_ATTENTION', 'MATH')
    """
    reasons = []
    for backend in order:
        if backend not in ENABLED or not ENABLED[backend]():
            continue
        reason = _obstacle(backend, query, key, value, attn_mask, is_causal, enable_gqa)
        if not reason:
            return backend
        reasons.append(f"{backend.name} {reason}")
    dtype = str(query.dtype).removeprefix("torch.")
    raise ForecastError(
        f"attention of {tuple(query.shape)} in {dtype} has no kernel among those that sdpa_kernel or "
        f"torch.backends.cuda allow ({'; '.join(reasons) or 'none is allowed'}); allow another one, such as "
        "SDPBackend.MATH",
        cause="no attention kernel",
        allowed=[backend.name for backend in order if backend in ENABLED and ENABLED[backend]()],
        shape=tuple(query.shape),
        dtype=dtype,
    )


def _obstacle(
    backend: SDPBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> str:
    """Why a kernel cannot run, in words; empty if it can."""
    if backend == SDPBackend.MATH:
        return ""
    if not query.dim() == key.dim() == value.dim() == 4:
        return "needs tensors of four dimensions"
    if not query.dtype == key.dtype == value.dtype:
        return "needs tensors of one dtype"
    if not query.shape[0] == key.shape[0] == value.shape[0] or not (
        query.shape[1] == key.shape[1] == value.shape[1] or enable_gqa
    ):
        return "needs tensors of one batch and number of heads"
    if 0 in (query.shape[2], key.shape[2]):
        return "needs sequences that are not empty"
    if attn_mask is not None and attn_mask.shape[-1] > 1 and attn_mask.stride(-1) != 1:
        return "needs a mask whose last dimension is contiguous"
    width, value_width = query.shape[3], value.shape[3]
    is_half = query.dtype in HALF
    match backend:
        case SDPBackend.FLASH_ATTENTION:
            obstacles = {
                "takes no mask": attn_mask is not None,
                "needs float16 or bfloat16": not is_half,
                "needs heads of one width, at most 256": width != value_width or width > 256,
                "takes is_causal for equally long sequences alone": is_causal and query.shape[2] != key.shape[2],
            }
        case SDPBackend.EFFICIENT_ATTENTION:
            alignment = 8 if is_half else 4
            obstacles = {
                "needs float32, float16 or bfloat16": not is_half and query.dtype != torch.float32,
                f"needs heads whose width is a multiple of {alignment}": bool(
                    width % alignment or value_width % alignment
                ),
            }
        case _:
            obstacles = {
                "needs float16 or bfloat16": not is_half,
                "needs heads whose width is a multiple of 8, at most 128": bool(
                    width % 8 or value_width % 8 or max(width, value_width) > 128
                ),
                "needs more than one key": key.shape[2] == 1,
            }
    return next((reason for reason, holds in obstacles.items() if holds), "")


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    kernel: SDPBackend = SDPBackend.FLASH_ATTENTION,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` by the operator of a fused kernel, without materialized ``(B, H, L, S)`` scores.

    Source: ``scaled_dot_product_attention`` and ``preprocess_mask`` in ATen.

    Args:
        query: ``(B, H, L, E)``.
        key: ``(B, H, S, E)``.
        value: ``(B, H, S, E)``.
        attn_mask: Broadcastable to ``(B, H, L, S)``.
        dropout_p: As in torch.
        is_causal: As in torch.
        scale: As in torch.
        enable_gqa: Allow fewer heads in ``key`` and ``value``, each shared by a group of query heads.
        kernel: Flash, efficient or cuDNN attention.

    Returns:
        ``(B, H, L, E)``.
    """
    width = query.shape[-1]
    scale = scale if scale is not None else 1 / math.sqrt(width)
    if kernel == SDPBackend.FLASH_ATTENTION:
        if width % 8:
            query, key, value = (torch.nn.functional.pad(t, (0, 8 - width % 8)) for t in (query, key, value))
        out = FLASH_ATTENTION(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width] if width % 8 else out
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if attn_mask is not None:
        attn_mask = _added_mask(attn_mask, query.dtype)
        padding = -attn_mask.shape[-1] % 8 if kernel == SDPBackend.EFFICIENT_ATTENTION else 0
        if padding:  # the kernel requires rows aligned to 16 bytes
            attn_mask = torch.nn.functional.pad(attn_mask, (0, padding))[..., :-padding]
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    if kernel == SDPBackend.CUDNN_ATTENTION and not needs_grad:  # its fake kernel makes a sum for the backward pass too
        order = sorted(range(4), key=query.stride, reverse=True)
        shape = (*query.shape[:-1], value.shape[-1])
        return torch.empty_permuted(shape, order, dtype=query.dtype, device=query.device)
    if kernel == SDPBackend.CUDNN_ATTENTION:
        arguments = (query, key, value, attn_mask, needs_grad, dropout_p, is_causal, False)
        return CUDNN_ATTENTION(*arguments, scale=scale)[0]
    accumulator = None
    if query.dtype in HALF and value.shape[-1] > MAX_OUTPUT_WIDTH:
        accumulator = torch.empty(*query.shape[:-1], value.shape[-1], dtype=torch.float32, device=query.device)
    out = EFFICIENT_ATTENTION(query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)[0]
    del accumulator
    return out


def math_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` by ordinary operators, which materialize the ``(B, H, L, S)`` scores in float32.

    Args and result as in :func:`fused_attention`.
    """
    mask = None if attn_mask is None else _added_mask(attn_mask, query.dtype)
    options = {"scale": scale, "enable_gqa": enable_gqa}
    out: torch.Tensor = MATH_ATTENTION(query, key, value, mask, dropout_p, is_causal, None, **options)[0]
    return out


def _added_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.full((), -math.inf, dtype=dtype, device=mask.device))


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
