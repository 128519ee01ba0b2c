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

    cuDNN convolves with channels-last kernels. For channels-first tensors, as in every model here, it transposes input,
    weight and output in a transient workspace, which is therefore as large as the three together, whatever the batch;
    16-bit channels are padded to a multiple of eight. An input in neither order is copied by ATen first. cuBLAS
    allocates one persistent workspace at its first matrix product, and cuBLASLt another at the first one with a bias,
    as of a linear layer.

    Attributes:
        input_factor: Bytes of a convolution's workspace for each byte of its input, where that is channels-first.
        output_factor: The same for its output.
        weight_factor: The same for its weight, in either layout.
        cublas_bytes: Allocated from the first matrix product on, on the card that was measured.
        context_bytes: Memory of the CUDA context and the loaded libraries; never part of a forecast peak.
        factors: The three factors of input, output and weight by dtype, where they were measured. Elsewhere 16-bit
            tensors have those above, others no workspace.
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
    factors: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
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
        copy_bytes = 0 if source.is_contiguous() or _is_channels_last(source) else _tensor_bytes(source)
        if groups > 1 or weight[0, 0].numel() == 1:  # ATen's depthwise and grouped kernels, and 1x1 ones, use none
            return copy_bytes
        input_factor, output_factor, weight_factor = self._factors(source.dtype)
        nbytes = weight_factor * _tensor_bytes(weight)
        if not _is_channels_last(source):
            nbytes += input_factor * _padded_bytes(source) + output_factor * _padded_bytes(result)
        return copy_bytes + math.ceil(nbytes)

    def _factors(self, dtype: torch.dtype) -> tuple[float, float, float]:
        general = (
            (self.input_factor, self.output_factor, self.weight_factor) if dtype in HALF_DTYPES else (0.0, 0.0, 0.0)
        )
        return self.factors.get(str(dtype).removeprefix("torch."), general)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _padded_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in channels-last order, whose 16-bit channels cuDNN pads to a multiple of eight."""
    channels = tensor.shape[1]
    padded = -(-channels // 8) * 8 if tensor.dtype in HALF_DTYPES else channels
    return _tensor_bytes(tensor) // max(channels, 1) * padded


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether ATen leaves a convolution's input in channels-last order; one in any other order it copies first."""
    if tensor.is_contiguous() or tensor.dim() not in (4, 5):
        return False
    order = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.is_contiguous(memory_format=order)


def load_workspaces() -> Workspaces:
    """The model in ``data/workspaces.json``.

    Example:
        >>> load_workspaces().cublas_bytes
        33554432
    """
    values = json.loads((data_dir() / "workspaces.json").read_text(encoding="utf-8"))
    given = {name: values[name] for name in Workspaces.__dataclass_fields__ if name in values}
    given["factors"] = {dtype: tuple(factors) for dtype, factors in values.get("factors", {}).items()}
    return Workspaces(**given)
