"""Everything of torch's private API that fakes and meters use, in one place: what to go through for a new torch.

``tests/unit/test_torch_compat.py`` has a test for each item, whose name in a report ends with the version of torch.
Written for torch 2.11; every item is the same in 2.12.1, 2.13.0, 2.14.1 and 2.15.0.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import DisableTorchFunctionSubclass  # calls no __torch_function__ of a class within its scope
from torch._higher_order_ops.flex_attention import sdpa_dense as dense_flex_attention  # by ordinary operators
from torch._subclasses import fake_tensor  # FakeTensorMode has no public name
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,  # an operator asks for values, such as .item()
    DynamicOutputShapeException,  # an operator's output shape follows from values, such as nonzero()
    FakeTensor,
    FakeTensorConverter,  # the mode's own reuses a fake for each real tensor, and so would share storages
    FakeTensorMode,
    UnsupportedOperatorException,  # an operator has no fake kernel
    in_kernel_invocation_manager,  # runs an operator on the meta tensors behind fakes, without the mode's own checks
)
from torch.nn.attention import SDPBackend, flex_attention
from torch.overrides import (  # a thread's stack, top last
    _get_current_function_mode_stack,
    _get_overridable_functions,
    _pop_mode,
    _push_mode,
)
from torch.utils._device import (  # what `with torch.device(...)` and set_default_device enter
    DeviceContext,
    _device_constructors,
)
from torch.utils._mode_utils import no_dispatch  # runs an operator outside all dispatch modes
from torch.utils._python_dispatch import (
    TorchDispatchMode,  # semi-public: documented, but has no public name
    _disable_current_modes,  # takes the dispatch modes outside a scope away
    _get_current_dispatch_mode_stack,
)
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only  # torch.utils has no public pytree

from i2v_lab.thread_patches import patched_here

__all__ = [
    "CALL",
    "CONVOLUTION_BASE",
    "CUDNN_ATTENTION",
    "DATA",
    "DATA_DEPENDENT",
    "DEVICE",
    "EFFICIENT_ATTENTION",
    "FLASH_ATTENTION",
    "LOCAL_SCALAR",
    "MAKE_SUBCLASS",
    "MATH_ATTENTION",
    "NUMPY",
    "SAFE_SOFTMAX",
    "TRUNCATED_NORMAL",
    "DeviceContext",
    "DisableTorchFunctionSubclass",
    "DispatchMode",
    "FakeTensor",
    "FakeTensorConverter",
    "FakeTensorMode",
    "HardwareFreeFakeMode",
    "ModeStacks",
    "TorchDispatchMode",
    "UnsupportedOperatorException",
    "active_fake_mode",
    "alias_annotations",
    "attention_order",
    "bool_result",
    "compiler_home",
    "convert_module",
    "dense_flex_attention",
    "disable_current_modes",
    "gpu_context_patch",
    "in_kernel_invocation_manager",
    "inner_tensors",
    "is_fake",
    "is_wrapper",
    "keep_device_guard",
    "lifting_restored",
    "no_dispatch",
    "returns_new_tensors",
    "returns_views",
    "storage_key",
    "tree_leaves",
    "tree_map_only",
    "uncompiled_flex_attention",
]

aten = torch.ops.aten

CALL = torch.nn.Module._call_impl.__code__  # the one function that every call of a module passes through

DATA_DEPENDENT = (DynamicOutputShapeException, DataDependentOutputException)
disable_current_modes = _disable_current_modes

DATA: Any = torch._C.TensorBase.data  # descriptor behind Tensor.data, which a forecast replaces
NUMPY: Any = torch._C.TensorBase.numpy  # method behind Tensor.numpy, which a forecast replaces
MAKE_SUBCLASS = (torch.Tensor, "_make_subclass")  # by which a class of tensors takes the storage of another one
TRUNCATED_NORMAL = (torch.nn.init, "_no_grad_trunc_normal_")  # draws until all values are within, from torch 2.14 on
CONVOLUTION_BASE = torch.nn.modules.conv._ConvNd  # its reset_parameters serves all convolutions

DEVICE = torch.ops.prim.device.default  # what C++ code dispatches to read a fake's device
LOCAL_SCALAR = aten._local_scalar_dense.default  # what Tensor.item() dispatches
SAFE_SOFTMAX = aten._safe_softmax.default  # only the math kernel of scaled_dot_product_attention dispatches it
FLASH_ATTENTION = aten._scaled_dot_product_flash_attention  # the kernels that CUDA picks, which fakes do not
EFFICIENT_ATTENTION = aten._scaled_dot_product_efficient_attention
MATH_ATTENTION = aten._scaled_dot_product_attention_math  # by ordinary operators
CUDNN_ATTENTION = aten._scaled_dot_product_cudnn_attention


class HardwareFreeFakeMode(FakeTensorMode):
    """Never asks whether there is a CUDA device, so that the answer is the same on every machine."""

    @property
    def avoid_device_init(self) -> bool:
        """Read by ``FakeTensorMode`` before it would initialise CUDA."""
        return True


class DispatchMode(TorchDispatchMode):
    """A dispatch mode without torch's wrapper that disables dynamo, which costs as much as the mode itself."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here


