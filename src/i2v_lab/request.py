"""What is asked of a pipeline: fields checked as far as no model is needed for it.

Which sizes a model takes is a rule of that model (:mod:`i2v_lab.pipeline.contract.sizes`).
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from i2v_lab.display import HtmlFields
from i2v_lab.errors import InvalidRequest, check_fields, neighbours, shown
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import NO_SETTINGS, MemorySettings
from i2v_lab.placement import Placement, placement_of


class Variant(StrEnum):
    """Which checkpoint and sampler: see ``docs/generate.md``.

    Example:
        >>> [variant.value for variant in Variant]
        ['distilled', 'dev']
    """

    DISTILLED = "distilled"
    DEV = "dev"


class Quantization(StrEnum):
    """How the transformer's weights are kept on the device.

    Example:
        >>> I2VRequest(image="still.png", quantization="bf16").quantization is Quantization.BF16
        True
    """

    FP8_CAST = "fp8-cast"
    BF16 = "bf16"


class DecodeScope(StrEnum):
    """In which grad mode the lazily decoded video is decoded.

    ``no_grad`` re-enters ``torch.no_grad()`` for every chunk, wherever the stream is consumed. ``escaped`` decodes in
    the consumer's own grad mode, which is the defect this package studies. ``inference_mode`` runs the pipeline inside
    ``torch.inference_mode()`` and decodes in the consumer's grad mode, which torch refuses.

    Example:
        >>> I2VRequest(image="still.png", decode_scope="escaped").decode_scope is DecodeScope.ESCAPED
        True
    """

    NO_GRAD = "no_grad"
    ESCAPED = "escaped"
    INFERENCE_MODE = "inference_mode"


CHOICES: dict[str, type[StrEnum]] = {
    "variant": Variant,
    "quantization": Quantization,
    "decode_scope": DecodeScope,
    "memory": MemoryPolicy,
}


MAX_SIDE = 2**20  # pixels
MAX_FRAMES = 2**20
MAX_STEPS = 10_000
MAX_TILE = 2**16  # pixels or frames


class VideoShape(NamedTuple):
    """A video in pixels.

    Attributes:
        frames: Number of frames.
        height: In pixels.
        width: In pixels.
    """

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Tiling(HtmlFields):
    """How the video decoder cuts its latent into overlapping tiles.

    Attributes:
        tile_px: Longer side of a tile, in pixels; at least 64, a multiple of 32.
        tile_overlap_px: Overlap of neighbours, in pixels; a multiple of 32, smaller than the tile.
        tile_frames: Frames in a tile; at least 16, a multiple of 8.
        tile_overlap_frames: Overlap of neighbours, in frames; a multiple of 8, smaller than the tile.

    Raises:
        InvalidRequest: Where ltx-core's ``SpatialTilingConfig`` or ``TemporalTilingConfig`` would refuse a value; and
            for a negative overlap, which they take and which leaves gaps between the tiles.

    Example:
        >>> Tiling(tile_px=512).tile_frames
        80
    """

    tile_px: int = 768
    tile_overlap_px: int = 64
    tile_frames: int = 80
    tile_overlap_frames: int = 24

    def __post_init__(self) -> None:
        _make_whole(self, "tile_px", "tile_overlap_px", "tile_frames", "tile_overlap_frames")
        _check_tile("tile_px", self.tile_px, "tile_overlap_px", self.tile_overlap_px, minimum=64, multiple=32)
        _check_tile(
            "tile_frames", self.tile_frames, "tile_overlap_frames", self.tile_overlap_frames, minimum=16, multiple=8
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tiling:
        """A tiling by its fields, of which those that are missing have their defaults.

        Raises:
            InvalidRequest: It is no mapping, or has an unknown field.
        """
        check_fields("tiling", values, [field.name for field in fields(cls)])
        return cls(**values)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name}={shown(value)} is not a text; put it in quotes", **{name: value})
    if name == "image":  # a path may have bytes that are no UTF-8
        if "\0" in value:
            raise InvalidRequest(f"{name}={shown(value)} has a null character; use another path", **{name: value})
        return
    try:
        value.encode()
    except UnicodeEncodeError:
        words = f"{name}={shown(value)} is not UTF-8; set a UTF-8 locale, or remove what is no character"
        raise InvalidRequest(words, **{name: value}) from None


def _check_tile(name: str, size: int, overlap_name: str, overlap: int, *, minimum: int, multiple: int) -> None:
    for each, value in ((name, size), (overlap_name, overlap)):
        if value > MAX_TILE:
            raise InvalidRequest(f"{each}={shown(value)} is above {MAX_TILE}; use that or less", **{each: value})
    if size < minimum:
        raise InvalidRequest(f"{name}={shown(size)} is below the smallest tile; use {minimum} or more", **{name: size})
    if size % multiple:
        raise InvalidRequest(
            f"{name}={size} is not a multiple of {multiple}; use {neighbours(size, multiple, minimum)}", **{name: size}
        )
    if overlap < 0:
        raise InvalidRequest(f"{overlap_name}={shown(overlap)} is negative; use 0 or more", **{overlap_name: overlap})
    if overlap >= size:
        raise InvalidRequest(
            f"{overlap_name}={overlap} is not smaller than {name}={size}; use {size - multiple} or less",
            **{name: size, overlap_name: overlap},
        )
    if overlap % multiple:
        remedy = neighbours(overlap, multiple, 0, maximum=size - multiple)
        raise InvalidRequest(
            f"{overlap_name}={overlap} is not a multiple of {multiple}; use {remedy}", **{overlap_name: overlap}
        )


def _make_whole(owner: Any, *names: str) -> None:
    """Turn what counts as an integer (numpy's, for instance) into one, and refuse what does not."""
    for name in names:
        value = getattr(owner, name)
        try:
            if type(value).__name__ in ("bool", "bool_"):  # Python's, numpy's
                raise TypeError
            object.__setattr__(owner, name, operator.index(value))
        except TypeError:
            raise InvalidRequest(f"{name}={shown(value)} is not a whole number; use one", **{name: value}) from None


@dataclass(frozen=True, kw_only=True)
class I2VRequest(HtmlFields):
    """One generation: a still and a prompt in, a video of the given size out.

    Attributes:
        image: Path of the still that becomes the first frame.
        prompt: What should happen.
        negative_prompt: What should not; used by the ``dev`` variant only.
        width: Pixels; which values a model takes is its own rule.
        height: Pixels, likewise.
        frames: Likewise.
        fps: Frames per second of the result.
        seed: For the noise; the same request gives the same video.
        variant: Sampler and checkpoint family.
        quantization: How the transformer is kept on the device.
        tiling: The decoder's tiles; ``None`` decodes in one piece.
        decode_scope: The grad mode of the decoding.
        memory: Which techniques lower the peak.
        settings: Memory settings of diffusers' pipelines; also as a mapping of their fields.
        steps: Of denoising; ``None`` for the model's own.
        placement: Stands in for the policy of ``memory``; also as a mapping of its fields.

    Raises:
        InvalidRequest: The first rule that is broken, with the value and the remedy.

    Example:
        >>> I2VRequest(image="still.png", width=1024, height=768, frames=97).shape
        VideoShape(frames=97, height=768, width=1024)
        >>> I2VRequest(image="still.png", frames=0)
        Traceback (most recent call last):
        ...
        i2v_lab.errors.InvalidRequest: frames=0 is not above 0; use 1 or more
    """

    image: str
    prompt: str = ""
    negative_prompt: str = ""
    width: int = 1024
    height: int = 768
    frames: int = 97
    fps: float = 24.0
    seed: int = 10
    variant: Variant = Variant.DISTILLED
    quantization: Quantization = Quantization.FP8_CAST
    tiling: Tiling | None = Tiling()
    decode_scope: DecodeScope = DecodeScope.NO_GRAD
    memory: MemoryPolicy = MemoryPolicy.RESIDENT
    settings: MemorySettings = NO_SETTINGS
    steps: int | None = None
    placement: Placement | None = None

    def __post_init__(self) -> None:
        _make_whole(self, "width", "height", "frames", "seed")
        for name, kind in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in list(kind):
                words = f"{name}={shown(value)} is unknown; use {' or '.join(kind)}"
                raise InvalidRequest(words, **{name: value})
            object.__setattr__(self, name, kind(value))
        if isinstance(self.image, os.PathLike):
            object.__setattr__(self, "image", os.fspath(self.image))
        for name in ("image", "prompt", "negative_prompt"):
            _check_text(name, getattr(self, name))
        if self.tiling is not None and not isinstance(self.tiling, Tiling):
            raise InvalidRequest(f"tiling={shown(self.tiling)} is not a Tiling; use one, or None", tiling=self.tiling)
        settings: Any = self.settings
        if not isinstance(settings, MemorySettings):
            object.__setattr__(self, "settings", MemorySettings.from_json(settings))
        placement: Any = self.placement
        if placement is not None:
            if not isinstance(placement, Placement):
                object.__setattr__(self, "placement", Placement.from_json(placement))
            if self.memory is not MemoryPolicy.RESIDENT:
                raise InvalidRequest(
                    f"memory={self.memory.value!r} and a placement exclude each other; give one of them",
                    memory=self.memory.value,
                    placement=self.placement and self.placement.to_json(),
                )
        if self.steps is not None:
            _make_whole(self, "steps")
            if not 1 <= self.steps <= MAX_STEPS:
                words = f"steps={shown(self.steps)} is not between 1 and {MAX_STEPS}; use a number such as 40"
                raise InvalidRequest(words, steps=self.steps)
        for name, most in {"width": MAX_SIDE, "height": MAX_SIDE, "frames": MAX_FRAMES}.items():
            value = getattr(self, name)
            if value < 1:
                raise InvalidRequest(f"{name}={shown(value)} is not above 0; use 1 or more", **{name: value})
            if value > most:
                raise InvalidRequest(f"{name}={shown(value)} is above {most}; use that or less", **{name: value})
        try:
            fps: Any = self.fps
            if isinstance(fps, bool) or not isinstance(fps, Real):
                raise TypeError
            object.__setattr__(self, "fps", float(fps))  # 24 and 24.0 are one request, with one digest
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequest(f"fps={shown(self.fps)} is not a number; use 24 or 25", fps=self.fps) from None
        if not 1 <= self.fps <= 240:  # nor is NaN
            raise InvalidRequest(f"fps={self.fps} is not between 1 and 240; use 24 or 25", fps=self.fps)
        if not 0 <= self.seed < 2**63:
            raise InvalidRequest(
                f"seed={shown(self.seed)} is not between 0 and 2**63-1; use a number such as 10", seed=self.seed
            )

    @property
    def shape(self) -> VideoShape:
        """The finished video in pixels."""
        return VideoShape(self.frames, self.height, self.width)

    @property
    def placed(self) -> Placement:
        """Its placement, or that of its memory policy, which must be resolved."""
        return self.placement or placement_of(self.memory)

    @property
    def frame_rate(self) -> Fraction:
        """``fps`` as the exact ratio that a container stores (29.97 becomes 30000/1001)."""
        if self.fps.is_integer():
            return Fraction(int(self.fps))
        ntsc = Fraction(round(self.fps * 1001 / 1000) * 1000, 1001)
        return ntsc if abs(float(ntsc) - self.fps) < 5e-3 else Fraction(self.fps).limit_denominator(1000)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; :meth:`from_json` reads them back."""
        placement = self.placement.to_json() if self.placement is not None else None
        return {**asdict(self), "settings": self.settings.to_json(), "placement": placement}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> I2VRequest:
        """Build a request from what :meth:`to_json` returned.

        Raises:
            InvalidRequest: It is no mapping, has no image, or breaks a rule.
        """
        if not isinstance(values, Mapping):
            raise InvalidRequest(f"a request of {shown(values)} is not a mapping; give its fields", request=values)
        known = {f.name for f in fields(cls)}
        converted: dict[str, Any] = {name: value for name, value in values.items() if name in known}
        if "image" not in converted:
            raise InvalidRequest("image is missing; give the path of a still", image=None)
        if converted.get("tiling") is not None:
            converted["tiling"] = Tiling.from_json(converted["tiling"])
        return cls(**converted)

    def digest(self) -> str:
        """A hash of everything that shapes the result, stable over machines: the still counts by its content."""
        values = self.to_json()
        if self.memory is MemoryPolicy.RESIDENT:
            del values["memory"]  # so that a request from before there were policies keeps its digest
        if self.settings.is_default:
            del values["settings"]
        if self.steps is None:
            del values["steps"]
        if self.placement is None:
            del values["placement"]
        still = Path(self.image)
        values["image"] = hashlib.sha256(still.read_bytes()).hexdigest() if still.is_file() else Path(self.image).name
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
