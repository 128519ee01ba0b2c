"""One run, described once: what is generated, by which runner, under which techniques, consumed and metered how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from i2v_lab.errors import InvalidRequest, shown
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy, Techniques, policy_of, to_techniques
from i2v_lab.memory_settings import MemorySettings, Offload
from i2v_lab.pipeline.contract.architectures import Architecture, load_architecture
from i2v_lab.pipeline.contract.runner import RunnerSpec
from i2v_lab.pipeline.registry import find_runner
from i2v_lab.placement import Placement
from i2v_lab.request import DecodeScope, I2VRequest, Quantization, Tiling, Variant

FULL_SIZE_MODEL = "ltx-2.3-22b"
SMALL_MODEL = "ltx-2.3-tiny"
MAX_GENERATIONS = 10_000
DEFAULT_STILL = "stills/lighthouse.png"
# Fields of a request that runs are compared without: the still is scaled, a prompt of up to 1,024 tokens is padded to
# these, and the policy is resolved to techniques.
WITHOUT_BYTES = ("image", "prompt", "negative_prompt", "seed", "memory")
# Techniques of records from before there were memory settings.
OFFLOADING_TECHNIQUES = {"model_offload": Offload.MODEL, "group_offload": Offload.GROUP_LEAF}


class Consumer(StrEnum):
    """What is done with the lazy stream that a pipeline returns.

    ``plain`` takes every chunk in the grad mode that Python starts in, which is with grad enabled. ``guarded`` does the
    same through :func:`~i2v_lab.profiling.guard.guard_stream`. ``left_open`` stops before the last chunk, or after the
    only one, and keeps the stream, as a preview or an interrupted notebook cell does.
    """

    PLAIN = "plain"
    GUARDED = "guarded"
    LEFT_OPEN = "left_open"


class ProfilerMode(StrEnum):
    """How closely a run is metered.

    ``full``: modules and autograd graphs, and NVML's view of the card. ``boundaries``: phases alone. ``off``: no phase.
    With the last two there is one phase around everything, so that times can be compared. ``none``: no meter at all,
    for interleaved benchmarks.
    """

    FULL = "full"
    BOUNDARIES = "boundaries"
    OFF = "off"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run in one process.

    Attributes:
        request: What to generate.
        model: An architecture's name.
        runner: Whose code runs it; by default the runner that the model names.
        techniques: How its peak is lowered; by default those that the request's memory policy stands for. This set is
            recorded and compared, not the policy's name.
        consumer: How each video is consumed.
        generations: How many, one after another.
        profiler: How closely it is metered.
        vram_cap_bytes: The most that the allocator may take; ``None`` leaves it the whole card.
        write_video: Whether videos are written, which takes time while they are decoded.

    Raises:
        UnknownModel: There is no such architecture.
        InvalidRequest: A value that is unknown, or that the runner or the model does not support; with what to use.

    Example:
        >>> request = I2VRequest(image="still.png", width=1024, height=768, frames=97, decode_scope="escaped")
        >>> spec = RunSpec(request=request, generations=3)
        >>> spec.name, spec.runner
        ('1024x768x97_escaped_3times', 'ltx-2')
    """

    request: I2VRequest
    model: str = FULL_SIZE_MODEL
    runner: str = ""
    techniques: Techniques | None = None
    consumer: Consumer = Consumer.PLAIN
    generations: int = 1
    profiler: ProfilerMode = ProfilerMode.FULL
    vram_cap_bytes: int | None = None
    write_video: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.request, I2VRequest):
            raise InvalidRequest(f"request={shown(self.request)} is not an I2VRequest; use one", request=self.request)
        architecture = load_architecture(self.model)
        unnamed = isinstance(self.runner, str) and not self.runner
        runner = find_runner(architecture.runner if unnamed else self.runner)
        object.__setattr__(self, "runner", runner.name)
        object.__setattr__(self, "consumer", _choice(Consumer, "consumer", self.consumer))
        object.__setattr__(self, "profiler", _choice(ProfilerMode, "profiler", self.profiler))
        if self.request.memory is MemoryPolicy.AUTO:
            raise InvalidRequest(
                "memory='auto' stands for other policies; resolve it first (i2v_lab.capacity.placement)", memory="auto"
            )
        runner.check_request(architecture, self.request)
        own = self.request.placed.techniques
        techniques = own if self.techniques is None else to_techniques(self.techniques)
        if (own or self.request.placement is not None) and techniques != own:
            given = "a placement" if self.request.placement else f"memory={self.request.memory.value!r}"
            raise InvalidRequest(
                f"{given} and techniques={sorted(techniques)} differ; give one of the two",
                memory=self.request.memory.value,
                techniques=sorted(techniques),
            )
        object.__setattr__(self, "techniques", techniques)
        runner.check_techniques(techniques)
        self._check_conditions(runner)

    def _check_conditions(self, runner: RunnerSpec) -> None:
        if type(self.generations) is not int or not 1 <= self.generations <= MAX_GENERATIONS:
            raise InvalidRequest(
                f"generations={shown(self.generations)} is not a whole number above 0 and at most {MAX_GENERATIONS}; "
                "use 1",
                generations=self.generations,
            )
        if self.generations > 1 and not runner.repeatable:
            raise InvalidRequest(
                f"generations={self.generations} is not for pipeline={runner.name!r}; use 1",
                generations=self.generations,
            )
        if self.consumer is not Consumer.PLAIN and not runner.lazy_decode:
            raise InvalidRequest(
                f"consumer={self.consumer.value!r} is not for pipeline={runner.name!r}, which returns decoded video; "
                "use plain",
                consumer=self.consumer.value,
            )
        if self.profiler in (ProfilerMode.BOUNDARIES, ProfilerMode.OFF) and not runner.emits_events:
            raise InvalidRequest(
                f"profiler={self.profiler.value!r} is not for pipeline={runner.name!r}, whose phases are found from "
                "the calls of its components; use full",
                profiler=self.profiler.value,
            )
        cap_bytes = self.vram_cap_bytes
        if cap_bytes is not None and not (type(cap_bytes) is int and 0 < cap_bytes < 2**63):
            raise InvalidRequest(
                f"vram_cap_bytes={shown(cap_bytes)} is not a whole number above 0; use the card's bytes",
                vram_cap_bytes=cap_bytes,
            )
        if not isinstance(self.write_video, bool):
            raise InvalidRequest(
                f"write_video={shown(self.write_video)} is neither; use True or False", write_video=self.write_video
            )

    # --- What follows from it ---

    @property
    def architecture(self) -> Architecture:
        """The model's architecture."""
        return load_architecture(self.model)

    @property
    def runner_spec(self) -> RunnerSpec:
        """The runner itself."""
        return find_runner(self.runner)

    @property
    def technique_set(self) -> Techniques:
        """The techniques, which :attr:`techniques` always has after construction."""
        assert self.techniques is not None
        return self.techniques

    @property
    def placement(self) -> Placement:
        """The techniques, and the numbers of the request's placement."""
        return self.request.placement or Placement(techniques=self.technique_set)

    @property
    def policy(self) -> MemoryPolicy | None:
        """The memory policy that is exactly its placement; ``None`` if there is none."""
        return self.placement.policy

    @property
    def is_reference(self) -> bool:
        """Whether its peaks answer what the request takes of this runner: fully metered, without a cap."""
        return self.profiler is ProfilerMode.FULL and self.vram_cap_bytes is None

    @property
    def name(self) -> str:
        """A short name for folders and axes: what differs from the model's defaults; not unique over models."""
        request, defaults = self.request, self.architecture.request
        parts = [f"{request.width}x{request.height}x{request.frames}"]
        if request.tiling != defaults.get("tiling", Tiling()):
            parts += _tiling_name(request.tiling)
        if request.decode_scope is not DecodeScope.NO_GRAD:
            parts.append(request.decode_scope.value)
        if request.variant is not Variant.DISTILLED:
            parts.append(request.variant.value)
        if request.quantization.value != defaults.get("quantization", Quantization.FP8_CAST.value):
            parts.append(request.quantization.value)
        if request.steps is not None:
            parts.append(f"{request.steps}steps")
        parts += [name for name in (request.settings.name,) if name]
        parts += _techniques_name(self.technique_set)
        parts += [name for name in (self.placement.name,) if name]
        if self.consumer is not Consumer.PLAIN:
            parts.append(self.consumer.value)
        if self.generations > 1:
            parts.append(f"{self.generations}times")
        return "_".join(parts)

    @property
    def full_name(self) -> str:
        """:attr:`name`, and what sets the run apart from a reference run of the model's own runner."""
        marks = []
        if self.runner_spec.third_party:
            marks.append(self.runner.replace("-", "_"))
        if self.profiler is not ProfilerMode.FULL:
            marks.append(self.profiler.value)
        if self.vram_cap_bytes is not None:
            marks.append(f"cap{self.vram_cap_bytes / 2**30:g}")
        return "_".join([self.name, *marks])

    def memory_key(self) -> str:
        """Equal for runs whose memory is equal, whatever their still, prompt and seed, and however they are metered."""
        values = self.to_json()
        for name in ("profiler", "vram_cap_bytes", "write_video"):
            del values[name]
        values["request"] = {key: value for key, value in values["request"].items() if key not in WITHOUT_BYTES}
        return json.dumps(values, sort_keys=True)

    def with_request(self, **changes: Any) -> RunSpec:
        """The same with another request; a change of ``memory`` or ``placement`` changes the techniques."""
        techniques = None if changes.keys() & {"memory", "placement"} else self.techniques
        return replace(self, request=replace(self.request, **changes), techniques=techniques)

    def with_still(self, image: Path) -> RunSpec:
        """The same with its still found."""
        return replace(self, request=replace(self.request, image=str(image)))

    # --- As JSON ---

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; :meth:`from_json` reads them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **values,
            "request": self.request.to_json(),
            "techniques": sorted(technique.value for technique in self.technique_set),
            "consumer": self.consumer.value,
            "profiler": self.profiler.value,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunSpec:
        """Build a spec from what :meth:`to_json` returned.

        Raises:
            InvalidRequest: It is no mapping, has an unknown field, or breaks a rule.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or "request" not in values or not set(values) <= names:
            words = f"a run of {shown(values)} is not a mapping of {', '.join(sorted(names))}; give these"
            raise InvalidRequest(words, spec=values)
        return cls(**_with_settings({**values, "request": I2VRequest.from_json(values["request"])}))


def _with_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a spec, whose offloading was a technique before there were memory settings."""
    techniques = values.get("techniques")
    if not isinstance(techniques, list) or len(techniques) != 1 or techniques[0] not in OFFLOADING_TECHNIQUES:
        return values
    settings = MemorySettings(offload=OFFLOADING_TECHNIQUES[techniques[0]])
    return {**values, "techniques": [], "request": replace(values["request"], settings=settings)}


