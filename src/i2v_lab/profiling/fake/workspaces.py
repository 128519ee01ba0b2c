"""Model of the workspaces that CUDA's libraries allocate besides tensors, fitted to measurements.

The figures are in ``data/workspaces.json``, which says where they come from; ``i2v-lab calibrate`` fits them again to
the measurements in ``data/measured``.
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
HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Workspaces:
    """Sizes of workspaces.

    cuDNN convolves 16-bit tensors with channels-last kernels. For channels-first tensors, as in every model here, it
    transposes input, weight and output in a transient workspace, which is therefore about as large as the three
    together. cuBLAS allocates one persistent workspace at its first matrix product.

    Attributes:
        input_factor: Bytes of a convolution's workspace for each byte of its input, where that is channels-first.
        output_factor: The same for its output.
        weight_factor: The same for its weight, in either layout.
        cublas_bytes: Allocated from the first matrix product on.
        context_bytes: Memory of the CUDA context and the loaded libraries; never part of a forecast peak.
    """

    input_factor: float
    output_factor: float
    weight_factor: float
    cublas_bytes: int
    context_bytes: int

    def persistent(self, func: Any) -> tuple[str, int]:
        """The library that an operator initialises, and the bytes of its workspace; empty and 0 for none."""
        return ("cuBLAS", self.cublas_bytes) if func in MATRIX_PRODUCTS else ("", 0)

    def transient(self, func: Any, args: tuple[Any, ...], result: Any) -> int:
        """Bytes that an operator's kernel allocates and frees before it returns."""
        if func is not aten.convolution.default:
            return 0
        source, weight, groups = args[0], args[1], args[8]
        if source.dtype not in HALF_DTYPES or groups > 1:  # ATen's depthwise kernels and grouped ones use none
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
    values = json.loads((data_dir() / "workspaces.json").read_text(encoding="utf-8"))
    return Workspaces(**{name: values[name] for name in Workspaces.__dataclass_fields__})
