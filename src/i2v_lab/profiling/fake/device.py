"""A fake device: shapes, dtypes and storages are those of a real run, and nothing is computed.

``torch``'s ``FakeTensorMode`` does the main work. This module adds what it lacks for inference code: the fused
attention kernels that a CUDA device picks, small tensors that keep their values, so that code that branches on them
takes the branch of a real run, and a CUDA device where there is none.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.attention import fused_attention, safe_softmax
from i2v_lab.profiling.fake.operators import FakeOperators, OnOperator, data_dependent_error, known_values
from i2v_lab.torch_compat import (
    CONVOLUTION_BASE,
    DATA,
    NUMPY,
    TRUNCATED_NORMAL,
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
    HardwareFreeFakeMode,
    convert_module,
    dense_flex_attention,
    disable_current_modes,
    gpu_context_patch,
    no_dispatch,
    tree_map_only,
    uncompiled_flex_attention,
)


@contextmanager
def fake_device(
    device: torch.device,
    current_module: Callable[[], str],
    on_operator: OnOperator = lambda *_: None,
    on_empty_cache: Callable[[], None] = lambda: None,
) -> Iterator[FakeTensorMode]:
    """Make every tensor fake, and ``device`` available, within this scope.

    Args:
        device: What the code asks for: ``cpu`` or ``cuda``. No CUDA call is made, on any machine.
        current_module: Returns the path of the running module, for errors.
        on_operator: Called after every operator.
        on_empty_cache: Called instead of ``torch.cuda.empty_cache()``.

    Raises:
        ForecastError: An operator without a fake kernel, or one whose result depends on unknown data; or a backward
            pass on ``cuda`` where there is no CUDA driver.
    """
    mode = HardwareFreeFakeMode(allow_non_fake_inputs=True)
    with ExitStack() as scopes:
        for target, name, substitute in _patches(device, current_module, on_empty_cache):
            scopes.enter_context(patch.object(target, name, substitute))
        scopes.enter_context(uncompiled_flex_attention(_flex_attention))
        scopes.enter_context(disable_current_modes())  # a meter outside would count fake storages
        scopes.enter_context(mode)
        operators = FakeOperators(mode, current_module, on_operator)
        scopes.callback(operators.restore_gradients)
        scopes.enter_context(operators)
        try:
            yield mode
        except RuntimeError as error:
            if "hasPrimaryContext" not in str(error):
                raise
            raise ForecastError(
                f"a backward pass on a fake device={str(device)!r} needs a CUDA driver, whose context autograd's "
                "engine asks for; forecast it with device='cpu'",
                cause="backward without a driver",
                device=str(device),
            ) from error


def to_fake(values: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """Replace modules and tensors among ``values`` by fake copies on ``device``; the originals are not modified.

    Since they are copies, a write to one is not seen by code that reaches the original in another way.
    """
    converter = FakeTensorConverter(copy_data=False, export=False)

    def fake(original: torch.Tensor) -> FakeTensor:
        return converter.from_real_tensor(mode, original)

    def module(original: torch.nn.Module) -> torch.nn.Module:
        memo: dict[int, Any] = {id(t): fake(t) for t in (*original.parameters(), *original.buffers())}
        for parameter in original.parameters():
            memo[id(parameter)] = torch.nn.Parameter(memo[id(parameter)].detach(), parameter.requires_grad)
        return copy.deepcopy(original, memo).to(device)

    values = tree_map_only(torch.nn.Module, module, values)
    return tree_map_only(torch.Tensor, lambda t: fake(t).to(device), values)


# --- Functions that are intercepted before torch decomposes them into operators ---------------------------------------


def _attention(
    original: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    attend = fused_attention if query.device.type == "cuda" else original
    result: torch.Tensor = attend(query, key, value, *args, **kwargs)
    return result


def _flex_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    with ExitStack() as scopes:
        if query.device.type == "cuda":  # whose allocator counts the steps of the softmax
            scopes.enter_context(patch.object(torch, "_safe_softmax", safe_softmax))
        return dense_flex_attention(query, *args, **kwargs)


def _tensor(original: Any, data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    data = _without_tensors(data) if isinstance(data, list | tuple) else data
    result: torch.Tensor = original(data, *args, **kwargs)
    return result


def _without_tensors(data: Any) -> Any:
    """Nested lists of numbers, some of which are tensors of one element, as numbers alone."""
    if isinstance(data, list | tuple):
        return [_without_tensors(item) for item in data]
    return data.item() if isinstance(data, torch.Tensor) else data


def _numpy(tensor: torch.Tensor, current_module: Callable[[], str], **kwargs: Any) -> Any:
    known = known_values(tensor)
    if known is None and isinstance(tensor, FakeTensor):
        raise data_dependent_error("torch.Tensor.numpy", current_module())
    with no_dispatch():
        return NUMPY(known.real if known is not None else tensor, **kwargs)


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """``tensor.data = value``, which offloading uses to move a tensor; a fake's device and values have to follow."""
    DATA.__set__(tensor, value)
    if isinstance(tensor, FakeTensor) and isinstance(value, FakeTensor):
        tensor.fake_device = value.fake_device
        tensor._i2v_lab_known = getattr(value, "_i2v_lab_known", None)  # type: ignore[attr-defined]


