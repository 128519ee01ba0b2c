"""``i2v-lab fit``: the largest request that a card takes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from i2v_lab.cli import options
from i2v_lab.cli.output import log, print_json, say
from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.request import I2VRequest, Variant
from i2v_lab.runs.spec import DEFAULT_STILL, FULL_SIZE_MODEL
from i2v_lab.units import GIB

if TYPE_CHECKING:
    from i2v_lab.profiling.records import Forecast

EXAMPLES = """
**Examples**

The largest 4:3 video of 97 frames, then the most frames at 1024x768, then the fastest tiling for both:

    i2v-lab fit --gpu "RTX 5090" --frames 97
    i2v-lab fit --gpu "RTX 5090" --width 1024 --height 768
    i2v-lab fit --gpu "RTX 5090" --width 1024 --height 768 --frames 97
"""


def fit(
    gpu: Annotated[str, typer.Option(help="A card of data/gpus.csv, or a size such as 24GiB.")],
    frames: Annotated[int | None, typer.Option(help="Frames. [default: searched for]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; with --height. [default: searched for]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; with --width. [default: searched for]")] = None,
    aspect: Annotated[str, typer.Option(help="Width to height, when searching for the size.")] = "4:3",
    fps: options.Fps = 24.0,
    model: options.Model = FULL_SIZE_MODEL,
    variant: options.VariantOption = Variant.DISTILLED,
    quantization: options.QuantizationOption = None,
    memory: options.MemoryOption = MemoryPolicy.RESIDENT,
    as_json: options.AsJson = False,
) -> None:
    """Search for the largest video that fits a card, over whichever is not given: size, frames or tiling.

    Without --width and --height the largest size; without --frames the most frames; with all three the fastest tiling.
    """
    from i2v_lab.capacity.fit import FitSearch
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.units import format_bytes

    if (width is None) != (height is None):
        raise InvalidRequest(
            f"width={width} and height={height} belong together; give both or neither", width=width, height=height
        )
    sides = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", aspect)
    if sides is None:
        raise InvalidRequest(f"aspect={aspect!r} is not two numbers; write it as 4:3", aspect=aspect)
    memory_bytes = _memory_bytes(gpu)
    # A dimension that is searched for starts at the default.
    request = options.build_request(
        load_architecture(model),
        (None,) * 4,
        no_tiling=False,
        image=DEFAULT_STILL,
        fps=fps,
        variant=variant,
        quantization=quantization,
        # A request that fits under any policy fits under the one with the smallest peak.
        memory=MemoryPolicy.STREAMED if memory is MemoryPolicy.AUTO else memory,
        frames=I2VRequest.frames if frames is None else frames,
        width=I2VRequest.width if width is None else width,
        height=I2VRequest.height if height is None else height,
    )

    def report(tried: I2VRequest, result: Forecast, verdict: str) -> None:
        log(f"{_described(tried)}: {format_bytes(result.peak.peak_bytes)} in {result.peak.phase}, {verdict}")

    search = FitSearch(memory_bytes, model, report)
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
        print_json({**answer, "at_the_bound": found.at_the_bound, "peak_bytes": peak.peak_bytes})
    elif found.request is None:
        say(
            f"nothing fits {gpu} ({format_bytes(memory_bytes)}): the smallest request takes "
            f"{format_bytes(peak.peak_bytes)} in {peak.phase}, and the CUDA context "
            f"{format_bytes(found.forecast.context_bytes)}"
        )
    else:
        more = "; the search ends there, more may fit" if found.at_the_bound else ""
        say(
            f"{_described(found.request)} fits {gpu} ({format_bytes(memory_bytes)}): "
            f"{format_bytes(peak.peak_bytes)} in {peak.phase}{more}"
        )


def _memory_bytes(gpu: str) -> int:
    from i2v_lab.capacity.cards import gpu_memory_bytes

    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?GiB", gpu)
    return int(float(size[1]) * GIB) if size else gpu_memory_bytes(gpu)


def _described(request: I2VRequest) -> str:
    tiling = request.tiling
    tiles = f"tiles of {tiling.tile_px} px x {tiling.tile_frames} frames" if tiling else "no tiling"
    return f"{request.width}x{request.height}, {request.frames} frames, {tiles}"
