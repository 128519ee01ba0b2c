"""The controls of the views: their options for a model and a request, and the request that they edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from i2v_lab.capacity.budget import AUTO
from i2v_lab.errors import InvalidRequest, RunnerUnavailable
from i2v_lab.lab.held import chooses
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import NO_SETTINGS, MemorySettings, Offload, TransformerQuantization
from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture
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
WIDTH = "340px"  # of a control
BUDGETS = [AUTO, *(f"{gib}GiB" for gib in (4, 6, 8, 10, 12, 16, 24, 32, 48, 80))]
SEARCHED = "auto: the fastest that fits"
SMALLER_SIZES = 6  # at the default aspect ratio, up to the default size


def choose(kind: Any, description: str, options: Any) -> Any:
    """A labelled selection widget; a slider reports a value when it is released, not while it is dragged."""
    extra = {} if kind.__name__ != "SelectionSlider" else {"continuous_update": False}
    control = kind(description=description, options=options, **extra)
    control.layout.width = WIDTH
    control.style.description_width = "70px"
    return control


def budget_field() -> Any:
    """A field for a memory budget, which offers common sizes."""
    import ipywidgets as widgets

    field = widgets.Combobox(
        description="budget",
        options=BUDGETS,
        placeholder="all of it, or such as 12GiB",
        layout=widgets.Layout(width=WIDTH),
        continuous_update=False,
        tooltip="the most that the process may take, CUDA context included; auto: what this machine's card has free",
    )
    field.style.description_width = "70px"
    return field


def memory_controls() -> dict[str, Any]:
    """The controls of how a request is held, of which :class:`RequestForm` shows those that the model has."""
    import ipywidgets as widgets

    return {
        "memory": choose(widgets.Dropdown, "memory", [""]),
        "settings": choose(widgets.Dropdown, "memory", [("", NO_SETTINGS)]),
        "transformer": choose(widgets.Dropdown, "quantized", [("", TransformerQuantization.NONE)]),
        "budget": budget_field(),
    }


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


def runnable_models() -> list[str]:
    """Models whose packages are installed."""
    found = []
    for name in architecture_names():
        architecture = load_architecture(name)
        with suppress(RunnerUnavailable):
            runner_of(architecture).require_package(architecture)
            found.append(name)
    return found


def policies(model: str) -> list[MemoryPolicy]:
    """Memory policies that a model supports, ``auto`` first; it also stands for the fastest settings of diffusers."""
    runner = runner_of(load_architecture(model))
    own: list[MemoryPolicy] = [policy for policy in runner.memory if policy is not MemoryPolicy.AUTO]
    return [MemoryPolicy.AUTO, *own] if chooses(model) else own


def with_supported_policy(request: I2VRequest, model: str) -> I2VRequest:
    """The request, with ``resident`` in place of a memory policy that the model does not support."""
    return request if request.memory in policies(model) else replace(request, memory=MemoryPolicy.RESIDENT)


def searching(request: I2VRequest, model: str) -> I2VRequest:
    """The request, held by what is fastest and fits, where the model has a choice."""
    return with_supported_policy(replace(request, memory=MemoryPolicy.AUTO, placement=None), model)


def request_for_model(request: I2VRequest, model: str) -> I2VRequest:
    """The request with another model's defaults, its size among them."""
    architecture = load_architecture(model)
    defaults: dict[str, Any] = {**architecture.request, "settings": NO_SETTINGS, "steps": None}
    if architecture.pipeline and "tokenizer" not in architecture.config:  # it takes no prompt
        defaults |= {"prompt": "", "negative_prompt": ""}
    return with_supported_policy(replace(request, **defaults), model)


def memory_settings(model: str, request: I2VRequest) -> list[tuple[str, MemorySettings]]:
    """Labels and memory settings, the request's own among them; one alone where the runner takes none.

    Quantization, which is chosen apart from them, is left out.
    """
    offered = OFFERED if runner_of(load_architecture(model)).settings else (NO_SETTINGS,)
    own = replace(request.settings, quantization=TransformerQuantization.NONE)
    return [(each.options.replace("--", "") or "none", each) for each in dict.fromkeys([*offered, own])]


def quantizations(model: str) -> list[tuple[str, TransformerQuantization]]:
    """Labels and quantizations of a model's transformers; none but ``none`` where it has none."""
    architecture = load_architecture(model)
    takes = architecture.pipeline and "transformer" in architecture.config and runner_of(architecture).settings
    return [(each.value, each) for each in TransformerQuantization if takes or not each.package]


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
        f"overlap {tiling.tile_overlap_px}, {tiling.tile_overlap_frames}"
    )


class RequestForm:
    """Widgets that edit a request of a model.

    A change of the model resets the request to that model's defaults; any other change edits one field.

    Args:
        widgets: By name: ``model``, ``size``, ``frames``, those of :func:`memory_controls`, and any other field of a
            request. Other names are observed, but edit nothing.
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
        own = [field.name for field in fields(I2VRequest) if field.name in widgets]
        self._fields = [name for name in own if name not in ("memory", "settings")]
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
        architecture = load_architecture(model)
        runner, searches = runner_of(architecture), request.memory is MemoryPolicy.AUTO
        offered: list[tuple[str, Any]] = [*memory_settings(model, request)]
        options |= {
            "size": sizes(model, request),
            "frames": frame_counts(model, request),
            "memory": policies(model),
            "settings": [(SEARCHED, None), *offered] if runner.settings else offered,
            "transformer": quantizations(model),
        }
        if "tiling" in self.widgets:
            options["tiling"] = tilings(model, request)
        values: dict[str, Any] = {"model": model, "size": f"{request.width}x{request.height}", "memory": request.memory}
        settings = replace(request.settings, quantization=TransformerQuantization.NONE)
        values |= {"settings": None if searches and runner.settings else settings}
        values |= {"transformer": request.settings.quantization}
        values |= {name: getattr(request, name) for name in self._fields}
        shown = {
            "memory": not runner.settings and len(policies(model)) > 1,
            "settings": runner.settings,
            "transformer": len(quantizations(model)) > 1,
            "tiling": runner.tiles(architecture),
            "quantization": len(runner.quantizations) > 1,
        }
        self._updating = True
        try:
            for name, choices in options.items():
                self.widgets[name].options = choices
            for name, value in values.items():
                self.widgets[name].value = value
            for name, visible in shown.items():
                if name in self.widgets:
                    self.widgets[name].layout.display = None if visible else "none"
        finally:
            self._updating = False

    def apply(self, changes: Mapping[str, Any]) -> None:
        """Change several widgets at once, as a user would one after another.

        Args:
            changes: Values by the widget's name; ``memory`` stands for the settings of a model of diffusers too.
        """
        self._updating = True
        try:
            for name, value in changes.items():
                searched = name == "memory" and value is MemoryPolicy.AUTO
                if searched and runner_of(load_architecture(self.model)).settings:
                    self.widgets["settings"].value = None
                else:
                    self.widgets[name].value = value
        finally:
            self._updating = False
        self._changed(None)

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
        edited["memory"], settings = self.widgets["memory"].value, self.widgets["settings"].value
        if runner_of(load_architecture(self.model)).settings:
            edited["memory"] = MemoryPolicy.AUTO if settings is None else MemoryPolicy.RESIDENT
        if edited["memory"] is not MemoryPolicy.RESIDENT:
            edited["placement"] = None
        edited["settings"] = replace(settings or NO_SETTINGS, quantization=self.widgets["transformer"].value)
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
