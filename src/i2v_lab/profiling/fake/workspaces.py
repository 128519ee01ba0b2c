"""What CUDA's libraries allocate on the device besides tensors: modelled from measurements, since no fake run sees it.

The figures are in ``data/workspaces.json``, which says where they come from; ``make calibrate`` fits them again to the
measurements in ``data/measured``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from i2v_lab.paths import data_dir

aten = torch.ops.aten

MATRIX_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Workspaces:
    """Bytes that libraries take.

    cuDNN convolves 16-bit tensors with kernels that want their channels last. For tensors whose channels come first, as
    in every model here, it lays out input, weight and output anew in a workspace of its own, which is therefore about
    as large as the three together. cuBLAS takes one workspace with its first product and keeps it.

    Attributes:
        input_factor: Of a convolution's input, how much more its workspace holds, where channels come first.
        output_factor: Of its output, likewise.
        weight_factor: Of its weight, wherever channels come.
        cublas_bytes: Held from the first matrix product on.
        context_bytes: What the CUDA context and the loaded libraries take from the card; never part of a forecast peak.
    """

    input_factor: float
    output_factor: float
    weight_factor: float
    cublas_bytes: int
    context_bytes: int

    def held(self, func: Any) -> tuple[str, int]:
        """The library that an operator starts up, and what that takes for good; empty and 0 for none."""
        return ("cuBLAS", self.cublas_bytes) if func in MATRIX_PRODUCTS else ("", 0)

    def borrowed(self, func: Any, args: tuple[Any, ...], result: Any) -> int:
        """What an operator's kernel takes and gives back before it returns."""
        if func is not aten.convolution.default:
            return 0
        source, weight, groups = args[0], args[1], args[8]
        if source.dtype not in HALVES or groups > 1:  # depthwise kernels of ATen's own, and grouped ones, take nothing
            return 0
        nbytes = self.weight_factor * _tensor_bytes(weight)
        if source.is_contiguous():
            nbytes += self.input_factor * _tensor_bytes(source) + self.output_factor * _tensor_bytes(result)
        return math.ceil(nbytes)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def load_workspaces() -> Workspaces:
    """The model in ``data/workspaces.json``.

    Example:
        >>> load_workspaces().cublas_bytes
        33554432
    """
    values = json.loads((data_dir() / "workspaces.json").read_text())
    return Workspaces(**{name: values[name] for name in Workspaces.__dataclass_fields__})
