"""Torch code run as if on a device: shapes, dtypes and storages are true, and nothing is computed.

``torch``'s ``FakeTensorMode`` does the main work. What stands here is what it lacks for inference code: the fused
attention kernels that a real card would pick, tensors small enough to keep their values, so that code that branches on
them takes the branch it would really take, and a CUDA device where there is none.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.attention import fused_attention
from i2v_lab.profiling.fake.operators import FakeOperators, Watch, known_values, unanswerable


@contextmanager
def fake_device(
    device: torch.device,
    where: Callable[[], str],
    watch: Watch = lambda *_: None,
    on_empty_cache: Callable[[], None] = lambda: None,
) -> Iterator[FakeTensorMode]:
    """Within this scope every tensor is fake, and ``device`` exists.

    Args:
        device: What the code will ask for: ``cpu`` or ``cuda``. No CUDA call is made, on any machine.
        where: Names the module that is running, for errors.
        watch: Told of every operator that ran.
        on_empty_cache: Called in the place of ``torch.cuda.empty_cache()``.

    Raises:
        ForecastError: An operator without a fake kernel, or one whose result depends on data that are not known.
    """
    mode = _FakeMode(allow_non_fake_inputs=True)
    with ExitStack() as scopes:
        for target, name, substitute in _substitutes(device, where, on_empty_cache):
            scopes.enter_context(patch.object(target, name, substitute))
        scopes.enter_context(_disable_current_modes())  # a meter outside would count what is not there
        scopes.enter_context(mode)
        operators = FakeOperators(mode, where, watch)
        scopes.callback(operators.restore_gradients)
        scopes.enter_context(operators)
        yield mode


def to_fake(values: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """Modules and tensors among ``values`` as fakes on ``device``; the originals are left alone.

    The fakes are copies: what is written to one is not seen in an original that the code reaches by another way.
    """
    converter = fake_tensor.FakeTensorConverter(copy_data=False, export=False)  # the mode's own would share storages

    def fake(original: torch.Tensor) -> FakeTensor:
        return converter.from_real_tensor(mode, original)

    def module(original: torch.nn.Module) -> torch.nn.Module:
        own: dict[int, Any] = {id(t): fake(t) for t in (*original.parameters(), *original.buffers())}
        for parameter in original.parameters():
            own[id(parameter)] = torch.nn.Parameter(own[id(parameter)].detach(), parameter.requires_grad)
        return copy.deepcopy(original, own).to(device)

    values = tree_map_only(torch.nn.Module, module, values)
    return tree_map_only(torch.Tensor, lambda t: fake(t).to(device), values)


_DATA: Any = torch._C.TensorBase.data  # the descriptor


class _FakeMode(FakeTensorMode):
    """Never asks whether there is a CUDA device, so that the answer is the same on every machine."""

    @property
    def avoid_device_init(self) -> bool:
        return True


# --- Functions: what has to be met before torch takes it apart into operators -----------------------------------------


def _attention(
    original: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    attend = fused_attention if query.device.type == "cuda" else original
    result: torch.Tensor = attend(query, key, value, *args, **kwargs)
    return result


def _tensor(original: Any, data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    result: torch.Tensor = original(_plain(data) if isinstance(data, list | tuple) else data, *args, **kwargs)
    return result


def _numpy(tensor: torch.Tensor, where: Callable[[], str], **kwargs: Any) -> Any:
    known = known_values(tensor)
    if known is None and isinstance(tensor, FakeTensor):
        raise unanswerable("torch.Tensor.numpy", where())
    with no_dispatch():
        return torch._C.TensorBase.numpy(known.real if known is not None else tensor, **kwargs)


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Where ``tensor.data = value`` moves a tensor, as offloading does, a fake has to be told where it is now."""
    _DATA.__set__(tensor, value)
    if isinstance(tensor, FakeTensor) and isinstance(value, FakeTensor):
        tensor.fake_device = value.fake_device
        tensor._i2v_lab_known = getattr(value, "_i2v_lab_known", None)  # type: ignore[attr-defined]


def _deepcopy(tensor: torch.Tensor, memo: dict[int, Any], original: Any) -> torch.Tensor:
    """A fake has no storage that could be copied; its clone is told of, and knows the same values."""
    if not isinstance(tensor, FakeTensor):
        result: torch.Tensor = original(tensor, memo)
        return result
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, tensor.requires_grad)
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


def _plain(data: Any) -> Any:
    """Nested lists of numbers, where some are tensors of one element."""
    if isinstance(data, list | tuple):
        return [_plain(item) for item in data]
    return data.item() if isinstance(data, torch.Tensor) else data


# --- What a device without hardware must not be asked -----------------------------------------------------------------


def _substitutes(
    device: torch.device, where: Callable[[], str], on_empty_cache: Callable[[], None]
) -> Iterator[tuple[Any, str, Any]]:
    functional = torch.nn.functional
    # By patches, not by a TorchFunctionMode, which would also be asked for every shape and dtype that anybody reads.
    yield torch, "tensor", functools.partial(_tensor, torch.tensor)
    attention = functools.partial(_attention, functional.scaled_dot_product_attention)
    yield functional, "scaled_dot_product_attention", attention
    yield torch.Tensor, "numpy", functools.partialmethod(_numpy, where)
    yield torch.Tensor, "data", property(_DATA.__get__, _set_data)
    yield torch.Tensor, "__deepcopy__", functools.partialmethod(_deepcopy, original=torch.Tensor.__deepcopy__)
    yield torch.nn.Module, "_apply", _convert_module
    for kind in (torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.Embedding):
        yield kind, "reset_parameters", lambda module: None  # fills in place what has no values
    yield fake_tensor, "init_gpu_context", lambda device: None
    if device.type == "cuda":
        yield torch, "Generator", _CpuGenerator
        yield torch.cuda, "is_available", lambda: True
        yield torch.cuda, "device_count", lambda: 1
        yield torch.cuda, "current_device", lambda: 0
        yield torch.cuda, "synchronize", lambda device=None: None
        yield torch.cuda, "empty_cache", on_empty_cache
        try:
            from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]
        except ImportError:
            return
        yield JITFunction, "run", _forget_arguments


class _CpuGenerator(torch.Generator):
    """Stands in for a generator on the fake device."""

    def __new__(cls, device: Any = "cpu") -> _CpuGenerator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


def _convert_module(module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """What ``Module._apply`` does, for fake parameters, which cannot be swapped."""
    if recurse:
        for child in module.children():
            _convert_module(child, fn)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                converted = fn(parameter)
            if converted is not parameter:
                if not isinstance(parameter, FakeTensor):
                    raise ForecastError(
                        f"a forecast would turn the real weights of {type(module).__name__} into fakes; build the "
                        "module inside the callable, or pass it as an argument",
                        module=type(module).__name__,
                    )
                parameter.data = converted  # the same object: one that is tied stays tied
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _forget_arguments(kernel: Any, *args: Any, **kwargs: Any) -> None:
    """In place of launching a Triton kernel: it writes to its arguments and allocates nothing."""
    for argument in args:
        known = known_values(argument) if isinstance(argument, torch.Tensor) else None
        if known is not None:
            known.valid[0] = False
