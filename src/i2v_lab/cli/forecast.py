"""``i2v-lab forecast``: the peak memory of every phase on a GPU, without one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from i2v_lab.capacity.device_profile import REFERENCE
from i2v_lab.cli import expected, options, placed
from i2v_lab.cli.forecast_report import OnCard, on_card, print_forecast, report, verdicts
from i2v_lab.cli.forecast_script import check_script_options, report_script
from i2v_lab.cli.output import print_json, say
from i2v_lab.errors import InvalidRequest
from i2v_lab.files import check_new_folder
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import Offload
from i2v_lab.paths import find_still
from i2v_lab.request import DecodeScope, I2VRequest, Variant
from i2v_lab.runs.spec import DEFAULT_STILL, FULL_SIZE_MODEL

if TYPE_CHECKING:
    from i2v_lab.capacity.cards import Fit
    from i2v_lab.profiling.records import Forecast

EXAMPLES = """
**Examples**

Whether a request fits, and in which phase the peak is; needs neither GPU nor weights:

    i2v-lab forecast --width 1536 --height 1152 --frames 97

The published defect, at full size:

    i2v-lab forecast --width 1024 --height 768 --frames 97 --decode-scope escaped

For a card with less memory, as JSON for a script:

    i2v-lab forecast --width 1024 --height 768 --vram-cap-gib 24 --json

What stays on a card of 12 GiB, and what is streamed:

    i2v-lab forecast --width 1024 --height 768 --vram-budget 12GiB --explain

Whether it fits another card, and how long it takes there by its published rates:

    i2v-lab forecast --width 1024 --height 768 --gpu "RTX 5090"

A model of diffusers, with its components waiting on the CPU:

    i2v-lab forecast --model wan-2.2-ti2v-5b --offload model

A script of diffusers, unchanged, with its own arguments after `--`:

    i2v-lab forecast --script my_pipeline.py -- --frames 81
"""


def forecast(
    context: typer.Context,
    arguments: Annotated[list[str] | None, typer.Argument(help="After `--`: the script's own arguments.")] = None,
    image: Annotated[Path, typer.Option(help="Image of the first frame; only its size matters.")] = Path(DEFAULT_STILL),
    prompt: options.Prompt = "",
    negative_prompt: options.NegativePrompt = "",
    width: options.Width = None,
    height: options.Height = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    seed: options.Seed = 10,
    model: options.Model = FULL_SIZE_MODEL,
    variant: options.VariantOption = Variant.DISTILLED,
    quantization: options.QuantizationOption = None,
    tile_px: options.TilePx = None,
    tile_overlap_px: options.TileOverlapPx = None,
    tile_frames: options.TileFrames = None,
    tile_overlap_frames: options.TileOverlapFrames = None,
    no_tiling: options.NoTiling = False,
    decode_scope: options.DecodeScopeOption = DecodeScope.NO_GRAD,
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
    vram_cap_gib: options.VramCapGib = None,
    vram_budget: placed.VramBudget = None,
    resident_blocks: placed.ResidentBlocks = None,
    prefetch: placed.Prefetch = None,
    chunk_tokens: placed.ChunkTokens = None,
    explain: placed.Explain = False,
    profile: Annotated[Path | None, typer.Option(help="Write the records to this folder, for `i2v-lab show`.")] = None,
    script: Annotated[
        Path | None,
        typer.Option(
            help="Forecast this Python script of diffusers in place of a model. It is run, with your rights, as "
            "`python` would run it; from_pretrained reads configuration files alone, and nothing is downloaded."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Whether it fits this card, as nvidia-smi names it, and the seconds there. "
            f"[default: those on {REFERENCE}]"
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Forecast the peak memory and the seconds of every phase on a GPU, without one, and which cards it fits."""
    from i2v_lab.capacity.device_profile import device_profile
    from i2v_lab.pipeline.contract.architectures import load_architecture

    asked_gpu, gpu = gpu, gpu or REFERENCE
    device_profile(gpu)  # refused before anything runs

    vram_cap_bytes = options.cap_bytes(vram_cap_gib)
    if profile is not None:
        check_new_folder(profile, "profile")
    check_script_options(context, script, arguments)
    if script is not None:
        report_script(script, arguments or [], vram_cap_gib, profile, asked_gpu, as_json)
        return
    asked = placed.asked_placement(
        context,
        memory,
        vram_budget,
        resident_blocks=resident_blocks,
        prefetch=prefetch,
        chunk_tokens=chunk_tokens,
        explain=explain,
        gpu=gpu,
    )
    if asked.budget_bytes is not None and vram_cap_bytes is not None:
        raise InvalidRequest(
            f"vram_cap_gib={vram_cap_gib:g} and vram_budget={vram_budget!r} are two sizes of a card; give one of them",
            vram_cap_gib=vram_cap_gib,
            vram_budget=vram_budget,
        )
    budget_bytes = vram_cap_bytes if asked.budget_bytes is None else asked.budget_bytes
    if vram_budget == placed.AUTO and budget_bytes is None:
        budget_bytes = placed.budget_or_free_bytes(vram_budget)
    if asked.solve and budget_bytes is None:
        raise InvalidRequest(
            "memory=auto depends on the card; give its size with --vram-budget or --vram-cap-gib",
            memory=memory.value,
            vram_cap_gib=None,
        )
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
        load_architecture(model),
        (tile_px, tile_overlap_px, tile_frames, tile_overlap_frames),
        no_tiling,
        image=str(image),
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        frames=frames,
        fps=fps,
        seed=seed,
        variant=variant,
        quantization=quantization,
        decode_scope=decode_scope,
        memory=memory,
        settings=settings,
        steps=steps,
    )
    request = placed.check_asked(request, model, asked)
    resolution = None
    if asked.solve and budget_bytes is not None:
        resolution = placed.solved(request, model, budget_bytes, asked)
        request = resolution.request
    # What was computed has no modules and no timeline: they are forecast only where they are written.
    computed = resolution is not None and bool(resolution.computed_from) and profile is None
    result = resolution.forecast if resolution is not None and computed else _forecast(request, model)
    card, fits = on_card(result, asked_gpu, placed=resolution is not None), verdicts(result, vram_cap_gib)
    if profile is not None:
        _write_run(profile, request, model, result, gpu)
    if as_json:
        values = {"model": model, "request": request.to_json(), **report(result, fits, gpu, card)}
        if resolution is not None:
            values["placement"] = placed.explanation(resolution)
        print_json(values)
    else:
        _print(request, model, result, fits, gpu, card)