def _deepcopy(tensor: torch.Tensor, memo: dict[int, Any], original: Any) -> torch.Tensor:
    """Clone a fake: torch would copy its storage, which has no data, past the meter and without the known values."""
    if not isinstance(tensor, FakeTensor):
        result: torch.Tensor = original(tensor, memo)
        return result
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, tensor.requires_grad)
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


# --- What must not reach absent hardware ------------------------------------------------------------------------------


def _patches(
    device: torch.device, current_module: Callable[[], str], on_empty_cache: Callable[[], None]
) -> Iterator[tuple[Any, str, Any]]:
    functional = torch.nn.functional
    # By patches: a TorchFunctionMode would also be called for every shape and dtype that is read.
    yield torch, "tensor", functools.partial(_tensor, torch.tensor)
    attention = functools.partial(_attention, functional.scaled_dot_product_attention)
    yield functional, "scaled_dot_product_attention", attention
    yield torch.Tensor, "numpy", functools.partialmethod(_numpy, current_module)
    yield torch.Tensor, "data", property(DATA.__get__, _set_data)
    yield torch.Tensor, "__deepcopy__", functools.partialmethod(_deepcopy, original=torch.Tensor.__deepcopy__)
    yield torch.nn.Module, "_apply", _apply
    for kind in (torch.nn.Linear, CONVOLUTION_BASE, torch.nn.Embedding):
        yield kind, "reset_parameters", lambda module: None  # fills storages that have no data
    yield *TRUNCATED_NORMAL, lambda tensor, *_, **__: tensor
    yield gpu_context_patch()
    if device.type == "cuda":
        yield torch, "Generator", _CpuGenerator
        yield torch.cuda, "is_available", lambda: True
        yield torch.cuda, "device_count", lambda: 1
        yield torch.cuda, "current_device", lambda: 0
        yield torch.cuda, "synchronize", lambda device=None: None
        yield torch.cuda, "empty_cache", on_empty_cache
        yield torch.cuda, "is_current_stream_capturing", lambda: False  # optimizers ask
        try:
            from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]
        except ImportError:
            return
        yield JITFunction, "run", _skip_kernel


class _CpuGenerator(torch.Generator):
    """Replaces a generator on the fake device."""

    def __new__(cls, device: Any = "cpu") -> _CpuGenerator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


def _apply(module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    return convert_module(module, fn, _check_fake, recurse=recurse)


def _check_fake(module: torch.nn.Module, parameter: torch.Tensor) -> None:
    if not isinstance(parameter, FakeTensor):
        raise ForecastError(
            f"a forecast would turn the real weights of {type(module).__name__} into fakes; build the module inside "
            "the callable, or pass it as an argument",
            cause="real weights",
            module=type(module).__name__,
        )


def _skip_kernel(kernel: Any, *args: Any, **kwargs: Any) -> None:
    """Instead of launching a Triton kernel, which writes to its arguments and allocates nothing."""
    for argument in args:
        known = known_values(argument) if isinstance(argument, torch.Tensor) else None
        if known is not None:
            known.valid[0] = False
