"""The question of the explorer: whether a request fits a GPU, or a budget of its memory, and the code that asks it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from i2v_lab.capacity.budget import AUTO, budget_or_free_bytes
from i2v_lab.capacity.cards import gpu_memory_bytes
from i2v_lab.errors import DeviceUnavailable
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import NO_SETTINGS
from i2v_lab.request import I2VRequest
from i2v_lab.runs.spec import FULL_SIZE_MODEL, RunSpec
from i2v_lab.units import format_bytes

DEFAULT_GPU = "RTX 4090"
UNSET = NO_SETTINGS.to_json()


@dataclass(frozen=True, kw_only=True)
class Question:
    """Whether a request fits a GPU, or a budget of its memory.

    Attributes:
        request: What would be generated; with ``memory="auto"`` by the fastest placement that fits, or the fastest
            memory settings of a model of diffusers.
        model: An architecture's name.
        gpu: A GPU in ``data/gpus.csv``, or any name together with ``memory_bytes``.
        memory_bytes: The GPU's memory; by default that in ``data/gpus.csv``.
        budget: The most that the process may take, such as ``12GiB``; ``auto`` for what this machine's card has free;
            empty for all of the GPU's memory.
        device: ``cuda``, or ``cpu`` for live storages against host memory.

    Example:
        >>> question = Question(request=I2VRequest(image="stills/lighthouse.png", frames=25), gpu="L4")
        >>> question.spec.name
        '1024x768x25'
    """

    request: I2VRequest
    model: str = FULL_SIZE_MODEL
    gpu: str = DEFAULT_GPU
    memory_bytes: int | None = None
    budget: str = ""
    device: str = "cuda"

    @property
    def searches(self) -> bool:
        """Whether the fastest placement or settings are searched for."""
        return self.request.memory is MemoryPolicy.AUTO

    @property
    def spec(self) -> RunSpec:
        """The run to forecast; of one that is searched for, with everything resident.

        Raises:
            InvalidRequest: The model does not support the request.
        """
        memory = MemoryPolicy.RESIDENT if self.searches else self.request.memory
        return RunSpec(request=replace(self.request, memory=memory), model=self.model)

    @property
    def gpu_bytes(self) -> int:
        """The GPU's memory."""
        return gpu_memory_bytes(self.gpu) if self.memory_bytes is None else self.memory_bytes

    def room_bytes(self) -> int:
        """The memory that the process may take: the budget, or all of the GPU.

        Raises:
            InvalidRequest: The budget is no size.
            DeviceUnavailable: It is more than the GPU has, or ``auto`` without a GPU.
        """
        whole = self.gpu_bytes
        if not self.budget or (self.budget == AUTO and self.memory_bytes is not None):
            return whole  # of this machine's GPU it is what is free
        room = budget_or_free_bytes(self.budget)
        if room > whole:
            raise DeviceUnavailable(
                f"budget={self.budget} is {format_bytes(room)}, above the {format_bytes(whole)} of {self.gpu}; use "
                "that or less, or leave it empty",
                budget=self.budget,
                memory_bytes=whole,
            )
        return room

    def code(self) -> str:
        """The source of a notebook cell that gives the same answer without widgets.

        Example:
            >>> request = I2VRequest(image="stills/lighthouse.png", width=512, height=384, frames=25, tiling=None)
            >>> print(Question(request=request, model="ltx-2.3-tiny", gpu="L4").code())
            from i2v_lab import I2VRequest, Tiling, forecast_request
            from i2v_lab.capacity.cards import gpu_memory_bytes, judge
            <BLANKLINE>
            request = I2VRequest(
                image="stills/lighthouse.png",
                width=512,
                height=384,
                frames=25,
                quantization="fp8-cast",
                tiling=None,
                decode_scope="no_grad",
            )
            forecast = forecast_request(request, model="ltx-2.3-tiny")
            judge(forecast, "L4", gpu_memory_bytes("L4"))
        """
        request, tiling = self.request, self.request.tiling
        tiles = "None"
        if tiling is not None:
            sizes = (tiling.tile_px, tiling.tile_overlap_px, tiling.tile_frames, tiling.tile_overlap_frames)
            tiles = f"Tiling({', '.join(map(str, sizes))})"
        lines = [f"    image={_quoted(request.image)},"]
        lines += [f"    {name}={getattr(request, name)}," for name in ("width", "height", "frames")]
        lines += [f"    quantization={_quoted(request.quantization.value)},", f"    tiling={tiles},"]
        lines += [f"    decode_scope={_quoted(request.decode_scope.value)},"]
        if request.memory is not MemoryPolicy.RESIDENT and not self.searches:
            lines.append(f"    memory={_quoted(request.memory.value)},")
        if request.placement is not None:
            lines.append(f"    placement={request.placement.to_json()!r},")
        names = "I2VRequest, Tiling, forecast_request"
        if not request.settings.is_default:
            given = {name: value for name, value in request.settings.to_json().items() if value != UNSET.get(name)}
            lines.append(
                f"    settings=MemorySettings({', '.join(f'{name}={value!r}' for name, value in given.items())}),"
            )
            names = "I2VRequest, MemorySettings, Tiling, forecast_request"
        gpu, model = _quoted(self.gpu), _quoted(self.model)
        imports, room = ["from i2v_lab.capacity.cards import gpu_memory_bytes"], f"gpu_memory_bytes({gpu})"
        if self.budget:
            imports = ["from i2v_lab.capacity.budget import budget_or_free_bytes"]
            room = f"budget_or_free_bytes({_quoted(self.budget)})"
        if self.searches:
            names = names.replace(", forecast_request", "")
            imports.append("from i2v_lab.studies.placed import best_placements")
            answer = [f"best_placements(request, {model}, [({gpu}, {room})])[0]"]
        else:
            imports[-1:] = (
                ["from i2v_lab.capacity.cards import judge", *imports] if self.budget else [f"{imports[0]}, judge"]
            )
            answer = [f"forecast = forecast_request(request, model={model})", f"judge(forecast, {gpu}, {room})"]
        return "\n".join(
            [f"from i2v_lab import {names}", *sorted(imports), "", "request = I2VRequest(", *lines, ")", *answer]
        )

    @property
    def card(self) -> str:
        """The GPU's name in our tables."""
        return self.gpu.removeprefix("this ")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a Python literal too, line breaks escaped
