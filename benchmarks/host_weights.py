"""Cold and warm generations of LTX-2.3 for budgets of device memory, beside resident and upstream's own pipeline.

    python benchmarks/host_weights.py times.jsonl --device cuda --turns 2 --ways resident,4GiB,8GiB,16GiB
    python benchmarks/host_weights.py times.jsonl --device cuda --ways upstream,resident,8GiB,upstream
    python benchmarks/host_weights.py times.jsonl --device cuda --files fp8 --folder /scratch/weights

A way is a memory policy, a budget, or ``upstream``. With ``--turns`` all run in one process, round after round, each
two generations that keep their weights in host memory: the first is cold, together with the release of what is kept,
the second warm; times end with the last decoded frame, and are divided by those of ``resident`` in the same round.
Otherwise each way runs in a process of its own, in the given order, from the pipeline's call to the finished MP4.
Placements are solved once, and kept beside the times. Without files weights are made on the device.

With ``--files`` the weight files are written first: in the layout of the real ones, at full size, with the same random
GiB over and over, which takes as long as the disk does. Then each way runs with the files dropped from the page cache,
and with them in it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from i2v_lab.files import scratch_folder, write_text
from i2v_lab.paths import find_still

UPSTREAM, RESIDENT = "upstream", "resident"
NOTHING_KEPT = (UPSTREAM, RESIDENT, "lean")
CAST = "transformer_blocks."
E4M3 = torch.float8_e4m3fn
SCALE = 0.5  # of each tensor of a checkpoint with scales
ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}


def main(
    out: Path,
    device: str = "cpu",
    model: str = "ltx-2.3-tiny",
    width: int = 64,
    height: int = 64,
    frames: int = 9,
    ways: Annotated[str, typer.Option(help="In their order; one may come twice.")] = "upstream,resident,streamed",
    generations: Annotated[int, typer.Option(help="Of each process; their weights are kept.")] = 1,
    turns: Annotated[int, typer.Option(help="Rounds within one process; 0 for one process each.")] = 0,
    files: Annotated[str, typer.Option(help="fp8, scaled, bf16, or none: weights made on demand.")] = "none",
    folder: Annotated[Path | None, typer.Option(help="Gets the files, and keeps them.")] = None,
    caches: Annotated[str, typer.Option(help="Of the files, before each way.")] = "cold,warm",
    limit_s: Annotated[float, typer.Option(help="Nothing further is started after it.")] = 600,
    way: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    from i2v_lab.cli.placed import use_expandable_segments
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.request import I2VRequest

    start = time.perf_counter()
    use_expandable_segments()
    architecture = load_architecture(model)
    image = str(find_still("stills/lighthouse.png"))
    request = I2VRequest(image=image, prompt="waves", width=width, height=height, frames=frames, seed=3)
    order = [way] if way else ways.split(",")
    requests = solved(request, model, device, order, out.with_suffix(".requests.json"))
    if files != "none" and not way:
        assert folder is not None, "--files needs --folder"
        written, seconds = write_files(architecture, folder, files)
        note(out, {"kind": "written", "bytes": written, "seconds": seconds, "gb_s": written / max(seconds, 1e-9) / 1e9})
    if way:
        with Bench(architecture, device, folder) as bench:
            for number in range(1, generations + 1):
                note(out, {"way": way, "generation": number, **bench.timed(way, *requests[way], mp4=True)})
        return
    if turns:
        with Bench(architecture, device, folder) as bench:
            take_turns(bench, out, order, requests, turns, start + limit_s)
        return
    for one in order:
        for cache in caches.split(",") if files != "none" else ("none",):
            if time.perf_counter() - start > limit_s:
                continue
            if cache == "cold" and folder is not None:
                drop_from_cache(folder)
            given = [f"--device={device}", f"--model={model}", f"--width={width}", f"--height={height}"]
            given += [f"--frames={frames}", f"--generations={generations}", f"--way={one}"]
            given += [] if folder is None else [f"--folder={folder}"]
            note(out, {"kind": "process", "way": one, "files": files, "cache": cache})
            begin = time.perf_counter()
            status = subprocess.run([sys.executable, __file__, str(out), *given], check=False).returncode
            seconds = time.perf_counter() - begin
            note(out, {"kind": "ended", "way": one, "cache": cache, "status": status, "process_seconds": seconds})


def note(out: Path, row: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def solved(request: Any, model: str, device: str, ways: list[str], path: Path) -> dict[str, tuple[Any, int | None]]:
    """For each way its request and the cap of the allocator; placements are read from ``path`` where they are there."""
    from i2v_lab.capacity.placement import resolve_memory
    from i2v_lab.request import I2VRequest

    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, tuple[Any, int | None]] = {}
    for way in ways:
        if way.endswith("GiB"):
            key = f"{model} {request.width}x{request.height}x{request.frames} {way}"
            if key not in kept:
                resolution = resolve_memory(request, int(float(way.removesuffix("GiB")) * 2**30), model, device)
                kept[key] = {"request": resolution.request.to_json(), "cap_bytes": resolution.cap_bytes}
                write_text(path, json.dumps(kept, indent=1) + "\n")
            own = I2VRequest.from_json({**kept[key]["request"], "image": request.image})
            found[way] = own, kept[key]["cap_bytes"]
        else:
            found[way] = replace(request, memory=RESIDENT if way == UPSTREAM else way), None
    return found


def take_turns(
    bench: Bench,
    out: Path,
    ways: list[str],
    requests: dict[str, tuple[Any, int | None]],
    rounds: int,
    end: float,
) -> None:
    """Rounds of all ways, and each way's times over those of ``resident``."""
    bench.timed(RESIDENT, replace(requests[ways[0]][0], memory=RESIDENT, placement=None), None, mp4=False)
    ratios: dict[tuple[str, str], list[float]] = {}
    for number in range(1, rounds + 1):
        seconds: dict[tuple[str, str], float] = {}
        for way in ways if number % 2 else reversed(ways):
            if time.perf_counter() > end:
                break
            for kind in ("warm",) if way in NOTHING_KEPT else ("cold", "warm"):
                row = bench.timed(way, *requests[way], mp4=False)
                seconds[way, kind] = row["seconds"]
                if kind == "warm":
                    row["release_seconds"] = bench.release()
                    if way not in NOTHING_KEPT:
                        seconds[way, "cold"] += row["release_seconds"]
                note(out, {"round": number, "way": way, "kind": kind, **row})
        for (way, kind), value in seconds.items():
            if (RESIDENT, "warm") in seconds:
                ratios.setdefault((way, kind), []).append(value / seconds[RESIDENT, "warm"])
        for (way, kind), values in ratios.items():
            median = statistics.median(values)
            note(out, {"kind": "ratio", "way": way, "of": kind, "rounds": values, "median": median})


