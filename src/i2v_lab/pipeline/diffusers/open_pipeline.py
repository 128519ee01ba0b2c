"""Which class runs an architecture: the one for any pipeline of diffusers, or the one for the two stages of LTX-2."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from i2v_lab.events import EventSink
from i2v_lab.memory_policy import Techniques
from i2v_lab.memory_settings import NO_SETTINGS, MemorySettings
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.diffusers import pipeline
from i2v_lab.pipeline.diffusers.weights import DiffusersWeights


def open_pipeline(
    weights: DiffusersWeights,
    device: str | torch.device = "cpu",
    sinks: Sequence[EventSink] = (),
    techniques: Techniques = frozenset(),
    settings: MemorySettings = NO_SETTINGS,
) -> Any:
    """The pipeline of a model; see :class:`~i2v_lab.pipeline.diffusers.pipeline.DiffusersPipeline`."""
    if weights.architecture.pipeline:
        return pipeline.DiffusersPipeline(weights, device, sinks, techniques, settings)
    from i2v_lab.pipeline.diffusers.ltx2 import DiffusersLTX2  # whose classes diffusers has from 0.37 on

    return DiffusersLTX2(weights, device, sinks, techniques, settings)


def memoizable_modules(architecture: Architecture) -> dict[type[torch.nn.Module], Callable[..., Hashable]]:
    """The modules of a model that run the same operators whenever they are called."""
    if architecture.pipeline:
        return pipeline.memoizable_modules(architecture)
    from i2v_lab.pipeline.diffusers import ltx2

    return ltx2.memoizable_modules(architecture)
