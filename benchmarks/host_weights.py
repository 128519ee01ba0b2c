"""Cold and warm generations of LTX-2.3: streamed, resident, and upstream's own pipeline, from files or without.

    python benchmarks/host_weights.py --device cuda --out times.jsonl
    python benchmarks/host_weights.py --device cuda --files fp8 --folder /scratch/weights --out times.jsonl

With ``--files`` the weight files are written first: in the layout of the real ones, at full size, with the same random
GiB over and over, which takes as long as the disk does. Then each way runs in processes of its own, with the files
dropped from the page cache and with them in it; a time is from the pipeline's call to the finished MP4. Without files
weights are made on the device.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from i2v_lab.files import scratch_folder
from i2v_lab.paths import find_still

WAYS = {  # memory policy, whether streamed weights are kept from one generation to the next, and upstream's pipeline
    "upstream": ("resident", False, True),
    "resident": ("resident", False, False),
    "streamed": ("streamed", False, False),
    "streamed, kept": ("streamed", True, False),
}
CAST = "transformer_blocks."
E4M3 = torch.float8_e4m3fn


def main(
    out: Path,
    device: str = "cpu",
    model: str = "ltx-2.3-tiny",
    width: int = 64,
    height: int = 64,
    frames: int = 9,
    generations: int = 2,
    files: Annotated[str, typer.Option(help="fp8, bf16, or none: weights made on demand.")] = "none",
    folder: Annotated[Path | None, typer.Option(help="Gets the files, and keeps them.")] = None,
    ways: str = "upstream,resident,streamed,streamed, kept",
    limit_s: Annotated[float, typer.Option(help="No further process is started after it.")] = 600,
    way: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.request import I2VRequest

    start = time.perf_counter()
    architecture = load_architecture(model)
    image = str(find_still("stills/lighthouse.png"))
    request = I2VRequest(image=image, prompt="waves", width=width, height=height, frames=frames, seed=3)
    if way:
        for row in run_way(way, architecture, request, device, generations, files, folder):
            note(out, {"way": way, "files": files, **row})
        return
    if files != "none":
        assert folder is not None, "--files needs --folder"
        written, seconds = write_files(architecture, folder, files)
        note(out, {"kind": "written", "bytes": written, "seconds": seconds, "gb_s": written / max(seconds, 1e-9) / 1e9})
    for name in WAYS:
        for cache in ("cold", "warm") if files != "none" else ("none",):
            if name not in ways.split(",") and name != "streamed, kept":
                continue
            if time.perf_counter() - start > limit_s or (name == "streamed, kept" and cache == "cold"):
                continue
            if cache == "cold" and folder is not None:
                drop_from_cache(folder)
            note(out, {"kind": "process", "way": name, "cache": cache, "at_s": time.perf_counter() - start})
            count = generations if name == "streamed, kept" or files == "none" else 1
            given = [f"--device={device}", f"--model={model}", f"--width={width}", f"--height={height}"]
            given += [f"--frames={frames}", f"--generations={count}", f"--files={files}", f"--way={name}"]
            given += [] if folder is None else [f"--folder={folder}"]
            begin = time.perf_counter()
            status = subprocess.run([sys.executable, __file__, str(out), *given], check=False).returncode
            seconds = time.perf_counter() - begin
            note(out, {"kind": "ended", "way": name, "cache": cache, "status": status, "process_seconds": seconds})


def note(out: Path, row: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def run_way(
    way: str, architecture: Any, request: Any, device: str, generations: int, files: str, folder: Path | None
) -> Iterator[dict[str, Any]]:
    """The seconds of one generation after another, and of their phases."""
    from contextlib import ExitStack

    from ltx_core.loader import SafetensorsModelStateDictLoader

    from i2v_lab.events import PhaseEnded, StepEnded
    from i2v_lab.pipeline.contract.media import write_video
    from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
    from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
    from i2v_lab.pipeline.ltx2.upstream import UpstreamPipeline

    policy, keep, upstream = WAYS[way]
    weights = located(architecture, folder) if folder is not None else None
    if weights is None:
        from i2v_lab.pipeline.ltx2.weights import synthetic_weights

        weights = synthetic_weights(architecture)
    elif upstream:
        weights = replace(weights, loader=SafetensorsModelStateDictLoader())
    seen: list[tuple[str, float]] = []
    since = [0.0]

    def sink(event: Any) -> None:
        if isinstance(event, PhaseEnded):
            seen.append((event.phase.value, event.seconds))
        elif isinstance(event, StepEnded):
            seen.append((f"{event.phase.value} {event.step}", time.perf_counter() - since[0]))

    with ExitStack() as scopes:
        host = scopes.enter_context(HostWeights(keep=keep))
        video = scopes.enter_context(scratch_folder()) / "video.mp4"
        for number in range(1, generations + 1):
            seen.clear()
            since[0] = begin = time.perf_counter()
            if upstream:
                pipeline: Any = UpstreamPipeline(weights, device, sinks=[sink])
            else:
                pipeline = TwoStagePipeline(weights, device, sinks=[sink], host_weights=host)
            generation = pipeline(replace(request, memory=policy))
            called = time.perf_counter() - begin
            with generation.video as chunks:
                write_video(chunks, generation.audio, video, request.frame_rate)
            yield {
                "generation": number,
                "seconds": time.perf_counter() - begin,
                "called_seconds": called,
                "held_bytes": host.held_bytes,
                "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
                "phases": list(seen),
            }


# --- Files ------------------------------------------------------------------------------------------------------------


def located(architecture: Any, folder: Path) -> Any:
    """The written files as weights; their values are not verified, which would read them."""
    from i2v_lab.pipeline.ltx2.synthetic import SYNTHETIC
    from i2v_lab.pipeline.ltx2.weights import Weights

    paths = SYNTHETIC.paths(folder)
    return Weights(
        architecture=architecture,
        checkpoint=paths["checkpoint"],
        gemma_root=str(folder / "gemma"),
        gemma_shards=(paths["gemma"],),
        upsampler=paths["upsampler"],
        lora=paths["lora"],
    )


def write_files(architecture: Any, folder: Path, kind: str) -> tuple[int, float]:
    """Write the checkpoint, Gemma and the upsampler, unless they are there; returns bytes and seconds."""
    from i2v_lab.pipeline.ltx2.layout import file_layout
    from i2v_lab.pipeline.ltx2.synthetic import SYNTHETIC, metadata, write_gemma_folder

    write_gemma_folder(architecture, folder)
    paths = SYNTHETIC.paths(folder)
    layouts = {file: file_layout(architecture, file) for file in ("checkpoint", "gemma", "upsampler")}
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(2**24, generator=generator) * 0.02).bfloat16()
    content = {
        "BF16": values.view(torch.uint8).numpy().tobytes() * 8,
        "F8_E4M3": values.to(E4M3).view(torch.uint8).numpy().tobytes() * 16,
    }
    begin, total = time.perf_counter(), 0
    for file, layout in layouts.items():
        if Path(paths[file]).exists():
            continue
        header: dict[str, Any] = {"__metadata__": metadata(architecture, file)}
        offset, order = 0, sorted(layout)
        for key in order:
            cast = kind == "fp8" and CAST in key and len(layout[key]) == 2 and file == "checkpoint"
            size = math.prod(layout[key]) * (1 if cast else 2)
            dtype = "F8_E4M3" if cast else "BF16"
            header[key] = {"dtype": dtype, "shape": layout[key], "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        part = Path(f"{paths[file]}.part")
        with part.open("wb", buffering=2**20) as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                first, last = header[key]["data_offsets"]
                data = memoryview(content[header[key]["dtype"]])
                for at in range(0, last - first, len(data)):
                    target.write(data[: min(len(data), last - first - at)])
            target.flush()
            os.fsync(target.fileno())
        part.rename(paths[file])
        total += offset
    return total, time.perf_counter() - begin


def drop_from_cache(folder: Path) -> None:
    """Have the system forget the pages of the files."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    typer.run(main)
