"""Streaming of weights, block by block: from the weight files, or from host memory after the first load.

A block's weights are loaded when it is called and freed when it returns. Where a block is called many times, as in
every step of denoising, its weights are offloaded to host memory after the first load, within a budget: one page-locked
buffer a block, prefetched to the device on a stream of its own while the preceding block computes. At most two blocks
are on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ltx_core.loader import SingleGPUModelBuilder, StateDict
from ltx_core.loader.fuse_loras import apply_loras
from ltx_core.loader.primitives import LoraStateDictWithStrength
from ltx_core.model.transformer.adaln import AdaLayerNormSingle
from ltx_core.model.transformer.transformer import BasicAVTransformerBlock
from ltx_core.model.video_vae.resnet import ResnetBlock3D
from ltx_core.model.video_vae.sampling import DepthToSpaceUpsample, SpaceToDepthDownsample
from ltx_core.text_encoders.gemma.embeddings_connector import _BasicTransformerBlock1D
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

from i2v_lab.pipeline.contract.scaled_fp8 import as_weight
from i2v_lab.pipeline.ltx2.memory.host_memory import PageLocked, host_budget_bytes
from i2v_lab.pipeline.ltx2.memory.readers import TensorReader
from i2v_lab.torch_compat import is_fake

ALIGNMENT = 256  # bytes; of a tensor in a block's buffer
BLOCKS = (  # module classes whose weights are streamed
    BasicAVTransformerBlock,
    AdaLayerNormSingle,
    Gemma3DecoderLayer,
    _BasicTransformerBlock1D,
    ResnetBlock3D,
    DepthToSpaceUpsample,
    SpaceToDepthDownsample,
)
LARGE_LAYERS = ("embed_tokens", "video_aggregate_embed", "audio_aggregate_embed")  # names of single layers, likewise

Load = Callable[[], dict[str, torch.Tensor]]


def block_names(model: torch.nn.Module) -> list[str]:
    """Paths of the submodules of ``model`` whose weights are streamed, in the order in which they are defined."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BLOCKS) or name.rpartition(".")[2] in LARGE_LAYERS
    ]


