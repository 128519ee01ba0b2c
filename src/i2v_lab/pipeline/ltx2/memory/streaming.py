"""Streaming of weights, block by block: from the weight files, or from host memory after the first load.

A block's weights are loaded when it is called and freed when it returns. Where a block is called many times, as in
every step of denoising, its weights are offloaded to host memory after the first load, within a budget: one page-locked
buffer a block, prefetched to the device on a stream of its own while the preceding blocks compute. Of the streamed
blocks at most one more than are prefetched are on the device. Where weights are in files, threads read them into host
memory ahead of their use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from ltx_core.loader import SingleGPUModelBuilder, StateDict
from ltx_core.loader.fuse_loras import apply_loras
from ltx_core.loader.primitives import LoraStateDictWithStrength

from i2v_lab.pipeline.contract.scaled_fp8 import as_weight
from i2v_lab.pipeline.ltx2.memory.blocks import BlockOrder
from i2v_lab.pipeline.ltx2.memory.host_blocks import HostBlocks
from i2v_lab.pipeline.ltx2.memory.host_copies import BlockPlan, HostCopy, PlannedTensor, planned
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.memory.readers import TensorReader
from i2v_lab.pipeline.ltx2.memory.tensors_ahead import tensors_ahead
from i2v_lab.torch_compat import is_fake

Load = Callable[[], dict[str, torch.Tensor]]
_Source = tuple[str, str, str]  # path, key in the file, key in the module


@dataclass(frozen=True)
class _Prepared:
    """A component before its weights: on the meta device, its streamed blocks, their tensors, and their host memory."""

    model: Any
    names: Sequence[str]
    tensors: Mapping[str, Sequence[_Source]]
    blocks: HostBlocks


@dataclass(frozen=True)
class StreamedBuilder(SingleGPUModelBuilder[Any]):
    """ltx-core's builder for a component whose blocks are streamed; tensors of no block are loaded when it is built.

    Attributes:
        reader: Reads single tensors.
        host_weights: Where blocks are in host memory.
        repeated: Whether blocks are called many times, so that they are kept there.
        resident_blocks: Blocks that are loaded when it is built, and stay on the device.
        prefetch: Streamed blocks that are copied to the device ahead of the one that runs.
    """

    reader: TensorReader | None = None
    host_weights: HostWeights = field(default_factory=HostWeights)
    repeated: bool = False
    resident_blocks: int = 0
    prefetch: int = 1

    def build(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """The component on ``device`` without its blocks' weights, which its ``weight_stream`` loads when they run.

        Args:
            device: Where it runs; CUDA by default.
            dtype: Of all weights; as stored by default.
        """
        device = device or torch.device("cuda")
        prepared = self.host_weights.claim(self._identity(device, dtype)) or self._prepared(device, dtype)
        if prepared is None:
            return super().build(device, dtype)
        model, tensors, hosts = prepared.model, prepared.tensors, [prepared.blocks]
        base, names = prepared.blocks, prepared.names
        try:
            if self.loras:
                hosts.insert(0, self._host_blocks(tensors, names, device, dtype, repeated=True, fused=True))
            for host in hosts:
                host.read_ahead()
            rest = self._fused(self._load(tensors.get("", []), device, dtype, ahead=True), device, dtype)
            model.load_state_dict(rest, strict=False, assign=True)
        except BaseException:
            for host in hosts:
                host.close()
            raise

        def load(name: str) -> dict[str, torch.Tensor]:
            copy = base.take(name) if self.loras else None
            if copy is None:
                return self._fused(self._load(tensors.get(name, []), device, dtype), device, dtype)
            return self._fused(copied(copy, base, name, device), device, dtype)

        loads: dict[str, Load] = {name: partial(load, name) for name in names}
        model.weight_stream = WeightStream(model, loads, device, hosts=hosts, prefetch=self.prefetch)
        return model

    def read_ahead(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Have threads read its blocks into host memory until it is built; arguments as for :meth:`build`."""
        if self.host_weights.limit_bytes(device) and not is_fake():
            prepared = self._prepared(device, dtype)
            if prepared is not None:
                self.host_weights.read_ahead(prepared.blocks, self._identity(device, dtype), prepared)

    def _identity(self, device: torch.device, dtype: torch.dtype | None) -> tuple[Any, ...]:
        """Equal for builders of equal components."""
        return self.model_path, self.module_ops, self.model_sd_ops, self.loras, self.resident_blocks, device, dtype

    def _prepared(self, device: torch.device, dtype: torch.dtype | None) -> _Prepared | None:
        model = self.meta_model(self.model_config(), self.module_ops)
        names = BlockOrder.of(model).streamed(self.resident_blocks)
        if not names:
            return None
        tensors = self._by_block(names)
        repeated = self.repeated and not self.loras
        return _Prepared(model, names, tensors, self._host_blocks(tensors, names, device, dtype, repeated=repeated))

    def _host_blocks(
        self,
        tensors: Mapping[str, Sequence[_Source]],
        names: Sequence[str],
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        repeated: bool,
        fused: bool = False,
    ) -> HostBlocks:
        """Its blocks in host memory; with LoRAs fused if ``fused``, which is done on the device."""
        assert self.reader is not None
        paths = sorted({path for name in names for path, _, _ in tensors.get(name, ())})
        loras = [lora.path for lora in self.loras] if fused else []
        files = tuple(self.reader.identity(path) for path in (*paths, *loras))
        plans: dict[str, BlockPlan] = {}
        if self.host_weights.limit_bytes(device) and not is_fake():
            plans = {
                name: BlockPlan(self._planned(source, dtype, in_file=not fused) for source in tensors.get(name, ()))
                for name in names
            }
        key = (
            type(self.reader).__name__,
            self.model_sd_ops and self.model_sd_ops.name,
            dtype,
            tuple((name, plan.content) for name, plan in plans.items()),
            tuple((lora.path, lora.strength) for lora in self.loras) if fused else (),
        )
        return self.host_weights.blocks(key, files, plans, device, repeated=repeated)

    def _planned(self, source: _Source, dtype: torch.dtype | None, *, in_file: bool) -> PlannedTensor:
        assert self.reader is not None
        path, key, mapped = source
        return planned(
            mapped,
            self.reader.part(path, key) if in_file else None,
            self.reader.scale(path, key) if in_file else None,
            self.reader.tensor(path, key, torch.device("meta")),
            lambda value: self._module_form(mapped, value, dtype),
        )

    def _by_block(self, names: Sequence[str]) -> dict[str, list[_Source]]:
        """Each block's tensors; those of no block under ''."""
        assert self.reader is not None
        found: dict[str, list[_Source]] = {}
        blocks = set(names)
        for path in (self.model_path,) if isinstance(self.model_path, str) else self.model_path:
            for key in self.reader.keys(path):
                mapped = key if self.model_sd_ops is None else self.model_sd_ops.apply_to_key(key)
                if mapped is not None:
                    found.setdefault(_owner(mapped, blocks), []).append((path, key, mapped))
        return found

    def _load(
        self, sources: Sequence[_Source], device: torch.device, dtype: torch.dtype | None, *, ahead: bool = False
    ) -> dict[str, torch.Tensor]:
        assert self.reader is not None
        host_weights = HostWeights(self.host_weights.budget_bytes if ahead else 0)
        own: dict[str, torch.Tensor] = {}
        wanted = [(path, key) for path, key, _ in sources]
        with closing(tensors_ahead(wanted, self.reader, host_weights, device)) as tensors:
            for _, _, mapped in sources:
                own |= self._module_form(mapped, next(tensors), dtype)
        return own

    def _module_form(self, mapped: str, value: torch.Tensor, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        pairs = [(mapped, value)] if self.model_sd_ops is None else self.model_sd_ops.apply_to_key_value(mapped, value)
        # A key map may name a tensor twice, such as an embedding for the head that is tied to it.
        return {name: as_weight(v) if dtype is None else v.to(dtype) for name, v in pairs if name == mapped}

    def _fused(
        self, own: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, torch.Tensor]:
        """Tensors with what LoRAs add to them."""
        if self.loras:
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


class WeightStream:
    """Loads each block's weights when it is called and frees them when it returns, by forward hooks.

    Args:
        model: Its blocks' parameters are on the meta device.
        loads: For each block, by its path, a function that loads its tensors onto ``device``, by their names in
            ``model``.
        device: Where the model runs.
        host_budget_bytes: Of host memory, for blocks that were loaded once; blocks beyond it are loaded at every call.
        hosts: Stand in for it: where blocks are in host memory; the first for the model's own, the others for what
            ``loads`` uses. They are closed with the stream.
        prefetch: Blocks that are copied to the device ahead of the one that runs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loads: dict[str, Load],
        device: torch.device,
        host_budget_bytes: int = 0,
        hosts: Sequence[HostBlocks] = (),
        prefetch: int = 1,
    ) -> None:
        self._model = model
        self._loads = loads
        self._device = device
        self._hosts = hosts or (
            HostWeights(host_budget_bytes).blocks("", None, {}, device, repeated=host_budget_bytes > 0),
        )
        self._host = self._hosts[0]
        self._loaded_bytes = 0
        self._prefetch = prefetch
        self._blocks = BlockOrder.of(model)  # while they have their sizes
        self._block_bytes: dict[str, int] = {}
        self._slots: dict[str, dict[str, tuple[dict[str, Any], str]]] = {name: {} for name in loads}
        self._parameters: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self._order = {name: index for index, name in enumerate(loads)}
        self._last = ""
        self._in_flight: dict[str, tuple[HostCopy, torch.Tensor, Any]] = {}
        real_cuda = device.type == "cuda" and not is_fake()
        self._stream = torch.cuda.Stream(device) if real_cuda else None
        self._hooks = []
        self._placeholder = torch.nn.Parameter(torch.empty(0, device=device, dtype=torch.bfloat16), requires_grad=False)
        for name in loads:
            block = model.get_submodule(name)
            own: list[dict[str, Any]] = [part._parameters for part in block.modules()]
            self._parameters[name] = [(each, leaf) for each in own for leaf in each if each[leaf] is not None]
            self._free(name)
            self._hooks.append(block.register_forward_pre_hook(partial(self._before_call, name)))
            self._hooks.append(block.register_forward_hook(partial(self._after_call, name), always_call=True))

    @property
    def page_locked_bytes(self) -> int:
        """The most page-locked host memory that its blocks took."""
        return sum(host.page_locked_bytes for host in self._hosts)

    @property
    def pageable_bytes(self) -> int:
        """The most pageable host memory: of the largest block that was loaded, or of tensors that threads converted."""
        return max(self._loaded_bytes, *(host.pageable_bytes for host in self._hosts))

    @property
    def resident_bytes(self) -> tuple[int, ...]:
        """What the first 0, 1, ... blocks would take on the device if they stayed; empty while one is not known."""
        order = self._blocks
        if not self._block_bytes.keys() >= set(order.names):
            return ()
        return tuple(
            sum(self._block_bytes[name] for name in order.resident(count)) for count in range(len(order.names) + 1)
        )

    def close(self) -> None:
        """Remove the hooks and free every byte, on the device and on the host."""
        for hook in self._hooks:
            hook.remove()
        if self._stream is not None:
            torch.cuda.synchronize(self._device)  # before the memory that copies read and write is reused
        self._in_flight.clear()
        self._slots.clear()
        self._parameters.clear()
        for host in self._hosts:
            host.close()
        self._loads.clear()

    def _before_call(self, name: str, module: torch.nn.Module, args: Any) -> None:
        tensors = self._fetch(name)
        if name not in self._block_bytes:
            sizes = (allocated_bytes(tensor.nbytes, self._device) for tensor in tensors.values())
            self._block_bytes[name] = sum(sizes)
        slots = self._slots[name]
        for key, tensor in tensors.items():
            if key not in slots:
                slots[key] = self._slot(key)
            own, leaf = slots[key]
            own[leaf] = tensor  # not as a Parameter: it exists for one call, and no autograd graph must retain it
        called_after = self._host.called_after
        called_after[self._last] = name
        self._last = name
        following = name
        for _ in range(self._prefetch if self._host.repeated else 0):
            previous, following = following, called_after.get(following, "")
            if self._order.get(following, 0) <= self._order[previous]:  # the next pass begins there
                break
            copy = self._host.ready(following) if following not in self._in_flight else None
            if copy is not None:
                self._in_flight[following] = (copy, *self._copy_to_device(following, copy))

    def _after_call(self, name: str, module: torch.nn.Module, args: Any, result: Any) -> None:
        self._free(name)

    def _slot(self, key: str) -> tuple[dict[str, Any], str]:
        """Where a tensor of the model is referenced; found once, as in short steps launches wait for the host."""
        owner, _, leaf = key.rpartition(".")
        part = self._model.get_submodule(owner)
        return (part._parameters if leaf in part._parameters else part._buffers), leaf

    def _free(self, name: str) -> None:
        for own, leaf in self._parameters[name]:
            own[leaf] = self._placeholder

    def _fetch(self, name: str) -> dict[str, torch.Tensor]:
        """A block's tensors on the device, complete for work queued next on the current stream."""
        if name in self._in_flight:
            copy, buffer, event = self._in_flight.pop(name)
        else:
            found = self._host.take(name)
            if found is None:
                tensors = self._loads[name]()
                self._loaded_bytes = max(self._loaded_bytes, sum(tensor.nbytes for tensor in tensors.values()))
                self._host.offload(name, tensors)
                return tensors
            copy, (buffer, event) = found, self._copy_to_device(name, found)
        if event is not None:
            event.wait(torch.cuda.current_stream(self._device))
        return copy.unpacked(buffer)

    def _copy_to_device(self, name: str, source: HostCopy) -> tuple[torch.Tensor, Any]:
        """A copy of a block's buffer on the device, and the event after which it is complete.

        The copy is allocated on the current stream, on which its memory may have been used until now and will be used
        again: the transfer starts after the work queued there, and overlaps with the block that is queued next.
        """
        data = source.buffer.data
        copy = torch.empty(data.shape, dtype=data.dtype, device=self._device)
        if self._stream is None:
            copy.copy_(data)
            self._host.used(name, None)
            return copy, None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy.copy_(data, non_blocking=True)
        event = self._stream.record_event()
        self._host.used(name, event)
        return copy, event


def allocated_bytes(nbytes: int, device: torch.device) -> int:
    """What a weight takes on a device: the caching allocator splits no rest of up to 1 MiB off a segment of 2 MiB's.

    Example:
        >>> allocated_bytes(15 * 2**20, torch.device("cuda")) // 2**20, allocated_bytes(100, torch.device("cpu"))
        (16, 100)
    """
    if device.type != "cuda":
        return nbytes
    rounded, segment = -(-nbytes // 512) * 512, -(-nbytes // 2**21) * 2**21
    return segment if nbytes >= 10 * 2**20 and segment - rounded <= 2**20 else rounded


def copied(copy: HostCopy, host: HostBlocks, name: str, device: torch.device) -> dict[str, torch.Tensor]:
    """A block's tensors on the device, from its copy in host memory."""
    buffer = copy.buffer.data.to(device, copy=True)
    host.used(name, None)  # the copy from page-locked memory is complete
    return copy.unpacked(buffer)
