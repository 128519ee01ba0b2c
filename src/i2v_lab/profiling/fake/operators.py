"""Operators on fake tensors: by the shortest way to the true result, with the values of small tensors where known."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.operator_kinds import FACTORIES, VIEWS, makes_new_tensors, tensors_in, written_tensors

aten = torch.ops.aten

KNOWN_ELEMENTS = 4096  # a tensor of up to this many elements keeps its values, where they are known
META = torch.device("meta")
DEVICE = torch.ops.prim.device.default
UNANSWERABLE = (fake_tensor.DynamicOutputShapeException, fake_tensor.DataDependentOutputException)

# Told of every operator that ran: itself, its arguments, its result, and all tensors in both.
Watch = Callable[[Any, tuple[Any, ...], Any, list[torch.Tensor]], None]


@dataclass(slots=True)
class Known:
    """The values of a fake tensor; those that share a storage share ``valid``."""

    real: torch.Tensor
    valid: list[bool]


def known_values(tensor: torch.Tensor) -> Known | None:
    """A tensor's values, where they are known; a small real tensor's own."""
    if isinstance(tensor, FakeTensor):
        known: Known | None = getattr(tensor, "_i2v_lab_known", None)
        return known if known is not None and known.valid[0] else None
    return Known(tensor, [True]) if tensor.numel() <= KNOWN_ELEMENTS and tensor.device.type == "cpu" else None


def unanswerable(operator: Any, module: str) -> ForecastError:
    """For an operator that asks for values which are not known."""
    return ForecastError(
        f"operator {operator} asks for values that a forecast does not know, in {module or 'no module'}; what follows "
        "from them can only be measured by a real run",
        operator=str(operator),
        module=module,
    )


@dataclass(frozen=True, slots=True)
class _Outputs:
    """What an operator made: size, stride, dtype and device of each tensor; and whether it returned several."""

    tensors: list[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]]
    many: bool


def _outputs(result: Any, inputs: list[torch.Tensor]) -> _Outputs | None:
    """To make the like of a result again; ``None`` where it is not just new, dense tensors."""
    many = isinstance(result, list | tuple)
    tensors = list(result) if many else [result]
    if not all(isinstance(tensor, FakeTensor) for tensor in tensors) or not are_new(tensors, inputs):
        return None
    return _Outputs([(t.shape, t.stride(), t.dtype, t.fake_device) for t in tensors], many)


def are_new(tensors: list[torch.Tensor], inputs: list[torch.Tensor]) -> bool:
    """Whether each of ``tensors`` fills a storage of its own, which none of ``inputs`` has.

    Not so for views, whether they say so or not (``_unsafe_view`` does not).
    """
    taken = {tensor.untyped_storage()._cdata for tensor in inputs}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata in taken or tensor.storage_offset() or tensor.numel() == 0:
            return False
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if storage.nbytes() != span * tensor.itemsize:
            return False
        taken.add(storage._cdata)
    return True


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor's data are real, its own or those that a fake stands for."""
    if not isinstance(tensor, FakeTensor):
        return tensor.device.type != "meta"
    return getattr(tensor.untyped_storage(), "_i2v_lab_stands_for_real", False)


