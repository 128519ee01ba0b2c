"""Rates of a card and its host, for `i2v-lab calibrate --time`: operators, copies, files, a video. About a minute.

    python benchmarks/measure_rates.py rates.jsonl

Needs a CUDA card that nothing else uses. Measures every operator in data/measured/rates-h100.jsonl anew, each by events
over repeated calls, small ones also in a CUDA graph, which leaves out their launches.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.nn import functional

from i2v_lab.capacity.rate_cases import case
from i2v_lab.paths import data_dir

RESULTS = {"seconds", "graph_s", "host_s", "first_s", "first_host_s", "count", "at_s"}
SERIES_S = 0.02  # of one series of calls
SHORT_S = 3e-4  # calls that are also measured in a graph
IN_GRAPH = 20
FILE_BYTES = 3 * 2**29
CALLS = 50


def clock(call: Callable[[], Any], count: int) -> tuple[float, float]:
    """Seconds of the host and of the device for one of ``count`` calls."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    start_s = time.perf_counter()
    for _ in range(count):
        call()
    host_s = time.perf_counter() - start_s
    last.record()
    torch.cuda.synchronize()
    return host_s / count, first.elapsed_time(last) / 1e3 / count


def in_graph(call: Callable[[], Any], stream: torch.cuda.Stream) -> float | None:
    """Seconds of one call without its launch; ``None`` where it cannot be captured."""
    try:
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(IN_GRAPH):
                call()
        graph.replay()
        return sorted(clock(graph.replay, 3)[1] / IN_GRAPH for _ in range(3))[1]
    except RuntimeError:
        return None


def elapsed(call: Callable[[], Any]) -> float:
    """Seconds of one call, to the end of what it launched."""
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start_s


def operators(write: Callable[..., None]) -> None:
    """Every operator of the committed measurements."""
    stream = torch.cuda.Stream()
    for line in (data_dir() / "measured" / "rates-h100.jsonl").read_text(encoding="utf-8").splitlines():
        described = {key: value for key, value in json.loads(line).items() if key not in RESULTS}
        call = case(described) if "dtype" in described else None
        if call is None:
            continue
        try:
            first_s = elapsed(call)
            once_s = max(clock(call, 1)[1], 1e-6)
            count = max(1, min(100, int(SERIES_S / once_s)))
            series = sorted((clock(call, count) for _ in range(3)), key=lambda pair: pair[1])
            graph_s = in_graph(call, stream) if series[1][1] < SHORT_S else None
            host_s = min(host for host, _ in series)
            write(
                described.pop("kind"),
                **described,
                seconds=series[1][1],
                graph_s=graph_s,
                host_s=host_s,
                first_s=first_s,
            )
        except RuntimeError as error:  # no such kernel, or too little memory
            print(f"left out: {described}: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.empty_cache()


def launches(write: Callable[..., None]) -> None:
    """Seconds that the host takes for a call of each kind."""
    a = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    norm = torch.nn.LayerNorm(64, device="cuda", dtype=torch.bfloat16)
    convolution = torch.nn.Conv2d(16, 16, 3, device="cuda", dtype=torch.bfloat16)
    image, query = a.view(1, 16, 16, 16), a.view(1, 1, 64, 64).expand(1, 4, 64, 64)
    calls: dict[str, Callable[[], Any]] = {
        "add": lambda: a + a,
        "view": lambda: a.view(32, 128),
        "empty": lambda: torch.empty(64, 64, device="cuda"),
        "F.linear": lambda: functional.linear(a, a, a[0]),
        "nn.LayerNorm": lambda: norm(a),
        "nn.Conv2d": lambda: convolution(image),
        "sdpa": lambda: functional.scaled_dot_product_attention(query, query, query),
    }
    for what, call in calls.items():
        for _ in range(CALLS):
            call()
        write("launch", what=what, host_s=float(np.median([clock(call, CALLS)[0] for _ in range(5)])))


def copies(write: Callable[..., None]) -> None:
    """Between host and device, by size."""
    for nbytes in (2**12, 2**20, 2**27, 2**30):
        for what, call in copies_of(nbytes).items():
            call()
            write("copy", what=what, bytes=nbytes, seconds=sorted(elapsed(call) for _ in range(3))[1])


def copies_of(nbytes: int) -> dict[str, Callable[[], Any]]:
    """Copies of one size, by what they are."""
    host, device = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8, device="cuda")
    locked = host.pin_memory()
    return {
        "to device, pageable": lambda: device.copy_(host),
        "to device, page-locked": lambda: device.copy_(locked, non_blocking=True),
        "to host, new": lambda: device.to("cpu"),
        "to host, page-locked": lambda: locked.copy_(device, non_blocking=True),
    }


def files(write: Callable[..., None]) -> None:
    """A file on the disk of temporary files, cold and warm, and a video."""
    with tempfile.TemporaryDirectory() as folder:
        path, buffer = Path(folder, "weights"), bytearray(2**26)
        with path.open("wb") as stream:
            for _ in range(FILE_BYTES // len(buffer)):
                stream.write(os.urandom(len(buffer)))
            stream.flush()
            os.fsync(stream.fileno())
        for what in ("read cold", "read warm"):
            with path.open("rb", buffering=0) as stream:
                if what == "read cold":
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                start_s = time.perf_counter()
                while stream.readinto(buffer):
                    pass
                write("file", what=what, bytes=FILE_BYTES, seconds=time.perf_counter() - start_s)
        for width, height, frames in ((1024, 768, 48), (2048, 1536, 16)):
            picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
            start_s = time.perf_counter()
            with av.open(str(Path(folder, "video.mp4")), "w") as container:
                video = container.add_stream("libx264", rate=24)
                video.width, video.height, video.pix_fmt = width, height, "yuv420p"
                for index in range(frames):
                    frame = av.VideoFrame.from_ndarray(np.roll(picture, index, axis=1), format="rgb24")
                    container.mux(video.encode(frame))
                container.mux(video.encode())
            seconds = time.perf_counter() - start_s
            write("encode", width=width, height=height, frames=frames, seconds=seconds)


def main() -> None:
    """Write the measurements as they are made."""
    properties = torch.cuda.get_device_properties(0)
    with Path(sys.argv[1]).open("w", encoding="utf-8", buffering=1) as out, torch.no_grad():

        def write(kind: str, **values: Any) -> None:
            out.write(json.dumps({"kind": kind, **values}) + "\n")

        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        write("device", name=properties.name, memory=properties.total_memory, cores=os.cpu_count(), **versions)
        for group in (launches, operators, copies, files):
            group(write)


if __name__ == "__main__":
    main()
