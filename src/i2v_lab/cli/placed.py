"""``--vram-budget`` and ``--memory auto`` on the command line: what is solved for, and how it is explained."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from i2v_lab.capacity.budget import AUTO as AUTO
from i2v_lab.capacity.budget import budget_bytes as budget_bytes
from i2v_lab.capacity.budget import budget_or_free_bytes as budget_or_free_bytes
from i2v_lab.capacity.device_profile import REFERENCE
from i2v_lab.cli import expected
from i2v_lab.cli.output import log
from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy
from i2v_lab.placement import Placement
from i2v_lab.request import I2VRequest
from i2v_lab.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from i2v_lab.capacity.placement import Alternative, Resolution
    from i2v_lab.capacity.solver import Fixed
    from i2v_lab.profiling.records import Forecast

PANEL = "Placement (LTX-2)"
SLOW_S = 2.0  # of a forecast, from which on it is announced
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
TILE_OPTIONS = ("tile_px", "tile_overlap_px", "tile_frames", "tile_overlap_frames", "no_tiling")

VramBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|auto",
        help="Solve for the fastest placement within a budget such as 12GiB, CUDA context included; auto: what the "
        "card has free.",
        rich_help_panel=PANEL,
    ),
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Print the placement, and why it is this one.", rich_help_panel=PANEL)
]
ResidentBlocks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COMPONENT=N",
        help="Blocks of a streamed component that stay on the device, such as transformer=12; repeatable.",
        rich_help_panel=PANEL,
    ),
]
Prefetch = Annotated[
    int | None, typer.Option(help="Streamed blocks that are copied ahead. [default: 1]", rich_help_panel=PANEL)
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(help="Tokens that the transformer processes at a time. [default: 8192]", rich_help_panel=PANEL),
]


@dataclass(frozen=True)
class Asked:
    """What the options of a command say about the placement.

    Attributes:
        budget_bytes: ``None`` without a budget, and for ``auto``.
        solve: Whether there is something to solve for.
        fixed: What the user decides.
        explain: Whether the result is printed.
        gpu: The card whose seconds are predicted.
    """

    budget_bytes: int | None
    solve: bool
    fixed: Fixed
    explain: bool
    gpu: str = REFERENCE


def asked_placement(
    context: typer.Context,
    memory: MemoryPolicy,
    vram_budget: str | None,
    *,
    resident_blocks: Sequence[str] | None = None,
    prefetch: int | None = None,
    chunk_tokens: int | None = None,
    explain: bool = False,
    gpu: str = REFERENCE,
) -> Asked:
    """Read the options.

    Args:
        context: Of the command, which knows which options were given.
        memory: A policy that was given beside a budget fixes the techniques.
        vram_budget: A size, or ``auto``.
        resident_blocks: Each ``COMPONENT=N``.
        prefetch: Of the placement.
        chunk_tokens: Likewise.
        explain: Whether the result is printed.
        gpu: The card whose seconds are predicted.

    Raises:
        InvalidRequest: A size or a pair that is none, or ``--explain`` without anything to explain.
    """
    from i2v_lab.capacity.solver import Fixed

    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    solve = vram_budget is not None or memory is MemoryPolicy.AUTO
    techniques = TECHNIQUES[memory] if "memory" in given and memory is not MemoryPolicy.AUTO else None
    fixed = Fixed(techniques, _counts(resident_blocks), prefetch, chunk_tokens, bool(given.intersection(TILE_OPTIONS)))
    if explain and not solve:
        raise InvalidRequest("explain=True has nothing to explain; give --vram-budget or --memory auto", explain=True)
    budget = None if vram_budget in (None, AUTO) else budget_bytes(str(vram_budget))
    return Asked(budget, solve, fixed, explain, gpu)


def not_placed(model: str) -> InvalidRequest:
    """The error for a model whose runner has no techniques."""
    return InvalidRequest(
        f"a placement is not for model={model!r}; leave out --vram-budget and what belongs to it, or use a model "
        "whose runner is ltx-2 (`i2v-lab models`)",
        model=model,
    )


def _counts(pairs: Sequence[str] | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for pair in pairs or ():
        name, _, text = pair.partition("=")
        if not name or not re.fullmatch(r"\d{1,9}", text, re.ASCII):
            words = f"resident_blocks={pair!r} is not a component and a number; write it as transformer=12"
            raise InvalidRequest(words, resident_blocks=pair)
        found[name] = int(text)
    return found


def check_asked(request: I2VRequest, model: str, asked: Asked) -> I2VRequest:
    """The request with what is fixed, before anything is solved.

    Raises:
        InvalidRequest: The model cannot be placed, or what is fixed contradicts itself.
    """
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.registry import check_request, runner_of

    fixed, architecture = asked.fixed, load_architecture(model)
    if not (asked.solve or fixed.resident_blocks or fixed.numbers):
        return request
    if not runner_of(architecture).techniques:
        raise not_placed(model)
    techniques = fixed.techniques
    if techniques is None:
        techniques = TECHNIQUES[MemoryPolicy.STREAMED if asked.solve else request.memory]
    counts = tuple(fixed.resident_blocks.items())
    placement = Placement(techniques=techniques, resident_blocks=counts, **fixed.numbers)
    placed = replace(request, memory=MemoryPolicy.RESIDENT, placement=placement)
    check_request(architecture, placed)
    return request if asked.solve else placed


def solved(request: I2VRequest, model: str, memory_bytes: int, asked: Asked, device: str = "cuda") -> Resolution:
    """The fastest placement within a budget; what was chosen, and why, goes to stderr.

    Args:
        request: Its memory policy is replaced.
        model: Name of the architecture.
        memory_bytes: The budget.
        asked: What the options say.
        device: ``cuda`` or ``cpu``.
    """
    from i2v_lab.capacity.placement import resolve_memory
    from i2v_lab.studies.placed import base_specs

    def progress(tried: I2VRequest, forecast: Forecast, _: str) -> None:
        if forecast.seconds > SLOW_S:
            placement = tried.placed
            held = ", ".join(filter(None, [str(placement.policy or "streamed"), placement.name]))
            log(f"i2v-lab: forecast {tried.width}x{tried.height}, {held}: {forecast.seconds:.0f} s")

    expected.announce_forecasts(base_specs(request, model), device=device)
    resolution = resolve_memory(request, memory_bytes, model, device, progress, asked.fixed, asked.gpu)
    log(f"i2v-lab: {resolution.reason}")
    if asked.explain:
        for line in explained(resolution):
            log(line)
    return resolution


def use_expandable_segments() -> None:
    """Have torch's allocator grow its segments, in this process; before torch is loaded."""
    os.environ.update(with_expandable_segments(os.environ))


