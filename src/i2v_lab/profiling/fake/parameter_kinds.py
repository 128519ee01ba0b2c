"""Tensors of classes that add attributes to a plain tensor, as packed weights are, made of fakes.

``GGUFParameter`` of diffusers and ``Params4bit`` of bitsandbytes make themselves by ``Tensor._make_subclass``, which
takes no tensor that has a class of its own, as a fake has. A class of both is made for each.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from i2v_lab.thread_patches import unpatched
from i2v_lab.torch_compat import MAKE_SUBCLASS, DisableTorchFunctionSubclass, FakeTensor, in_kernel_invocation_manager

aten = torch.ops.aten


def make_subclass(kind: type[torch.Tensor], data: torch.Tensor, require_grad: bool = False, **options: Any) -> Any:
    """``Tensor._make_subclass`` that takes fakes too.

    Args:
        kind: Of the result.
        data: Whose storage it shares.
        require_grad: Whether it requires a gradient.
        **options: Those of torch's own, which it has where it makes a fake itself.
    """
    if options or not isinstance(data, FakeTensor):
        return unpatched(*MAKE_SUBCLASS)(kind, data, require_grad, **options)
    with DisableTorchFunctionSubclass(), in_kernel_invocation_manager(data.fake_mode):
        meta = aten.detach.default(data).requires_grad_(require_grad)
    make = unpatched(FakeTensor, "__new__")
    return make(fake_kind(kind), data.fake_mode, meta, data.fake_device)


@functools.cache
def fake_kind(kind: type[torch.Tensor]) -> type[FakeTensor]:
    """The class of fakes that are of another class besides.

    Args:
        kind: A class of tensors that has nothing of its own but attributes and methods.

    Example:
        >>> fake_kind(torch.nn.Parameter).__mro__[1:3] == (torch.nn.Parameter, FakeTensor)
        True
    """
    if issubclass(kind, FakeTensor):
        return kind
    return FakeTensor if kind is torch.Tensor else types.new_class(kind.__name__, (kind, FakeTensor))
