"""What is to be known of an operator before it runs: whether it makes, views or overwrites tensors, and which."""

from __future__ import annotations

import functools
from typing import Any

import torch

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
}  # operators that make known values out of none
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
}  # the most frequent operators: their shape functions need none of FakeTensorMode's special cases
BATCH_NORMS = {
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
    aten.native_batch_norm.default,
}  # write to their running statistics in training, which their schemas do not say


@functools.cache
def makes_new_tensors(func: Any) -> bool:
    """Whether an operator's results depend on its inputs' shapes alone and share no storage with them."""
    schema = func._schema
    if schema.is_mutable or not schema.returns or any(one.alias_info for one in schema.returns):
        return False
    return not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags)


@functools.cache
def _written_places(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return [
        (i, argument.name)
        for i, argument in arguments
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or (func in BATCH_NORMS and argument.name.startswith("running_"))
    ]


def written_tensors(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors among its arguments that an operator writes to."""
    places = _written_places(func)
    if not places or (func in BATCH_NORMS and not args[5]):
        return []
    return tensors_in([args[i] if i < len(args) else kwargs.get(name) for i, name in places], [])


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
