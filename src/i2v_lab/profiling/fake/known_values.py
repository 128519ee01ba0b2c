"""Values of fake tensors, where they are known: code that branches on them takes the branch of a real run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from i2v_lab.profiling.fake.operator_kinds import is_view, tensors_in
from i2v_lab.torch_compat import FakeTensor, no_dispatch, storage_key, tree_map_only

KNOWN_ELEMENTS = 4096  # a computed tensor of up to this many elements keeps its values, where they are known
CPU = torch.device("cpu")
LIFT = torch.ops.aten.lift_fresh.default


@dataclass(slots=True)
class KnownValues:
    """The values of a fake tensor.

    Attributes:
        real: A real tensor on the CPU with these values.
        valid: One element, shared by all tensors on a storage: ``False`` once that was overwritten with unknown values.
        read_only: Whether the storage of ``real`` belongs to the code under forecast, and is never written to.
    """

    real: torch.Tensor
    valid: list[bool]
    read_only: bool = False


def known_values(tensor: torch.Tensor) -> KnownValues | None:
    """A tensor's values, where they are known: those that a fake keeps, and a real tensor's own on the CPU."""
    if isinstance(tensor, FakeTensor):
        known: KnownValues | None = getattr(tensor, "_i2v_lab_known", None)
        return known if known is not None and known.valid[0] else None
    return KnownValues(tensor, [True], read_only=True) if tensor.device.type == "cpu" else None


def keep_values(fake: torch.Tensor, known: KnownValues | None) -> None:
    """Let a fake tensor have these values, or unknown ones."""
    fake._i2v_lab_known = known  # type: ignore[attr-defined]


def keep_values_of(original: torch.Tensor, fake: torch.Tensor) -> None:
    """Let the fake that replaces a real tensor have its values: a copy of few, many without a copy."""
    if original.device.type != "cpu" or type(original) not in (torch.Tensor, torch.nn.Parameter):
        return
    if original.layout is torch.strided:
        with no_dispatch():
            real = original.detach()
            large = real.numel() > KNOWN_ELEMENTS
            keep_values(fake, KnownValues(real if large else real.clone(), [True], read_only=large))


def propagate_values(
    func: Any,
    args: Any,
    kwargs: Any,
    outputs: Sequence[torch.Tensor],
    written: Sequence[torch.Tensor],
    known: Sequence[KnownValues | None],
    all_known: bool,
) -> None:
    """Compute the outputs' values from those of the inputs, or invalidate those of overwritten tensors.

    Computed for real are views, which take no memory, and results of few elements: such as a reduction over a picture.

    Args:
        func: The operator that ran on fakes.
        args: Its arguments.
        kwargs: Its keyword arguments.
        outputs: The tensors that it returned.
        written: Those that it wrote to.
        known: Of each tensor among its arguments.
        all_known: Whether all inputs are known.
    """
    if not all_known and not written:
        return
    small = all(tensor.numel() <= KNOWN_ELEMENTS for tensor in outputs) or is_view(func)
    overwritten = [each for each in map(known_values, written) if each is not None]
    if (
        not (all_known and small)
        or torch.Tag.nondeterministic_seeded in func.tags
        or any(each.read_only for each in overwritten)
    ):
        for each in overwritten:
            each.valid[0] = False
        return
    sources = {storage_key(each.real): each for each in known if each is not None}
    real = tensors_in(run_on_values(func, args, kwargs), [])
    for fake, value in zip(outputs, real, strict=True):
        if isinstance(fake, FakeTensor):
            source = sources.get(storage_key(value))
            if value.dtype != fake.dtype:  # which is the default one of this forecast
                with no_dispatch():
                    value = value.to(fake.dtype)
            owner = None if func is LIFT else source  # which torch.tensor calls, on a tensor that it has made
            valid, read_only = (owner.valid, owner.read_only) if owner is not None else ([True], False)
            keep_values(fake, KnownValues(value, valid, read_only))


def run_on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator's result on the values of its arguments, all of which are known."""

    def value(tensor: torch.Tensor) -> torch.Tensor:
        known = known_values(tensor)
        assert known is not None
        return known.real

    args, kwargs = tree_map_only(torch.Tensor, value, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": CPU}
    with no_dispatch():
        return func(*args, **kwargs)


def selected_positions(index: torch.Tensor, known: KnownValues) -> list[torch.Tensor]:
    """The positions that a mask with known values selects, one tensor of int64 for each of its dimensions."""
    with no_dispatch():
        positions = known.real.nonzero(as_tuple=True)
    fakes = [torch.empty(each.shape, dtype=torch.int64, device=index.device) for each in positions]
    for fake, real in zip(fakes, positions, strict=True):
        keep_values(fake, KnownValues(real, [True]))
    return fakes
