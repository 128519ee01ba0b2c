"""What the controls of the views offer, for a model and around a request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.studies.published import to_size, to_tiling, varied

FRAMES = (9, 17, 25, 33, 49, 65, 81, 97, 121, 161, 201, 257)
STAGE_MULTIPLE = 64  # of the sides that are offered; every runner takes it
STEPS_TO_OWN = 6  # sizes of the model's own shape that are smaller than its own


def choose(kind: Any, description: str, options: Any) -> Any:
    """A control with a name that leaves the page alone until it is released."""
    more = {} if kind.__name__ != "SelectionSlider" else {"continuous_update": False}
    control = kind(description=description, options=options, **more)
    control.style.description_width = "70px"
    return control


def two_columns(controls: list[Any]) -> Any:
    """Controls beside one another, as many rows as they take."""
    import ipywidgets as widgets

    return widgets.GridBox(controls, layout=widgets.Layout(grid_template_columns="repeat(2, 350px)"))


def sizes(model: str, request: I2VRequest) -> list[str]:
    """Sizes such as ``1024x768``, the smallest first: of the model's own shape, of its studies, and the request's own.

    Example:
        >>> sizes("ltx-2.3-tiny", I2VRequest(image="still.png", width=320, height=64))
        ['128x64', '320x64', '192x128', '256x192', '384x256', '512x320', '576x384', '640x448', '768x512']
    """
    own = load_architecture(model).request
    multiple = STAGE_MULTIPLE
    unit = max(multiple, own["height"] // STEPS_TO_OWN // multiple * multiple)
    found = {(request.width, request.height)}
    for height in range(unit, 2 * max(own["height"], 4 * unit) + 1, unit):
        width = max(1, round(height * own["width"] / own["height"] / multiple)) * multiple
        found.add((width, height))
    found |= {to_size(text) for what in ("sizes", "map_sizes") for text in varied(model, what)}
    return [f"{width}x{height}" for width, height in sorted(found, key=lambda size: (size[0] * size[1], size))]


def policies(model: str) -> list[MemoryPolicy]:
    """Memory policies that a model has; ``auto`` asks a card first and is none of them."""
    return [policy for policy in runner_of(load_architecture(model)).memory if policy is not MemoryPolicy.AUTO]


def under_a_policy(request: I2VRequest, model: str) -> I2VRequest:
    """The request, ``resident`` where it asks for what the model has not, or for ``auto``."""
    return request if request.memory in policies(model) else replace(request, memory=MemoryPolicy.RESIDENT)


def for_model(request: I2VRequest, model: str) -> I2VRequest:
    """A request as another model has it, at that model's own size."""
    own: dict[str, Any] = {**load_architecture(model).request}
    return under_a_policy(replace(request, **own), model)


def frame_counts(request: I2VRequest) -> list[int]:
    """Numbers of frames, the request's own among them."""
    return sorted({*FRAMES, request.frames})


def tilings(model: str, request: I2VRequest) -> list[tuple[str, Tiling | None]]:
    """Tilings in words, the request's own among them."""
    usual = [Tiling()] if runner_of(load_architecture(model)).tiled else []
    found = dict.fromkeys([*usual, request.tiling, *(to_tiling(text) for text in varied(model, "tilings"))])
    return [(_words(tiling), tiling) for tiling in found]


def _words(tiling: Tiling | None) -> str:
    if tiling is None:
        return "in one piece"
    return (
        f"{tiling.tile_px} px by {tiling.tile_frames} frames, "
        f"overlaps {tiling.tile_overlap_px} px, {tiling.tile_overlap_frames}"
    )
