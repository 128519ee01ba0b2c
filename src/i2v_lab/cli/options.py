"""Options that several commands share, and the request that they make up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import NOT_QUANTIZATIONS, QUANTIZATIONS, MemorySettings, Offload, TransformerQuantization
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.registry import check_request, runner_of
from i2v_lab.request import DecodeScope, I2VRequest, Quantization, Tiling, Variant
from i2v_lab.units import GIB

Prompt = Annotated[str, typer.Option(help="Description of the video.")]
NegativePrompt = Annotated[str, typer.Option(help="Description of what to avoid (dev variant, and diffusers' models).")]
Width = Annotated[int | None, typer.Option(help="Pixels, by the model's size rule. [default: the model's]")]
Height = Annotated[int | None, typer.Option(help="Pixels, by the model's size rule. [default: the model's]")]
Frames = Annotated[int | None, typer.Option(help="Frames, by the model's size rule. [default: the model's]")]
Fps = Annotated[float | None, typer.Option(help="Frames per second. [default: the model's, or 24]")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Model = Annotated[str, typer.Option(help="Name of an architecture in data/architectures.")]
VariantOption = Annotated[Variant, typer.Option(help="Sampler of the model.")]
QuantizationOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Quantization of the transformer: {' or '.join(Quantization)}; of diffusers' models "
        f"{', '.join(QUANTIZATIONS)}. [default: the model's]",
    ),
]
TilePx = Annotated[int | None, typer.Option(help="Longer side of a VAE decoder tile, pixels. [default: 768]")]
TileOverlapPx = Annotated[int | None, typer.Option(help="Spatial overlap of tiles, pixels. [default: 64]")]
TileFrames = Annotated[int | None, typer.Option(help="Length of a VAE decoder tile, frames. [default: 80]")]
TileOverlapFrames = Annotated[int | None, typer.Option(help="Temporal overlap of tiles, frames. [default: 24]")]
NoTiling = Annotated[bool, typer.Option("--no-tiling", help="Decode without tiles.")]
DecodeScopeOption = Annotated[DecodeScope, typer.Option(help="Grad mode while the video is decoded.")]
MemoryOption = Annotated[MemoryPolicy, typer.Option(help="Memory policy; auto: the fastest whose forecast fits.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps (diffusers' models). [default: the model's]")]
OffloadOption = Annotated[
    Offload, typer.Option(help="What waits on the CPU (diffusers' models).", rich_help_panel="Memory settings")
]
OffloadStream = Annotated[
    bool,
    typer.Option(
        "--offload-stream", help="Copy the next group on a CUDA stream meanwhile.", rich_help_panel="Memory settings"
    ),
]
OffloadBlocks = Annotated[
    int, typer.Option(help="Blocks in a group, for group-block.", rich_help_panel="Memory settings")
]
VaeTiling = Annotated[
    bool, typer.Option("--vae-tiling", help="Let the autoencoder tile.", rich_help_panel="Memory settings")
]
VaeTile = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="An argument of its enable_tiling, such as tile_sample_min_height=256; repeatable.",
        rich_help_panel="Memory settings",
    ),
]
VaeSlicing = Annotated[
    bool, typer.Option("--vae-slicing", help="Let the autoencoder slice a batch.", rich_help_panel="Memory settings")
]
LayerwiseCasting = Annotated[
    bool,
    typer.Option(
        "--layerwise-casting",
        help="Keep the transformer in float8, cast layer by layer.",
        rich_help_panel="Memory settings",
    ),
]
DtypeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype",
        metavar="COMPONENT=DTYPE",
        help="Of a component's weights, such as vae=float32; 'default' stands for all others; repeatable.",
        rich_help_panel="Memory settings",
    ),
]
VramCapGib = Annotated[float | None, typer.Option(help="Limit memory to that of a card of this size, GiB.")]
MAX_CAP_GIB = 2**20
Workers = Annotated[
    str | None,
    typer.Option(
        metavar="auto|N",
        help="Workers side by side; auto: one for each card, or for each core where no card is used. [default: 1]",
    ),
]
Cluster = Annotated[
    Path | None,
    typer.Option(metavar="YAML", help="A Slurm cluster in Dask's own configuration; each worker is a job of it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]


def as_text(words: str, name: str) -> str:
    """Text of the command line as UTF-8, whatever the locale: under ``LC_ALL=C`` Python takes it for ASCII.

    Args:
        words: As Python decoded it.
        name: The option's, for the error.

    Raises:
        InvalidRequest: It is not UTF-8.
    """
    try:
        return os.fsencode(words).decode("utf-8")
    except UnicodeError:
        raise InvalidRequest(f"{name}={words!r} is not UTF-8 text; encode it as UTF-8", **{name: words}) from None


def cap_bytes(vram_cap_gib: float | None) -> int | None:
    """A memory limit in bytes.

    Raises:
        InvalidRequest: It is not a number above 0 that a device could have.
    """
    if vram_cap_gib is None:
        return None
    if not (0 < vram_cap_gib <= MAX_CAP_GIB and int(vram_cap_gib * GIB)):
        raise InvalidRequest(
            f"vram_cap_gib={vram_cap_gib} is {'above' if vram_cap_gib > MAX_CAP_GIB else 'not above'} "
            f"{MAX_CAP_GIB if vram_cap_gib > MAX_CAP_GIB else 0}; use the card's GiB",
            vram_cap_gib=vram_cap_gib,
        )
    return int(vram_cap_gib * GIB)


def memory_settings(
    offload: Offload = Offload.NONE,
    *,
    offload_stream: bool = False,
    offload_blocks: int = 1,
    vae_tiling: bool = False,
    vae_tile: Sequence[str] | None = None,
    vae_slicing: bool = False,
    layerwise_casting: bool = False,
    dtype: Sequence[str] | None = None,
    quantization: str | None = None,
) -> MemorySettings:
    """The memory settings of a command line; a tile's size alone turns tiling on.

    A quantization of this package's own models is none of them: see :func:`build_request`.

    Raises:
        InvalidRequest: A pair is not ``NAME=VALUE``, or a value is unknown.
    """
    own = list(Quantization)
    if quantization and quantization not in (*own, *TransformerQuantization, *NOT_QUANTIZATIONS):
        known = ", ".join(QUANTIZATIONS)
        words = f"quantization={quantization!r} is unknown; use {' or '.join(own)}, or for diffusers' models {known}"
        raise InvalidRequest(words, quantization=quantization)
    tile: dict[str, Any] = {}
    for name, text in _named("vae_tile", vae_tile).items():
        try:
            tile[name] = float(text) if "." in text else int(text)
        except ValueError:
            raise InvalidRequest(f"vae_tile: {name}={text!r} is not a number; use one", **{name: text}) from None
    return MemorySettings.from_json(
        {
            "offload": offload,
            "offload_stream": offload_stream,
            "offload_blocks": offload_blocks,
            "vae_tiling": vae_tiling or bool(tile),
            "vae_tile": tile,
            "vae_slicing": vae_slicing,
            "layerwise_casting": layerwise_casting,
            "dtypes": _named("dtype", dtype),
            "quantization": quantization if quantization and quantization not in own else "none",
        }
    )


def _named(option: str, pairs: Sequence[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or ():
        name, separator, value = pair.partition("=")
        if not (name and separator and value):
            words = f"{option}={pair!r} is not a name and a value; write it as NAME=VALUE"
            raise InvalidRequest(words, **{option: pair})
        found[name] = value
    return found


def build_request(
    architecture: Architecture, tile: tuple[int | None, ...], no_tiling: bool, **values: Any
) -> I2VRequest:
    """Build the request of a command line from options and the defaults of the architecture.

    Args:
        architecture: Gives the default of every option that is ``None``, and the runner, whose package is checked.
        tile: ``tile_px, tile_overlap_px, tile_frames, tile_overlap_frames``.
        no_tiling: Ignore ``tile`` and decode without tiles.
        **values: Other fields of the request; ``None`` stands for the default.

    Raises:
        InvalidRequest: A rule of the model is broken.
        RunnerUnavailable: The model's package is not installed.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("quantization") not in list(Quantization):  # but one of the memory settings
        given.pop("quantization", None)
    given |= {name: as_text(given[name], name) for name in ("prompt", "negative_prompt") if name in given}
    names = ("tile_px", "tile_overlap_px", "tile_frames", "tile_overlap_frames")
    tiles = {name: value for name, value in zip(names, tile, strict=True) if value is not None}
    tiling = architecture.request.get("tiling", Tiling())
    if no_tiling:
        tiling = None
    elif tiles:
        tiling = replace(tiling or Tiling(), **tiles)
    request = I2VRequest(**{**architecture.request, **given, "tiling": tiling})
    check_request(architecture, request)
    runner_of(architecture).require_package(architecture)
    return request
