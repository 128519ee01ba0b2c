"""Weights that arrive block by block and go again: from the weight files, or from host memory once they are there.

A component's blocks are loaded when they are called and let go of when they return. Where a block is called many times,
as in every step of denoising, its weights stay in host memory after the first, as far as there is room: one page-locked
buffer a block, copied to the device by a stream of its own while the block before computes. At most two blocks are on
the device.
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

from i2v_lab.pipeline.ltx2.memory.host_memory import PageLocked, room_bytes
from i2v_lab.pipeline.ltx2.memory.readers import TensorReader

ALIGNMENT = 256  # bytes, of a tensor in a block's buffer
BLOCKS = (
    BasicAVTransformerBlock,
    AdaLayerNormSingle,
    Gemma3DecoderLayer,
    _BasicTransformerBlock1D,
    ResnetBlock3D,
    DepthToSpaceUpsample,
    SpaceToDepthDownsample,
)
LARGE_LAYERS = ("embed_tokens", "video_aggregate_embed", "audio_aggregate_embed")

Load = Callable[[], dict[str, torch.Tensor]]


def block_names(model: torch.nn.Module) -> list[str]:
    """Paths of the parts of ``model`` whose weights come and go, in the order in which they are defined."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BLOCKS) or name.rpartition(".")[2] in LARGE_LAYERS
    ]


