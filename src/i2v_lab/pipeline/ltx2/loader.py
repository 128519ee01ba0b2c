"""ltx-core's loader of safetensors files, with the scales of float8 weights applied."""

from __future__ import annotations

from typing import Any

import torch
from ltx_core.loader import SafetensorsModelStateDictLoader, StateDict
from safetensors import safe_open

from i2v_lab.pipeline.contract.scaled_fp8 import as_weight, dequantized, own_keys, scale_keys
from i2v_lab.pipeline.ltx2.lora import LoraKeys


class ScaledStateDictLoader(SafetensorsModelStateDictLoader):
    """Loads what ltx-core's loader loads; float8 weights with scales as their products, in bfloat16.

    ltx-core's own loader passes the scales on as further tensors, which a module that has none drops without a word.
    """

    def load(self, path: str | list[str], sd_ops: Any | None = None, device: torch.device | None = None) -> StateDict:
        """Load the tensors whose checkpoint keys ``sd_ops`` lets through.

        Args:
            path: Of one weight file, or of several.
            sd_ops: ltx-core's map from checkpoint keys to module keys; all tensors under their own keys without one.
            device: Where they are loaded; the CPU by default.

        Returns:
            The tensors by their module keys: weights in bfloat16 or float8_e4m3fn, those of a LoRA as stored.
        """
        target = device or torch.device("cpu")
        loaded: dict[str, torch.Tensor] = {}
        for one in [path] if isinstance(path, str) else path:
            with safe_open(one, framework="pt", device=str(target)) as file:
                scales = scale_keys(file.keys())
                for key in own_keys(file.keys()):
                    mapped = key if sd_ops is None else sd_ops.apply_to_key(key)
                    if mapped is None:
                        continue
                    tensor = file.get_tensor(key)
                    if key in scales:
                        tensor = dequantized(tensor, file.get_tensor(scales[key]))
                    pairs = [(mapped, tensor)] if sd_ops is None else sd_ops.apply_to_key_value(mapped, tensor)
                    for name, value in pairs:
                        loaded[name] = value if isinstance(sd_ops, LoraKeys) else as_weight(value)
                    del tensor, pairs, value
        size = sum(tensor.nbytes for tensor in loaded.values())
        return StateDict(sd=loaded, device=target, size=size, dtype={tensor.dtype for tensor in loaded.values()})
