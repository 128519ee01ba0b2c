"""The controls of the views: their options for a model and a request, and the request that they edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import NO_SETTINGS, MemorySettings, Offload
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.studies.published import to_size, to_tiling, varied

FRAMES = (9, 17, 25, 33, 49, 65, 81, 97, 121, 161, 201, 257)
OFFERED = (
    NO_SETTINGS,
    MemorySettings(vae_tiling=True),
    MemorySettings(offload=Offload.MODEL),
    MemorySettings(offload=Offload.MODEL, vae_tiling=True),
    MemorySettings(offload=Offload.GROUP_LEAF, offload_stream=True),
    MemorySettings(offload=Offload.GROUP_LEAF, offload_stream=True, vae_tiling=True),
    MemorySettings(offload=Offload.SEQUENTIAL),
    MemorySettings(offload=Offload.SEQUENTIAL, vae_tiling=True),
)
MOST_EXACT = 2**53 - 1  # among the numbers of a browser
SMALLER_SIZES = 6  # at the default aspect ratio, up to the default size


def choose(kind: Any, description: str, options: Any) -> Any:
    """A labelled selection widget; a slider reports a value when it is released, not while it is dragged."""
    extra = {} if kind.__name__ != "SelectionSlider" else {"continuous_update": False}
    control = kind(description=description, options=options, **extra)
    control.style.description_width = "70px"
    return control


def two_columns(controls: list[Any]) -> Any:
    """Controls in a grid of two columns."""
    import ipywidgets as widgets

    return widgets.GridBox(controls, layout=widgets.Layout(grid_template_columns="repeat(2, 350px)"))


def sizes(model: str, request: I2VRequest) -> list[str]:
    """Sizes such as ``1024x768``, ascending: at the model's aspect ratio, of its studies, and the request's own.

    Example:
        >>> sizes("ltx-2.3-tiny", I2VRequest(image="still.png", width=320, height=64))
        ['128x64', '320x64', '192x128', '256x192', '384x256', '512x320', '576x384', '640x448', '768x512']
    """
    architecture = load_architecture(model)
    own, rule = architecture.request, runner_of(architecture).size_rule(architecture)
    if rule.only:
        return [f"{width}x{height}" for width, height in sorted({*rule.only, (request.width, request.height)})]
    multiple = rule.pixel_multiple
    unit = max(multiple, own["height"] // SMALLER_SIZES // multiple * multiple)
    found = {(request.width, request.height)}
    for height in range(unit, 2 * max(own["height"], 4 * unit) + 1, unit):
        width = max(1, round(height * own["width"] / own["height"] / multiple)) * multiple
        found.add((width, height))
    found |= {to_size(text) for what in ("sizes", "map_sizes") for text in varied(model, what)}
    return [f"{width}x{height}" for width, height in sorted(found, key=lambda size: (size[0] * size[1], size))]


def policies(model: str) -> list[MemoryPolicy]:
    """Memory policies that a model supports, without ``auto``."""
    return [policy for policy in runner_of(load_architecture(model)).memory if policy is not MemoryPolicy.AUTO]


def with_supported_policy(request: I2VRequest, model: str) -> I2VRequest:
    """The request, with ``resident`` in place of ``auto`` or of a memory policy that the model does not support."""
    return request if request.memory in policies(model) else replace(request, memory=MemoryPolicy.RESIDENT)


def request_for_model(request: I2VRequest, model: str) -> I2VRequest:
    """The request with another model's defaults, its size among them."""
    architecture = load_architecture(model)
    defaults: dict[str, Any] = {**architecture.request, "settings": NO_SETTINGS, "steps": None}
    if architecture.pipeline and "tokenizer" not in architecture.config:  # it takes no prompt
        defaults |= {"prompt": "", "negative_prompt": ""}
    return with_supported_policy(replace(request, **defaults), model)


def memory_settings(model: str, request: I2VRequest) -> list[tuple[str, MemorySettings]]:
    """Labels and memory settings, the request's own among them; one alone where the runner takes none."""
    offered = OFFERED if runner_of(load_architecture(model)).settings else (NO_SETTINGS,)
    return [(each.options.replace("--", "") or "none", each) for each in dict.fromkeys([*offered, request.settings])]


