"""What cuDNN, cuBLAS and the CUDA context take on this machine's GPU: what data/workspaces.json is fitted to.

Every convolution that the 22B pipeline runs, in the shapes of a dozen requests, is run alone; its workspace is the peak
beyond its output. Takes a few minutes. Afterwards: i2v-lab calibrate FILE.json

    python benchmarks/measure_libraries.py data/measured/libraries-MYGPU.json
"""

from __future__ import annotations

import json
import math
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx2.components import memoizable_modules
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.pipeline.ltx2.weights import skeleton_weights
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.fake.workspaces import Workspaces
from i2v_lab.request import I2VRequest, Tiling

STILL = Path(__file__).parents[1] / "data" / "stills" / "lighthouse.png"
REQUESTS: list[dict[str, Any]] = [
    *({"width": w, "height": h} for w, h in ((1024, 768), (1280, 768), (1536, 1152), (2048, 1536))),
    *({"width": 1024, "height": 768, "frames": frames} for frames in (49, 121)),
    {"width": 768, "height": 512, "frames": 25},
    {"width": 512, "height": 320, "frames": 33, "tiling": None},
    *({"width": 1024, "height": 768, "tiling": Tiling(*tile)} for tile in ((512, 64, 64, 24), (384, 64, 32, 8))),
    {"width": 768, "height": 1024, "frames": 57, "tiling": Tiling(256, 64, 24, 16)},
]


class Collector(Workspaces):
    """Takes note of every convolution of a forecast."""

    def transient(self, func: Any, args: tuple[Any, ...], result: Any) -> int:
        if func is torch.ops.aten.convolution.default:
            source, weight, bias, *rest = args
            seen.add((tuple(source.shape), source.is_contiguous(), tuple(weight.shape), bias is not None, repr(rest)))
        return 0


seen: set[tuple[Any, ...]] = set()


def collect() -> None:
    architecture = load_architecture("ltx-2.3-22b")
    weights = skeleton_weights(architecture)
    for values in tqdm(REQUESTS, desc="collecting shapes"):
        request = I2VRequest(image=str(STILL), **values)
        nothing = Collector(0, 0, 0, 0, 0)
        with forecasting("cuda", memoize=memoizable_modules(architecture), workspaces=nothing) as profiler:
            for _ in TwoStagePipeline(weights, "cuda", sinks=[profiler])(request).video:
                pass


def beyond_the_result(run: Any) -> int:
    """Bytes of the peak that are neither there before nor part of the result; of the second of two runs."""
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        held = torch.cuda.memory_allocated() - before
        del result
    return extra if held else 0


@torch.no_grad()
def measure(out: Path) -> None:
    matrix = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    product = matrix @ matrix
    torch.cuda.synchronize()
    cublas_bytes = torch.cuda.memory_allocated() - before - product.nbytes
    rows = []
    for shape, contiguous, weight_shape, has_bias, rest in tqdm(sorted(seen), desc="convolutions"):
        stride, padding, dilation, transposed, output_padding, groups = eval(rest)  # noqa: S307 - of our own repr
        source = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        if not contiguous:
            last = torch.channels_last if source.dim() == 4 else torch.channels_last_3d
            source = source.contiguous(memory_format=last)
        weight = torch.randn(weight_shape, device="cuda", dtype=torch.bfloat16)
        channels = weight_shape[1] * groups if transposed else weight_shape[0]
        bias = torch.randn(channels, device="cuda", dtype=torch.bfloat16) if has_bias else None
        more = (stride, padding, dilation, transposed, output_padding, groups)
        run = partial(torch.ops.aten.convolution, source, weight, bias, *more)
        workspace_bytes = beyond_the_result(run)
        output = run()
        rows.append(
            {
                "dims": len(weight_shape) - 2,
                "transposed": transposed,
                "grouped": groups > 1,
                "contiguous": contiguous,
                "input_shape": "x".join(map(str, shape)),
                "weight_shape": "x".join(map(str, weight_shape)),
                "input_bytes": math.prod(shape) * 2,
                "weight_bytes": math.prod(weight_shape) * 2,
                "output_bytes": output.nbytes,
                "workspace_bytes": workspace_bytes,
            }
        )
        del source, weight, bias, output, run
        torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    device = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "date": datetime.now(UTC).date().isoformat(),
        "total_memory_bytes": total_bytes,
        "cublas_bytes": cublas_bytes,
        "context_bytes": total_bytes - free_bytes - torch.cuda.memory_reserved(),
    }
    out.write_text(json.dumps(device, indent=1))
    pd.DataFrame(rows).to_csv(out.with_suffix(".csv"), index=False)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not torch.cuda.is_available():
        sys.exit(f"{__doc__}\nIt needs the name of a file, and a CUDA device.")
    collect()
    measure(Path(sys.argv[1]))