def _device(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is; a fake's own ``.device`` is slow."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _check_devices(inputs: list[torch.Tensor]) -> None:
    """What torch checks for every other fake operator: a convolution of mixed devices fails only where it is real."""
    devices = set(map(_device, inputs))
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors of a convolution to be on the same device, but found {found}")


def _shapes(value: Any) -> Any:
    """Nested arguments with each tensor by its layout, to compare."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, _device(value))
    if isinstance(value, list | tuple):
        return tuple([_shapes(item) for item in value])
    if isinstance(value, dict):
        return tuple([(key, _shapes(item)) for key, item in value.items()])
    return (type(value), value)


def _is_meta(kwargs: dict[str, Any], inputs: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    device = kwargs.get("device")
    if device is not None and device.type != "meta":
        return False
    if inputs:
        return len(others) == len(inputs) and all(tensor.device.type == "meta" for tensor in others)
    return device is not None


class FakeOperators(TorchDispatchMode):
    """Keeps known values known, and answers from them what a fake tensor cannot answer."""

    def __init__(self, mode: FakeTensorMode, where: Callable[[], str], watch: Watch) -> None:
        super().__init__()
        self._mode = mode
        self._where = where
        self._watch = watch
        self._seen: dict[Any, _Outputs | None] = {}
        self._leaves: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor | None]] = {}  # and their gradients

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's wrapper against it costs as much as the rest

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}  # there is no generator for the fake device
        inputs = tensors_in((args, kwargs), [])
        others = [tensor for tensor in inputs if not isinstance(tensor, FakeTensor)]
        if _is_meta(kwargs, inputs, others):  # a skeleton, which has no memory anywhere
            with no_dispatch():
                return func(*args, **kwargs)
        written = written_tensors(func, args, kwargs)
        if written and any(_is_real(tensor) for tensor in written):
            raise ForecastError(
                f"operator {func} in {self._where() or 'no module'} would write to a real tensor, which a forecast "
                "leaves alone; write to its clone(), make it inside the callable, or pass it or its module as an "
                "argument",
                operator=str(func),
                module=self._where(),
            )
        known = [known_values(tensor) for tensor in inputs]
        all_known = all(k is not None for k in known) and bool(inputs or func in FACTORIES)
        if func is aten._local_scalar_dense.default:
            return self._scalar(func, known[0])
        if func is aten._safe_softmax.default and inputs[0].device.type == "cuda":
            raise ForecastError(
                f"attention in {self._where() or 'no module'} was called by a name of its own, so that the kernel of a "
                "real card cannot take its place; call torch.nn.functional.scaled_dot_product_attention",
                operator=str(func),
                module=self._where(),
            )
        if func is aten.convolution.default:
            _check_devices(inputs)
        if func is aten.index.Tensor:
            args = (args[0], [self._index(func, index) for index in args[1]])
        try:
            if others and func is not aten.lift_fresh.default:
                result = self._run(func, *self._stand_ins(args, kwargs))
            else:
                result = self._run(func, args, kwargs, inputs)
        except UNANSWERABLE as error:
            if not all_known:
                raise unanswerable(func, self._where()) from error
            result = self._faked(self._really(func, args, kwargs), args[0].device)
        except (fake_tensor.UnsupportedOperatorException, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "no fake impl" not in str(error):
                raise
            raise ForecastError(
                f"operator {func} has no fake kernel, so what it allocates cannot be forecast; it ran in "
                f"{self._where() or 'no module'}; register one with torch.library.register_fake",
                operator=str(func),
                module=self._where(),
            ) from error
        outputs = tensors_in(result, [])
        self._follow(func, args, kwargs, outputs, written, known, all_known)
        lifted = func is aten.lift_fresh.default  # its input is the same tensor, on its way to being a fake
        self._watch(func, args, result, outputs if lifted else [*inputs, *outputs])
        return result

    def _stand_ins(self, args: Any, kwargs: Any) -> tuple[Any, Any, list[torch.Tensor]]:
        """The arguments, and all tensors in them, with fakes for the real ones, marked so that their views tell."""

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
                return tensor
            fake = self._mode.from_tensor(tensor)
            fake.untyped_storage()._i2v_lab_stands_for_real = True  # type: ignore[attr-defined]
            met = self._leaves.get(id(tensor))
            if tensor.requires_grad and tensor.is_leaf and (met is None or met[0]() is None):
                self._leaves[id(tensor)] = (weakref.ref(tensor), tensor.grad)
            return fake

        args, kwargs = tree_map_only(torch.Tensor, stand_in, (args, kwargs))
        return args, kwargs, tensors_in((args, kwargs), [])

    def restore_gradients(self) -> None:
        """Give real leaves, in whose ``grad`` a backward leaves fakes, the gradients that they had."""
        for reference, gradient in self._leaves.values():
            leaf = reference()
            if leaf is not None:
                leaf.grad = gradient

    def _run(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        """``FakeTensorMode``'s result, by a shorter way than its own where there is one."""
        if func is aten.empty.memory_format and kwargs.get("device") is not None:
            return self._fake(func, args, {**kwargs, "device": META, "pin_memory": None}, kwargs["device"])
        if func in VIEWS and isinstance(inputs[0], FakeTensor):
            return self._fake(func, args, kwargs, inputs[0].fake_device)
        if not makes_new_tensors(func):
            return func(*args, **kwargs)
        # A factory answers in the default dtype where it is given none.
        key = (func, torch.get_default_dtype(), _shapes(args), _shapes(kwargs))
        seen = self._seen.get(key)
        if seen is None:
            result = func(*args, **kwargs)
            self._seen[key] = _outputs(result, inputs)
            return result
        with no_dispatch():
            metas = [
                torch.empty_strided(size, stride, dtype=dtype, device=META) for size, stride, dtype, _ in seen.tensors
            ]
        made = [FakeTensor(self._mode, meta, one[3]) for meta, one in zip(metas, seen.tensors, strict=True)]
        return made if seen.many else made[0]

    def _fake(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        with in_kernel_invocation_manager(self._mode):
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            return FakeTensor(self._mode, result, device)
        return [FakeTensor(self._mode, tensor, device) for tensor in result]

    def _follow(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        outputs: list[torch.Tensor],
        written: list[torch.Tensor],
        known: Any,
        all_known: bool,
    ) -> None:
        """Work out the results' values from those of the inputs, or forget what was overwritten."""
        if not all_known and not written:
            return
        small = all(tensor.numel() <= KNOWN_ELEMENTS for tensor in outputs)
        if not (all_known and small) or torch.Tag.nondeterministic_seeded in func.tags:
            for overwritten in map(known_values, written):
                if overwritten is not None:
                    overwritten.valid[0] = False
            return
        cells = {k.real.untyped_storage()._cdata: k.valid for k in known}
        real = tensors_in(self._really(func, args, kwargs), [])
        for fake, value in zip(outputs, real, strict=True):
            if isinstance(fake, FakeTensor):
                cell = cells.get(value.untyped_storage()._cdata, [True])
                fake._i2v_lab_known = Known(value, cell)  # type: ignore[attr-defined]

    def _really(self, func: Any, args: Any, kwargs: Any) -> Any:
        def value(tensor: torch.Tensor) -> torch.Tensor:
            known = known_values(tensor)
            assert known is not None
            return known.real

        args, kwargs = tree_map_only(torch.Tensor, value, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with no_dispatch():
            return func(*args, **kwargs)

    def _faked(self, result: Any, device: torch.device) -> Any:
        return tree_map_only(torch.Tensor, lambda real: self._mode.from_tensor(real).to(device), result)

    def _index(self, func: Any, index: Any) -> Any:
        """A mask whose values are known, as the positions that it selects."""
        if not isinstance(index, torch.Tensor) or index.dtype not in (torch.bool, torch.uint8):
            return index
        known = known_values(index)
        if known is None:
            raise unanswerable(func, self._where())
        if index.dim() != 1:
            return index
        with no_dispatch():
            positions = known.real.nonzero().flatten()
        fake = torch.empty(positions.shape, dtype=torch.int64, device=index.device)
        fake._i2v_lab_known = Known(positions, [True])  # type: ignore[attr-defined]
        return fake

    def _scalar(self, func: Any, known: Known | None) -> Any:
        if known is None:
            raise unanswerable(func, self._where())
        with no_dispatch():
            return known.real.item()