@dataclass(frozen=True)
class StreamedBuilder(SingleGPUModelBuilder[Any]):
    """ltx-core's builder for a component whose blocks are streamed; what is in none of them is loaded at once.

    Attributes:
        reader: Gives single tensors.
        repeated: Whether blocks are called many times, so that their weights are worth host memory.
    """

    reader: TensorReader | None = None
    repeated: bool = False

    def build(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """The component on ``device``, without its blocks' weights; ``weight_stream`` is what brings them."""
        device = device or torch.device("cuda")
        model = self.meta_model(self.model_config(), self.module_ops)
        names = block_names(model)
        tensors = self._by_block(names)
        rest = self._load(tensors.pop("", []), device, dtype)
        model.load_state_dict(rest, strict=False, assign=True)
        loads: dict[str, Load] = {name: partial(self._load, tensors.get(name, []), device, dtype) for name in names}
        model.weight_stream = WeightStream(model, loads, device, room_bytes(device) if self.repeated else 0)
        return model

    def _by_block(self, names: Sequence[str]) -> dict[str, list[tuple[str, str, str]]]:
        """Where each block's tensors are, as path, key in the file and key in the module; those of none under ''."""
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
            # A key map may name a tensor twice, such as an embedding for a head that is tied to it.
            own |= {name: v if dtype is None else v.to(dtype) for name, v in pairs if name == mapped}
            del value, pairs
        if not self.loras:
            return own
        state = StateDict(own, device, 0, set())
        apply_loras(state, [self._lora(lora, own) for lora in self.loras], dtype, destination_sd=state)
        return own

    def _lora(self, lora: Any, names: dict[str, torch.Tensor]) -> LoraStateDictWithStrength:
        """What a LoRA has for the tensors ``names``."""
        assert self.reader is not None
        host = torch.device("cpu")
        prefixes = {name.removesuffix(".weight") for name in names}
        found = {}
        for key in self.reader.keys(lora.path):
            mapped = lora.sd_ops.apply_to_key(key)
            if mapped is not None and mapped.partition(".lora_")[0] in prefixes:
                found[mapped] = self.reader.tensor(lora.path, key, host)
        return LoraStateDictWithStrength(StateDict(found, host, 0, set()), lora.strength)


def _owner(name: str, blocks: set[str]) -> str:
    """The block that a tensor belongs to, or ''."""
    while name:
        name = name.rpartition(".")[0]
        if name in blocks:
            return name
    return ""


@dataclass(frozen=True)
class _Kept:
    """A block's tensors in host memory.

    Attributes:
        buffer: All of them.
        layout: For each its name, offset in bytes, dtype and shape.
    """

    buffer: PageLocked
    layout: tuple[tuple[str, int, torch.dtype, torch.Size], ...]

    def unpacked(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in ``buffer``."""
        typed = {dtype: buffer.view(dtype) for dtype in {dtype for _, _, dtype, _ in self.layout}}
        return {
            name: typed[dtype].as_strided(shape, _strides(shape), at // dtype.itemsize)
            for name, at, dtype, shape in self.layout
        }


class WeightStream:
    """Brings each block's weights when it is called, and takes them away when it returns.

    Args:
        model: On the meta device where its blocks are.
        loads: For each block, by its path, what loads its tensors onto ``device``, by their names in ``model``.
        device: Where the model runs.
        room_bytes: Of host memory, for blocks that were loaded once; the rest is loaded at every call.
    """

    def __init__(
        self, model: torch.nn.Module, loads: dict[str, Load], device: torch.device, room_bytes: int = 0
    ) -> None:
        self._model = model
        self._loads = loads
        self._device = device
        self._room_bytes = room_bytes
        self._order = {name: index for index, name in enumerate(loads)}
        self._following: dict[str, str] = {}  # as seen in the last pass
        self._last = ""
        self._host: dict[str, _Kept] = {}
        self._under_way: dict[str, tuple[torch.Tensor, Any]] = {}
        real_cuda = device.type == "cuda" and torch._guards.active_fake_mode() is None
        self._stream = torch.cuda.Stream(device) if room_bytes and real_cuda else None
        self._hooks = []
        self._absent = torch.nn.Parameter(torch.empty(0, device=device, dtype=torch.bfloat16), requires_grad=False)
        for name in loads:
            block = model.get_submodule(name)
            self._take_away(name)
            self._hooks.append(block.register_forward_pre_hook(partial(self._arrive, name)))
            self._hooks.append(block.register_forward_hook(partial(self._leave, name), always_call=True))

    def close(self) -> None:
        """Let go of every byte, on the device and on the host."""
        for hook in self._hooks:
            hook.remove()
        if self._stream is not None:
            torch.cuda.synchronize(self._device)  # before what copies read and write is given to others
        self._under_way.clear()
        for kept in self._host.values():
            kept.buffer.release()
        self._host.clear()
        self._loads.clear()

    def _arrive(self, name: str, module: torch.nn.Module, args: Any) -> None:
        tensors = self._fetched(name)
        for key, tensor in tensors.items():
            owner, _, leaf = key.rpartition(".")
            part = self._model.get_submodule(owner)
            # Not as a Parameter: it is there for one call, and no graph is to hold it for longer.
            own: dict[str, Any] = part._parameters if leaf in part._parameters else part._buffers
            own[leaf] = tensor
        self._following[self._last] = name
        self._last = name
        following = self._following.get(name, "")
        ahead = self._order.get(following, 0) > self._order[name]
        if ahead and following in self._host and following not in self._under_way:
            self._under_way[following] = self._send(self._host[following])

    def _leave(self, name: str, module: torch.nn.Module, args: Any, result: Any) -> None:
        self._take_away(name)

    def _take_away(self, name: str) -> None:
        for part in self._model.get_submodule(name).modules():
            for leaf, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[leaf] = self._absent

    def _fetched(self, name: str) -> dict[str, torch.Tensor]:
        """A block's tensors on the device, there for whatever the current stream does next."""
        if name not in self._host:
            tensors = self._loads[name]()
            self._keep(name, tensors)
            return tensors
        sent = self._under_way.pop(name) if name in self._under_way else self._send(self._host[name])
        buffer, event = sent
        if event is not None:
            event.wait(torch.cuda.current_stream(self._device))
        return self._host[name].unpacked(buffer)

    def _keep(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        layout, size = [], 0
        for key, tensor in tensors.items():
            layout.append((key, size, tensor.dtype, tensor.shape))
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if size > self._room_bytes:
            return
        try:
            buffer = PageLocked(size, self._device)
        except RuntimeError:  # the system grants no more
            self._room_bytes = 0
            return
        self._room_bytes -= size
        for tensor, (_, at, _, _) in zip(tensors.values(), layout, strict=True):
            part = buffer.data[at : at + tensor.nbytes]
            part.copy_(tensor.contiguous().view(-1).view(torch.uint8), non_blocking=True)
        self._host[name] = _Kept(buffer, tuple(layout))

    def _send(self, kept: _Kept) -> tuple[torch.Tensor, Any]:
        """A copy on the device, and the event after which it is complete.

        The buffer belongs to the current stream, on which its memory may have been used until now and will be used
        again: the copy begins after what is queued there, and the block that is about to be queued runs beside it.
        """
        data = kept.buffer.data
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
