"""``i2v-lab generate``: generate a video from a still and report the peak memory of every phase."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from i2v_lab.cli import expected, options, placed
from i2v_lab.cli.output import plain_console, print_json
from i2v_lab.errors import DeviceUnavailable, OutOfDeviceMemory, VramCapExceeded
from i2v_lab.files import check_new_folder
from i2v_lab.locks import exclusive, lock_on_this_machine
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import Offload
from i2v_lab.paths import find_still
from i2v_lab.request import DecodeScope, I2VRequest, Variant
from i2v_lab.runs.spec import SMALL_MODEL
from i2v_lab.units import format_bytes

if TYPE_CHECKING:
    from i2v_lab.profiling.phase_profiler import PhaseProfiler

EXAMPLES = """
**Examples**

A complete generation in seconds on a CPU, with a tiny model and random weights:

    i2v-lab generate --image stills/lighthouse.png --prompt "waves roll in" --out video.mp4

The published defect, its cost, and the modules whose tensors hold the memory:

    i2v-lab generate --image stills/lighthouse.png --decode-scope escaped --out video.mp4 --profile runs/escaped
    i2v-lab show runs/escaped

A model of diffusers, tiny and with random weights:

    i2v-lab generate --model wan-2.2-ti2v-5b-tiny --image stills/lighthouse.png --out video.mp4

Real weights on a GPU:

    i2v-lab generate --model ltx-2.3-22b --device cuda --image still.png --prompt "..." --out video.mp4
    --checkpoint ltx-2.3-22b-distilled.safetensors --gemma gemma-3-12b --upsampler spatial-upscaler.safetensors
