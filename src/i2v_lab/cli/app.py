"""The command line: parse, call, print."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from i2v_lab.cli import options
from i2v_lab.cli.doctor import doctor
from i2v_lab.cli.forecast import FIT_EXAMPLES, FORECAST_EXAMPLES, accuracy, calibrate, fit, forecast
from i2v_lab.cli.lab import LAB_CONTEXT, LAB_EXAMPLES, lab
from i2v_lab.cli.measure import MEASURE_EXAMPLES, measure
from i2v_lab.cli.reproduce import REPRODUCE_EXAMPLES, ReproduceCommand, reproduce
from i2v_lab.cli.show import show
from i2v_lab.errors import I2VLabError
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.request import DecodeScope, Variant
from i2v_lab.runs.spec import SMALL_MODEL
from i2v_lab.runs.workers import enable_mkl_cnr

app = typer.Typer(
    name="i2v-lab",
    help="Run large image-to-video models, and see where their memory goes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

GENERATE_EXAMPLES = """
**Examples**

A whole generation in seconds on a CPU, with a tiny model and random weights:

    i2v-lab generate --image data/stills/lighthouse.png --prompt "waves roll in" --out video.mp4

The published defect, what it costs, and who holds it:

    i2v-lab generate --image data/stills/lighthouse.png --decode-scope escaped --out video.mp4 --profile runs/escaped
    i2v-lab show runs/escaped

Real weights on a GPU:

    i2v-lab generate --model ltx-2.3-22b --device cuda --image still.png --prompt "..." --out video.mp4
    --checkpoint ltx-2.3-22b-distilled.safetensors --gemma gemma-3-12b --upsampler spatial-upscaler.safetensors
"""


def main() -> None:
    """Entry point of ``i2v-lab``: errors of ours are one line on stderr and an exit status, never a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    enable_mkl_cnr()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except I2VLabError as error:
        print(f"i2v-lab: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("i2v-lab: interrupted", file=sys.stderr)
        sys.exit(130)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # as an exception, so that partial files are cleaned up


@app.callback()
def _root() -> None:
    pass


@app.command(epilog=GENERATE_EXAMPLES)
def generate(
    image: Annotated[Path, typer.Option(help="The still that becomes the first frame.")],
    out: Annotated[Path, typer.Option(help="The MP4 to write.")] = Path("video.mp4"),
    prompt: options.Prompt = "",
    negative_prompt: options.NegativePrompt = "",
    width: options.Width = None,
    height: options.Height = None,
    frames: options.Frames = None,
    fps: options.Fps = 24.0,
    seed: options.Seed = 10,
    model: options.Model = SMALL_MODEL,
    variant: options.VariantOption = Variant.DISTILLED,
    quantization: options.QuantizationOption = None,
    tile_px: options.TilePx = None,
    tile_overlap_px: options.TileOverlapPx = None,
    tile_frames: options.TileFrames = None,
    tile_overlap_frames: options.TileOverlapFrames = None,
    no_tiling: options.NoTiling = False,
    decode_scope: options.DecodeScopeOption = DecodeScope.NO_GRAD,
    memory: options.MemoryOption = MemoryPolicy.RESIDENT,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    checkpoint: Annotated[Path | None, typer.Option(help="Main weights. [default: synthetic]")] = None,
    gemma: Annotated[Path | None, typer.Option(help="Gemma 3 folder (LTX-2).")] = None,
    text_encoder: Annotated[Path | None, typer.Option(help="T5 folder (LTX-Video).")] = None,
    upsampler: Annotated[Path | None, typer.Option(help="Spatial latent upsampler.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Distilled LoRA (LTX-2, dev variant).")] = None,
    vram_cap_gib: options.VramCapGib = None,
    profile: Annotated[Path | None, typer.Option(help="Write the run's records to this folder.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Turn a still into a video, and report the peak memory of every phase."""
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.registry import runner_of

    architecture = load_architecture(model)
    runner = runner_of(architecture)
    paths = {
        "checkpoint": checkpoint,
        "gemma": gemma,
        "text_encoder": text_encoder,
        "upsampler": upsampler,
        "lora": lora,
    }
    runner.check_weight_options(paths, model)
    request = options.build_request(
        architecture,
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
    options.check_cap(vram_cap_gib)
    from i2v_lab.pipeline.contract import media  # the first import of torch: options are right by now

    media.check_output(out)
    media.load_still(image)

    from i2v_lab.capacity.this_machine import memory_budget_bytes
    from i2v_lab.cli.progress import ProgressReport
    from i2v_lab.pipeline.contract.generation import resolve_device
    from i2v_lab.profiling.records import peak_phase
    from i2v_lab.runs.execute import WHOLE, Hooks, Mode, execute
    from i2v_lab.runs.spec import ProfilerMode, RunSpec

    target = resolve_device(device)
    if memory is MemoryPolicy.AUTO:
        request = options.resolved(request, model, memory_budget_bytes(device, vram_cap_gib), target.type)
    spec = RunSpec(
        request=request,
        model=model,
        # Following modules and graphs is what --profile adds; peaks alone need neither.
        profiler=ProfilerMode.BOUNDARIES if profile is None and runner.emits_events else ProfilerMode.FULL,
        vram_cap_bytes=None if vram_cap_gib is None else int(vram_cap_gib * 2**30),
    )
    with ProgressReport(request.frames) as progress:
        weights = runner.resolve_weights(architecture, variant, progress.checked, **paths)
        profiler = execute(
            spec,
            Mode.REAL,
            str(target),
            weights=weights,
            run_dir=profile,
            metadata={"argv": sys.argv},
            video_path=lambda _: out,
            hooks=Hooks(sinks=[progress], on_frame=progress.frame_written),
        )
    assert profiler is not None
    phases = [record for record in profiler.phases if record.phase != WHOLE]
    peak = peak_phase(phases)
    assert peak is not None
    report: dict[str, Any] = {
        "output": str(out),
        "model": model,
        "width": request.width,
        "height": request.height,
        "frames": request.frames,
        "fps": request.fps,
        "seed": request.seed,
        "decode_scope": request.decode_scope.value,
        "memory": request.memory.value,
        "peak_bytes": peak.peak_bytes,
        "peak_phase": peak.phase,
        "phases": [{key: asdict(record)[key] for key in ("phase", "seconds", "peak_bytes")} for record in phases],
    }
    if as_json:
        print(json.dumps(report))
    else:
        _print_report(report)


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from i2v_lab.units import format_bytes

    table = Table("phase", "seconds", "peak", title=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in report["phases"]:
        style = "bold" if phase["phase"] == report["peak_phase"] else ""
        table.add_row(phase["phase"], f"{phase['seconds']:.2f}", format_bytes(phase["peak_bytes"]), style=style)
    console = Console()
    console.print(table)
    console.print(
        f"{report['output']}: {report['width']}x{report['height']}, {report['frames']} frames, {report['fps']:g} fps; "
        f"peak {format_bytes(report['peak_bytes'])} in {report['peak_phase']}",
        soft_wrap=True,
        highlight=False,
    )


app.command()(doctor)
app.command()(show)
app.command(epilog=FORECAST_EXAMPLES)(forecast)
app.command(epilog=FIT_EXAMPLES)(fit)
app.command()(accuracy)
app.command()(calibrate)
app.command(epilog=LAB_EXAMPLES, context_settings=LAB_CONTEXT)(lab)
app.command(epilog=MEASURE_EXAMPLES)(measure)
app.command(epilog=REPRODUCE_EXAMPLES, cls=ReproduceCommand)(reproduce)


if __name__ == "__main__":
    main()
