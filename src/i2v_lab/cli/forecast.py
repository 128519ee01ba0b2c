"""``i2v-lab forecast``, ``fit``, ``accuracy`` and ``calibrate``: what a GPU that is not here would say."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from i2v_lab.cli import options
from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.request import DecodeScope, I2VRequest, Variant
from i2v_lab.runs.spec import DEFAULT_STILL, FULL_SIZE_MODEL

if TYPE_CHECKING:
    from i2v_lab.capacity.cards import Fit
    from i2v_lab.profiling.records import Forecast


FORECAST_EXAMPLES = """
**Examples**

Will it fit, and which phase decides? No GPU, no weights:

    i2v-lab forecast --width 1536 --height 1152 --frames 97

The published defect, at full size:

    i2v-lab forecast --width 1024 --height 768 --frames 97 --decode-scope escaped

For a script, and for a card that is shared:

    i2v-lab forecast --width 1024 --height 768 --vram-cap-gib 24 --json
"""

FIT_EXAMPLES = """
**Examples**

The largest 4:3 video of 97 frames, then the most frames at 1024x768, then the fastest tiling for both:

    i2v-lab fit --gpu "RTX 5090" --frames 97
    i2v-lab fit --gpu "RTX 5090" --width 1024 --height 768
    i2v-lab fit --gpu "RTX 5090" --width 1024 --height 768 --frames 97
"""

Still = Annotated[Path, typer.Option(help="The still; only its size matters.")]


def forecast(
    image: Still = Path(DEFAULT_STILL),
    prompt: options.Prompt = "",
    negative_prompt: options.NegativePrompt = "",
    width: options.Width = None,
    height: options.Height = None,
    frames: options.Frames = None,
    fps: options.Fps = 24.0,
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
    vram_cap_gib: options.VramCapGib = None,
    profile: Annotated[Path | None, typer.Option(help="Write the records to this folder, for `i2v-lab show`.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Forecast the peak memory of every phase on a GPU, without one, and which cards it fits."""
    from i2v_lab.capacity.cards import judge, judge_all
    from i2v_lab.pipeline.contract.architectures import load_architecture

    options.check_cap(vram_cap_gib)
    if memory is MemoryPolicy.AUTO and vram_cap_gib is None:
        raise InvalidRequest("memory=auto depends on the card; say how large it is with --vram-cap-gib")
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
    )
    if vram_cap_gib is not None:
        request = options.resolved(request, model, int(vram_cap_gib * 2**30))
    result = _forecast(request, model)
    fits = judge_all(result)
    if vram_cap_gib is not None:
        fits.insert(0, judge(result, f"cap of {vram_cap_gib:g} GiB", int(vram_cap_gib * 2**30)))
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
        "fits": [asdict(fit) for fit in fits],
        "seconds": result.seconds,
    }
    if as_json:
        print(json.dumps(report))
    else:
        _print(request, model, result, fits)


def _forecast(request: I2VRequest, model: str) -> Forecast:
    from i2v_lab.runs.forecast import forecast_request

    if not sys.stderr.isatty():
        return forecast_request(request, model)
    from rich.console import Console

    with Console(stderr=True).status("forecasting, some 20 s for a request not seen before"):
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
    from rich.console import Console
    from rich.table import Table

    from i2v_lab.reporting import run_tables
    from i2v_lab.reporting.headlines import headline
    from i2v_lab.reporting.terminal import rich_table
    from i2v_lab.runs.sources import as_run
    from i2v_lab.runs.spec import RunSpec
    from i2v_lab.units import format_bytes

    run = as_run(RunSpec(request=request, model=model), result)
    console = Console(highlight=False, markup=False, emoji=False)
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
    console.print(rich_table(modules, f"Alive at the peak, in {result.peak.phase}, by module"))
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


