"""A fake device: shapes, dtypes and storages are those of a real run, and nothing is computed.

``torch``'s ``FakeTensorMode`` does the main work. This module adds what it lacks for inference code: the fused
attention kernels that a CUDA device picks, small tensors that keep their values, so that code that branches on them
takes the branch of a real run, and a CUDA device where there is none.
"""

from __future__ import annotations

import functools
import re
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.assumptions import DEFAULT, Answers
from i2v_lab.profiling.fake.attention import chosen_kernel, fused_attention, math_attention, safe_softmax, usual_order
from i2v_lab.profiling.fake.card import CardProperties, FakeCard
from i2v_lab.profiling.fake.checkpoint_files import reading_patches
from i2v_lab.profiling.fake.compact_zeros import picture_patches
from i2v_lab.profiling.fake.compiled import no_compiled_functions
from i2v_lab.profiling.fake.known_values import keep_values, known_values
from i2v_lab.profiling.fake.operators import FakeOperators, OnOperator
from i2v_lab.profiling.fake.page_locked import is_page_locked, set_page_locked
from i2v_lab.profiling.fake.parameter_kinds import make_subclass
from i2v_lab.profiling.fake.random_state import random_patches
from i2v_lab.profiling.fake.refusals import no_answer, no_kernel_error
from i2v_lab.profiling.fake.threads import ForecastMode, one_thread
from i2v_lab.thread_modes import thread_state_restored
from i2v_lab.thread_patches import patched_here, unpatched
from i2v_lab.torch_compat import (
    CONVOLUTION_BASE,
    DATA,
    LOCAL_SCALAR,
    MAKE_SUBCLASS,
    NUMPY,
    TRUNCATED_NORMAL,
    FakeTensor,
    FakeTensorMode,
    attention_order,
    cache_function_sets,
    convert_module,
    dense_flex_attention,
    disable_current_modes,
    gpu_context_patch,
    inner_tensors,
    keep_device_guard,
    lifting_restored,
    no_dispatch,
    storage_key,
    uncompiled_flex_attention,
)


@contextmanager
def fake_device(
    device: torch.device,
    current_module: Callable[[], str],
    on_operator: OnOperator = lambda *_: None,
    on_attention: Callable[..., None] = lambda *_: None,
    card: FakeCard | None = None,
    answers: Answers | None = None,
) -> Iterator[FakeTensorMode]:
    """Make every tensor of this thread fake, and ``device`` available to it, within this scope.

    Other threads are not affected: functions that are replaced are replaced for this thread alone.

    Args:
        device: What the code asks for: ``cpu`` or ``cuda``. No CUDA call is made, on any machine.
        current_module: Returns the path of the running module, for errors.
        on_operator: Called after every operator.
        on_attention: Called with the arguments of attention by cuDNN, which runs as no operator.
        card: What ``torch.cuda`` tells about the device; with ``cuda`` alone.
        answers: To questions about unknown values; by default those of ``Assumptions()``.

    Raises:
        ForecastError: An operator without a fake kernel, or one whose result depends on unknown data; work in another
            thread; a compiled function; a question about the card that none can answer; or a backward pass on ``cuda``
            that needs a CUDA driver where there is none.
    """
    keep_device_guard()
    cache_function_sets()
    with ExitStack() as scopes:
        mode = ForecastMode()
        scopes.enter_context(thread_state_restored())
        scopes.enter_context(lifting_restored())
        scopes.enter_context(uncompiled_flex_attention(_flex_attention))
        scopes.enter_context(disable_current_modes())  # a meter outside would count fake storages
        scopes.enter_context(mode)
        answers = answers or Answers(DEFAULT, current_module)
        operators = FakeOperators(mode, current_module, on_operator, answers)
        operators.on_attention = on_attention
        scopes.callback(operators.restore_gradients)
        for target, name, substitute in _patches(device, operators, card):
            scopes.enter_context(patched_here(target, name, substitute))
        scopes.enter_context(no_compiled_functions())
        scopes.enter_context(one_thread(mode))
        # A backward pass runs in this thread too, even where a driver is there to run it in another one.
        scopes.enter_context(torch.autograd.set_multithreading_enabled(False))
        scopes.enter_context(operators)
        try:
            yield mode
        except (RuntimeError, AssertionError) as error:
            understood = _understood(error, device)
            if understood is None:
                raise
            raise understood from error


