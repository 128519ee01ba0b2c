"""Float8 weights with scales, as published checkpoints have them: which keys belong together, and the exact product.

Next to ``<layer>.weight`` in float8 such a file has ``<layer>.weight_scale`` or ``<layer>.scale_weight``: a factor of
the whole tensor or of each output channel. The weight is their product. ``<layer>.input_scale`` or ``scale_input`` is
the factor by which activations are quantized for a product in float8. Runs here multiply in bfloat16, where activations
are not quantized, so it has no use and is not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

WEIGHT_SCALES = ("weight_scale", "scale_weight")
INPUT_SCALES = ("input_scale", "scale_input")
MARKER = "scaled_fp8"  # an empty tensor below a prefix: the float8 weights under it have scales
DESCRIPTION = "comfy_quant"  # JSON as bytes: the format of one layer
CHUNK_ELEMENTS = 2**20  # of float32 at a time, while a product is made


def weight_of(key: str) -> str | None:
    """The name of the weight that a companion key belongs to; ``None`` for any other key.

    Example:
        >>> weight_of("block.to_q.scale_weight")
        'block.to_q.weight'
    """
    layer, _, name = key.rpartition(".")
    return f"{layer}.weight" if layer and name in (*WEIGHT_SCALES, *INPUT_SCALES, DESCRIPTION) else None


def is_marker(key: str) -> bool:
    """Whether a key marks a file, or the part of it under a prefix, as float8 with scales."""
    return key.rpartition(".")[2] == MARKER


def scale_keys(keys: Iterable[str]) -> dict[str, str]:
    """For each weight with a scale, the scale's key.

    Example:
        >>> scale_keys(["a.weight", "a.weight_scale", "a.input_scale", "b.weight"])
        {'a.weight': 'a.weight_scale'}
    """
    found = ((weight_of(key), key) for key in keys if key.rpartition(".")[2] in WEIGHT_SCALES)
    return {weight: key for weight, key in found if weight is not None}


def own_keys(keys: Iterable[str]) -> list[str]:
    """The keys without companions and markers."""
    return [key for key in keys if weight_of(key) is None and not is_marker(key)]


def fits(scale: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether a scale of shape ``scale`` is one factor, or one for each output channel, of a weight's shape.

    Example:
        >>> fits((), (8, 4)), fits((8, 1), (8, 4)), fits((4,), (8, 4))
        (True, True, False)
    """
    if all(size == 1 for size in scale):
        return True
    return bool(weight) and scale[0] == weight[0] and all(size == 1 for size in scale[1:])


def dequantized(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The product of a float8 weight and its scale, computed in float32 and rounded once.

    Some rows at a time, so that no float32 copy of the whole tensor exists.

    Args:
        weight: Float8, of any shape.
        scale: One element, or one for each index of the weight's first dimension.
        dtype: Of the result.

    Returns:
        A tensor of the weight's shape, on its device.

    Example:
        >>> dequantized(torch.tensor([[2.0], [4.0]]).to(torch.float8_e4m3fn), torch.tensor([0.5, 3.0])).tolist()
        [[1.0], [12.0]]
    """
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if not weight.numel():
        return result
    rows = weight.shape[0] if weight.ndim else 1
    factor = scale.to(weight.device, torch.float32).reshape(-1)
    parts = (weight.reshape(rows, -1), result.view(rows, -1), factor.expand(rows)[:, None])
    step = max(1, CHUNK_ELEMENTS * rows // weight.numel())
    for source, target, factors in zip(*(part.split(step) for part in parts), strict=True):
        target.copy_(source.to(torch.float32).mul_(factors))
    return result


def as_weight(tensor: torch.Tensor) -> torch.Tensor:
    """A weight in bfloat16, in which runs compute, unless it is in float8_e4m3fn, which is cast when it is used.

    ltx-core builds a transformer for fp8-cast with the dtypes of its file, and fuses a LoRA with no others than these.

    Example:
        >>> [as_weight(torch.ones(1, dtype=dtype)).dtype for dtype in (torch.float32, torch.float8_e4m3fn)]
        [torch.bfloat16, torch.float8_e4m3fn]
    """
    return tensor if tensor.dtype == torch.float8_e4m3fn else tensor.to(torch.bfloat16)