@dataclass(frozen=True)
class ModeStacks:
    """The modes that are active in a thread, innermost last, and its default device.

    Attributes:
        function: Modes of torch functions.
        dispatch: Modes of dispatch.
        default: What ``torch.set_default_device`` entered in this thread, first of ``function``; ``None`` is the CPU.

    Example:
        >>> with torch.device("meta"):
        ...     stacks = ModeStacks.current()
        >>> stacks.device_context().device, stacks.default
        (device(type='meta'), None)
    """

    function: tuple[Any, ...]
    dispatch: tuple[Any, ...]
    default: DeviceContext | None

    @classmethod
    def current(cls) -> ModeStacks:
        """Those of this thread."""
        default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
        return cls(tuple(_get_current_function_mode_stack()), tuple(_get_current_dispatch_mode_stack()), default)

    def device_context(self) -> DeviceContext | None:
        """What ``torch.set_default_device`` would enter for the device that tensors are made on now."""
        inner = next((mode for mode in reversed(self.function) if isinstance(mode, DeviceContext)), None)
        if inner is None:
            return None
        context = DeviceContext(inner.device)
        context.old_device = None  # as __enter__ does, for set_default_device, which leaves it
        return context

    def apply(self) -> None:
        """Make them those of this thread."""
        current = ModeStacks.current()
        _exchange(current.function, self.function, _pop_mode, _push_mode)
        _exchange(current.dispatch, self.dispatch, _pop_dispatch_mode, _push_dispatch_mode)
        if current.default is not self.default:
            torch._GLOBAL_DEVICE_CONTEXT.device_context = self.default


def _exchange(
    current: Sequence[Any], wanted: Sequence[Any], pop: Callable[[], Any], push: Callable[[Any], None]
) -> None:
    common = 0
    while common < min(len(current), len(wanted)) and current[common] is wanted[common]:
        common += 1
    for _ in current[common:]:
        pop()
    for mode in wanted[common:]:
        push(mode)


@contextmanager
def uncompiled_flex_attention(attend: Callable[..., Any] | None = None) -> Iterator[None]:
    """Do not let torch trace ``flex_attention`` in this thread within this scope, unless its caller compiles it.

    Uncompiled, it runs ordinary operators, which materialize all scores; torch traces every call only to run the same.
    It hands it to a dispatch mode as one operator that takes functions, which shows nothing of what it allocates.

    Args:
        attend: Runs the operators in torch's place, so that a dispatch mode sees them: :func:`dense_flex_attention`, or
            a function with its arguments.

    Example:
        >>> from torch.nn.attention.flex_attention import flex_attention
        >>> query = torch.ones(1, 1, 128, 16)
        >>> with uncompiled_flex_attention(), torch.no_grad():
        ...     flex_attention(query, query, query).shape
        torch.Size([1, 1, 128, 16])
    """
    with ExitStack() as scopes:
        scopes.enter_context(patched_here(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True))
        if attend is not None:  # otherwise as it is, or as a scope outside has it
            scopes.enter_context(patched_here(flex_attention, "flex_attention_hop", attend))
        yield


def storage_key(tensor: torch.Tensor) -> int:
    """Address of a tensor's ``StorageImpl``, the same for all views; valid while that exists. Fakes have no other."""
    return tensor.untyped_storage()._cdata