def frame_counts(model: str, request: I2VRequest) -> list[int]:
    """Numbers of frames that the model takes, in ascending order, the request's own among them."""
    architecture = load_architecture(model)
    step = runner_of(architecture).size_rule(architecture).frame_step
    return sorted({*((frames - 1) // step * step + 1 for frames in FRAMES), request.frames})


def tilings(model: str, request: I2VRequest) -> list[tuple[str, Tiling | None]]:
    """Labels and tilings, the request's own among them."""
    architecture = load_architecture(model)
    default = [Tiling()] if runner_of(architecture).tiles(architecture) else []
    found = dict.fromkeys([*default, request.tiling, *(to_tiling(text) for text in varied(model, "tilings"))])
    return [(_label(tiling), tiling) for tiling in found]


def _label(tiling: Tiling | None) -> str:
    if tiling is None:
        return "untiled"
    return (
        f"{tiling.tile_px} px by {tiling.tile_frames} frames, "
        f"overlaps {tiling.tile_overlap_px} px, {tiling.tile_overlap_frames}"
    )


class RequestForm:
    """Widgets that edit a request of a model.

    A change of the model resets the request to that model's defaults; any other change edits one field.

    Args:
        widgets: By name: ``model``, ``size``, ``frames``, ``memory``, ``settings``, and any other field of a request.
            Other names are observed, but edit nothing.
        model: An architecture's name.
        request: Shown first.
        on_change: Called after a change by the user, not after :meth:`show`.

    Attributes:
        widgets: As given.
        model: As edited.
        request: As edited; what was refused is not in it.
        problem: Why the last change was refused; empty otherwise.
    """

    def __init__(
        self, widgets: Mapping[str, Any], model: str, request: I2VRequest, on_change: Callable[[], None]
    ) -> None:
        self.widgets = widgets
        self._fields = [field.name for field in fields(I2VRequest) if field.name in widgets]
        self._on_change = on_change
        self._updating = False
        self.problem = ""
        self.show(model, request)
        for widget in widgets.values():
            widget.observe(self._changed, "value")

    def show(self, model: str, request: I2VRequest, **options: Sequence[Any]) -> None:
        """Set options and values of the widgets.

        Args:
            model: Decides which sizes, policies and tilings are offered.
            request: Its values are among the options.
            **options: Of further widgets, by name.
        """
        self.model, self.request = model, request
        options |= {
            "size": sizes(model, request),
            "frames": frame_counts(model, request),
            "memory": policies(model),
            "settings": memory_settings(model, request),
        }
        if "tiling" in self.widgets:
            options["tiling"] = tilings(model, request)
        values = {"model": model, "size": f"{request.width}x{request.height}"}
        values |= {name: getattr(request, name) for name in self._fields}
        self._updating = True
        try:
            for name, choices in options.items():
                self.widgets[name].options = choices
            for name, value in values.items():
                self.widgets[name].value = value
        finally:
            self._updating = False

    def _changed(self, _: Any) -> None:
        if self._updating:
            return
        model = self.widgets["model"].value
        self.problem = ""
        if model != self.model:
            self.show(model, request_for_model(self.request, model))
        else:
            try:
                self.request = self._edited()
            except InvalidRequest as error:
                self.problem = str(error)
        self._on_change()

    def _edited(self) -> I2VRequest:
        width, height = to_size(self.widgets["size"].value)
        edited = {name: self.widgets[name].value for name in self._fields}
        if "seed" in edited:
            edited["seed"] = _exact(edited["seed"])
        return replace(self.request, width=width, height=height, **edited)


def _exact(seed: float) -> float:
    """A seed as a browser sends it, as the whole number that it is; any other stays, and is refused by the request.

    Raises:
        InvalidRequest: It is so large that the browser may have rounded it.
    """
    if abs(seed) > MOST_EXACT:
        raise InvalidRequest(
            f"seed={seed:.0f} is above 2**53-1, beyond which a browser rounds numbers; use that or less", seed=seed
        )
    return int(seed) if float(seed).is_integer() else seed
