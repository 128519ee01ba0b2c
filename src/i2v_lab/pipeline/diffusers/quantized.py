"""Transformers of diffusers built quantized, as its loader does: by its quantizers, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import accelerate
import torch
from diffusers.models.model_loading_utils import load_model_dict_into_meta
from diffusers.quantizers import DiffusersAutoQuantizer

from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_settings import TransformerQuantization
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.diffusers.components import CLASS, find_class

TRANSFORMERS = ("transformer", "transformer_2")
TORCHAO = {"torchao-int8-weight-only": "Int8WeightOnlyConfig", "torchao-float8-weight-only": "Float8WeightOnlyConfig"}
STD = 0.02  # of random weights
BYTES_BELOW = 16  # of random GGUF blocks, whose float16 scales are then finite and small


def quantizer_config(quantization: TransformerQuantization, dtype: torch.dtype) -> Any:
    """Configuration of a quantization, of diffusers' own class.

    Args:
        quantization: Any but none; its package is installed.
        dtype: In which the transformer computes.
    """
    if quantization.package == "torchao":
        from diffusers import TorchAoConfig
        from torchao import quantization as torchao_quantization

        return TorchAoConfig(getattr(torchao_quantization, TORCHAO[quantization])())
    from diffusers import GGUFQuantizationConfig

    return GGUFQuantizationConfig(compute_dtype=dtype)


def build_quantized(
    architecture: Architecture, name: str, quantization: TransformerQuantization, dtype: torch.dtype
) -> torch.nn.Module:
    """Build a transformer with random quantized weights.

    Args:
        architecture: Whose configuration.
        name: ``transformer`` or ``transformer_2``.
        quantization: Any but none.
        dtype: Of what is not quantized, and of the computation.

    Returns:
        The model in evaluation mode on torch's default device. It is never whole there in ``dtype``: each weight is
        quantized before the next is made.

    Raises:
        InvalidRequest: No layer is as wide as a block of a GGUF type.
        RunnerUnavailable: The installed packages lack its class.
    """
    config = dict(architecture.config[name])
    kind = find_class(architecture, config.pop(CLASS))
    is_gguf = quantization.package == "gguf"
    with accelerate.init_empty_weights():
        model: torch.nn.Module = kind(**config)
    weights = _RandomWeights(model, dtype, quantization if is_gguf else None, _kept(kind))
    if is_gguf and not weights.packed:
        raise InvalidRequest(
            f"quantization={quantization.value} is not for model={architecture.name!r}, of whose {name} no layer's "
            f"width is a multiple of {weights.block}; use a type of smaller blocks, such as gguf-q8_0",
            quantization=quantization.value,
            model=architecture.name,
        )
    config = quantizer_config(quantization, dtype)
    return _loaded(model, weights, config, dtype, torch.get_default_device(), is_gguf=is_gguf)


def load_quantized(build: Callable[[], Any], config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Build a model, and quantize weights that are drawn for it, by a configuration of torchao.

    Args:
        build: Makes the model; its parameters are left on the meta device.
        config: A ``TorchAoConfig`` of diffusers.
        dtype: Of what is not quantized.
        device: Where the model is loaded.

    Returns:
        The model in evaluation mode.
    """
    with accelerate.init_empty_weights():
        model = build()
    return _loaded(model, _RandomWeights(model, dtype, None, []), config, dtype, device, is_gguf=False)


def _kept(kind: Any) -> list[str]:
    kept = kind._keep_in_fp32_modules or ()
    return [kept] if isinstance(kept, str) else list(kept)


def _loaded(
    model: Any, weights: _RandomWeights, config: Any, dtype: torch.dtype, device: torch.device, *, is_gguf: bool
) -> Any:
    """Load weights into a model as diffusers does."""
    quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=is_gguf)
    device_map, kept = {"": device}, _kept(type(model))
    quantizer.validate_environment(torch_dtype=dtype, device_map=device_map)
    quantizer.preprocess_model(model, device_map=device_map, state_dict=weights, keep_in_fp32_modules=kept)
    load_model_dict_into_meta(
        model, weights, dtype=dtype, hf_quantizer=quantizer, keep_in_fp32_modules=kept, device_map=device_map
    )
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    return model.eval()


class _RandomWeights(Mapping[str, torch.Tensor]):
    """The state dict of a model, each tensor of which is made when it is asked for.

    Args:
        model: Its parameters may be on the meta device.
        dtype: Of what is not quantized.
        gguf: The type of the weights of linear layers, as a GGUF file has them; None for none.
        kept: Names of modules that are not quantized.

    Attributes:
        block: Values in a block of ``gguf``.
        packed: Names of the weights that are quantized as in a GGUF file.
    """

    def __init__(
        self, model: torch.nn.Module, dtype: torch.dtype, gguf: TransformerQuantization | None, kept: list[str]
    ) -> None:
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._dtype = dtype
        self._type: Any = None
        self.block = 1
        self.packed: set[str] = set()
        if gguf is not None:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

            self._type = GGMLQuantizationType[gguf.removeprefix("gguf-").upper()]
            self.block, self._block_bytes = GGML_QUANT_SIZES[self._type]
            self.packed = {
                f"{name}.weight"
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
                and module.in_features % self.block == 0
                and not set(kept) & set(name.split("."))
            }

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name not in self.packed:
            return torch.empty(shape, dtype=self._dtype).normal_(std=STD)
        from diffusers.quantizers.gguf.utils import GGUFParameter

        packed = (*shape[:-1], shape[-1] // self.block * self._block_bytes)
        return GGUFParameter(torch.randint(BYTES_BELOW, packed, dtype=torch.uint8), quant_type=self._type)
