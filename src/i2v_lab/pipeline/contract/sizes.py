"""Which video sizes a model takes, and the latent grid that follows from one: data of its runner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from i2v_lab.errors import InvalidRequest, neighbours
from i2v_lab.request import MAX_FRAMES, MAX_SIDE, I2VRequest, VideoShape

NORM_GROUPS = 32  # of the latent upsamplers of LTX-2 and LTX-Video


class LatentShape(NamedTuple):
    """A video latent's grid.

    Attributes:
        frames: Latent frames.
        height: Latent rows.
        width: Latent columns.
    """

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Positions, which is the transformer's sequence length at patch size 1."""
        return self.frames * self.height * self.width


@dataclass(frozen=True, kw_only=True)
class SizeRule:
    """The sizes that a runner's models take.

    Attributes:
        pixel_multiple: Width and height are multiples of this.
        min_pixels: The smallest width and height.
        frame_step: The number of frames is ``frame_step * k + 1``.
        spatial_scale: Pixels for one latent row or column.
        temporal_scale: Frames for one latent frame after the first, which the autoencoder treats causally.
        max_pixels: The largest width and height: positions beyond it are none that the model has.
        min_frames: The smallest number of frames.
        max_frames: The largest.
        section_frames: Frames to ask the pipeline for in place of each ``frame_step``; 0 where it makes as many as are
            asked for.
        only: The sizes that there are, as ``(width, height)``, where they are few; none for all multiples.

    Example:
        >>> rule = SizeRule(pixel_multiple=64, min_pixels=64, frame_step=8, spatial_scale=32, temporal_scale=8)
        >>> rule.latent(VideoShape(97, 384, 512)).tokens
        2496
        >>> rule.check(I2VRequest(image="still.png", height=500))
        Traceback (most recent call last):
        ...
        i2v_lab.errors.InvalidRequest: height=500 is not a multiple of 64; use 448 or 512
    """

    pixel_multiple: int
    min_pixels: int
    frame_step: int
    spatial_scale: int
    temporal_scale: int
    only: tuple[tuple[int, int], ...] = ()
    section_frames: int = 0
    max_pixels: int = MAX_SIDE
    min_frames: int = 1
    max_frames: int = MAX_FRAMES

    def asked_frames(self, frames: int) -> int:
        """The number of frames to ask the pipeline for, so that it makes ``frames``."""
        return (frames - 1) // self.frame_step * self.section_frames if self.section_frames else frames

    def check(self, request: I2VRequest) -> None:
        """Refuse a size that is not allowed.

        Raises:
            InvalidRequest: With the value and its nearest neighbours that are allowed.
        """
        if self.only and (request.width, request.height) not in self.only:
            near = sorted(self.only, key=lambda size: abs(size[0] - request.width) + abs(size[1] - request.height))
            raise InvalidRequest(
                f"{request.width}x{request.height} is none of the model's sizes; use "
                f"{' or '.join(f'{width}x{height}' for width, height in near[:3])}",
                width=request.width,
                height=request.height,
            )
        for name in ("width", "height"):
            value, multiple = getattr(request, name), self.pixel_multiple
            if value % multiple:
                remedy = neighbours(value, multiple, self.min_pixels) or self.min_pixels
                raise InvalidRequest(f"{name}={value} is not a multiple of {multiple}; use {remedy}", **{name: value})
            _check_bounds(name, value, self.min_pixels, self.max_pixels)
        if (request.frames - 1) % self.frame_step:
            remedy = neighbours(request.frames, self.frame_step, self.min_frames, offset=1) or self.min_frames
            raise InvalidRequest(
                f"frames={request.frames} is not {self.frame_step}k+1; use {remedy}", frames=request.frames
            )
        _check_bounds("frames", request.frames, self.min_frames, self.max_frames)

    def check_normalized(self, request: I2VRequest, channels: int, model: str) -> None:
        """Refuse a video whose latent at half size is one value in each group that a latent upsampler normalizes.

        Args:
            request: For the size.
            channels: Of the upsampler, which are normalized in 32 groups.
            model: The architecture's name.

        Raises:
            InvalidRequest: With the number of frames; only a model of few channels has such a video.
        """
        half = VideoShape(request.frames, request.height // 2, request.width // 2)
        if channels // NORM_GROUPS * self.latent(half).tokens == 1:
            raise InvalidRequest(
                f"frames={request.frames} at {request.width}x{request.height} is a single latent position, which the "
                f"upsampler of model={model!r} cannot normalize; use {1 + self.frame_step} frames or more",
                frames=request.frames,
            )

    def latent(self, shape: VideoShape) -> LatentShape:
        """The latent grid: a causal first frame, then one position for each ``temporal_scale`` frames.

        Source: ``VideoLatentShape.from_pixel_shape`` in ltx-core.
        """
        return LatentShape(
            frames=(shape.frames - 1) // self.temporal_scale + 1,
            height=shape.height // self.spatial_scale,
            width=shape.width // self.spatial_scale,
        )

    def sizes(self, aspect: tuple[int, int], max_height: int) -> Iterator[tuple[int, int]]:
        """Every allowed height up to a limit with its width at an aspect ratio, as ``(width, height)``.

        Where there are few sizes, those up to the limit by their pixels, whatever their aspect ratio.
        """
        if self.only:
            yield from sorted((size for size in self.only if size[1] <= max_height), key=lambda size: size[0] * size[1])
            return
        for height in range(self.min_pixels, min(max_height, self.max_pixels) + 1, self.pixel_multiple):
            steps = round(Fraction(height * aspect[0], aspect[1] * self.pixel_multiple))
            width = max(self.min_pixels, steps * self.pixel_multiple)
            if width <= self.max_pixels or height == self.min_pixels:
                yield width, height

    def frame_counts(self, max_frames: int) -> range:
        """Every allowed number of frames up to a limit."""
        return range(self.min_frames, min(max_frames, self.max_frames) + 1, self.frame_step)


def _check_bounds(name: str, value: int, least: int, most: int) -> None:
    if value < least:
        raise InvalidRequest(f"{name}={value} is below {least}; use that or more", **{name: value})
    if value > most:
        raise InvalidRequest(f"{name}={value} is above {most}; use that or less", **{name: value})
