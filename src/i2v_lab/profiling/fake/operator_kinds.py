"""Kinds of operators: whether they allocate, view or overwrite tensors, and which."""

from __future__ import annotations

import functools
from typing import Any

import torch

from i2v_lab.torch_compat import alias_annotations, bool_result, returns_new_tensors, returns_views

aten = torch.ops.aten

FACTORIES = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.eye.default,
    aten.full.default,
    aten.linspace.default,
    aten.ones.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
}  # their values are known without any input
VIEWS = {
    aten.alias.default,
    aten.as_strided.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
}  # the most frequent views, which need none of FakeTensorMode's special cases
BATCH_NORMS = {
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
    aten.native_batch_norm.default,
}  # write to their running statistics in training, which their schemas do not say


@functools.cache
def makes_new_tensors(func: Any) -> bool:
    """Whether an operator's results depend on its inputs' shapes alone and share no storage with them."""
    return returns_new_tensors(func) and not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(
        func.tags
    )


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operator's schema says that all its results are views, and that it writes to nothing."""
    return returns_views(func)


@functools.cache
def returns_condition(func: Any) -> bool:
    """Whether an operator returns a truth value, as ``equal`` does."""
    return bool_result(func)


@functools.cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operator writes to."""
    return [
        (position, name)
        for position, (name, is_written) in enumerate(alias_annotations(func))
        if is_written or (func in BATCH_NORMS and name.startswith("running_"))
    ]


def written_tensors(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors among its arguments that an operator writes to."""
    arguments = _written_arguments(func)
    if not arguments or (func in BATCH_NORMS and not args[5]):
        return []
    return tensors_in([args[i] if i < len(args) else kwargs.get(name) for i, name in arguments], [])


def tensors_in(value: Any, found: list[torch.Tensor]) -> list[torch.Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            tensors_in(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            tensors_in(item, found)
    return found
