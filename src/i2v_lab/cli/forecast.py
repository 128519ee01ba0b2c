"""``i2v-lab forecast``: the peak memory of every phase on a GPU, without one."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from i2v_lab.cli import options
from i2v_lab.cli.output import plain_console, print_json
from i2v_lab.errors import InvalidRequest
from i2v_lab.files import check_new_folder
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import Offload
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
"""


def forecast(
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
    profile: Annotated[Path | None, typer.Option(help="Write the records to this folder, for `i2v-lab show`.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Forecast the peak memory of every phase on a GPU, without one, and which cards it fits."""
    from i2v_lab.capacity.cards import judge, judge_all
    from i2v_lab.pipeline.contract.architectures import load_architecture

    vram_cap_bytes = options.cap_bytes(vram_cap_gib)
    if profile is not None:
        check_new_folder(profile, "profile")
    if memory is MemoryPolicy.AUTO and vram_cap_gib is None:
        raise InvalidRequest(
            "memory=auto depends on the card; give its size with --vram-cap-gib", memory=memory.value, vram_cap_gib=None
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
    if vram_cap_bytes is not None:
        request = options.resolved(request, model, vram_cap_bytes)
    result = _forecast(request, model)
    fits = judge_all(result)
    if vram_cap_bytes is not None:
        fits.insert(0, judge(result, f"cap of {vram_cap_gib:g} GiB", vram_cap_bytes))
    if profile is not None:
        _write_run(profile, request, model, result)
    report = {
        "model": model,
        "request": request.to_json(),
        "phases": [
            {
                "phase": phase.phase,
                "start_bytes": phase.start_bytes,
                "peak_bytes": phase.peak_bytes,
                "end_bytes": phase.end_bytes,
                "saved_for_backward_bytes": phase.saved_for_backward_bytes,
            }
            for phase in result.phases
        ],
        "peak_bytes": result.peak.peak_bytes,
        "peak_phase": result.peak.phase,
        "peak_reserved_bytes": result.peak_reserved_bytes,
        "context_bytes": result.context_bytes,
        "host_page_locked_bytes": result.page_locked_bytes,
        "host_pageable_bytes": result.pageable_bytes,
        "fits": [asdict(fit) for fit in fits],
        "notes": [asdict(note) for note in result.notes],
        "seconds": result.seconds,
    }
    if as_json:
        print_json(report)
    else:
        _print(request, model, result, fits)


def _forecast(request: I2VRequest, model: str) -> Forecast:
    from i2v_lab.runs.forecast import forecast_request

    if not sys.stderr.isatty():
        return forecast_request(request, model)
    from i2v_lab.reporting.console import PlainConsole

    with PlainConsole(stderr=True).status("forecasting; about 20 s unless the forecast is cached"):
        return forecast_request(request, model)


def _write_run(folder: Path, request: I2VRequest, model: str, result: Forecast) -> None:
    from i2v_lab.runs.provenance import run_metadata
    from i2v_lab.runs.spec import RunSpec
    from i2v_lab.runs.store import FORECAST, RunWriter

    metadata = run_metadata(FORECAST, spec=RunSpec(request=request, model=model), argv=sys.argv)
    with RunWriter(folder, metadata) as writer:
        for record in result.records:
            writer.append(record)


def _print(request: I2VRequest, model: str, result: Forecast, fits: list[Fit]) -> None:
    from rich.table import Table

    from i2v_lab.reporting import run_tables
    from i2v_lab.reporting.headlines import headline
    from i2v_lab.reporting.terminal import rich_table
    from i2v_lab.runs.sources import as_run
    from i2v_lab.runs.spec import RunSpec
    from i2v_lab.units import format_bytes

    run = as_run(RunSpec(request=request, model=model), result)
    console = plain_console()
    policy = f", {request.memory}" if request.memory is not MemoryPolicy.RESIDENT else ""
    console.print(
        f"{model}, {request.width}x{request.height}, {request.frames} frames, {request.variant}, "
        f"{request.quantization}, decode {request.decode_scope}{policy}",
        soft_wrap=True,
    )
    console.print(headline(run))
    phases = run_tables.phase_table(run).drop(columns="seconds")
    console.print(rich_table(phases, "Phases, forecast", bold=result.peak.phase))
    modules = run_tables.modules_table(run).head(8)
    console.print(rich_table(modules, f"Live at the peak, in {result.peak.phase}, by module"))
    table = Table("card", "memory", "verdict", box=None, header_style="bold", pad_edge=False)
    colours = {"fits": "green", "tight": "yellow", "no": "red"}
    for fit in fits:
        table.add_row(fit.gpu, format_bytes(fit.memory_bytes), fit.verdict, style=colours[fit.verdict])
    console.print(table)
    console.print(
        f"needs {format_bytes(result.peak.peak_bytes)} allocated, {format_bytes(result.peak_reserved_bytes)} reserved "
        f"by the allocator, and {format_bytes(result.context_bytes)} for the CUDA context",
        soft_wrap=True,
    )
    if result.pageable_bytes:
        console.print(
            f"streaming needs {format_bytes(result.page_locked_bytes)} of page-locked host memory, and "
            f"{format_bytes(result.pageable_bytes)} of pageable host memory for the largest block read from its file",
            soft_wrap=True,
        )
