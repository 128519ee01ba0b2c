"""Operators on fake tensors: cached shape inference, and the values of small tensors where they are known."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.assumptions import Answers
from i2v_lab.profiling.fake.attention import safe_softmax
from i2v_lab.profiling.fake.autograd_devices import AutogradDevices, with_real_device
from i2v_lab.profiling.fake.known_values import (
    LIFT,
    KnownValues,
    keep_values,
    known_values,
    propagate_values,
    run_on_values,
    selected_positions,
)
from i2v_lab.profiling.fake.operator_kinds import (
    FACTORIES,
    VIEWS,
    makes_new_tensors,
    returns_condition,
    tensors_in,
    written_tensors,
)
from i2v_lab.profiling.fake.page_locked import set_page_locked
from i2v_lab.profiling.fake.refusals import (
    check_devices,
    math_attention_error,
    no_kernel_error,
    not_strided_error,
    real_write_error,
)
from i2v_lab.profiling.storages import StorageSet
from i2v_lab.torch_compat import (
    DATA_DEPENDENT,
    DEVICE,
    LOCAL_SCALAR,
    SAFE_SOFTMAX,
    DispatchMode,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    in_kernel_invocation_manager,
    is_wrapper,
    no_dispatch,
    storage_key,
    tree_map_only,
)

aten = torch.ops.aten

META = torch.device("meta")
FILLS = {aten.fill_.Scalar, aten.fill_.Tensor, aten.normal_.default, aten.uniform_.default, aten.zero_.default}
UNSCALE = aten._amp_foreach_non_finite_check_and_unscale_.default  # writes whether a gradient is not finite
NORMS = {aten.native_layer_norm.default: 2, aten.native_group_norm.default: 1}  # positions of their weights
ONEDNN_RNN = aten.mkldnn_rnn_layer.default
CUDNN_RNN = aten._cudnn_rnn.default

# Called after every operator with the operator, its arguments, its result, and all tensors in both.
OnOperator = Callable[[Any, tuple[Any, ...], Any, list[torch.Tensor]], None]


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Outputs of an operator: size, stride, dtype and device of each tensor; and whether it returned several."""

    tensors: list[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]]
    many: bool


def _outputs(result: Any, inputs: list[torch.Tensor]) -> _Outputs | None:
    """The outputs to allocate when the operator is called again; ``None`` where they are not all new, dense tensors."""
    many = isinstance(result, list | tuple)
    tensors = list(result) if many else [result]
    if not all(isinstance(tensor, FakeTensor) for tensor in tensors) or not are_new(tensors, inputs):
        return None
    return _Outputs([(t.shape, t.stride(), t.dtype, t.fake_device) for t in tensors], many)


def are_new(tensors: list[torch.Tensor], inputs: list[torch.Tensor]) -> bool:
    """Whether each of ``tensors`` fills a storage of its own, shared with none of ``inputs``.

    False for views, also for those that the schema does not declare, such as ``_unsafe_view``.
    """
    used = {storage_key(tensor) for tensor in inputs}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage_key(tensor) in used or tensor.storage_offset() or tensor.numel() == 0:
            return False
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if storage.nbytes() != span * tensor.itemsize:
            return False
        used.add(storage_key(tensor))
    return True


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor's data are real: its own, or those of the tensor that a fake replaces."""
    if not isinstance(tensor, FakeTensor):
        return tensor.device.type != "meta"
    return getattr(tensor.untyped_storage(), "_i2v_lab_is_real", False)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of its storage, and no leaf of autograd's graph."""
    if tensor.layout is not torch.strided or tensor.requires_grad or not tensor.is_contiguous():
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def _is_filled(args: Any) -> bool:
    """Whether an operator fills its first argument, and torch has no reason to refuse it."""
    return isinstance(args[0], FakeTensor) and not any(
        isinstance(each, torch.Tensor) and each.dim() for each in args[1:]
    )


def _device(tensor: torch.Tensor) -> torch.device:
    """A tensor's device; ``FakeTensor.device`` is a Python property that reads more."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _layout(value: Any) -> Any:
    """Nested arguments as a hashable key, in which a tensor is its shape, stride, dtype and device."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, _device(value))
    if isinstance(value, list | tuple):
        return tuple([_layout(item) for item in value])
    if isinstance(value, dict):
        return tuple([(key, _layout(item)) for key, item in value.items()])
    return (type(value), value)