"""


def generate(
    context: typer.Context,
    image: Annotated[
        Path,
        typer.Option(help="Image of the first frame; stills/lighthouse.png is one of the package."),
    ],
    out: Annotated[Path, typer.Option(help="MP4 file to write.")] = Path("video.mp4"),
    prompt: options.Prompt = "",
    negative_prompt: options.NegativePrompt = "",
    width: options.Width = None,
    height: options.Height = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
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
    steps: options.Steps = None,
    offload: options.OffloadOption = Offload.NONE,
    offload_stream: options.OffloadStream = False,
    offload_blocks: options.OffloadBlocks = 1,
    vae_tiling: options.VaeTiling = False,
    vae_tile: options.VaeTile = None,
    vae_slicing: options.VaeSlicing = False,
    layerwise_casting: options.LayerwiseCasting = False,
    dtype: options.DtypeOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights, safetensors. [default: synthetic]")] = None,
    gemma: Annotated[Path | None, typer.Option(help="Gemma 3 folder (LTX-2).")] = None,
    text_encoder: Annotated[Path | None, typer.Option(help="T5 folder (LTX-Video).")] = None,
    upsampler: Annotated[Path | None, typer.Option(help="Spatial latent upsampler.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of a diffusers repository, safetensors (diffusers' models).")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="Distilled LoRA (LTX-2, dev variant).")] = None,
    vram_cap_gib: options.VramCapGib = None,
    vram_budget: placed.VramBudget = None,
    resident_blocks: placed.ResidentBlocks = None,
    prefetch: placed.Prefetch = None,
    chunk_tokens: placed.ChunkTokens = None,
    explain: placed.Explain = False,
    profile: Annotated[Path | None, typer.Option(help="Write the run's records to this folder.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Generate a video from a still, and report the peak memory of every phase."""
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.registry import runner_of

    asked = placed.asked_placement(
        context,
        memory,
        vram_budget,
        resident_blocks=resident_blocks,
        prefetch=prefetch,
        chunk_tokens=chunk_tokens,
        explain=explain,
    )
    if asked.solve:
        placed.use_expandable_segments()
    image = find_still(image)
    architecture = load_architecture(model)
    runner = runner_of(architecture)
    paths = {
        "checkpoint": checkpoint,
        "gemma": gemma,
        "text_encoder": text_encoder,
        "upsampler": upsampler,
        "lora": lora,
        "weights": weights,
    }
    runner.check_weight_options(paths, model)
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
    vram_cap_bytes = options.cap_bytes(vram_cap_gib)
    from i2v_lab.pipeline.contract import media  # imports torch, so only once the options are valid

    media.check_output(out)
    if profile is not None:
        check_new_folder(profile, "profile")
    media.check_size(request.width, request.height)
    media.load_still(image)

    from i2v_lab.capacity.this_machine import available_memory, memory_budget_bytes
    from i2v_lab.cli.progress import ProgressReport
    from i2v_lab.pipeline.contract.generation import resolve_device
    from i2v_lab.runs.execute import Hooks, Mode, execute
    from i2v_lab.runs.spec import ProfilerMode, RunSpec

    target = resolve_device(device)
    resolution = None
    if asked.solve:
        available_bytes = memory_budget_bytes(device, vram_cap_bytes)
        device_name = available_memory(device)[0].removeprefix("this ")
        budget_bytes = available_bytes if asked.budget_bytes is None else asked.budget_bytes
        if budget_bytes > available_bytes:
            raise DeviceUnavailable(
                f"vram_budget={format_bytes(budget_bytes)} is above the {format_bytes(available_bytes)} that are "
                f"available on device={str(target)!r}; use that or less, or auto",
                vram_budget=budget_bytes,
                available_bytes=available_bytes,
            )
        asked = replace(asked, gpu=device_name)
        resolution = placed.solved(request, model, budget_bytes, asked, target.type)
        request = resolution.request
        if asked.budget_bytes is not None:
            vram_cap_bytes = min(vram_cap_bytes or budget_bytes, resolution.cap_bytes)
    if target.type == "cuda":
        name = available_memory(device)[0].removeprefix("this ")
        expected.announce_generation(request, model, target.type, name, resolution.forecast if resolution else None)
    spec = RunSpec(
        request=request,
        model=model,
        # Attribution to modules and autograd graphs is only recorded with --profile; peaks need neither.
        profiler=ProfilerMode.BOUNDARIES if profile is None and runner.emits_events else ProfilerMode.FULL,
        vram_cap_bytes=vram_cap_bytes,
    )
    with exclusive(lock_on_this_machine(out), out), ProgressReport(request.frames) as progress:
        resolved_weights = runner.resolve_weights(architecture, variant, progress.checked, **paths)
        for note in getattr(resolved_weights, "notes", ()):  # what was applied of the files
            progress.note(note)
        try:
            profiler = execute(
                spec,
                Mode.REAL,
                str(target),
                weights=resolved_weights,
                run_dir=profile,
                metadata={"argv": sys.argv, "weights": list(getattr(resolved_weights, "notes", ()))},
                video_path=lambda _: out,
                hooks=Hooks(sinks=[progress], on_frame=progress.frame_written),
            )
        except (OutOfDeviceMemory, VramCapExceeded) as error:
            if resolution is None:
                raise
            budget_bytes = resolution.memory_bytes
            words = f"{error}; the budget is {format_bytes(budget_bytes)}"
            raise type(error)(words, **error.fields, budget_bytes=budget_bytes) from None
    assert profiler is not None
    report = _report(request, model, out, profiler, real=any(paths.values()))
    if resolution is not None:
        report["placement"] = placed.explanation(resolution)
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _report(request: I2VRequest, model: str, out: Path, profiler: PhaseProfiler, *, real: bool) -> dict[str, Any]:
    from i2v_lab.profiling.records import NoteRecord, peak_phase
    from i2v_lab.runs.execute import WHOLE

    phases = [record for record in profiler.phases if record.phase != WHOLE]
    peak = peak_phase(phases)
    assert peak is not None
    return {
        "output": str(out),
        "model": model,
        "weights": "files" if real else "random",
        "width": request.width,
        "height": request.height,
        "frames": request.frames,
        "fps": request.fps,
        "seed": request.seed,
        "decode_scope": request.decode_scope.value,
        "memory": str(request.placed.policy or "placed"),
        "peak_bytes": peak.peak_bytes,
        "peak_phase": peak.phase,
        "phases": [{key: asdict(record)[key] for key in ("phase", "seconds", "peak_bytes")} for record in phases],
        "notes": [asdict(record) for record in profiler.records if isinstance(record, NoteRecord)],
    }


def _print_report(report: dict[str, Any]) -> None:
    from i2v_lab.reporting.console import TerminalTable
    from i2v_lab.runs.random_weights import random_weights
    from i2v_lab.units import format_bytes, format_seconds

    table = TerminalTable("phase", "time", "peak", title=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in report["phases"]:
        style = "bold" if phase["phase"] == report["peak_phase"] else ""
        table.add_row(phase["phase"], format_seconds(phase["seconds"]), format_bytes(phase["peak_bytes"]), style=style)
    console = plain_console()
    console.print(table)
    random = report["weights"] == "random"
    console.print(
        f"{report['output']}: {report['width']}x{report['height']}, {report['frames']} frames, {report['fps']:g} fps"
        f"{', random weights' if random else ''}; peak {format_bytes(report['peak_bytes'])} in {report['peak_phase']}",
        soft_wrap=True,
    )
    if random:
        console.print(random_weights(report["model"]), soft_wrap=True)