def with_expandable_segments(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which torch's allocator grows its segments, unless it configures the allocator already.

    With it 2048x1536 fits 3.25 GiB where 3.5 are needed without (docs/log/memory-policies.md). torch has it on Linux.
    """
    if sys.platform != "linux" or any(name in environment for name in ALLOCATOR_VARIABLES):
        return dict(environment)
    return {**environment, ALLOCATOR_VARIABLES[0]: "expandable_segments:True"}


def explained(resolution: Resolution) -> list[str]:
    """A placement in lines: bytes by component, what each phase takes and how long, and the next cheaper and faster.

    Args:
        resolution: The placement.
    """
    from i2v_lab.capacity.device_profile import device_profile

    forecast, room = resolution.forecast, resolution.allocatable_bytes
    placement = resolution.request.placed
    budget = (
        f"budget {format_bytes(resolution.memory_bytes)}: {format_bytes(room)} for tensors, "
        f"{format_bytes(resolution.cap_bytes - room)} for fragmentation, "
        f"{format_bytes(resolution.memory_bytes - resolution.cap_bytes)} for the CUDA context and kernels"
    )
    lines = [budget, f"techniques: {', '.join(sorted(placement.techniques)) or 'none'}"]
    if resolution.components:
        lines.append(
            f"prefetch {placement.prefetch}, chunks of {placement.chunk_tokens or 'the default number of'} tokens"
        )
    for one in resolution.components:
        lines.append(
            f"{one.component}: {one.resident_blocks} of {one.blocks} blocks stay ({format_bytes(one.resident_bytes)}), "
            f"{format_bytes(one.streamed_bytes)} are streamed whenever it runs"
        )
        if one.next_bytes is not None:
            lines.append(
                f"    one more would take {format_bytes(one.next_bytes)}; {one.phase} has "
                f"{format_bytes(one.free_bytes)} free"
            )
    lines += [f"{phase.phase}: {format_bytes(phase.peak_bytes)}" for phase in forecast.phases]
    if resolution.computed_from:
        lines.append(f"computed from forecasts of {'; '.join(resolution.computed_from)}")
    source = device_profile(resolution.gpu).source
    lines.append(f"predicted on {resolution.gpu}: {format_seconds(resolution.seconds)} ({source})")
    lines.append("next cheaper: " + (_alternative(resolution.cheaper) if resolution.cheaper else "none takes less"))
    if resolution.faster is None:
        return [*lines, "next faster: none, with any budget"]
    lines.append(
        f"next faster: {_alternative(resolution.faster)}, {format_bytes(resolution.faster.peak_bytes - room)} "
    )
    lines[-1] += f"more than there is; it needs a budget of {format_bytes(resolution.faster.memory_bytes)}"
    return lines


def _alternative(one: Alternative) -> str:
    return f"{one.name}: {format_seconds(one.seconds)}, {format_bytes(one.peak_bytes)} in {one.peak_phase}"


def explanation(resolution: Resolution) -> dict[str, Any]:
    """The same as JSON values."""
    from i2v_lab.capacity.device_profile import device_profile

    return {
        "memory_bytes": resolution.memory_bytes,
        "context_bytes": resolution.forecast.context_bytes,
        "allocatable_bytes": resolution.allocatable_bytes,
        "cap_bytes": resolution.cap_bytes,
        "memory": str(resolution.request.placed.policy or "placed"),
        "placement": resolution.request.placed.to_json(),
        "components": [asdict(one) for one in resolution.components],
        "computed_from": list(resolution.computed_from),
        "peak_bytes": resolution.forecast.peak.peak_bytes,
        "predicted_seconds": resolution.seconds,
        "predicted_on": resolution.gpu,
        "predicted_measured": device_profile(resolution.gpu).measured,
        "next_cheaper": resolution.cheaper and asdict(resolution.cheaper),
        "next_faster": resolution.faster and asdict(resolution.faster),
        "reason": resolution.reason,
    }
