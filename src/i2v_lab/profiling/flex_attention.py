"""Flex attention that is not compiled, as the ordinary operators that it runs, which a dispatch mode can count.

Torch hands it to a dispatch mode as one operator that takes functions, and only through its compiler; neither shows
what it allocates. Uncompiled, it materializes all scores: in float32, five copies of them at its peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch._higher_order_ops.flex_attention import sdpa_dense  # this and the two names below are private
from torch.nn.attention import flex_attention

__all__ = ["sdpa_dense", "uncompiled_flex_attention"]


@contextmanager
def uncompiled_flex_attention(attend: Callable[..., Any] = sdpa_dense) -> Iterator[None]:
    """Run ``flex_attention`` by ordinary operators within this scope, where its caller does not compile it.

    Args:
        attend: Runs them; torch's own implementation for dense tensors by default.

    Example:
        >>> import torch
        >>> from torch.nn.attention.flex_attention import flex_attention
        >>> query = torch.ones(1, 1, 128, 16)
        >>> with uncompiled_flex_attention(), torch.no_grad():
        ...     flex_attention(query, query, query).shape
        torch.Size([1, 1, 128, 16])
    """
    with (
        patch.object(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
        patch.object(flex_attention, "flex_attention_hop", attend),
    ):
        yield