def _is_meta(kwargs: dict[str, Any], inputs: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    device = kwargs.get("device")
    if device is not None and device.type != "meta":
        return False
    if inputs:
        return len(others) == len(inputs) and all(tensor.device.type == "meta" for tensor in others)
    return device is not None


class FakeOperators(DispatchMode):
    """Runs operators on fake tensors, and propagates the values of small ones.

    Args:
        mode: The fake mode below this one.
        current_module: Returns the path of the running module, for errors.
        on_operator: Called after every operator.
        answers: Answers questions about unknown values.

    Attributes:
        devices: What C++ code is told of the devices of fakes.
        made_on_meta: Storages of tensors on the meta device that were made in this forecast.
        default_dtype: Of floating-point results that follow from none; torch's own is that of all threads.
    """

    def __init__(
        self, mode: FakeTensorMode, current_module: Callable[[], str], on_operator: OnOperator, answers: Answers
    ) -> None:
        super().__init__()
        self.on_attention: Callable[..., None] = lambda *_: None  # attention that runs as no operator
        self.answers = answers
        self._mode = mode
        self._current_module = current_module
        self._on_operator = on_operator
        self._outputs: dict[Any, _Outputs | None] = {}
        self._is_math_attention = False
        self.devices = AutogradDevices()
        self.made_on_meta = StorageSet()
        self.default_dtype = torch.get_default_dtype()
        self._real_leaves: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor | None]] = {}  # with their gradients

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(map(is_wrapper, types)):
            return NotImplemented  # they run operators on what they hold, which come here
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return self.devices.told(args[0].fake_device)
        if func is LIFT and type(args[0]) is torch.Tensor and args[0].device.type == "cpu" and _is_dense(args[0]):
            return self._lifted(func, args)
        kwargs = with_real_device(kwargs or {})
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}  # there is no generator for the fake device
        if is_locked := bool(kwargs.get("pin_memory")):
            kwargs = {**kwargs, "pin_memory": None}  # of the host, whose memory is never a fake device's
        inputs = tensors_in((args, kwargs), [])
        others = [tensor for tensor in inputs if not isinstance(tensor, FakeTensor)]
        if _is_meta(kwargs, inputs, others):  # has no memory on any device
            with no_dispatch():
                result = func(*args, **kwargs)
            if not inputs:
                result = self._with_default_dtype(func, args, kwargs, result)
            self.made_on_meta.add(tensors_in(result, []))
            return result
        written = written_tensors(func, args, kwargs)
        if written and any(_is_real(tensor) for tensor in written):
            raise real_write_error(func, self._current_module())
        known = [known_values(tensor) for tensor in inputs]
        all_known = all(k is not None for k in known) and bool(inputs or func in FACTORIES)
        if func is LOCAL_SCALAR:
            return self._scalar(func, inputs[0], known[0])
        if func is SAFE_SOFTMAX and inputs[0].device.type == "cuda":
            if not self._is_math_attention:
                raise math_attention_error(func, self._current_module())
            with self:  # its kernel runs operators, each of which allocates
                return safe_softmax(*args, **kwargs)
        if func is aten.convolution.default:
            check_devices(set(map(_device, inputs)))
        if func is aten.index.Tensor:
            args = (args[0], self._indices(func, args[1]))
        try:
            if others and func is not LIFT:
                result = self._run(func, *self._fake_real_inputs(args, kwargs))
            else:
                result = self._run(func, args, kwargs, inputs)
            if func in NORMS and inputs[0].device.type == "cpu" and (weight := args[NORMS[func]]) is not None:
                # Mean and deviation have the dtype of the weight; torch's fake kernel takes that of the input.
                result = (result[0], *(self._in_dtype(each, weight.dtype) for each in result[1:]))
            if not any(tensor.dtype.is_floating_point or tensor.dtype.is_complex for tensor in inputs):
                result = self._with_default_dtype(func, args, kwargs, result)
        except ForecastError as error:
            if error.fields.get("cause") != "needs a card":
                raise
            raise no_kernel_error(func, self._current_module()) from error  # torch would run it on real tensors
        except DATA_DEPENDENT as error:
            if not all_known and returns_condition(func):
                return self.answers.condition(func)
            if not all_known:
                raise self.answers.refusal(func) from error
            result = self._to_fake(run_on_values(func, args, kwargs), args[0].device)
        except (UnsupportedOperatorException, RuntimeError) as error:
            missing = isinstance(error, UnsupportedOperatorException | NotImplementedError)
            if not missing and "no fake impl" not in str(error):
                raise
            raise no_kernel_error(func, self._current_module()) from error
        outputs = tensors_in(result, [])
        if func is UNSCALE:  # gradients are taken to be finite: a step that GradScaler skips allocates less
            written = tensors_in(args[0], [])
        propagate_values(func, args, kwargs, outputs, written, known, all_known)
        if any(tensor.layout is not torch.strided for tensor in outputs):
            raise not_strided_error(func, self._current_module())
        set_page_locked(*outputs if is_locked else ())
        lifted = func is LIFT  # its input is the same tensor before it became fake
        self._on_operator(func, args, result, outputs if lifted else [*inputs, *outputs])
        return result

    @contextmanager
    def math_attention(self) -> Iterator[None]:
        """Attention by ordinary operators is that of the card, within this scope."""
        before, self._is_math_attention = self._is_math_attention, True
        try:
            yield
        finally:
            self._is_math_attention = before

    def set_default_dtype(self, dtype: torch.dtype) -> None:
        """``torch.set_default_dtype`` for this forecast."""
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"only floating-point types are supported as the default type, not {dtype}")
        self.default_dtype = dtype

    def _with_default_dtype(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """The result of an operator that was given no floating-point dtype, with the default one of this forecast."""
        if func.namespace != "aten" or any(isinstance(each, torch.dtype) for each in (*args, *kwargs.values())):
            return result
        return tree_map_only(torch.Tensor, lambda tensor: self._in_dtype(tensor, self.default_dtype), result)

    def _in_dtype(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not tensor.dtype.is_floating_point or tensor.dtype == dtype:
            return tensor
        if isinstance(tensor, FakeTensor):
            return self._empty(tensor.shape, tensor.stride(), dtype, tensor.fake_device)
        with no_dispatch():
            return tensor.to(dtype)  # on the meta device

    def _fake_real_inputs(self, args: Any, kwargs: Any) -> tuple[Any, Any, list[torch.Tensor]]:
        """Replace real tensors by fakes whose storages are marked as real, so that writes to them are detected.

        Returns:
            The arguments, and all tensors in them.
        """

        def fake_if_real(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
                return tensor
            fake = self._mode.from_tensor(tensor)
            fake.untyped_storage()._i2v_lab_is_real = True  # type: ignore[attr-defined]
            seen = self._real_leaves.get(id(tensor))
            if tensor.requires_grad and tensor.is_leaf and (seen is None or seen[0]() is None):
                self._real_leaves[id(tensor)] = (weakref.ref(tensor), tensor.grad)
            return fake

        args, kwargs = tree_map_only(torch.Tensor, fake_if_real, (args, kwargs))
        return args, kwargs, tensors_in((args, kwargs), [])

    def restore_gradients(self) -> None:
        """Restore the ``grad`` of real leaves, in which a backward pass has accumulated fakes."""
        for reference, gradient in self._real_leaves.values():
            leaf = reference()
            if leaf is not None:
                leaf.grad = gradient

    def _run(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        """``FakeTensorMode``'s result, by a fast path where there is one."""
        if func is aten.empty.memory_format and kwargs.get("device") is not None:
            return self._fake(func, args, {**kwargs, "device": META, "pin_memory": None}, kwargs["device"])
        if func in VIEWS and isinstance(inputs[0], FakeTensor):
            return self._fake(func, args, kwargs, inputs[0].fake_device)
        if not makes_new_tensors(func):
            return args[0] if func in FILLS and _is_filled(args) else func(*args, **kwargs)
        if func is CUDNN_RNN:
            raise no_kernel_error(func, self._current_module())  # torch's fake one wants a buffer that is optional
        if func is ONEDNN_RNN:
            return self._on_zeros(func, args, inputs[0])
        key = (func, _layout(args), _layout(kwargs))
        outputs = self._outputs.get(key)
        if outputs is None:
            result = self._apart(func(*args, **kwargs))
            self._outputs[key] = _outputs(result, inputs)
            return result
        fakes = [self._empty(*layout) for layout in outputs.tensors]
        return fakes if outputs.many else fakes[0]

    def _lifted(self, func: Any, args: Any) -> FakeTensor:
        """A fake with the values of a real tensor, which nothing else holds."""
        real = args[0]
        fake = self._empty(real.shape, real.stride(), real.dtype, real.device)
        keep_values(fake, KnownValues(real, [True]))
        self._on_operator(func, args, fake, [fake])
        return fake

    def _empty(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> FakeTensor:
        with no_dispatch():
            meta = torch.empty_strided(size, stride, dtype=dtype, device=META)
        return FakeTensor(self._mode, meta, device)

    def _apart(self, result: Any) -> Any:
        """The results, each on a storage of its own, also where a fake kernel returned one tensor twice.

        Torch's cache of fake results gives a second call two, as a real kernel does.
        """
        if not isinstance(result, list | tuple):
            return result
        return [
            self._empty(each.shape, each.stride(), each.dtype, each.fake_device)
            if isinstance(each, FakeTensor) and any(each is other for other in result[:index])
            else each
            for index, each in enumerate(result)
        ]

    def _on_zeros(self, func: Any, args: Any, source: torch.Tensor) -> list[FakeTensor | None]:
        """Results as large as those on real zeros, for the workspace of oneDNN, whose size only it knows."""
        with no_dispatch():
            real = func(*tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), args))
            metas = [
                t if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META) for t in real
            ]
        return [meta if meta is None else FakeTensor(self._mode, meta, _device(source)) for meta in metas]

    def _fake(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        with in_kernel_invocation_manager(self._mode):
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            return FakeTensor(self._mode, result, device)
        return [FakeTensor(self._mode, tensor, device) for tensor in result]

    def _to_fake(self, result: Any, device: torch.device) -> Any:
        return tree_map_only(torch.Tensor, lambda real: self._mode.from_tensor(real).to(device), result)

    def _indices(self, func: Any, indices: Any) -> list[Any]:
        """Replace masks whose values are known by the positions that they select."""
        found: list[Any] = []
        for index in indices:
            if not isinstance(index, torch.Tensor) or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            known = known_values(index)
            if known is None:
                raise self.answers.refusal(func)
            found += selected_positions(index, known) if index.dim() else [index]
        return found

    def _scalar(self, func: Any, tensor: torch.Tensor, known: KnownValues | None) -> Any:
        if known is None:
            return self.answers.number(func, tensor)
        with no_dispatch():
            return known.real.item()
