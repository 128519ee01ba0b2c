"""The operators that a device profile is fitted to, each described by JSON values: what runs, and with which shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
    "f8": torch.float8_e4m3fn,
    "c128": torch.complex128,
}
CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
ROW = 512  # elements of the rows of memory-bound operators
DECODER = (1, 128, 73, 144, 192)  # an activation in the decoder of LTX-2.3
FRAMES = (8, 256, 288, 512)  # of eight frames at once, as in that of SVD
TOKENS = (1, 9984, 4096)  # of the transformer of LTX-2.3

Call = Callable[[], Any]
MEMORY: Mapping[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "mul scalar": lambda a, b: a * 0.5,
    "gelu": lambda a, b: functional.gelu(a, approximate="tanh"),
    "silu": lambda a, b: functional.silu(a),
    "pow": lambda a, b: a.pow(2),
    "clone": lambda a, b: a.clone(),
    "copy_": lambda a, b: b.copy_(a),
    "fill_": lambda a, b: b.zero_(),
    "eq": lambda a, b: a == b,
    "to f32": lambda a, b: a.float(),
    "to bf16": lambda a, b: a.to(torch.bfloat16),
    "f8 to bf16": lambda a, b: a.to(torch.bfloat16),
    "bf16 to f8": lambda a, b: a.to(torch.float8_e4m3fn),
    "cat": lambda a, b: torch.cat([a, b], 1),
    "mul row": lambda a, b: a * b[:1],
    "div row": lambda a, b: a / a[:, :1],
    "softmax": lambda a, b: a.softmax(-1),
    "layer_norm": lambda a, b: functional.layer_norm(a, (ROW,)),
    "mean": lambda a, b: a.mean(-1),
    "sum": lambda a, b: a.sum(),
    "randn": lambda a, b: torch.randn(a.shape, device=a.device, dtype=a.dtype),
    "pow 5d": lambda a, b: a.pow(2),
    "mean over channels 5d": lambda a, b: a.mean(1, keepdim=True),
    "vector_norm over channels 5d": lambda a, b: torch.linalg.vector_norm(a, 2, [1], True),
    "div channels 5d": lambda a, b: a / a[:, :1],
    "mul channel 5d": lambda a, b: a * a[0, :, :1, :1, :1],
    "cat time 5d": lambda a, b: torch.cat([a[:, :, :2], a], 2),
    "pad constant 5d": lambda a, b: functional.pad(a, (1, 1, 1, 1, 0, 0)),
    "permute contiguous 5d": lambda a, b: a.permute(0, 2, 3, 4, 1).contiguous(),
    "channels_last copy 5d": lambda a, b: a.contiguous(memory_format=torch.channels_last_3d),
    "group_norm 5d": lambda a, b: functional.group_norm(a, 32),
    "slice clone 5d": lambda a, b: a[:, :, 1:].clone(),
    "nearest 5d": lambda a, b: functional.interpolate(a[:, :, :18], scale_factor=(1, 2, 2), mode="nearest"),
    "group_norm 4d": lambda a, b: functional.group_norm(a, 32),
    "nearest 4d": lambda a, b: functional.interpolate(a[:2], scale_factor=2, mode="nearest"),
    "pad replicate 4d": lambda a, b: functional.pad(a, (1, 1, 1, 1), mode="replicate"),
    "channels_last copy 4d": lambda a, b: a.contiguous(memory_format=torch.channels_last),
    "silu 4d": lambda a, b: functional.silu(a),
    "heads contiguous": lambda a, b: a.view(1, 9984, 32, 128).transpose(1, 2).contiguous(),
    "chunk mul": lambda a, b: a[..., :2048] * a[..., 2048:],
    "addcmul": lambda a, b: torch.addcmul(a, a, a),
}


def case(values: Mapping[str, Any], device: str = "cuda") -> Call | None:
    """The call that a description stands for, with its tensors on a device; ``None`` for one that is unknown.

    Args:
        values: ``kind`` (``linear``, ``bmm``, ``attention``, ``convolution`` or ``memory``), ``dtype``, and shapes.
        device: Where its tensors are.

    Example:
        >>> call = case({"kind": "linear", "dtype": "bf16", "m": 2, "k": 8, "n": 4}, "cpu")
        >>> call().shape
        torch.Size([2, 4])
    """
    makers: dict[str, Callable[[Mapping[str, Any], str], Call | None]] = {
        "linear": _linear,
        "bmm": _bmm,
        "attention": _attention,
        "convolution": _convolution,
        "memory": _memory,
    }
    make = makers.get(values["kind"])
    return None if make is None else make(values, device)


def _random(shape: tuple[int, ...], dtype: str, device: str) -> torch.Tensor:
    """Not zeros, with which products take less power and run faster."""
    kind = DTYPES[dtype]
    if kind.itemsize == 1:
        return torch.randn(shape, dtype=torch.bfloat16, device=device).to(kind)
    return torch.randn(shape, dtype=kind, device=device)


def _linear(values: Mapping[str, Any], device: str) -> Call:
    m, k, n, dtype = values["m"], values["k"], values["n"], values["dtype"]
    source, weight = _random((m, k), dtype, device), _random((n, k), dtype, device)
    bias = _random((n,), dtype, device) if values.get("bias", True) else None
    return lambda: functional.linear(source, weight, bias)


def _bmm(values: Mapping[str, Any], device: str) -> Call:
    b, m, k, n, dtype = (values[name] for name in ("b", "m", "k", "n", "dtype"))
    first, second = _random((b, m, k), dtype, device), _random((b, k, n), dtype, device)
    return lambda: torch.bmm(first, second)


def _attention(values: Mapping[str, Any], device: str) -> Call | None:
    if values["kernel"] == "MATH":
        return None
    b, h, queries, keys, width = (values[name] for name in ("b", "h", "l", "s", "e"))
    query = _random((b, h, queries, width), values["dtype"], device)
    key = _random((b, h, keys, width), values["dtype"], device)
    mask = _random((1, 1, queries, keys), values["dtype"], device) if values.get("mask") else None
    mask = None if mask is None else mask.expand(b, h, queries, keys)
    kernel = getattr(SDPBackend, values["kernel"])

    def call() -> torch.Tensor:
        with sdpa_kernel(kernel):
            return functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)

    return call


def _convolution(values: Mapping[str, Any], device: str) -> Call:
    shape, channels, kernel, dtype = values["shape"], values["channels"], values["kernel"], values["dtype"]
    groups = values.get("groups", 1)
    source = _random(tuple(shape), dtype, device)
    if values.get("transposed"):
        weight = _random((shape[1], channels, *kernel), dtype, device)
        return lambda: functional.conv_transpose1d(source, weight, None, values["stride"], values["padding"])
    weight, bias = _random((channels, shape[1] // groups, *kernel), dtype, device), _random((channels,), dtype, device)
    convolve: Callable[..., torch.Tensor] = CONVOLUTIONS[len(kernel) - 1]
    stride, padding = (tuple(v) if isinstance(v, list) else v for v in (values["stride"], values["padding"]))
    return lambda: convolve(source, weight, bias, stride, padding, 1, groups)


def _memory(values: Mapping[str, Any], device: str) -> Call | None:
    operator = MEMORY.get(values["what"])
    if operator is None:
        return None
    shape = tuple(values.get("shape") or (-(-values["elements"] // ROW), ROW))
    a, b = _random(shape, values["dtype"], device), _random(shape, values["dtype"], device)
    return lambda: operator(a, b)
