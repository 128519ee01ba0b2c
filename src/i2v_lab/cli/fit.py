"""``i2v-lab fit``: the largest request that a card takes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from i2v_lab.cli import best, expected, options, placed
from i2v_lab.cli.forecast_report import measured_on
from i2v_lab.cli.output import log, print_json, say
from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import Offload
from i2v_lab.request import I2VRequest, Variant
from i2v_lab.runs.spec import DEFAULT_STILL, FULL_SIZE_MODEL
from i2v_lab.units import format_bytes

if TYPE_CHECKING:
    from i2v_lab.profiling.records import Forecast

EXAMPLES = """
**Examples**

Every size of LTX-2.3 up to the largest 4:3 one, the most frames at 1024x768, and one video alone:

    i2v-lab fit --gpu "RTX 3060 12GB"
    i2v-lab fit --gpu "RTX 3060 12GB" --width 1024 --height 768
    i2v-lab fit --gpu "RTX 4050 Laptop 6GB" --width 3840 --height 2176 --frames 97

A model of diffusers (`i2v-lab models` lists them), under whichever settings are fastest:

    i2v-lab fit --gpu "RTX 3060 12GB" --model wan-2.2-i2v-a14b --width 832 --height 480 --frames 81

The largest under a memory policy, or under memory settings, of one's own:

    i2v-lab fit --gpu "RTX 5090" --frames 97 --memory lean
    i2v-lab fit --gpu "RTX 4090" --model cogvideox-5b-i2v --width 720 --height 480 --offload model
