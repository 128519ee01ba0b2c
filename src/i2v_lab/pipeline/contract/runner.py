"""Whose code runs a model: the seam between an architecture and the package behind it.

A backend makes of a request phases, events, a lazily decoded video, and sound or none. Nothing of a backend is imported
before one of its parts is asked for, so that using one never imports the other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from i2v_lab.errors import BackendUnavailable, InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy, Techniques
from i2v_lab.request import PIXEL_MULTIPLE, SPATIAL_SCALE, I2VRequest, Quantization, Variant, VideoShape

if TYPE_CHECKING:
    import torch

    from i2v_lab.events import EventSink
    from i2v_lab.pipeline.contract.architectures import Architecture
    from i2v_lab.pipeline.contract.generation import Generation
    from i2v_lab.pipeline.contract.weight_files import Progress


class Pipeline(Protocol):
    """What every backend's pipeline is called like."""

    def __call__(self, request: I2VRequest) -> Generation:
        """Run every phase but the decoding of the video, which the returned stream does as it is consumed."""


@dataclass(frozen=True)
class Backend:
    """One package that runs models, and what it takes.

    Attributes:
        name: As in an architecture's ``backend``.
        package: What it imports.
        install: The command that installs it.
        weights: Options that name real weights.
        quantizations: Of the transformer; the first is the usual one.
        memory: Memory policies.
        tiled: Whether its decoder can cut the latent into tiles.
        pixel_multiple: Of the width and height of its videos.
        homes: Its parts, as ``module:name`` below :mod:`i2v_lab.pipeline`.

    Example:
        >>> BACKENDS["ltx-video"].quantizations[0].value
        'bf16'
    """

    name: str
    package: str
    install: str
    weights: tuple[str, ...]
    quantizations: tuple[Quantization, ...]
    memory: tuple[MemoryPolicy, ...]
    tiled: bool
    pixel_multiple: int
    homes: Mapping[str, str] = field(repr=False)

    def require_package(self) -> None:
        """Find out whether the package is installed, without importing it.

        Raises:
            BackendUnavailable: It is not; with the command that installs it.
        """
        if find_spec(self.package) is None:
            raise BackendUnavailable(
                f"backend={self.name!r} needs the package {self.name}, which is not installed; run `{self.install}`",
                backend=self.name,
            )

    def require_own(self, given: Mapping[str, Any], model: str) -> None:
        """Refuse options for weights of another backend.

        Args:
            given: Paths by option, without dashes; ``None`` for what is not given.
            model: For the message.

        Raises:
            InvalidRequest: With the options that there are.
        """
        for name, value in given.items():
            if value is not None and name not in self.weights:
                raise InvalidRequest(
                    f"{_option(name)} is not for model={model!r}, whose backend is {self.name}; use "
                    f"{', '.join(map(_option, self.weights))}",
                    **{name: value},
                )

    def resolve_weights(
        self, architecture: Architecture, variant: Variant, progress: Progress = lambda *_: None, **paths: Path | None
    ) -> Any:
        """The weights of a model: verified files, or synthetic ones where no path is given."""
        own = {name: path for name, path in paths.items() if name in self.weights}
        if "lora" in self.weights:
            return self._part("resolve_weights")(
                architecture, **own, needs_lora=variant is Variant.DEV, progress=progress
            )
        return self._part("resolve_weights")(architecture, **own, progress=progress)

    def skeleton_weights(self, architecture: Architecture) -> Any:
        """Weights without values, made on demand: all that a forecast of memory needs."""
        return self._part("skeleton_weights")(architecture)

    def pipeline(
        self,
        weights: Any,
        device: str | torch.device = "cpu",
        sinks: Sequence[EventSink] = (),
        techniques: Techniques | None = None,
    ) -> Pipeline:
        """The pipeline over weights that this backend resolved.

        Args:
            weights: From :meth:`resolve_weights` or :meth:`skeleton_weights`.
            device: ``cpu`` or ``cuda``.
            sinks: Called with every event.
            techniques: What stands in for those of a request's memory policy.

        Raises:
            InvalidRequest: This backend has no techniques.
        """
        options: dict[str, Any] = {}
        if techniques is not None:
            if self.memory == (MemoryPolicy.RESIDENT,):
                raise InvalidRequest(f"techniques are not for backend={self.name!r}; leave them out")
            options = {"techniques": techniques}
        pipeline: Pipeline = self._part("pipeline")(weights, device, sinks=sinks, **options)
        return pipeline

    def upstream(self, weights: Any, device: str | torch.device = "cpu", sinks: Sequence[EventSink] = ()) -> Pipeline:
        """The package's own pipeline, untouched, called alike.

        Raises:
            InvalidRequest: This backend has none that tells its phases.
        """
        if "upstream" not in self.homes:
            raise InvalidRequest(f"backend={self.name!r} has no upstream pipeline to measure; use i2v-lab's own")
        pipeline: Pipeline = self._part("upstream")(weights, device, sinks=sinks)
        return pipeline

    def memoizable_modules(self) -> Mapping[type[torch.nn.Module], Callable[..., Hashable]]:
        """Module classes whose identical calls a forecast executes once, each with its memory key."""
        kinds: Mapping[type[torch.nn.Module], Callable[..., Hashable]] = self._part("memoizable_modules")()
        return kinds

    def _part(self, name: str) -> Any:
        self.require_package()
        module, _, attribute = self.homes[name].partition(":")
        return getattr(import_module(f"i2v_lab.pipeline.{module}"), attribute)


BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="ltx-2",
            package="ltx_pipelines",
            install="pip install ltx-core==1.0.0 ltx-pipelines==1.0.0",
            weights=("checkpoint", "gemma", "upsampler", "lora"),
            quantizations=(Quantization.FP8_CAST, Quantization.BF16),
            memory=tuple(MemoryPolicy),
            tiled=True,
            pixel_multiple=PIXEL_MULTIPLE,
            homes={
                "resolve_weights": "ltx2.weights:resolve_weights",
                "skeleton_weights": "ltx2.weights:skeleton_weights",
                "pipeline": "ltx2.pipeline:TwoStagePipeline",
                "upstream": "ltx2.upstream:UpstreamPipeline",
                "memoizable_modules": "ltx2.components:memoizable_modules",
            },
        ),
        Backend(
            name="ltx-video",
            package="ltx_video",
            install="pip install --no-deps ltx-video==0.1.2",
            weights=("checkpoint", "text_encoder", "upsampler"),
            quantizations=(Quantization.BF16,),  # its own fp8 needs q8_kernels
            memory=(MemoryPolicy.RESIDENT,),
            tiled=False,  # its tiles leave out the timestep that the decoder of 0.9.8 is conditioned on
            pixel_multiple=SPATIAL_SCALE,
            homes={
                "resolve_weights": "ltx_video.weights:resolve_weights",
                "skeleton_weights": "ltx_video.weights:skeleton_weights",
                "pipeline": "ltx_video.pipeline:LtxVideoPipeline",
                "memoizable_modules": "ltx_video.passes:memoizable_modules",
            },
        ),
    )
}


def backend_of(architecture: Architecture) -> Backend:
    """The backend that runs an architecture.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> backend_of(load_architecture("ltxv-tiny")).name
        'ltx-video'
    """
    return BACKENDS[architecture.backend]


def check_request(architecture: Architecture, request: I2VRequest) -> None:
    """Refuse what a model or its backend does not have.

    Raises:
        InvalidRequest: With the value and what to use.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> request = I2VRequest(image="still.png", width=192, height=128)
        >>> check_request(load_architecture("ltxv-tiny"), request)
        Traceback (most recent call last):
        ...
        i2v_lab.errors.InvalidRequest: quantization='fp8-cast' is not for model='ltxv-tiny'; use bf16
    """
    backend = backend_of(architecture)
    model = architecture.name
    known: dict[str, Sequence[str]] = {
        "quantization": backend.quantizations,
        "variant": architecture.variants,
        "memory": backend.memory,
    }
    for name, choices in known.items():
        value = getattr(request, name).value
        if value not in choices:
            raise InvalidRequest(
                f"{name}={value!r} is not for model={model!r}; use {' or '.join(choices)}", **{name: value}
            )
    for name in ("width", "height"):
        value, multiple = getattr(request, name), backend.pixel_multiple
        if value % multiple:
            raise InvalidRequest(
                f"{name}={value} is not for model={model!r}; use a multiple of {multiple}", **{name: value}
            )
    if backend.name == "ltx-video" and stage_shape(architecture, request, 1).latent().tokens == 1:
        raise InvalidRequest(
            f"frames=1 at {request.width}x{request.height} is not for model={model!r}, whose transformer needs "
            "more than one latent position; use 9 frames, or 128 pixels or more",
            frames=1,
        )
    if request.tiling is not None and not backend.tiled:
        raise InvalidRequest(
            f"tile_px={request.tiling.tile_px} is not for model={model!r}, whose decoder works in one piece; use no "
            "tiling (--no-tiling, or tiling=None)",
            tiling=request.tiling,
        )


def stage_shape(architecture: Architecture, request: I2VRequest, stage: int) -> VideoShape:
    """The video in pixels as a stage of the model works on it.

    Models of ltx-video begin at two thirds of the size, rounded down to 32 pixels, and double that: their second stage
    may be larger than what is asked for, and is scaled down at the end. Source: ``LTXMultiScalePipeline.__call__``.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> request = I2VRequest(image="still.png", width=320, height=192)
        >>> stage_shape(load_architecture("ltxv-tiny"), request, 2)
        VideoShape(frames=97, height=192, width=384)
    """
    if "downscale_factor" not in architecture.sampling:
        return request.stage_shape(stage)
    factor = architecture.sampling["downscale_factor"]
    height, width = (int(side * factor) // SPATIAL_SCALE * SPATIAL_SCALE for side in (request.height, request.width))
    return VideoShape(request.frames, height * stage, width * stage)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