def _understood(error: Exception, device: torch.device) -> ForecastError | None:
    """What an error of torch's own code means in a forecast; ``None`` where it is the code's under forecast."""
    message = str(error)
    frame = deque(traceback.walk_tb(error.__traceback__), 1)[0][0]
    call = f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}"
    if "hasPrimaryContext" in message:
        return ForecastError(
            f"a backward pass on device={str(device)!r} needs a CUDA driver here, where the C library does not list "
            "the frames of a stack; forecast it with device='cpu'",
            cause="backward without a driver",
            device=str(device),
        )
    if message.startswith("CUDA error"):  # C++ code that asks the driver, to choose a kernel
        return no_answer(call, "a kernel that is chosen on a real card")
    if any(words in message for words in ("NVIDIA driver", "not compiled with CUDA", "create a new Stream")):
        return no_answer(call, "a real card")
    lacking = re.match(r"Could not run 'aten::(\w+)", message)
    if lacking is not None:
        return no_kernel_error(f"aten.{lacking[1]}", "")
    if "saved tensor hooks" in message:
        return ForecastError(
            f"{call} runs without the hooks of saved tensors that a forecast counts by; use torch.autograd.grad",
            cause="no saved tensor hooks",
            operator=call,
        )
    return None


# --- Functions that are intercepted before torch decomposes them into operators ---------------------------------------


