"""What a runner is: the code that runs a model, with everything that it supports as data.

A runner turns a request into phases, events, a video and sound or none. Nothing of it is imported before one of its
parts is needed, so that using one never imports another's packages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from i2v_lab.errors import InvalidRequest, RunnerUnavailable
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy, Techniques
from i2v_lab.memory_settings import NO_SETTINGS, QUANTIZATIONS, MemorySettings
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.sizes import SizeRule
from i2v_lab.request import I2VRequest, Quantization, Variant

if TYPE_CHECKING:
    import torch

    from i2v_lab.events import EventSink
    from i2v_lab.pipeline.contract.generation import Generation
    from i2v_lab.pipeline.contract.weight_files import Progress


class Pipeline(Protocol):
    """What every runner's pipeline is called like."""

    def __call__(self, request: I2VRequest) -> Generation:
        """Run every phase but a lazy decoding of the video, which the returned stream does as it is consumed."""


class KeptWeights(Protocol):
    """Weights in host memory that pipelines of one runner share."""

    def close(self) -> None:
        """Release them."""


@dataclass(frozen=True, kw_only=True)
class RunnerSpec:
    """A runner: which models it runs, what it needs, and what it supports.

    Attributes:
        name: As in a plan's ``pipeline`` and in a record.
        label: As tables call it.
        models: The ``runner`` of the architectures that it runs: its own name, or that of the runner beside which it
            stands.
        module: The Python module that it needs.
        install: The command that installs it.
        packages: Distributions whose versions decide what it computes; they are recorded, and part of every cache key.
        sizes: The sizes that its models take; those of an architecture with ``sizes`` of its own are these.
        parts: ``resolve_weights``, ``skeleton_weights``, ``pipeline``, ``memoizable_modules``, and ``kept_weights``
            where it can keep weights from one generation to the next, each as ``module:name`` below
            :mod:`i2v_lab.pipeline`; imported when they are needed.
        weight_options: Names of the options that give real weights.
        quantizations: Of the transformer; the first is the default.
        variants: Samplers, as far as an architecture has them.
        techniques: How it can lower its peak.
        tiled: Whether its decoder can cut the latent into tiles; where not all of its models agree, a function that
            says so of an architecture.
        lazy_decode: Whether it returns before the video is decoded, so that a consumer can leave the stream open, and
            guard it.
        repeatable: Whether it generates several times in a process.
        emits_events: Whether it reports its phases; otherwise they are found from the calls of its components.
        settings: Whether it takes :class:`~i2v_lab.memory_settings.MemorySettings`, and a number of steps.
        third_party: Whether it is another project's pipeline as it is, for comparison.
        check_model: Further rules that need the architecture.

    Example:
        >>> from i2v_lab.pipeline.registry import RUNNERS
        >>> RUNNERS["ltx-video"].quantizations[0].value
        'bf16'
    """

    name: str
    label: str
    models: str
    module: str
    install: str
    packages: tuple[str, ...]
    sizes: SizeRule
    parts: Mapping[str, str] = field(repr=False)
    weight_options: tuple[str, ...] = ()
    quantizations: tuple[Quantization, ...] = tuple(Quantization)
    variants: tuple[Variant, ...] = tuple(Variant)
    techniques: Techniques = frozenset()
    tiled: bool | Callable[[Architecture], bool] = False
    lazy_decode: bool = True
    repeatable: bool = True
    emits_events: bool = True
    settings: bool = False
    third_party: bool = False
    check_model: Callable[[Architecture, I2VRequest], None] = field(default=lambda *_: None, repr=False)

    @property
    def memory(self) -> tuple[MemoryPolicy, ...]:
        """The memory policies that it supports; ``auto`` where there is a choice."""
        own = [policy for policy, techniques in TECHNIQUES.items() if techniques <= self.techniques]
        return (*own, MemoryPolicy.AUTO) if len(own) > 1 else tuple(own)

    @property
    def is_own(self) -> bool:
        """Whether it is the runner that its models name, rather than one that stands beside that."""
        return self.models == self.name

    def tiles(self, architecture: Architecture) -> bool:
        """Whether a model's decoder can cut the latent into tiles."""
        return self.tiled(architecture) if callable(self.tiled) else self.tiled

    def size_rule(self, architecture: Architecture) -> SizeRule:
        """The sizes that a model takes."""
        own: dict[str, Any] = dict(architecture.sizes)
        if not own:
            return self.sizes
        return SizeRule(**{**own, "only": tuple((width, height) for width, height in own.get("only", ()))})

    # --- Rules ---

    def require_package(self, architecture: Architecture | None = None) -> None:
        """Find out whether the package is installed, and new enough for a model, without importing it.

        Args:
            architecture: The model that is to be run, if it is known.

        Raises:
            RunnerUnavailable: It is not, or a package that the model requires is older; with the command that installs
                it.

        Example:
            >>> from i2v_lab.pipeline.contract.architectures import load_architecture
            >>> from i2v_lab.pipeline.registry import RUNNERS
            >>> RUNNERS["ltx-2"].require_package(load_architecture("ltx-2.3-tiny"))
        """
        if find_spec(self.module) is None:
            raise RunnerUnavailable(
                f"pipeline={self.name!r} needs the Python module {self.module}, which is not installed; run "
                f"`{self.install}`",
                pipeline=self.name,
            )
        required = architecture.requires if architecture is not None else {}
        installed = {package: _installed(package) for package in required}
        old = {name: found for name, found in installed.items() if _release(found or "") < _release(required[name])}
        if architecture is not None and old:
            needs = " and ".join(f"{name} >= {required[name]} ({old[name] or 'none'} is installed)" for name in old)
            packages = " ".join(f"'{name}>={required[name]}'" for name in old)
            raise RunnerUnavailable(
                f"model={architecture.name!r} needs {needs}; run `pip install --upgrade {packages}`",
                model=architecture.name,
                installed=old,
            )

    def check_weight_options(self, given: Mapping[str, Any], model: str) -> None:
        """Refuse options for weights of another runner.

        Args:
            given: Paths by option, without dashes; ``None`` for what is not given.
            model: For the message.

        Raises:
            InvalidRequest: With the options that there are.
        """
        for name, value in given.items():
            if value is not None and name not in self.weight_options:
                known = ", ".join(map(_option, self.weight_options)) or "none: its weights are random"
                raise InvalidRequest(
                    f"{_option(name)} is not for model={model!r}, whose runner is {self.name}; use {known}",
                    **{name: value},
                )

    def check_request(self, architecture: Architecture, request: I2VRequest) -> None:
        """Refuse what a model or its runner does not support.

        Raises:
            InvalidRequest: With the value and what to use.

        Example:
            >>> from i2v_lab.pipeline.contract.architectures import load_architecture
            >>> from i2v_lab.pipeline.registry import RUNNERS
            >>> request = I2VRequest(image="still.png", width=192, height=128)
            >>> RUNNERS["ltx-video"].check_request(load_architecture("ltxv-tiny"), request)
            Traceback (most recent call last):
            ...
            i2v_lab.errors.InvalidRequest: quantization='fp8-cast' is not for model='ltxv-tiny'; use bf16
        """
        model = architecture.name
        if architecture.runner != self.models:
            raise InvalidRequest(
                f"pipeline={self.name!r} does not run model={model!r}; use a model whose runner is {self.models}",
                pipeline=self.name,
                model=model,
            )
        whose = f"model={model!r}" if self.is_own else f"pipeline={self.name!r}"
        known: dict[str, Sequence[str]] = {
            "quantization": self.quantizations,
            "variant": [variant for variant in self.variants if variant in architecture.variants],
            "memory": self.memory,
        }
        for name, choices in known.items():
            value = getattr(request, name).value
            if value not in choices:
                use = " or ".join(choices)
                if name == "quantization" and self.settings:
                    use += f", or {', '.join(QUANTIZATIONS)}"
                raise InvalidRequest(f"{name}={value!r} is not for {whose}; use {use}", **{name: value})
        if request.placement is not None and not self.techniques:
            words = f"a placement is not for {whose}; leave it out, or use a model whose runner is ltx-2"
            raise InvalidRequest(words, placement=request.placement.to_json())
        if not self.settings:
            if request.settings.quantizes:
                value = request.settings.quantization.value
                use = " or ".join(self.quantizations)
                raise InvalidRequest(f"quantization={value!r} is not for {whose}; use {use}", quantization=value)
            for name, unset in {"settings": NO_SETTINGS, "steps": None}.items():
                if getattr(request, name) != unset:
                    value = getattr(request, name)
                    raise InvalidRequest(
                        f"{name}={value.name if isinstance(value, MemorySettings) else value} is not for {whose}; "
                        "leave it out, or use a model of diffusers (`i2v-lab models`)",
                        **{name: value.to_json() if isinstance(value, MemorySettings) else value},
                    )
        self.size_rule(architecture).check(request)
        self.check_model(architecture, request)
        if request.tiling is not None and not self.tiles(architecture):
            raise InvalidRequest(
                f"tile_px={request.tiling.tile_px} is not for {whose}, whose decoder does not tile; use no tiling "
                "(--no-tiling, or tiling=None)",
                tiling=request.tiling,
            )

    # --- Parts ---

    def resolve_weights(
        self, architecture: Architecture, variant: Variant, progress: Progress = lambda *_: None, **paths: Path | None
    ) -> Any:
        """The weights of a model: verified files, or synthetic ones where no path is given."""
        self.require_package(architecture)
        own: dict[str, Any] = {name: path for name, path in paths.items() if name in self.weight_options}
        if "lora" in self.weight_options:
            own["needs_lora"] = variant is Variant.DEV
        return self._part("resolve_weights")(architecture, **own, progress=progress)

    def skeleton_weights(self, architecture: Architecture) -> Any:
        """Weights without values, made on demand: all that a forecast of memory needs."""
        self.require_package(architecture)
        return self._part("skeleton_weights")(architecture)

    def pipeline(
        self,
        weights: Any,
        device: str | torch.device = "cpu",
        sinks: Sequence[EventSink] = (),
        techniques: Techniques | None = None,
        settings: MemorySettings = NO_SETTINGS,
        kept: KeptWeights | None = None,
    ) -> Pipeline:
        """The pipeline over weights that this runner resolved.

        Args:
            weights: From :meth:`resolve_weights` or :meth:`skeleton_weights`.
            device: ``cpu`` or ``cuda``.
            sinks: Called with every event.
            techniques: Stand in for those of a request's memory policy.
            settings: Of the requests that it will get, where it takes any.
            kept: From :meth:`kept_weights`, for pipelines that share them.

        Raises:
            InvalidRequest: A technique or settings that it does not support.
        """
        self.check_techniques(techniques or frozenset())
        options: dict[str, Any] = {"techniques": techniques} if self.techniques and techniques is not None else {}
        if self.settings:
            options["settings"] = settings
        if kept is not None:
            options["host_weights"] = kept
        pipeline: Pipeline = self._part("pipeline")(weights, device, sinks=sinks, **options)
        return pipeline

    def kept_weights(self, budget_bytes: int | None = None) -> KeptWeights | None:
        """Keeps streamed weights in host memory from one generation to the next; ``None`` where the runner cannot.

        Args:
            budget_bytes: The most host memory that they may take; by default 0.8 of what is available.

        Example:
            >>> from i2v_lab.pipeline.registry import RUNNERS
            >>> print(RUNNERS["ltx-video"].kept_weights())
            None
        """
        if "kept_weights" not in self.parts:
            return None
        kept: KeptWeights = self._part("kept_weights")(budget_bytes, keep=True)
        return kept

    def check_techniques(self, techniques: Techniques) -> None:
        """Refuse a technique that this runner does not support.

        Raises:
            InvalidRequest: With those that there are.
        """
        unknown = sorted(techniques - self.techniques)
        if unknown:
            known = ", ".join(sorted(self.techniques)) or "none"
            raise InvalidRequest(
                f"technique='{unknown[0]}' is not for pipeline={self.name!r}; use {known}", technique=unknown[0].value
            )

    def memoizable_modules(self, architecture: Architecture) -> Mapping[type[torch.nn.Module], Callable[..., Hashable]]:
        """Module classes whose identical calls a forecast runs once (see :mod:`i2v_lab.profiling.fake.memoization`)."""
        kinds: Mapping[type[torch.nn.Module], Callable[..., Hashable]] = self._part("memoizable_modules")(architecture)
        return kinds

    def _part(self, name: str) -> Any:
        self.require_package()
        module, _, attribute = self.parts[name].partition(":")
        return getattr(import_module(f"i2v_lab.pipeline.{module}"), attribute)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a version, without what marks a development or local one."""
    found = re.match(r"[0-9.]*", text)
    return tuple(int(number) for number in found[0].split(".") if number) if found else ()
