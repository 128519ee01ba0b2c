"""Measures the workspaces of convolutions on this machine's GPU, by dtype, batch, channels, kernel and memory format.

It stands alone: torch only. It writes a line of JSON for each convolution as it goes, the first one for the card, and
stops after the seconds given (110 by default), the most telling convolutions first. `i2v-lab calibrate` finds the file
beside that of measure_libraries.py, by its name.

    python benchmarks/measure_convolutions.py data/measured/libraries-MYGPU.jsonl [seconds]
"""

import itertools
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch

START = time.perf_counter()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCHES = (1, 4, 16, 2, 8)
KERNELS = (3, 1)
SHAPES = (  # channels in and out, spatial size
    (128, 128, (256, 256)),
    (512, 512, (64, 64)),
    (128, 128, (5, 64, 64)),
    (512, 512, (64, 64)),
    (256, 256, (128, 128)),
    (512, 512, (5, 32, 32)),
    (256, 128, (256, 256)),
    (16, 512, (64, 64)),
    (128, 3, (256, 256)),
    (256, 256, (9, 64, 64)),
    (320, 320, (96, 96)),
    (1280, 640, (48, 48)),
    (3, 128, (512, 512)),
    (48, 128, (9, 64, 64)),
    (96, 96, (9, 96, 96)),
    (512, 512, (128, 128)),
    (128, 128, (512, 512)),
)
LARGE = ((128, 128, (1024, 1024)), (256, 256, (1024, 1024)), (512, 512, (512, 512)), (96, 96, (5, 352, 640)))  # batch 1


def plan():
    """Every case once: dtype, batch, channels, size, kernel, channels first, stride."""
    seen = set()
    cases = [(d, 1, *shape, 3, True, 1) for d in DTYPES for shape in LARGE]
    for shape, batch, dtype in itertools.product(SHAPES, BATCHES, DTYPES):
        cases.append((dtype, batch, *shape, 3, True, 1))
    for shape, batch, dtype in itertools.product(SHAPES[:7], (1, 4, 16), DTYPES):
        cases.append((dtype, batch, *shape, 1, True, 1))
        cases.append((dtype, batch, *shape, 3, False, 1))
        cases.append((dtype, batch, *shape, 3, True, 2))
    for case in cases:
        if case not in seen:
            seen.add(case)
            yield case


def beyond_the_result(run):
    """Bytes of the peak that are neither there before nor part of the result; of the second of two runs."""
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        output_bytes = result.nbytes
        del result
    return extra, output_bytes


def workspace_of(run):
    """Bytes that stay allocated after the first call, besides its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before - result.nbytes
    del result
    return kept


def device():
    """What the card and its libraries are, and take."""
    matrix = torch.zeros(512, 512, device="cuda", dtype=torch.bfloat16)
    cublas_bytes = workspace_of(partial(torch.mm, matrix, matrix))
    bias = torch.zeros(512, device="cuda", dtype=torch.bfloat16)
    cublaslt_bytes = workspace_of(partial(torch.nn.functional.linear, matrix, matrix, bias))
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return {
        "kind": "device",
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "total_memory_bytes": total_bytes,
        "cublas_bytes": cublas_bytes,
        "cublaslt_bytes": cublaslt_bytes,
        "context_bytes": total_bytes - free_bytes - torch.cuda.memory_reserved(),
    }


def convolution(dtype, batch, inside, outside, size, kernel, first, stride):
    """One convolution, and its workspace."""
    dims = len(size)
    source = torch.zeros(batch, inside, *size, device="cuda", dtype=dtype)
    if not first:
        source = source.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    weight = torch.zeros(outside, inside, *(kernel,) * dims, device="cuda", dtype=dtype)
    bias = torch.zeros(outside, device="cuda", dtype=dtype)
    convolve = torch.nn.functional.conv2d if dims == 2 else torch.nn.functional.conv3d
    run = partial(convolve, source, weight, bias, stride=stride, padding=kernel // 2)
    workspace_bytes, output_bytes = beyond_the_result(run)
    return {
        "kind": "convolution",
        "dims": dims,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "kernel": kernel,
        "stride": stride,
        "contiguous": first,
        "grouped": False,
        "input_shape": list(source.shape),
        "weight_shape": list(weight.shape),
        "input_bytes": math.prod(source.shape) * dtype.itemsize,
        "weight_bytes": weight.nbytes,
        "output_bytes": output_bytes,
        "workspace_bytes": workspace_bytes,
    }


@torch.no_grad()
def main(out, limit_s=110.0):
    """Measure until the time is over."""
    with Path(out).open("w", encoding="utf-8") as file:
        print(json.dumps(device()), file=file, flush=True)
        for count, case in enumerate(plan()):
            if time.perf_counter() - START > float(limit_s):
                break
            print(json.dumps(convolution(*case)), file=file, flush=True)
            if count % 20 == 0:
                torch.cuda.empty_cache()
    print(f"{count} convolutions in {time.perf_counter() - START:.0f} s: {out}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not torch.cuda.is_available():
        sys.exit(f"{__doc__}\nIt needs the name of a file, and a CUDA device.")
    main(*sys.argv[1:])