class Bench:
    """Times generations over one set of weights, which are kept in host memory until :meth:`release`."""

    def __init__(self, architecture: Any, device: str, folder: Path | None) -> None:
        from i2v_lab.pipeline.ltx2.loader import ScaledStateDictLoader
        from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
        from i2v_lab.pipeline.ltx2.synthetic import SYNTHETIC
        from i2v_lab.pipeline.ltx2.weights import located, synthetic_weights

        self.device = device
        if folder is None:
            self.weights = synthetic_weights(architecture)
        else:
            self.weights = located(architecture, folder, SYNTHETIC.paths(folder), ScaledStateDictLoader())
        self.is_synthetic = folder is None
        self.host = HostWeights(keep=True)
        self._scopes = ExitStack()

    def __enter__(self) -> Bench:
        self.video = self._scopes.enter_context(scratch_folder()) / "video.mp4"
        return self

    def __exit__(self, *_: object) -> None:
        self.host.close()
        self._scopes.close()

    def release(self) -> float:
        """Release what is kept; returns the seconds that it took."""
        from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights

        begin = time.perf_counter()
        self.host.close()
        seconds = time.perf_counter() - begin
        self.host = HostWeights(keep=True)
        return seconds

    def timed(self, way: str, request: Any, cap_bytes: int | None, *, mp4: bool) -> dict[str, Any]:
        """The seconds of a generation and of its parts."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(1.0 if cap_bytes is None else cap_bytes / total)
            torch.cuda.reset_peak_memory_stats()
        seen: list[tuple[str, float]] = []
        host_s = self._host_seconds()
        begin = time.perf_counter()

        def sink(event: Any) -> None:
            name = ":".join(str(getattr(event, part, "")) for part in ("phase", "name", "step"))
            seen.append((f"{type(event).__name__} {name}", round(time.perf_counter() - begin, 4)))

        generation = self._pipeline(way, sink)(request)
        called = time.perf_counter() - begin
        with generation.video as chunks:
            if not mp4:
                for chunk in chunks:
                    chunk.cpu()
            elif way == UPSTREAM:
                from ltx_pipelines.utils.media_io import encode_video

                encode_video(iter(chunks), request.fps, generation.audio, str(self.video), generation.video.chunks)
            else:
                from i2v_lab.pipeline.contract.media import write_video

                write_video(chunks, generation.audio, self.video, request.frame_rate)
        return {
            "seconds": time.perf_counter() - begin,
            "called_seconds": called,
            "host_s": host_s,
            "held_bytes": self.host.held_bytes,
            **self._memory(),
            "cap_bytes": cap_bytes,
            "events": seen,
        }

    def _memory(self) -> dict[str, int | None]:
        """Peaks of allocated and reserved bytes, and of what NVML counts for the process: its context besides."""
        from i2v_lab.profiling.meters.nvml import card_index, read_device

        if self.device != "cuda":
            return {}
        reserved_bytes = torch.cuda.max_memory_reserved()
        own_bytes = read_device(card_index(torch.device("cuda", 0))).own_bytes
        context_bytes = None if own_bytes is None else own_bytes - torch.cuda.memory_reserved()
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": reserved_bytes,
            "process_bytes": None if context_bytes is None else context_bytes + reserved_bytes,
        }

    def _host_seconds(self) -> float:
        """Of 20,000 small operations: steps of stage 1 are bound by them, and hosts differ from minute to minute."""
        small = torch.zeros(8, device=self.device)
        begin = time.perf_counter()
        for _ in range(20_000):
            small.add_(1)
        small.cpu()
        return time.perf_counter() - begin

    def _pipeline(self, way: str, sink: Any) -> Any:
        from ltx_core.loader import SafetensorsModelStateDictLoader

        from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
        from i2v_lab.pipeline.ltx2.upstream import UpstreamPipeline

        if way != UPSTREAM:
            return TwoStagePipeline(self.weights, self.device, sinks=[sink], host_weights=self.host)
        own = {} if self.is_synthetic else {"loader": SafetensorsModelStateDictLoader()}
        return UpstreamPipeline(replace(self.weights, **own), self.device, sinks=[sink])


# --- Files ------------------------------------------------------------------------------------------------------------


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
        "F32": torch.tensor([SCALE]).view(torch.uint8).numpy().tobytes(),
    }
    begin, total = time.perf_counter(), 0
    for file, layout in layouts.items():
        if Path(paths[file]).exists():
            continue
        header: dict[str, Any] = {"__metadata__": metadata(architecture, file)}
        offset = 0
        for key in sorted(layout):
            cast = kind != "bf16" and CAST in key and len(layout[key]) == 2 and file == "checkpoint"
            entries = [(key, "F8_E4M3" if cast else "BF16", layout[key])]
            if cast and kind == "scaled" and key.endswith(".weight"):
                entries.append((f"{key}_scale", "F32", ()))
            for name, dtype, shape in entries:
                size = math.prod(shape) * ITEM_BYTES[dtype]
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
                offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        part = Path(f"{paths[file]}.part")
        with part.open("wb", buffering=2**20) as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for key in [key for key in header if key != "__metadata__"]:
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
