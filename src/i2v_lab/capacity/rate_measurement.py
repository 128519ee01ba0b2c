"""Measures the rates of a card and its host: operators, launches, copies, files, a video. A minute on an H100."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from i2v_lab.capacity.rate_cases import case
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.media import write_video

MEASUREMENTS = "rates-h100.jsonl"  # has the descriptions of all operators, in data/measured
RESULTS = {"seconds", "graph_s", "host_s", "first_s", "first_host_s", "count", "at_s"}
SERIES_S = 0.02  # of one series of calls
SHORT_S = 3e-4  # calls that are also measured in a graph
IN_GRAPH = 20
FILE_BYTES = 3 * 2**28
PART_BYTES = 2**26  # that a file is read by
COPY_BYTES = (2**12, 2**20, 2**27, 2**30)
VIDEOS = ((1024, 768, 48), (2048, 1536, 16))  # width, height, frames
PICTURES = 4  # of noise, as of random weights, in turn
THREADS = min(8, os.cpu_count() or 1)  # as many as read weights ahead
FRAME_RATE = Fraction(24)
CALLS = 50
SHAPE = {"b": 1, "h": 16, "l": 25600, "s": 25600, "e": 128}
LONG_MASK = {"kind": "attention", "kernel": "CUDNN_ATTENTION", "dtype": "bf16", **SHAPE, "mask": True}

Row = dict[str, Any]


def rate_cases() -> list[Row]:
    """The operators that are measured, each described once; kinds alternate, so that none is missing when time ends."""
    lines = (data_dir() / "measured" / MEASUREMENTS).read_text(encoding="utf-8").splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key not in RESULTS} for line in lines]
    described = [json.dumps(row) for row in (*rows, LONG_MASK) if "dtype" in row]
    by_kind: dict[str, list[Row]] = {}
    for text in dict.fromkeys(described):
        row = json.loads(text)
        by_kind.setdefault(row["kind"], []).append(row)
    places = [(index / len(kind), row) for kind in by_kind.values() for index, row in enumerate(kind)]
    return [row for _, row in sorted(places, key=lambda place: place[0])]


@dataclass(frozen=True)
class RateMeasurement:
    """Measures the rates of a device, which nothing else uses.

    Args:
        device: ``cuda``, or ``cpu``, whose launches are not apart from what they do.
        cases: Operators, described as for :func:`~i2v_lab.capacity.rate_cases.case`.
        limit_s: Operators are left out after so many seconds.
        file_bytes: Of the file that is written and read.
        copy_bytes: Of the copies between host and device.
        videos: Width, height and frames of each video that is encoded.

    Example:
        >>> tiny = [{"kind": "linear", "dtype": "f32", "m": 2, "k": 8, "n": 4}]
        >>> rows = list(RateMeasurement("cpu", tiny, 10.0, 2**20, (8, 16), ((32, 32, 1),)).rows())
        >>> [row["m"] for row in rows if row["kind"] == "linear"]
        [2]
    """

    device: str = "cuda"
    cases: Sequence[Mapping[str, Any]] = field(default_factory=rate_cases)
    limit_s: float = 75.0
    file_bytes: int = FILE_BYTES
    copy_bytes: Sequence[int] = COPY_BYTES
    videos: Sequence[tuple[int, int, int]] = VIDEOS

    def rows(self) -> Iterator[Row]:
        """What is measured, one row after another; the first names the device."""
        yield self._device()
        with torch.no_grad():
            for group in (self._launches, self._operators, self._copies, self._locks, self._files, self._encoding):
                yield from group()

    def _device(self) -> Row:
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        name, memory = self.device, 0
        if self._cuda:
            properties = torch.cuda.get_device_properties(0)
            name, memory = properties.name, properties.total_memory
        return {"kind": "device", "name": name, "memory": memory, "cores": os.cpu_count(), **versions}

    # --- Clocks ---

    @property
    def _cuda(self) -> bool:
        return self.device == "cuda"

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _clock(self, call: Callable[[], Any], count: int) -> tuple[float, float]:
        """Seconds of the host and of the device for one of ``count`` calls."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else []
        self._synchronize()
        for event in events[:1]:
            event.record()
        start_s = time.perf_counter()
        for _ in range(count):
            call()
        host_s = time.perf_counter() - start_s
        for event in events[1:]:
            event.record()
        self._synchronize()
        device_s = events[0].elapsed_time(events[1]) / 1e3 if events else host_s
        return host_s / count, device_s / count

    def _elapsed(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, to the end of what it launched."""
        self._synchronize()
        start_s = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - start_s

    def _in_graph(self, call: Callable[[], Any]) -> float | None:
        """Seconds of one call without its launch; ``None`` where it cannot be captured."""
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(IN_GRAPH):
                    call()
            graph.replay()
            return sorted(self._clock(graph.replay, 3)[1] / IN_GRAPH for _ in range(3))[1]
        except RuntimeError:
            return None

    # --- Groups ---

    def _launches(self) -> Iterator[Row]:
        """Seconds that the host takes for a call of each kind, and for the first of a process."""
        a = torch.zeros(64, 64, device=self.device, dtype=torch.bfloat16)
        norm = torch.nn.LayerNorm(64, device=self.device, dtype=torch.bfloat16)
        convolution = torch.nn.Conv2d(16, 16, 3, device=self.device, dtype=torch.bfloat16)
        image, query = a.view(1, 16, 16, 16), a.view(1, 1, 64, 64).expand(1, 4, 64, 64)
        calls: dict[str, Callable[[], Any]] = {
            "add": lambda: a + a,
            "view": lambda: a.view(32, 128),
            "empty": lambda: torch.empty(64, 64, device=self.device),
            "F.linear": lambda: functional.linear(a, a, a[0]),
            "nn.LayerNorm": lambda: norm(a),
            "nn.Conv2d": lambda: convolution(image),
            "sdpa": lambda: functional.scaled_dot_product_attention(query, query, query),
        }
        for what, call in calls.items():
            yield {"kind": "once", "what": what, "seconds": self._elapsed(call)}
            for _ in range(CALLS):
                call()
            host_s = float(np.median([self._clock(call, CALLS)[0] for _ in range(5)]))
            yield {"kind": "launch", "what": what, "host_s": host_s}

    def _operators(self) -> Iterator[Row]:
        start_s = time.perf_counter()
        for described in self.cases:
            if time.perf_counter() - start_s > self.limit_s:
                return
            try:
                call = case(described, self.device)
                row = None if call is None else {**described, **self._operator(call)}
            except RuntimeError:  # no kernel for it, or not enough memory
                row = None
            if row is not None:
                yield row
            if self._cuda:
                torch.cuda.empty_cache()

    def _operator(self, call: Callable[[], Any]) -> Row:
        first_s = self._elapsed(call)
        once_s = max(self._clock(call, 1)[1], 1e-6)
        count = max(1, min(100, int(SERIES_S / once_s)))
        series = sorted((self._clock(call, count) for _ in range(3)), key=lambda pair: pair[1])
        seconds = series[1][1]
        graph_s = seconds if not self._cuda else self._in_graph(call) if seconds < SHORT_S else None
        return {"seconds": seconds, "graph_s": graph_s, "host_s": min(host for host, _ in series), "first_s": first_s}

    def _copies(self) -> Iterator[Row]:
        for nbytes in self.copy_bytes:
            for what, call in self._copies_of(nbytes).items():
                call()
                seconds = sorted(self._elapsed(call) for _ in range(3))[1]
                yield {"kind": "copy", "what": what, "bytes": nbytes, "seconds": seconds}

    def _copies_of(self, nbytes: int) -> dict[str, Callable[[], Any]]:
        host, device = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8, device=self.device)
        locked = host.pin_memory() if self._cuda else host.clone()
        return {
            "to device, pageable": lambda: device.copy_(host),
            "to device, page-locked": lambda: device.copy_(locked, non_blocking=True),
            "to host, new": lambda: device.to("cpu", copy=True),
            "to host, page-locked": lambda: locked.copy_(device, non_blocking=True),
        }

    def _locks(self) -> Iterator[Row]:
        """Page-locking memory whose pages exist, as streamed blocks have it."""
        if not self._cuda:
            return
        nbytes = max(self.copy_bytes)
        memory, driver = torch.ones(nbytes, dtype=torch.uint8), torch.cuda.cudart()
        start_s = time.perf_counter()
        failed = driver.cudaHostRegister(memory.data_ptr(), nbytes, 0)
        seconds = time.perf_counter() - start_s
        if not int(failed):
            yield {"kind": "lock", "what": "cudaHostRegister", "bytes": nbytes, "seconds": seconds}
            driver.cudaHostUnregister(memory.data_ptr())

    def _files(self) -> Iterator[Row]:
        """A file on the disk of temporary files, out of the page cache and from it."""
        with tempfile.TemporaryDirectory() as folder:
            path, buffer = Path(folder, "weights"), bytearray(min(PART_BYTES, self.file_bytes))
            with path.open("wb") as stream:
                for _ in range(self.file_bytes // len(buffer)):
                    stream.write(os.urandom(len(buffer)))
                stream.flush()
                os.fsync(stream.fileno())
            nbytes = path.stat().st_size
            with path.open("rb", buffering=0) as stream:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                start_s = time.perf_counter()
                while stream.readinto(buffer):
                    pass
                seconds = time.perf_counter() - start_s
            yield {"kind": "file", "what": "read cold", "bytes": nbytes, "seconds": seconds}
            buffers = [bytearray(nbytes // THREADS) for _ in range(THREADS)]
            with ThreadPoolExecutor(THREADS) as threads:
                start_s = time.perf_counter()
                read = sum(
                    threads.map(lambda part: _read(path, buffers[part], part * (nbytes // THREADS)), range(THREADS))
                )
                seconds = time.perf_counter() - start_s
            yield {"kind": "file", "what": "read warm by threads", "bytes": read, "seconds": seconds}

    def _encoding(self) -> Iterator[Row]:
        for width, height, frames in self.videos:
            noise = torch.randint(0, 255, (PICTURES, height, width, 3), dtype=torch.uint8)
            with tempfile.TemporaryDirectory() as folder:
                start_s = time.perf_counter()
                chunks = (noise[index % PICTURES][None] for index in range(frames))
                write_video(chunks, None, Path(folder, "video.mp4"), FRAME_RATE)
                seconds = time.perf_counter() - start_s
            yield {"kind": "encode", "width": width, "height": height, "frames": frames, "seconds": seconds}


def _read(path: Path, buffer: bytearray, offset: int) -> int:
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        return stream.readinto(buffer) or 0