def _choice(kind: type[StrEnum], name: str, value: Any) -> StrEnum:
    if not isinstance(value, str) or value not in list(kind):
        raise InvalidRequest(f"{name}={shown(value)} is unknown; use {' or '.join(kind)}", **{name: value})
    return kind(value)


def _techniques_name(techniques: Techniques) -> list[str]:
    policy = policy_of(techniques)
    if policy is not None:
        return [] if policy is MemoryPolicy.RESIDENT else [policy.value]
    rest = TECHNIQUES[MemoryPolicy.STREAMED] - techniques
    if techniques <= TECHNIQUES[MemoryPolicy.STREAMED] and len(rest) < len(techniques):
        return ["all_but", *sorted(technique.value for technique in rest)]
    return sorted(technique.value for technique in techniques)


def _tiling_name(tiling: Tiling | None) -> list[str]:
    if tiling is None:
        return ["untiled"]
    overlaps, default = (tiling.tile_overlap_px, tiling.tile_overlap_frames), Tiling()
    usual = overlaps == (default.tile_overlap_px, default.tile_overlap_frames)
    return [f"tile{tiling.tile_px}x{tiling.tile_frames}", *([] if usual else [f"overlap{overlaps[0]}x{overlaps[1]}"])]


def make_request(model: str, **given: Any) -> I2VRequest:
    """A request with the model's own defaults where nothing is given.

    Example:
        >>> make_request("ltxv-tiny", frames=9).quantization.value
        'bf16'
    """
    return I2VRequest(**{"image": DEFAULT_STILL, **load_architecture(model).request, **given})