"""


def fit(
    context: typer.Context,
    gpu: Annotated[
        str | None, typer.Option(help="A card as nvidia-smi names it, or a size such as 24GiB; or --vram-budget.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames. [default: searched for]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; with --height. [default: searched for]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; with --width. [default: searched for]")] = None,
    aspect: Annotated[str, typer.Option(help="Width to height, when searching for the size.")] = "4:3",
    fps: options.Fps = None,
    model: options.Model = FULL_SIZE_MODEL,
    variant: options.VariantOption = Variant.DISTILLED,
    quantization: options.QuantizationOption = None,
    memory: options.MemoryOption = MemoryPolicy.RESIDENT,
    steps: options.Steps = None,
    offload: options.OffloadOption = Offload.NONE,
    offload_stream: options.OffloadStream = False,
    offload_blocks: options.OffloadBlocks = 1,
    vae_tiling: options.VaeTiling = False,
    vae_tile: options.VaeTile = None,
    vae_slicing: options.VaeSlicing = False,
    layerwise_casting: options.LayerwiseCasting = False,
    dtype: options.DtypeOption = None,
    vram_budget: placed.VramBudget = None,
    explain: placed.Explain = False,
    as_json: options.AsJson = False,
) -> None:
    """What fits a card, and how long it takes: the fastest placement, or memory settings, of every size.

    Without --width and --height the model's sizes, up to the largest that fits; with them the most frames, or that
    request alone where --frames is given too. With --memory, or with memory settings such as --offload, only what fits
    under these. The exit status is 1 if nothing fits; then the memory that is needed at least is named.
    """
    from i2v_lab.capacity.cards import BUDGET, gpu_memory_bytes
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.registry import runner_of

    if (gpu is None) == (vram_budget is None):
        raise InvalidRequest(
            f"gpu={gpu} and vram_budget={vram_budget} name one size between them; give either --gpu or --vram-budget",
            gpu=gpu,
            vram_budget=vram_budget,
        )
    if (width is None) != (height is None):
        raise InvalidRequest(
            f"width={width} and height={height} belong together; give both or neither", width=width, height=height
        )
    sides = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", aspect)
    if sides is None:
        raise InvalidRequest(f"aspect={aspect!r} is not two numbers; write it as 4:3", aspect=aspect)
    if vram_budget is not None and memory not in (MemoryPolicy.RESIDENT, MemoryPolicy.AUTO):
        raise InvalidRequest(
            f"memory={memory.value!r} and vram_budget={vram_budget!r} exclude each other; give one of them",
            memory=memory.value,
            vram_budget=vram_budget,
        )
    memory_bytes = gpu_memory_bytes(gpu) if gpu is not None else placed.budget_or_free_bytes(str(vram_budget))
    gpu = gpu or f"{BUDGET}{format_bytes(memory_bytes)}"
    # A dimension that is searched for starts at the default.
    architecture = load_architecture(model)
    runner_of(architecture).require_package(architecture)  # what is refused is so before the time is announced
    places = bool(runner_of(architecture).techniques)
    if vram_budget is not None and not places:
        raise placed.not_placed(model)
    settings = options.memory_settings(
        offload,
        offload_stream=offload_stream,
        offload_blocks=offload_blocks,
        vae_tiling=vae_tiling,
        vae_tile=vae_tile,
        vae_slicing=vae_slicing,
        layerwise_casting=layerwise_casting,
        dtype=dtype,
        quantization=quantization,
    )
    given = str(context.get_parameter_source("memory")).endswith("COMMANDLINE") and memory is not MemoryPolicy.AUTO
    free = best.is_free(settings) and not given
    if explain and not (free and places):
        raise InvalidRequest("explain=True has nothing to explain; leave out --memory and --offload", explain=True)
    request = options.build_request(
        architecture,
        (None,) * 4,
        no_tiling=False,
        image=DEFAULT_STILL,
        fps=fps,
        variant=variant,
        quantization=quantization,
        memory=memory if given else MemoryPolicy.RESIDENT,
        frames=frames,
        width=width,
        height=height,
        settings=settings,
        steps=steps,
    )
    card, shape = best.Card(gpu, memory_bytes), (int(sides[1]), int(sides[2]))
    sought = "size" if width is None else "frames" if frames is None else ""
    fits = (_fastest if free else _as_asked)(request, model, card, sought, shape, explain=explain, as_json=as_json)
    if not fits:
        raise typer.Exit(1)


def _fastest(
    request: I2VRequest,
    model: str,
    card: best.Card,
    sought: str,
    aspect: tuple[int, int],
    *,
    explain: bool,
    as_json: bool,
) -> bool:
    """Print the fastest placement, or memory settings, of every size; return whether anything fits."""
    from i2v_lab.capacity.solver import Fixed

    found = best.find(request, model, card, sought, aspect)
    resolution = None
    if found.placed[-1].request is not None and found.placed[-1].request.settings.is_default and explain:
        asked = placed.Asked(card.memory_bytes, solve=True, fixed=Fixed(), explain=True, gpu=card.name)
        resolution = placed.solved(found.asked[-1], model, card.memory_bytes, asked)
    if as_json:
        answer = {
            "gpu": card.name,
            "memory_bytes": card.memory_bytes,
            "model": model,
            "sought": sought or "request",
            **best.as_json(found, model, card),
            "predicted_measured": measured_on(card.name),
        }
        if resolution is not None:
            answer["placement"] = placed.explanation(resolution)
        print_json(answer)
    else:
        best.show(found, model, card)
    return found.fits


def _as_asked(
    request: I2VRequest,
    model: str,
    card: best.Card,
    sought: str,
    aspect: tuple[int, int],
    *,
    explain: bool,
    as_json: bool,
) -> bool:
    """Print the largest that fits under a memory policy or settings; return whether anything does."""
    from i2v_lab.capacity.cards import fitting_bytes
    from i2v_lab.capacity.fit import FitSearch
    from i2v_lab.capacity.time_model import seconds_on
    from i2v_lab.runs.spec import RunSpec

    announced = expected.AnnouncedSearch(best.search_steps(model, sought, aspect))

    def before(tried: I2VRequest) -> None:
        announced.before(RunSpec(request=tried, model=model))

    def report(tried: I2VRequest, result: Forecast, verdict: str) -> None:
        log(f"{_described(tried)}: {format_bytes(result.peak.peak_bytes)} in {result.peak.phase}, {verdict}")

    search = FitSearch(card.memory_bytes, model, report, before=before)

    if sought == "size":
        found = search.largest_size(request, aspect)
    else:
        found = search.most_frames(request) if sought else search.fastest_tiling(request)
    needed_bytes, instead = fitting_bytes(found.forecast), None
    if found.request is None:  # what would fit is what is found without the policy, or the offload
        free = best.find(best.freed(request), model, card, sought, aspect, smaller=False)
        instead, needed_bytes = free.placed[-1], min(needed_bytes, free.placed[-1].needed_bytes)
    if as_json:
        print_json(
            {
                "gpu": card.name,
                "memory_bytes": card.memory_bytes,
                "model": model,
                "sought": sought or "tiling",
                "request": found.request.to_json() if found.request else None,
                "at_the_bound": found.at_the_bound,
                "peak_bytes": found.forecast.peak.peak_bytes,
                "instead": instead.request.to_json() if instead and instead.request else None,
                "needed_bytes": needed_bytes,
                "host_bytes": found.forecast.page_locked_bytes + found.forecast.pageable_bytes,
                "predicted_seconds": seconds_on(found.forecast, card.name) if found.request else None,
                "predicted_measured": measured_on(card.name),
            }
        )
    elif found.request is None:
        peak = found.forecast.peak
        remedy = f"{format_bytes(needed_bytes)} are needed at least; use a larger card"
        if instead is not None and instead.request is not None:
            other = instead.request
            remedy = f"{other.width}x{other.height} with {other.frames} frames fits, {instead.name}: "
            remedy += best.command(other, model, card)
        say(
            f"nothing fits {card.words}: with {_held(request)} the smallest request takes "
            f"{format_bytes(peak.peak_bytes)} in {peak.phase}, and the CUDA context "
            f"{format_bytes(found.forecast.context_bytes)}; {remedy}"
        )
    else:
        peak = found.forecast.peak
        more = "; the search ends there, more may fit" if found.at_the_bound else ""
        say(
            f"{_described(found.request)} fits {card.words}: "
            f"{format_bytes(peak.peak_bytes)} in {peak.phase}{_predicted(found.forecast, card.name)}{more}"
        )
    return found.request is not None


def _predicted(result: Forecast, gpu: str) -> str:
    from i2v_lab.capacity.cards import is_size
    from i2v_lab.capacity.time_model import time_in_words

    return "" if is_size(gpu) else f"; {time_in_words(result, gpu)}"


def _held(request: I2VRequest) -> str:
    return request.settings.options or f"--memory {request.memory}"


def _described(request: I2VRequest) -> str:
    tiling = request.tiling
    tiles = f"tiles of {tiling.tile_px} px x {tiling.tile_frames} frames" if tiling else "no tiling"
    tiles = request.settings.options or tiles
    return f"{request.width}x{request.height}, {request.frames} frames, {tiles}"
