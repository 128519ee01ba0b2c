"""The options of a request, as every command that takes one spells them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.registry import check_request, runner_of
from i2v_lab.request import DecodeScope, I2VRequest, Quantization, Tiling, Variant

Prompt = Annotated[str, typer.Option(help="What should happen.")]
NegativePrompt = Annotated[str, typer.Option(help="What should not (dev variant).")]
Width = Annotated[
    int | None, typer.Option(help="Pixels, a multiple of 64; of 32 for LTX-Video. [default: the model's]")
]
Height = Annotated[int | None, typer.Option(help="Pixels, likewise. [default: the model's]")]
Frames = Annotated[int | None, typer.Option(help="8k+1. [default: the model's]")]
Fps = Annotated[float, typer.Option(help="Frames per second.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Model = Annotated[str, typer.Option(help="An architecture of data/architectures.")]
VariantOption = Annotated[Variant, typer.Option(help="Sampler: 8+3 steps, or guided then 3.")]
QuantizationOption = Annotated[Quantization | None, typer.Option(help="Of the transformer. [default: the model's]")]
TilePx = Annotated[int | None, typer.Option(help="Decoder tile, longer side. [default: 768]")]
TileOverlapPx = Annotated[int | None, typer.Option(help="Overlap of tiles, pixels. [default: 64]")]
TileFrames = Annotated[int | None, typer.Option(help="Decoder tile, frames. [default: 80]")]
TileOverlapFrames = Annotated[int | None, typer.Option(help="Overlap of tiles, frames. [default: 24]")]
NoTiling = Annotated[bool, typer.Option("--no-tiling", help="Decode in one piece.")]
DecodeScopeOption = Annotated[DecodeScope, typer.Option(help="Grad mode of the decoding.")]
MemoryOption = Annotated[
    MemoryPolicy, typer.Option(help="What is held at a time; auto: the fastest that fits by the forecast.")
]
VramCapGib = Annotated[float | None, typer.Option(help="Pretend to a card of this size, in GiB.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def check_cap(vram_cap_gib: float | None) -> None:
    """Refuse a cap that no card can have.

    Raises:
        InvalidRequest: It is not above 0.
    """
    if vram_cap_gib is not None and not vram_cap_gib > 0:
        raise InvalidRequest(
            f"vram_cap_gib={vram_cap_gib} is not above 0; use the card's GiB", vram_cap_gib=vram_cap_gib
        )


def resolved(request: I2VRequest, model: str, memory_bytes: int, device: str = "cuda") -> I2VRequest:
    """A request with ``memory=auto`` as the fastest policy that fits; the choice and its reason go to stderr."""
    if request.memory is not MemoryPolicy.AUTO:
        return request
    from i2v_lab.capacity.placement import resolve_memory

    resolution = resolve_memory(request, memory_bytes, model, device)
    print(f"i2v-lab: {resolution.reason}", file=sys.stderr)
    return resolution.request


def build_request(
    architecture: Architecture, tile: tuple[int | None, ...], no_tiling: bool, **asked: Any
) -> I2VRequest:
    """The request of a command line.

    Args:
        architecture: Has what to use where nothing is asked for, and a backend, which must be there.
        tile: ``tile_px, tile_overlap_px, tile_frames, tile_overlap_frames``.
        no_tiling: Disregard ``tile``.
        **asked: Everything else, ``None`` where nothing is asked for.

    Raises:
        InvalidRequest: A rule is broken.
        RunnerUnavailable: The model's package is not installed.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    names = ("tile_px", "tile_overlap_px", "tile_frames", "tile_overlap_frames")
    tiles = {name: value for name, value in zip(names, tile, strict=True) if value is not None}
    untiled = no_tiling or (not tiles and "tiling" in architecture.request)
    request = I2VRequest(**{**architecture.request, **given, "tiling": None if untiled else Tiling(**tiles)})
    check_request(architecture, request)
    runner_of(architecture).require_package()
    return request