def _attention(
    operators: FakeOperators,
    orders: tuple[Sequence[SDPBackend], Sequence[SDPBackend]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    if query.device.type != "cuda":
        result: torch.Tensor = unpatched(torch.nn.functional, "scaled_dot_product_attention")(*arguments, **options)
        return result
    initial_order, usual = orders
    order: Sequence[SDPBackend] = attention_order()  # the code's own; at first that of the card that may be here
    order = usual if order == initial_order else order
    kernel = chosen_kernel(query, key, value, attn_mask, is_causal, enable_gqa, order)
    if kernel == SDPBackend.CUDNN_ATTENTION:  # runs as no operator
        operators.on_attention("cudnn", query, key, value, attn_mask)
    if kernel != SDPBackend.MATH:
        return fused_attention(*arguments, **options, kernel=kernel)
    with operators.math_attention():
        return math_attention(*arguments, **options)


def _flex_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    with ExitStack() as scopes:
        if query.device.type == "cuda":  # whose allocator counts the steps of the softmax
            scopes.enter_context(patched_here(torch, "_safe_softmax", safe_softmax))
        return dense_flex_attention(query, *args, **kwargs)


def _tensor(operators: FakeOperators, data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    original = unpatched(torch, "tensor")
    plain = isinstance(data, list | tuple | int | float | complex)
    data = _without_tensors(data) if isinstance(data, list | tuple) else data
    result: torch.Tensor = original(data, *args, **kwargs)
    if plain and kwargs.get("dtype") is None and result.is_floating_point() and result.dtype != operators.default_dtype:
        return original(data, *args, **{**kwargs, "dtype": operators.default_dtype})
    return result


def _without_tensors(data: Any) -> Any:
    """Nested lists of numbers, some of which are tensors of one element, as numbers alone."""
    if isinstance(data, list | tuple):
        return [_without_tensors(item) for item in data]
    return data.item() if isinstance(data, torch.Tensor) else data


def _numpy(tensor: torch.Tensor, answers: Answers, **kwargs: Any) -> Any:
    known = known_values(tensor)
    if known is None and isinstance(tensor, FakeTensor):
        return answers.array("torch.Tensor.numpy", tensor, **kwargs)
    with no_dispatch():
        return NUMPY(known.real if known is not None else tensor, **kwargs)


def _tolist(tensor: torch.Tensor, answers: Answers) -> Any:
    known = known_values(tensor)
    if known is None:
        return answers.nested_list("torch.Tensor.tolist", tensor)
    with no_dispatch():
        return known.real.tolist()


def _number(tensor: torch.Tensor, conversion: str, answers: Answers) -> Any:
    """``float(tensor)`` and the like, which ``torch.Tensor(list)`` calls past all dispatch modes."""
    known = known_values(tensor)
    if known is None and tensor.numel() == 1:
        return getattr(answers.number(LOCAL_SCALAR, tensor), conversion)()
    with no_dispatch():
        real = known.real if known is not None else torch.empty(tensor.shape, device="cpu")  # torch's own error
        return getattr(real, conversion)()


def _truth(tensor: torch.Tensor, answers: Answers) -> bool:
    if known_values(tensor) is None and tensor.numel() == 1:
        return answers.condition("torch.Tensor.__bool__")
    return bool(unpatched(FakeTensor, "__bool__")(tensor))


def _format(tensor: torch.Tensor, spec: str, answers: Answers) -> str:
    if tensor.dim():
        return str(unpatched(FakeTensor, "__format__")(tensor, spec))
    known = known_values(tensor)
    if known is None:
        return format(answers.number_in_text("torch.Tensor.__format__", tensor), spec)
    with no_dispatch():
        return format(known.real.item(), spec)


def _new(kind: type, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A fake; or a parameter, which code makes by ``type(parameter)(data, requires_grad=...)``."""
    make = unpatched(FakeTensor, "__new__")
    if isinstance(args[0], torch.Tensor):  # attributes of the old parameter may come along
        return torch.nn.Parameter(args[0], kwargs.get("requires_grad", True))
    made: torch.Tensor = make(kind, *args, **kwargs)
    return made


def _pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    pinned = tensor.clone()
    set_page_locked(pinned)
    return pinned


def _save(*_: Any, answers: Answers, function: str, **__: Any) -> None:
    raise answers.refusal(function)


def _set_data(operators: FakeOperators, tensor: torch.Tensor, value: torch.Tensor) -> None:
    """``tensor.data = value``, which offloading uses to move a tensor; a fake's device and values have to follow."""
    operators.devices.set_data(tensor, value)
    if isinstance(tensor, FakeTensor) and isinstance(value, FakeTensor):
        tensor.fake_device = value.fake_device
        keep_values(tensor, getattr(value, "_i2v_lab_known", None))


def _deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """Clone a fake: torch would copy its storage, which has no data, past the meter and without the known values."""
    if not isinstance(tensor, FakeTensor):
        with no_dispatch():
            result: torch.Tensor = unpatched(torch.Tensor, "__deepcopy__")(tensor, memo)
        return result
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, tensor.requires_grad)
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


# --- What must not reach absent hardware ------------------------------------------------------------------------------


def _patches(device: torch.device, operators: FakeOperators, card: FakeCard | None) -> Iterator[tuple[Any, str, Any]]:
    # By patches: a TorchFunctionMode would also be called for every shape and dtype that is read.
    yield torch, "tensor", functools.partial(_tensor, operators)
    properties = card.properties if card is not None else CardProperties()
    usual = usual_order((properties.major, properties.minor))
    attend = functools.partial(_attention, operators, (attention_order(), usual))
    yield torch.nn.functional, "scaled_dot_product_attention", attend
    yield torch.Tensor, "numpy", functools.partial(_numpy, answers=operators.answers)
    yield FakeTensor, "__new__", _new
    yield *MAKE_SUBCLASS, make_subclass
    for name in ("__float__", "__int__", "__index__"):
        yield FakeTensor, name, functools.partial(_number, conversion=name, answers=operators.answers)
    reads: dict[str, Callable[..., Any]] = {"tolist": _tolist, "__bool__": _truth, "__format__": _format}
    for name, substitute in reads.items():
        yield FakeTensor, name, functools.partial(substitute, answers=operators.answers)
    yield torch.Tensor, "data", property(DATA.__get__, functools.partial(_set_data, operators))
    yield torch.Tensor, "__deepcopy__", _deepcopy
    yield torch.nn.Module, "_apply", lambda module, fn, recurse=True: _apply(operators, module, fn, recurse)
    yield torch.Tensor, "pin_memory", _pin_memory
    yield torch.Tensor, "is_pinned", lambda tensor, device=None: is_page_locked(tensor)
    yield torch, "save", functools.partial(_save, answers=operators.answers, function="torch.save")
    safetensors = sys.modules.get("safetensors.torch")
    for name in ("serialize", "serialize_file"):  # which read the memory of tensors
        if hasattr(safetensors, name):
            refuse = functools.partial(_save, answers=operators.answers, function=f"safetensors.torch.{name}")
            yield safetensors, name, refuse
    for kind in (torch.nn.Linear, CONVOLUTION_BASE, torch.nn.Embedding):
        yield kind, "reset_parameters", lambda module: None  # fills storages that have no data
    yield *TRUNCATED_NORMAL, lambda tensor, *_, **__: tensor
    yield torch, "set_default_dtype", operators.set_default_dtype  # torch's own is that of all threads
    yield torch, "get_default_dtype", lambda: operators.default_dtype
    yield gpu_context_patch()
    yield from reading_patches()
    yield from picture_patches()
    yield from random_patches()
    if device.type == "cuda":
        yield torch, "Generator", lambda device="cpu": unpatched(torch, "Generator")("cpu")
        if card is not None:
            yield from card.patches()
        try:
            from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]
        except ImportError:
            return
        yield JITFunction, "run", _skip_kernel


def _apply(
    operators: FakeOperators, module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> Any:
    def check(module: torch.nn.Module, parameter: torch.Tensor) -> bool:
        if all(isinstance(inner, FakeTensor) for inner in inner_tensors(parameter)):
            return False
        if storage_key(parameter) in operators.made_on_meta:
            return True
        raise ForecastError(
            f"a forecast would turn the real weights of {type(module).__name__} into fakes; build the module inside "
            "the callable, or pass it as an argument",
            cause="real weights",
            module=type(module).__name__,
        )

    return convert_module(module, fn, check, recurse=recurse)


def _skip_kernel(kernel: Any, *args: Any, **kwargs: Any) -> None:
    """Instead of launching a Triton kernel, which writes to its arguments and allocates nothing."""
    for argument in args:
        known = known_values(argument) if isinstance(argument, torch.Tensor) else None
        if known is not None:
            known.valid[0] = False
