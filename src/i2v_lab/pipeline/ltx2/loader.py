"""ltx-core's loader of safetensors files, with the scales of float8 weights applied; and one that reads ahead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from ltx_core.loader import SafetensorsModelStateDictLoader, StateDict
from safetensors import SafetensorError, safe_open

from i2v_lab.errors import CheckpointError
from i2v_lab.pipeline.contract.scaled_fp8 import as_weight, dequantized, own_keys, scale_keys
from i2v_lab.pipeline.contract.weight_headers import reason
from i2v_lab.pipeline.ltx2.lora import LoraKeys
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.memory.readers import SafetensorsReader
from i2v_lab.pipeline.ltx2.memory.tensors_ahead import tensors_ahead
from i2v_lab.torch_compat import is_fake


@contextmanager
def _opened(path: str, device: str = "cpu") -> Iterator[Any]:
    """An open weight file; what fails within this scope is an error about it.

    Raises:
        CheckpointError: It was whole when the run began, and has been removed or damaged; ``fields`` has its ``path``.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"weight file '{path}' cannot be read any more ({reason(error)}); restore it and run again", path=path
        ) from error


class ScaledStateDictLoader(SafetensorsModelStateDictLoader):
    """Loads what ltx-core's loader loads; float8 weights with scales as their products, in bfloat16.

    ltx-core's own loader passes the scales on as further tensors, which a module that has none drops without a word.
    """

    def metadata(self, path: str) -> dict[str, Any]:
        """The configuration in a file's metadata; empty where it has none."""
        with _opened(path) as file:
            config: dict[str, Any] = json.loads((file.metadata() or {}).get("config", "{}"))
            return config

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
            with _opened(one, str(target)) as file:
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


class AheadStateDictLoader(ScaledStateDictLoader):
    """The same, read by threads ahead of the copies to the device, through page-locked buffers.

    Args:
        host_weights: Whose budget the buffers take; without one, as for a model on a CPU, it loads like its base.
    """

    def __init__(self, host_weights: HostWeights) -> None:
        super().__init__()
        self._host_weights = host_weights

    def load(self, path: str | list[str], sd_ops: Any | None = None, device: torch.device | None = None) -> StateDict:
        """As :meth:`ScaledStateDictLoader.load`.

        Raises:
            CheckpointError: A file has been removed, cut short or changed; ``fields`` has its ``path``.
        """
        target = device or torch.device("cpu")
        is_ahead = not is_fake() and self._host_weights.limit_bytes(target) > 0
        if isinstance(sd_ops, LoraKeys) or not is_ahead:
            return super().load(path, sd_ops, device)
        reader, paths = SafetensorsReader(), [path] if isinstance(path, str) else path
        found = [
            (one, key, key if sd_ops is None else sd_ops.apply_to_key(key)) for one in paths for key in reader.keys(one)
        ]
        wanted = [(one, key, mapped) for one, key, mapped in found if mapped is not None]
        loaded: dict[str, torch.Tensor] = {}
        sources = [(one, key) for one, key, _ in wanted]
        with closing(tensors_ahead(sources, reader, self._host_weights, target)) as tensors:
            for _, _, mapped in wanted:
                tensor = next(tensors)
                pairs = [(mapped, tensor)] if sd_ops is None else sd_ops.apply_to_key_value(mapped, tensor)
                loaded |= {name: as_weight(value) for name, value in pairs}
                del tensor, pairs
        size = sum(tensor.nbytes for tensor in loaded.values())
        return StateDict(sd=loaded, device=target, size=size, dtype={tensor.dtype for tensor in loaded.values()})
