"""``i2v-lab models``: the models that there are, with their parameters, sizes and phases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from i2v_lab.cli import options
from i2v_lab.cli.output import print_json
from i2v_lab.errors import RunnerUnavailable
from i2v_lab.request import MAX_FRAMES, MAX_SIDE

if TYPE_CHECKING:
    from i2v_lab.pipeline.contract.architectures import Architecture

EXAMPLES = """
**Examples**

Every model in full size, then one of them with its components, sizes and sources, and all as JSON:

    i2v-lab models
    i2v-lab models wan-2.2-i2v-a14b
    i2v-lab models --tiny --json
"""
BILLION = 10**9


def models(
    name: Annotated[str | None, typer.Argument(help="One model, in detail.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="List the tiny models for tests too.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """List the models, with parameters, default size and phases; or one of them in detail."""
    from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture

    if name is not None:
        described = _described(load_architecture(name))
        if as_json:
            print_json(described)
        else:
            _print_one(described)
        return
    names = [each for each in architecture_names() if tiny or "tiny" not in each]
    every = [_described(load_architecture(each)) for each in names]
    if as_json:
        print_json(every)
    else:
        _print_all(every)


def _described(architecture: Architecture) -> dict[str, Any]:
    from i2v_lab.memory_settings import Offload
    from i2v_lab.pipeline.registry import runner_of

    runner = runner_of(architecture)
    rule = runner.size_rule(architecture)
    lacking = ""
    try:
        runner.require_package(architecture)
    except RunnerUnavailable as error:
        lacking = str(error)
    return {
        "name": architecture.name,
        "runner": runner.name,
        "pipeline": architecture.pipeline,
        "parameters": {key: count for key, count in architecture.parameters.items() if not key.startswith("of which")},
        "request": {key: architecture.request.get(key) for key in ("width", "height", "frames", "fps")},
        "sizes": {
            "only": [list(size) for size in rule.only],
            "pixel_multiple": rule.pixel_multiple,
            "min_pixels": rule.min_pixels,
            "max_pixels": rule.max_pixels,
            "frame_step": rule.frame_step,
            "min_frames": rule.min_frames,
            "max_frames": rule.max_frames,
        },
        "phases": _phases(architecture),
        "dtypes": architecture.dtypes,
        "sampling": architecture.sampling,
        "memory": [policy.value for policy in runner.memory],
        "offload": [offload.value for offload in Offload] if runner.settings else [],
        "repository": list(architecture.repository),
        "source": architecture.source,
        "note": architecture.note,
        "unavailable": lacking,
    }


def _phases(architecture: Architecture) -> list[str]:
    """The phases of a generation, in the order in which they begin, by the names that its records give them."""
    from i2v_lab.events import Phase
    from i2v_lab.profiling.components import DENOISE, phase_of

    order = list(Phase)
    if architecture.runner == "diffusers":
        order.sort(key=lambda phase: phase is Phase.DECODE_AUDIO)
    if architecture.image_first:
        order.sort(key=lambda phase: phase is not Phase.ENCODE_IMAGE)
    if not architecture.pipeline:
        silent = architecture.runner == "ltx-video"
        return [each.value for each in order if each is not Phase.DECODE_AUDIO or not silent]
    found = [
        phase_of([name, config["_class_name"]], [part] if part else [], "diffusers")
        for name, config in architecture.config.items()
        for part in (("encoder", "decoder") if name == "vae" else ("",))
        if name in architecture.parameters
    ]
    stages = [Phase.DENOISE_STAGE_1, Phase.DENOISE_STAGE_2][: found.count(DENOISE)]
    return [each.value for each in order if each in found or each in stages]


def _print_all(every: list[dict[str, Any]]) -> None:
    from i2v_lab.reporting.console import TerminalTable, wide_console

    table = TerminalTable("model", "parameters", "default", "phases", box=None, header_style="bold", pad_edge=False)
    table.columns[1].justify = "right"
    console = wide_console()
    for column in table.columns:
        column.overflow = "fold"
    table.columns[0].no_wrap = True
    for each in every:
        style = "dim" if each["unavailable"] else ""
        table.add_row(each["name"], _billions(each["parameters"]), _size(each), ", ".join(each["phases"]), style=style)
    console.print(table)
    for each in every:
        if each["unavailable"]:
            console.print(each["unavailable"], soft_wrap=True)
    console.print("parameters: of all components together; `i2v-lab models NAME` says more of one", soft_wrap=True)


def _print_one(model: dict[str, Any]) -> None:
    from i2v_lab.reporting.console import wide_console

    console = wide_console()
    console.print(f"{model['name']}: {model['pipeline'] or model['runner']}, {_size(model)}", soft_wrap=True)
    for name, count in model["parameters"].items():
        console.print(f"  {name}: {_billions({name: count})} parameters", soft_wrap=True)
    sizes = model["sizes"]
    rule = (
        f"sizes: {', '.join(f'{width}x{height}' for width, height in sizes['only'])}"
        if sizes["only"]
        else f"width and height: multiples of {sizes['pixel_multiple']}, "
        f"{_bounds(sizes['min_pixels'], sizes['max_pixels'], MAX_SIDE)}"
    )
    frames = _bounds(sizes["min_frames"], sizes["max_frames"], MAX_FRAMES)
    console.print(f"{rule}; frames: {sizes['frame_step']}k+1, {frames}", soft_wrap=True)
    console.print(f"phases: {', '.join(model['phases'])}", soft_wrap=True)
    facts = {
        "dtypes": ", ".join(f"{name} {dtype}" for name, dtype in model["dtypes"].items()),
        "call": ", ".join(f"{name}={value}" for name, value in model["sampling"].items()),
        "memory policies": ", ".join(model["memory"]),
        "offload": ", ".join(model["offload"]),
        "weights": ", ".join(model["repository"]),
        "source": model["source"],
        "note": model["note"],
        "unavailable": model["unavailable"],
    }
    for name, text in facts.items():
        if text:
            console.print(f"{name}: {text}", soft_wrap=True)


def _bounds(least: int, most: int, unlimited: int) -> str:
    return f"{least} or more" if most == unlimited else f"{least} to {most}"


def _billions(parameters: dict[str, int]) -> str:
    total = sum(parameters.values())
    return f"{total / BILLION:.2f} B" if total >= BILLION / 100 else f"{total / 10**6:.2f} M" if total else ""


def _size(model: dict[str, Any]) -> str:
    request = model["request"]
    return f"{request['width']}x{request['height']}, {request['frames']} frames"
