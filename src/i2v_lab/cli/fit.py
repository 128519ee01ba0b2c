"""``i2v-lab fit``: the largest request that a card takes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from i2v_lab.cli import options, placed
from i2v_lab.cli.forecast_report import measured_on, seconds_on
from i2v_lab.cli.output import log, print_json, say
from i2v_lab.errors import ForecastError, InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import NO_SETTINGS, Offload
from i2v_lab.request import I2VRequest, Variant
from i2v_lab.runs.spec import DEFAULT_STILL, FULL_SIZE_MODEL

if TYPE_CHECKING:
    from i2v_lab.profiling.records import Forecast

EXAMPLES = """
**Examples**

The largest 4:3 video of 97 frames, then the most frames at 1024x768, then the fastest tiling for both:

    i2v-lab fit --gpu "RTX 5090" --frames 97
    i2v-lab fit --gpu "RTX 5090" --width 1024 --height 768
    i2v-lab fit --gpu "RTX 5090" --width 1024 --height 768 --frames 97

The most frames of a model of diffusers (`i2v-lab models` lists them):

    i2v-lab fit --gpu "RTX 4090" --model cogvideox-5b-i2v --width 720 --height 480 --offload model
"""


def fit(
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
    """Search for the largest video that fits a card, over whichever is not given: size, frames or tiling.

    Without --width and --height the largest size; without --frames the most frames; with all three the fastest tiling.
    The exit status is 1 if nothing fits; then the memory policy that does is named, or the memory that is needed.
    """
    from i2v_lab.capacity.cards import BUDGET, context_bytes, gpu_memory_bytes
    from i2v_lab.capacity.fit import FitSearch, Largest, lighter
    from i2v_lab.capacity.placement import allocatable_bytes
    from i2v_lab.capacity.placement import needed_bytes as placed_bytes
    from i2v_lab.capacity.solver import Fixed
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.registry import runner_of
    from i2v_lab.runs.execute import FAILS_ON_A_CARD
    from i2v_lab.units import GIB, format_bytes

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
    solve = vram_budget is not None
    if explain and not solve:
        raise InvalidRequest("explain=True has nothing to explain; give --vram-budget", explain=True)
    if solve and memory not in (MemoryPolicy.RESIDENT, MemoryPolicy.AUTO):
        raise InvalidRequest(
            f"memory={memory.value!r} and vram_budget={vram_budget!r} exclude each other; give one of them",
            memory=memory.value,
            vram_budget=vram_budget,
        )
    memory_bytes = gpu_memory_bytes(gpu) if gpu is not None else placed.budget_or_free_bytes(str(vram_budget))
    gpu = gpu or f"{BUDGET}{format_bytes(memory_bytes)}"
    # A dimension that is searched for starts at the default.
    architecture = load_architecture(model)
    if solve and not runner_of(architecture).techniques:
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
    request = options.build_request(
        architecture,
        (None,) * 4,
        no_tiling=False,
        image=DEFAULT_STILL,
        fps=fps,
        variant=variant,
        quantization=quantization,
        # A request that fits under any policy fits under the one with the smallest peak.
        memory=MemoryPolicy.STREAMED if solve or memory is MemoryPolicy.AUTO else memory,
        frames=frames,
        width=width,
        height=height,
        settings=settings,
        steps=steps,
    )

    def report(tried: I2VRequest, result: Forecast, verdict: str) -> None:
        log(f"{_described(tried)}: {format_bytes(result.peak.peak_bytes)} in {result.peak.phase}, {verdict}")

    if solve:  # by the rule of placements: the allocated peak and a margin
        context = context_bytes()
        search = FitSearch(allocatable_bytes(memory_bytes, context) + context, model, report, tightly=True)
    else:
        search = FitSearch(memory_bytes, model, report)

    def largest(asked: I2VRequest) -> tuple[str, Largest]:
        if width is None:
            return "size", search.largest_size(asked, (int(sides[1]), int(sides[2])))
        return ("frames", search.most_frames(asked)) if frames is None else ("tiling", search.fastest_tiling(asked))

    sought, found = largest(request)
    resolution = None
    if solve and found.request is not None:
        fixed = Fixed(tiling=sought == "tiling")
        asked = placed.Asked(memory_bytes, solve, fixed, explain, gpu)
        resolution = placed.solved(found.request, model, memory_bytes, asked)
        found = replace(found, request=resolution.request, forecast=resolution.forecast)
    # What would fit instead: the same search under what holds less.
    others: list[Largest] = []
    for other in lighter(request, model) if found.request is None else ():
        try:
            others.append(largest(other)[1])
        except (InvalidRequest, ForecastError) as error:  # an autoencoder that does not tile; what fails on a card
            if isinstance(error, ForecastError) and error.fields.get("cause") != FAILS_ON_A_CARD:
                raise
            log(f"{other.settings.options}: {error}")
            continue
        if others[-1].request is not None:
            break
    instead = next((other for other in others if other.request is not None), None)
    least = min([found, *others], key=lambda each: each.forecast.peak.peak_bytes)
    needed_bytes = least.forecast.peak_reserved_bytes + least.forecast.context_bytes
    if solve:
        needed_bytes = placed_bytes(least.forecast.peak.peak_bytes, least.forecast.context_bytes)
    if as_json:
        answer = {
            "gpu": gpu,
            "memory_bytes": memory_bytes,
            "model": model,
            "sought": sought,
            "request": found.request.to_json() if found.request else None,
            "at_the_bound": found.at_the_bound,
            "peak_bytes": found.forecast.peak.peak_bytes,
            "instead": instead.request.to_json() if instead and instead.request else None,
            "needed_bytes": needed_bytes,
            "predicted_seconds": seconds_on(found.forecast, gpu) if found.request else None,
            "predicted_measured": measured_on(gpu),
        }
        if resolution is not None:
            answer["placement"] = placed.explanation(resolution)
        print_json(answer)
    elif found.request is None:
        peak = found.forecast.peak
        remedy = (
            f"with {_remedy(instead.request)}, {_described(replace(instead.request, settings=NO_SETTINGS))} fits"
            if instead and instead.request
            else f"{format_bytes(needed_bytes)} are needed at least; use a larger card"
        )
        if instead and runner_of(architecture).techniques:
            budget = f"{memory_bytes * 100 // GIB / 100:g}GiB"
            remedy += f"; --vram-budget {budget} in place of --gpu solves for the fastest placement"
        say(
            f"nothing fits {gpu} ({format_bytes(memory_bytes)}): the smallest request takes "
            f"{format_bytes(peak.peak_bytes)} in {peak.phase}, and the CUDA context "
            f"{format_bytes(found.forecast.context_bytes)}; {remedy}"
        )
    else:
        peak = found.forecast.peak
        more = "; the search ends there, more may fit" if found.at_the_bound else ""
        say(
            f"{_described(found.request)} fits {gpu} ({format_bytes(memory_bytes)}): "
            f"{format_bytes(peak.peak_bytes)} in {peak.phase}{_predicted(found.forecast, gpu)}{more}"
        )
    if found.request is None:
        raise typer.Exit(1)


def _predicted(result: Forecast, gpu: str) -> str:
    from i2v_lab.capacity.cards import is_size
    from i2v_lab.capacity.time_model import time_in_words

    return "" if is_size(gpu) else f"; {time_in_words(result, gpu)}"


def _remedy(request: I2VRequest) -> str:
    return request.settings.options or f"--memory {request.memory}"


def _described(request: I2VRequest) -> str:
    tiling = request.tiling
    tiles = f"tiles of {tiling.tile_px} px x {tiling.tile_frames} frames" if tiling else "no tiling"
    tiles = request.settings.options or tiles
    return f"{request.width}x{request.height}, {request.frames} frames, {tiles}"