def fit(
    gpu: Annotated[str, typer.Option(help="A card of data/gpus.csv, or a size such as 24GiB.")],
    frames: options.Frames = None,
    width: options.Width = None,
    height: options.Height = None,
    aspect: Annotated[str, typer.Option(help="Width to height, where the size is searched for.")] = "4:3",
    fps: options.Fps = 24.0,
    model: options.Model = FULL_SIZE_MODEL,
    variant: options.VariantOption = Variant.DISTILLED,
    quantization: options.QuantizationOption = None,
    memory: options.MemoryOption = MemoryPolicy.RESIDENT,
    as_json: options.AsJson = False,
) -> None:
    """Find the largest video that a card takes: its size, its frames, or its tiling, whichever is left open."""
    from i2v_lab.capacity.fit import FitSearch
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.units import format_bytes

    if (width is None) != (height is None):
        raise InvalidRequest(f"width={width} and height={height} come together; give both, or neither")
    sides = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", aspect)
    if sides is None:
        raise InvalidRequest(f"aspect={aspect!r} is not two numbers; write it as 4:3", aspect=aspect)
    memory_bytes = _memory_bytes(gpu)
    # Where it is searched for, a size may be any.
    request = options.build_request(
        load_architecture(model),
        (None,) * 4,
        no_tiling=False,
        image=DEFAULT_STILL,
        fps=fps,
        variant=variant,
        quantization=quantization,
        # What fits under any policy fits under the smallest.
        memory=MemoryPolicy.STREAMED if memory is MemoryPolicy.AUTO else memory,
        frames=I2VRequest.frames if frames is None else frames,
        width=I2VRequest.width if width is None else width,
        height=I2VRequest.height if height is None else height,
    )

    def tell(tried: I2VRequest, result: Forecast, verdict: str) -> None:
        print(
            f"{_described(tried)}: {format_bytes(result.peak.peak_bytes)} in {result.peak.phase}, {verdict}",
            file=sys.stderr,
        )

    search = FitSearch(memory_bytes, model, tell)
    if width is None:
        sought, found = "size", search.largest_size(request, (int(sides[1]), int(sides[2])))
    elif frames is None:
        sought, found = "frames", search.most_frames(request)
    else:
        sought, found = "tiling", search.fastest_tiling(request)
    peak = found.forecast.peak
    if as_json:
        chosen = found.request.to_json() if found.request else None
        answer = {"gpu": gpu, "memory_bytes": memory_bytes, "model": model, "sought": sought, "request": chosen}
        print(json.dumps({**answer, "at_the_bound": found.at_the_bound, "peak_bytes": peak.peak_bytes}))
    elif found.request is None:
        print(
            f"nothing fits {gpu} ({format_bytes(memory_bytes)}): even the smallest takes "
            f"{format_bytes(peak.peak_bytes)} in {peak.phase}, and {format_bytes(found.forecast.context_bytes)} besides"
        )
    else:
        more = "; that is where the search ends, more may fit" if found.at_the_bound else ""
        print(
            f"{_described(found.request)} fits {gpu} ({format_bytes(memory_bytes)}): "
            f"{format_bytes(peak.peak_bytes)} in {peak.phase}{more}"
        )


def _memory_bytes(gpu: str) -> int:
    from i2v_lab.capacity.cards import gpu_memory_bytes

    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?GiB", gpu)
    return int(float(size[1]) * 2**30) if size else gpu_memory_bytes(gpu)


def _described(request: I2VRequest) -> str:
    tiling = request.tiling
    tiles = f"tiles of {tiling.tile_px} px x {tiling.tile_frames} frames" if tiling else "no tiling"
    return f"{request.width}x{request.height}, {request.frames} frames, {tiles}"


def accuracy(
    folder: Annotated[Path | None, typer.Argument(help="Measured runs. [default: data/measured]")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write every phase of every run to this file.")] = None,
) -> None:
    """Hold forecasts against every run that was measured on a GPU."""
    from rich.console import Console

    from i2v_lab.reporting.tables import save_table
    from i2v_lab.reporting.terminal import rich_table
    from i2v_lab.studies.accuracy import accuracy_table, halves_table, measured_table, summary_table

    measured = measured_table(folder=folder)
    if measured.empty:
        print("no runs measured on a GPU there; make some with `i2v-lab generate --device cuda --profile DIR`")
        return
    table = accuracy_table(measured)
    if csv is not None:
        save_table(table, csv.parent, csv.stem)
    console = Console(highlight=False, markup=False, emoji=False)
    worst = table.reindex(table["error"].abs().sort_values(ascending=False).index).head(10)
    columns = ["run", "phase", "peak_bytes", "forecast_bytes", "error"]
    console.print(rich_table(worst[columns], "The ten worst errors"))
    console.print(rich_table(summary_table(table), f"{table['run'].nunique()} runs, by phase"))
    console.print(rich_table(halves_table(table), "A correction by phase, fitted to half of the specs"))


def calibrate(
    measurements: Annotated[
        Path | None, typer.Argument(help="What benchmarks/measure_libraries.py wrote. [default: data/measured]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The model to write. [default: data/workspaces.json]")] = None,
) -> None:
    """Fit the model of cuDNN's and cuBLAS's workspaces to measurements again."""
    from i2v_lab.capacity.calibration import calibrate as run

    for line in run(measurements, out):
        print(line)
