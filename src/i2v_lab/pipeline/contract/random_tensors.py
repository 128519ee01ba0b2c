"""Synthetic tensors: random values of a given name, shape and dtype, seeded by the name.

On a CPU values are the same on every machine and with every version of torch, whichever subset of a model is made and
in whichever order.
"""

from __future__ import annotations

import hashlib
import math

import torch

DTYPE = torch.bfloat16  # of every weight, of every runner
SEED = 2203
PERIOD = 2**18  # elements that a tensor on the CPU repeats: drawn one by one, the LoRA of 22B takes a minute and a half


def synthetic_tensor(key: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """One tensor, bfloat16, with values that keep activations finite through every layer.

    Matrices and kernels are normal with variance 1 / fan-in, norms are one, biases small, the VAE's statistics neutral.

    Args:
        key: The tensor's name in the weight file, which seeds its values.
        shape: Its shape.
        device: Where it is made; on the meta device it has no values.

    Example:
        >>> synthetic_tensor("vae.decoder.conv_in.conv.bias", (4,)).dtype
        torch.bfloat16
    """
    device = torch.device(device)
    if device.type == "meta":
        return torch.empty(shape, dtype=DTYPE, device=device)
    if key.endswith("std-of-means") or (len(shape) == 1 and "norm" in key and key.endswith("weight")):
        return torch.ones(shape, dtype=DTYPE, device=device)
    if key.endswith(("mean-of-means", ".alpha", ".beta")):
        return torch.zeros(shape, dtype=DTYPE, device=device)
    std = 0.02 if len(shape) < 2 else 1 / math.sqrt(math.prod(shape[1:]))
    if key.startswith("vocoder.") and ("resblocks" in key or "conv_post" in key):
        std *= 0.3  # its residual branches have no norm: without this the waveform is clipped throughout
    seed = int.from_bytes(hashlib.sha256(f"{SEED}:{key}".encode()).digest()[:7])
    generator = torch.Generator(device).manual_seed(seed)
    count = math.prod(shape)
    if device.type != "cpu":
        return torch.randn(shape, generator=generator, dtype=DTYPE, device=device).mul_(std)
    # Drawn as float32: what a seed gives as bfloat16 changed between torch 2.11 and 2.14.
    values = torch.randn(min(count, PERIOD), generator=generator).mul_(std).to(DTYPE)
    whole, rest = divmod(count, PERIOD)
    return torch.cat([*[values] * whole, values[:rest]]).reshape(shape)


def uninitialized_tensor(
    key: str, shape: tuple[int, ...], device: torch.device | str = "cpu", dtype: torch.dtype = DTYPE
) -> torch.Tensor:
    """An uninitialized tensor, enough where only memory is studied; arguments as for :func:`synthetic_tensor`."""
    return torch.empty(shape, dtype=dtype, device=device)
