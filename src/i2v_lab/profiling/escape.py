"""Detects the operator at which an autograd graph begins, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from i2v_lab.errors import ProfilerError
from i2v_lab.torch_compat import tree_leaves

OnEscape = Literal["fix", "warn", "raise"]


class GradEscapeWarning(UserWarning):
    """Work with trainable parameters ran with grad enabled where it should not."""


def check_on_escape(on_escape: str) -> None:
    """Refuse anything that is no ``OnEscape``.

    Raises:
        ProfilerError: Another value.
    """
    if on_escape not in ("fix", "warn", "raise"):
        raise ProfilerError(f"on_escape={on_escape!r} is not one of fix, warn or raise", on_escape=on_escape)


class EscapeDetector(TorchFunctionMode):
    """Sees every torch function; reports each that returns part of an autograd graph with grad enabled.

    What ``torch.autograd.Function``, TorchScript and re-entrant checkpoints record is seen at the next function that
    takes it; what other threads record is not.

    Args:
        report: Called with the function's name.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and any(has_graph(leaf) for leaf in tree_leaves(result)):
            self._report(getattr(func, "__name__", str(func)))
        return result


def has_graph(leaf: Any) -> bool:
    """Whether it is a tensor that an autograd graph computed, which it keeps alive."""
    return isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None