def is_wrapper(kind: type[Any]) -> bool:
    """Whether tensors of a class hold others, as quantized ones do: they have no storage of their own."""
    return hasattr(kind, "__tensor_flatten__")


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with storages that a tensor holds, at any depth; a plain one itself."""
    names = tensor.__tensor_flatten__()[0] if is_wrapper(type(tensor)) else None  # type: ignore[attr-defined]
    return [tensor] if names is None else [inner for name in names for inner in inner_tensors(getattr(tensor, name))]


def compiler_home(*, load: bool = True) -> Any:
    """Module and name of the function that every call of a compiled function asks for its compiler.

    Args:
        load: Import dynamo, which takes most of a second; otherwise ``None`` if nothing has yet.
    """
    if not load and "torch._dynamo.eval_frame" not in sys.modules:
        return None
    return importlib.import_module("torch._dynamo.eval_frame"), "_callback_from_stance"


def gpu_context_patch() -> tuple[Any, str, Callable[[Any], None]]:
    """What to patch, and with what, so that a fake tensor on ``cuda`` does not initialise CUDA."""
    return fake_tensor, "init_gpu_context", lambda device: None


def cache_function_sets() -> None:
    """Have torch collect its own functions, before any is replaced.

    It does so once in a process: those that make tensors where it first needs a default device, those that can be
    overridden where it first needs their names. Collected within a forecast, the sets would have the stand-ins, and
    ``torch.tensor`` would ignore the default device ever after.
    """
    _device_constructors()
    _get_overridable_functions()


_guard_is_kept = False


def keep_device_guard() -> None:
    """Give a torch without a CUDA driver the device guard that does nothing, for as long as the process lives.

    A fake mode does it, where it is the first to be entered, but the guard is destroyed with the thread that asked for
    it, and used by all others: the next fake mode in any thread would read freed memory. So a thread asks that ends
    with the process, the main one or one that waits for ever.
    """
    global _guard_is_kept
    with _LIFTING:
        if _guard_is_kept:
            return
        done = threading.Event()

        def ask() -> None:
            torch._C._ensureCUDADeviceGuardSet()
            done.set()

        if threading.current_thread() is threading.main_thread():
            ask()
        else:

            def ask_and_wait() -> None:
                ask()
                threading.Event().wait()

            threading.Thread(target=ask_and_wait, name="i2v-lab-device-guard", daemon=True).start()
            done.wait()
        _guard_is_kept = True


_LIFTING = threading.Lock()
_lifting_scopes = 0
_lifted_before = False


@contextmanager
def lifting_restored() -> Iterator[None]:
    """Restore how ``torch.tensor`` reaches a device, once the last of several fake modes, in any threads, has ended.

    A fake mode sets it for the whole process, and one that ends puts back what it found, which is another's.
    """
    global _lifting_scopes, _lifted_before
    with _LIFTING:
        if not _lifting_scopes:
            _lifted_before = torch._C._only_lift_cpu_tensors()
        _lifting_scopes += 1
    try:
        yield
    finally:
        with _LIFTING:
            _lifting_scopes -= 1
            torch._C._set_only_lift_cpu_tensors(_lifting_scopes > 0 or _lifted_before)


def attention_order() -> list[SDPBackend]:
    """The kernels of attention in the order in which torch tries them; ``sdpa_kernel(set_priority=True)`` sets it."""
    return [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]


def active_fake_mode() -> FakeTensorMode:
    """The fake mode that this code runs under; there must be one."""
    mode = torch._guards.active_fake_mode()
    assert mode is not None
    return mode


def is_fake() -> bool:
    """Whether this code runs under fake tensors, as in a forecast."""
    return torch._guards.active_fake_mode() is not None


def returns_new_tensors(operator: Any) -> bool:
    """Whether an operator's schema says that its results share no storage with its inputs and none is written to."""
    schema = operator._schema  # OpOverload has no public schema
    return not schema.is_mutable and bool(schema.returns) and not any(each.alias_info for each in schema.returns)


def returns_views(operator: Any) -> bool:
    """Whether an operator's schema says that its results are views of its inputs, and that none is written to."""
    schema = operator._schema
    return not schema.is_mutable and bool(schema.returns) and all(each.alias_info for each in schema.returns)


def bool_result(operator: Any) -> bool:
    """Whether an operator's schema says that it returns a truth value of Python."""
    return [str(each.type) for each in operator._schema.returns] == ["bool"]


def alias_annotations(operator: Any) -> Iterator[tuple[str, bool]]:
    """Name of each of an operator's arguments, and whether its schema says that the operator writes to it."""
    for argument in operator._schema.arguments:
        yield argument.name, argument.alias_info is not None and argument.alias_info.is_write


def convert_module(
    module: torch.nn.Module,
    convert: Callable[[torch.Tensor], torch.Tensor],
    check_parameter: Callable[[torch.nn.Module, torch.Tensor], bool],
    *,
    recurse: bool = True,
) -> torch.nn.Module:
    """What ``Module._apply`` does, the private method behind ``to``, ``cuda`` and ``half``, for fake parameters.

    Torch's own swaps the tensors, which fakes do not support; and a parameter has to stay the same object, because it
    may be tied.

    Args:
        module: Converted in place.
        convert: Called with each parameter and buffer.
        check_parameter: Called with the module and its parameter before its data are replaced; may raise, or return
            whether the parameter itself is to be replaced, as torch does with one on the meta device.
        recurse: Whether its children are converted too.
    """
    if recurse:
        for child in module.children():
            convert_module(child, convert, check_parameter)
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            with torch.no_grad():
                converted = convert(parameter)
            if converted is not parameter:
                if check_parameter(module, parameter):
                    module._parameters[name] = torch.nn.Parameter(converted, parameter.requires_grad)
                elif is_wrapper(type(converted)):
                    torch.utils.swap_tensors(parameter, torch.nn.Parameter(converted, parameter.requires_grad))
                else:
                    parameter.data = converted
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module
