"""ltx-core's loader of safetensors files, with the scales of float8 weights applied; and one that reads ahead."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ltx_core.loader import SafetensorsModelStateDictLoader, StateDict
from safetensors import SafetensorError, safe_open

from i2v_lab.errors import CheckpointError
from i2v_lab.pipeline.contract.scaled_fp8 import as_weight, dequantized, own_keys, scale_keys
from i2v_lab.pipeline.contract.weight_headers import reason
from i2v_lab.pipeline.ltx2.lora import LoraKeys
from i2v_lab.pipeline.ltx2.memory.host_copies import ALIGNMENT, BlockPlan, PlannedTensor
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.memory.readers import SafetensorsReader
from i2v_lab.torch_compat import is_fake

GROUP_BYTES = 2**27  # of tensors that are read at once


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
        if isinstance(sd_ops, LoraKeys) or is_fake() or not self._host_weights.limit_bytes(target):
            return super().load(path, sd_ops, device)
        reader = SafetensorsReader()
        plans, mapped = _plans(reader, [path] if isinstance(path, str) else path, sd_ops)
        files = tuple(reader.identity(one) for one in ([path] if isinstance(path, str) else path))
        loaded: dict[str, torch.Tensor] = {}
        blocks = self._host_weights.blocks(tuple(mapped.values()), files, plans, target, repeated=False)
        try:
            for name, plan in plans.items():
                copy = blocks.take(name)
                tensors = plan.loaded(target) if copy is None else copy.tensors_on(target)
                for key, tensor in tensors:
                    own = mapped[key]
                    pairs = [(own, tensor)] if sd_ops is None else sd_ops.apply_to_key_value(own, tensor)
                    loaded |= {name: as_weight(value) for name, value in pairs}
                    del tensor, pairs
                blocks.used(name, torch.cuda.current_stream(target).record_event() if target.type == "cuda" else None)
            if target.type == "cuda":
                torch.cuda.current_stream(target).synchronize()
        finally:
            blocks.close()
        size = sum(tensor.nbytes for tensor in loaded.values())
        return StateDict(sd=loaded, device=target, size=size, dtype={tensor.dtype for tensor in loaded.values()})


def _plans(
    reader: SafetensorsReader, paths: Sequence[str], sd_ops: Any | None
) -> tuple[dict[str, BlockPlan], dict[str, str]]:
    """Tensors in groups that are read at once, in the order of the files; and the name of each for the module."""
    groups: list[list[PlannedTensor]] = []
    room, mapped = 0, {}
    for path in paths:
        for key in reader.keys(path):
            own = key if sd_ops is None else sd_ops.apply_to_key(key)
            if own is None:
                continue
            part, scale = reader.part(path, key), reader.scale(path, key)
            size = part.nbytes + (0 if scale is None else scale.nbytes) + 2 * ALIGNMENT
            if size > room:
                groups.append([])
                room = GROUP_BYTES
            room -= size
            mapped[key] = own
            target = part.dtype if scale is None else torch.bfloat16
            groups[-1].append(PlannedTensor(key, part.shape, part.dtype, target, part, scale))
    return {str(index): BlockPlan(group, GROUP_BYTES) for index, group in enumerate(groups)}, mapped