@dataclass(frozen=True)
class StreamedBuilder(SingleGPUModelBuilder[Any]):
    """ltx-core's builder for a component whose blocks are streamed; tensors of no block are loaded when it is built.

    Attributes:
        reader: Reads single tensors.
        repeated: Whether blocks are called many times, so that their weights are offloaded to host memory.
    """

    reader: TensorReader | None = None
    repeated: bool = False

    def build(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """The component on ``device`` without its blocks' weights, which its ``weight_stream`` loads when they run.

        Args:
            device: Where it runs; CUDA by default.
            dtype: Of all weights; as stored by default.
        """
        device = device or torch.device("cuda")
        model = self.meta_model(self.model_config(), self.module_ops)
        names = block_names(model)
        tensors = self._by_block(names)
        rest = self._load(tensors.pop("", []), device, dtype)
        model.load_state_dict(rest, strict=False, assign=True)
        loads: dict[str, Load] = {name: partial(self._load, tensors.get(name, []), device, dtype) for name in names}
        model.weight_stream = WeightStream(model, loads, device, host_budget_bytes(device) if self.repeated else 0)
        return model

    def _by_block(self, names: Sequence[str]) -> dict[str, list[tuple[str, str, str]]]:
        """Each block's tensors as (path, key in the file, key in the module); those of no block under ''."""
        assert self.reader is not None
        found: dict[str, list[tuple[str, str, str]]] = {}
        blocks = set(names)
        for path in (self.model_path,) if isinstance(self.model_path, str) else self.model_path:
            for key in self.reader.keys(path):
                mapped = key if self.model_sd_ops is None else self.model_sd_ops.apply_to_key(key)
                if mapped is not None:
                    found.setdefault(_owner(mapped, blocks), []).append((path, key, mapped))
        return found

    def _load(
        self, tensors: Sequence[tuple[str, str, str]], device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, torch.Tensor]:
        assert self.reader is not None
        own: dict[str, torch.Tensor] = {}
        for path, key, mapped in tensors:
            value = self.reader.tensor(path, key, device)
            pairs = (
                [(mapped, value)] if self.model_sd_ops is None else self.model_sd_ops.apply_to_key_value(mapped, value)
            )
            # A key map may name a tensor twice, such as an embedding for the head that is tied to it.
            own |= {name: as_weight(v) if dtype is None else v.to(dtype) for name, v in pairs if name == mapped}
            del value, pairs
        if not self.loras:
            return own
        state = StateDict(own, device, 0, set())
        apply_loras(state, [self._lora(lora, own) for lora in self.loras], dtype, destination_sd=state)
        return own

    def _lora(self, lora: Any, names: dict[str, torch.Tensor]) -> LoraStateDictWithStrength:
        """The tensors of a LoRA that apply to the weights ``names``."""
        assert self.reader is not None
        host = torch.device("cpu")
        prefixes = {name.removesuffix(".weight") for name in names}
        found: dict[str, torch.Tensor] = {}
        for key in self.reader.keys(lora.path):
            mapped = lora.sd_ops.apply_to_key(key)
            if mapped is not None and mapped.partition(".lora_")[0] in prefixes:
                found |= lora.sd_ops.apply_to_key_value(mapped, self.reader.tensor(lora.path, key, host))
        return LoraStateDictWithStrength(StateDict(found, host, 0, set()), lora.strength)


def _owner(name: str, blocks: set[str]) -> str:
    """The block that a tensor belongs to, or ''."""
    while name:
        name = name.rpartition(".")[0]
        if name in blocks:
            return name
    return ""


@dataclass(frozen=True)
class _HostCopy:
    """A block's tensors in host memory.

    Attributes:
        buffer: Holds all of them.
        layout: Name, offset in bytes, dtype and shape of each.
    """

    buffer: PageLocked
    layout: tuple[tuple[str, int, torch.dtype, torch.Size], ...]

    def unpacked(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors as views of ``buffer``, a copy on the device."""
        typed = {dtype: buffer.view(dtype) for dtype in {dtype for _, _, dtype, _ in self.layout}}
        return {
            name: typed[dtype].as_strided(shape, _strides(shape), offset // dtype.itemsize)
            for name, offset, dtype, shape in self.layout
        }


class WeightStream:
    """Loads each block's weights when it is called and frees them when it returns, by forward hooks.

    Args:
        model: Its blocks' parameters are on the meta device.
        loads: For each block, by its path, a function that loads its tensors onto ``device``, by their names in
            ``model``.
        device: Where the model runs.
        host_budget_bytes: Of host memory, for blocks that were loaded once; blocks beyond it are loaded at every call.

    Attributes:
        page_locked_bytes: Taken of ``host_budget_bytes`` so far.
        pageable_bytes: Of the largest block that was loaded.
    """

    def __init__(
        self, model: torch.nn.Module, loads: dict[str, Load], device: torch.device, host_budget_bytes: int = 0
    ) -> None:
        self._model = model
        self._loads = loads
        self._device = device
        self._host_budget_bytes = host_budget_bytes
        self.page_locked_bytes = self.pageable_bytes = 0
        self._order = {name: index for index, name in enumerate(loads)}
        self._following: dict[str, str] = {}  # the block called after each, as observed in the last pass
        self._last = ""
        self._host: dict[str, _HostCopy] = {}
        self._in_flight: dict[str, tuple[torch.Tensor, Any]] = {}
        real_cuda = device.type == "cuda" and not is_fake()
        self._stream = torch.cuda.Stream(device) if host_budget_bytes and real_cuda else None
        self._hooks = []
        self._placeholder = torch.nn.Parameter(torch.empty(0, device=device, dtype=torch.bfloat16), requires_grad=False)
        for name in loads:
            block = model.get_submodule(name)
            self._free(name)
            self._hooks.append(block.register_forward_pre_hook(partial(self._before_call, name)))
            self._hooks.append(block.register_forward_hook(partial(self._after_call, name), always_call=True))

    def close(self) -> None:
        """Remove the hooks and free every byte, on the device and on the host."""
        for hook in self._hooks:
            hook.remove()
        if self._stream is not None:
            torch.cuda.synchronize(self._device)  # before the memory that copies read and write is reused
        self._in_flight.clear()
        for copy in self._host.values():
            copy.buffer.release()
        self._host.clear()
        self._loads.clear()

    def _before_call(self, name: str, module: torch.nn.Module, args: Any) -> None:
        tensors = self._fetch(name)
        for key, tensor in tensors.items():
            owner, _, leaf = key.rpartition(".")
            part = self._model.get_submodule(owner)
            # Not as a Parameter: it exists for one call, and no autograd graph must retain it for longer.
            own: dict[str, Any] = part._parameters if leaf in part._parameters else part._buffers
            own[leaf] = tensor
        self._following[self._last] = name
        self._last = name
        following = self._following.get(name, "")
        ahead = self._order.get(following, 0) > self._order[name]
        if ahead and following in self._host and following not in self._in_flight:
            self._in_flight[following] = self._copy_to_device(self._host[following])

    def _after_call(self, name: str, module: torch.nn.Module, args: Any, result: Any) -> None:
        self._free(name)

    def _free(self, name: str) -> None:
        for part in self._model.get_submodule(name).modules():
            for leaf, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[leaf] = self._placeholder

    def _fetch(self, name: str) -> dict[str, torch.Tensor]:
        """A block's tensors on the device, complete for work queued next on the current stream."""
        if name not in self._host:
            tensors = self._loads[name]()
            self.pageable_bytes = max(self.pageable_bytes, sum(tensor.nbytes for tensor in tensors.values()))
            self._offload(name, tensors)
            return tensors
        if name in self._in_flight:
            buffer, event = self._in_flight.pop(name)
        else:
            buffer, event = self._copy_to_device(self._host[name])
        if event is not None:
            event.wait(torch.cuda.current_stream(self._device))
        return self._host[name].unpacked(buffer)

    def _offload(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Copy a block's tensors to host memory, if the budget allows."""
        layout, size = [], 0
        for key, tensor in tensors.items():
            layout.append((key, size, tensor.dtype, tensor.shape))
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if size > self._host_budget_bytes:
            return
        try:
            buffer = PageLocked(size, self._device)
        except RuntimeError:  # the driver refuses to lock more memory
            self._host_budget_bytes = 0
            return
        self._host_budget_bytes -= size
        self.page_locked_bytes += size
        for tensor, (_, offset, _, _) in zip(tensors.values(), layout, strict=True):
            part = buffer.data[offset : offset + tensor.nbytes]
            part.copy_(tensor.contiguous().view(-1).view(torch.uint8), non_blocking=True)
        self._host[name] = _HostCopy(buffer, tuple(layout))

    def _copy_to_device(self, source: _HostCopy) -> tuple[torch.Tensor, Any]:
        """A copy of a block's buffer on the device, and the event after which it is complete.

        The copy is allocated on the current stream, on which its memory may have been used until now and will be used
        again: the transfer starts after the work queued there, and overlaps with the block that is queued next.
        """
        data = source.buffer.data
        copy = torch.empty(data.shape, dtype=data.dtype, device=self._device)
        if self._stream is None:
            return copy.copy_(data), None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy.copy_(data, non_blocking=True)
        return copy, self._stream.record_event()


def _strides(shape: torch.Size) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides[: len(shape)]