def _forecast(request: I2VRequest, model: str) -> Forecast:
    from i2v_lab.runs.forecast import forecast_request, is_cached
    from i2v_lab.runs.spec import RunSpec

    spec = RunSpec(request=request, model=model)
    if not is_cached(spec):  # what is refused is so before the time is announced
        from i2v_lab.pipeline.contract.media import load_still

        spec.runner_spec.require_package(spec.architecture)
        load_still(find_still(request.image))
        expected.announce("forecasting", expected.forecasts_s([model]))
    if not sys.stderr.isatty():
        return forecast_request(request, model)
    from i2v_lab.reporting.console import PlainConsole

    with PlainConsole(stderr=True).status("forecasting"):
        return forecast_request(request, model)


def _write_run(folder: Path, request: I2VRequest, model: str, result: Forecast, gpu: str) -> None:
    from i2v_lab.capacity.clock import on_clock
    from i2v_lab.capacity.device_profile import device_profile
    from i2v_lab.runs.provenance import run_metadata
    from i2v_lab.runs.spec import RunSpec
    from i2v_lab.runs.store import FORECAST, RunWriter

    device = device_profile(gpu)
    metadata = run_metadata(FORECAST, spec=RunSpec(request=request, model=model), argv=sys.argv)
    with RunWriter(folder, {**metadata, "clock": device.name}) as writer:
        for record in on_clock(result, device).records:
            writer.append(record)


def _print(request: I2VRequest, model: str, result: Forecast, fits: list[Fit], gpu: str, card: OnCard | None) -> None:
    from i2v_lab.capacity.cards import NO
    from i2v_lab.placement import STREAMED_COMPONENTS
    from i2v_lab.runs.sources import as_run
    from i2v_lab.runs.spec import RunSpec

    held = request.settings.options
    if request.placed.policy is not MemoryPolicy.RESIDENT:
        held = str(request.placed.policy or f"placed: {request.placed.name}")
    policy = f", {held}" if held else ""
    title = (
        f"{model}, {request.width}x{request.height}, {request.frames} frames, {request.variant}, "
        f"{request.quantization}, decode {request.decode_scope}{policy}"
    )
    spec = RunSpec(request=request, model=model)
    verdict = card.in_words(_fit_command(request, model, card.gpu)) if card else ""
    print_forecast(title, as_run(spec, result), result, fits, gpu, verdict)
    whole = spec.runner_spec.techniques and not request.placed.techniques & set(STREAMED_COMPONENTS)
    if whole and any(fit.verdict == NO for fit in fits):
        say(f"{NO}: as it is; --vram-budget, with a card's memory, solves for the fastest placement that fits")


def _fit_command(request: I2VRequest, model: str, gpu: str) -> str:
    """The command that finds what fits a card in place of a request."""
    from i2v_lab.runs.spec import make_request

    words = f'i2v-lab fit --gpu "{gpu}" --model {model} --width {request.width} --height {request.height}'
    if request.settings.quantizes:
        words += f" --quantization {request.settings.quantization}"
    elif request.quantization != make_request(model).quantization:
        words += f" --quantization {request.quantization}"
    return f"{words} --frames {request.frames}"
