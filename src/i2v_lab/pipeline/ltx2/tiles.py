"""LTX-2's sizes and tiles: the two stages, the latent grid, and how the video decoder cuts it. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from i2v_lab.pipeline.contract.sizes import SizeRule
from i2v_lab.request import I2VRequest, VideoShape

STAGE_2_FACTOR = 2  # stage 1 runs at half the width and height
# Scales: ltx_core.types.VIDEO_SCALE_FACTORS.
SIZES = SizeRule(pixel_multiple=32 * STAGE_2_FACTOR, min_pixels=64, frame_step=8, spatial_scale=32, temporal_scale=8)
Interval = tuple[int, int]


def stage_shape(request: I2VRequest, stage: int) -> VideoShape:
    """The video in pixels as stage 1 (half width and height) or stage 2 (full size) processes it.

    Example:
        >>> stage_shape(I2VRequest(image="still.png", width=1024, height=768), 1)
        VideoShape(frames=97, height=384, width=512)
    """
    factor = STAGE_2_FACTOR if stage == 1 else 1
    return VideoShape(request.frames, request.height // factor, request.width // factor)


def chunk_count(request: I2VRequest) -> int:
    """How many chunks the decoder yields: one for each temporal tile, one without tiling.

    Tiles of ``s`` latent frames overlapping by ``o`` cover ``n`` latent frames in ``ceil((n - o) / (s - o))`` steps.
    Source: ``split_with_symmetric_overlaps`` in ltx-core (its own ``get_video_chunks_number`` counts one too many where
    the video fits in a single tile).

    Example:
        >>> chunk_count(I2VRequest(image="still.png", frames=97))
        2
    """
    if request.tiling is None:
        return 1
    latent_frames = SIZES.latent(request.shape).frames
    size = request.tiling.tile_frames // SIZES.temporal_scale
    overlap = request.tiling.tile_overlap_frames // SIZES.temporal_scale
    return 1 if latent_frames <= size else math.ceil((latent_frames - overlap) / (size - overlap))


@dataclass(frozen=True)
class TileGrid:
    """Where a decoder's tiles lie in the video.

    Attributes:
        rows: ``(start, stop)`` of each row of tiles, in pixels.
        columns: The same of each column.
        groups: The same of each temporal group, in frames; groups are decoded one after another.
    """

    rows: tuple[Interval, ...]
    columns: tuple[Interval, ...]
    groups: tuple[Interval, ...]

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.rows) * len(self.columns) * len(self.groups)

    @property
    def voxels(self) -> int:
        """Pixels times frames decoded, overlaps counted as often as they are decoded."""
        lengths = [sum(stop - start for start, stop in axis) for axis in (self.rows, self.columns, self.groups)]
        return lengths[0] * lengths[1] * lengths[2]


def tile_grid(request: I2VRequest) -> TileGrid:
    """Where the decoder's tiles lie.

    The arithmetic is that of ltx-core 1.0.0 (``VideoDecoder._prepare_tiles``): the tile's longer side is scaled along
    the shorter axis, the last tile takes the rest, and temporal tiles but the first start one latent frame earlier,
    since the first latent frame of a tile decodes to one frame only.

    Example:
        >>> request = I2VRequest(image="still.png", width=1024, height=768, frames=97)
        >>> grid = tile_grid(request)
        >>> grid.columns, grid.groups
        (((0, 768), (704, 1024)), ((0, 73), (48, 97)))
    """
    latent, tiling = SIZES.latent(request.shape), request.tiling
    spatial, temporal = SIZES.spatial_scale, SIZES.temporal_scale
    if tiling is None:
        return TileGrid(((0, request.height),), ((0, request.width),), ((0, request.frames),))
    size, overlap = tiling.tile_px // spatial, tiling.tile_overlap_px // spatial
    axes = []
    for length in (latent.height, latent.width):
        scaled = max(2, overlap + 1, round(size * length / max(latent.height, latent.width)))
        tiles = _split(length, scaled, overlap)
        axes.append(tuple((start * spatial, stop * spatial) for start, stop in tiles))
    size, overlap = tiling.tile_frames // temporal, tiling.tile_overlap_frames // temporal
    latent_groups = _split(latent.frames, size, overlap)
    groups = tuple((max(0, start - 1) * temporal, 1 + (stop - 1) * temporal) for start, stop in latent_groups)
    return TileGrid(axes[0], axes[1], groups)


def _split(length: int, size: int, overlap: int) -> list[Interval]:
    if length <= size:
        return [(0, length)]
    count = (length + size - 2 * overlap - 1) // (size - overlap)
    starts = [index * (size - overlap) for index in range(count)]
    return [(start, start + size) for start in starts[:-1]] + [(starts[-1], length)]
