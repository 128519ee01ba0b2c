"""Model of the workspaces that CUDA's libraries allocate besides tensors, fitted to measurements.

The figures are in ``data/workspaces.json``, which says where they come from; ``i2v-lab calibrate`` fits them again to
the measurements in ``data/measured``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from i2v_lab.paths import data_dir

aten = torch.ops.aten

MATRIX_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
HALF_DTYPES = (torch.float16, torch.bfloat16)
OTHER = "other"  # compute capabilities that are not named


@dataclass(frozen=True)
class Workspaces:
    """Sizes of workspaces.

    cuDNN convolves 16-bit tensors with channels-last kernels. For channels-first tensors, as in every model here, it
    transposes input, weight and output in a transient workspace, which is therefore about as large as the three
    together. Other dtypes and larger batches are as they were measured. cuBLAS allocates one persistent workspace at
    its first matrix product, and cuBLASLt another at the first one with a bias, as of a linear layer.

    Attributes:
        input_factor: Bytes of a convolution's workspace for each byte of its input, where that is channels-first.
        output_factor: The same for its output.
        weight_factor: The same for its weight, in either layout.
        cublas_bytes: Allocated from the first matrix product on, on the card that was measured.
        context_bytes: Memory of the CUDA context and the loaded libraries; never part of a forecast peak.
        factors: The three factors of input, output and weight by dtype and batch, where they were measured; a batch
            between two takes those of the smaller one. Elsewhere 16-bit tensors have those above, others no workspace.
        cublas_bytes_by_capability: Of cards by their compute capability, such as ``9.0``, and of all ``other`` ones.
            Source: ``parseChosenWorkspaceSize`` in ATen's ``CublasHandlePool.cpp``.
        cublaslt_bytes: Allocated from the first matrix product with a bias on, on every card. Source:
            ``parseCUDABlasLtWorkspaceSize`` there.
    """

    input_factor: float
    output_factor: float
    weight_factor: float
    cublas_bytes: int
    context_bytes: int
    factors: Mapping[str, Mapping[int, tuple[float, float, float]]] = field(default_factory=dict)
    cublas_bytes_by_capability: Mapping[str, int] = field(default_factory=dict)
    cublaslt_bytes: int = 0

    def persistent(self, func: Any, args: tuple[Any, ...], capability: tuple[int, int] = (9, 0)) -> dict[str, int]:
        """The libraries that an operator initialises, and the bytes of their workspaces.

        Args:
            func: The operator.
            args: Its arguments.
            capability: Compute capability of the card.
        """
        if func not in MATRIX_PRODUCTS:
            return {}
        sizes = self.cublas_bytes_by_capability
        other = sizes.get(OTHER, self.cublas_bytes)
        cublas = {"cuBLAS": sizes.get(".".join(map(str, capability)), other)}
        has_bias = func is aten.addmm.default and args[0].dim() == 1
        return {**cublas, "cuBLASLt": self.cublaslt_bytes} if has_bias and self.cublaslt_bytes else cublas

    def transient(self, func: Any, args: tuple[Any, ...], result: Any) -> int:
        """Bytes that an operator's kernel allocates and frees before it returns."""
        if func is not aten.convolution.default:
            return 0
        source, weight, groups = args[0], args[1], args[8]
        if groups > 1 or weight[0, 0].numel() == 1:  # ATen's depthwise and grouped kernels, and 1x1 ones, use none
            return 0
        input_factor, output_factor, weight_factor = self._factors(source.dtype, len(source))
        nbytes = weight_factor * _tensor_bytes(weight)
        if source.is_contiguous():
            nbytes += input_factor * _tensor_bytes(source) + output_factor * _tensor_bytes(result)
        return math.ceil(nbytes)

    def _factors(self, dtype: torch.dtype, batch: int) -> tuple[float, float, float]:
        measured = self.factors.get(str(dtype).removeprefix("torch."))
        if measured:
            return measured[max((each for each in measured if each <= batch), default=min(measured))]
        return (self.input_factor, self.output_factor, self.weight_factor) if dtype in HALF_DTYPES else (0.0, 0.0, 0.0)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def load_workspaces() -> Workspaces:
    """The model in ``data/workspaces.json``.

    Example:
        >>> load_workspaces().cublas_bytes
        33554432
    """
    values = json.loads((data_dir() / "workspaces.json").read_text(encoding="utf-8"))
    given = {name: values[name] for name in Workspaces.__dataclass_fields__ if name in values}
    by_dtype = values.get("factors", {})
    given["factors"] = {
        dtype: {int(batch): tuple(factors) for batch, factors in by_batch.items()}
        for dtype, by_batch in by_dtype.items()
    }
    return Workspaces(**given)
