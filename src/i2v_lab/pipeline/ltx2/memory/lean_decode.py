"""The tiled decode without full-frame copies: ltx-core's tiles and decoder, blended in place.

ltx-core keeps two groups of tiles that follow each other in time, each with a buffer of blending weights as large as
its frames, and divides them into a third. Here there is one buffer; of the group before, only the frames that overlap
are kept; weights are made from their one-dimensional factors for a few frames at a time; and frames are handed on as
soon as no later tile touches them. Roundings are ltx-core's, so frames are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from ltx_core.loader.module_ops import ModuleOps
from ltx_core.model.common.normalization import PixelNorm
from ltx_core.model.video_vae import TilingConfig, VideoDecoder
from ltx_core.model.video_vae.resnet import ResnetBlock3D
from ltx_core.types import VideoLatentShape

SLAB_FRAMES = 8  # blended and converted at a time
BAND_BYTES = 192 * 2**20  # of a residual block's input that is worked on at a time
HALO_ROWS = 2  # by which two convolutions of 3 rows each look beyond a band


class LeanResnetBlock(ResnetBlock3D):
    """ltx-core's residual block, by bands of rows; its input becomes its output, in place.

    Rows at a band's edge are computed twice, a tenth of the work or less, so that none of a whole tile's intermediate
    results, nor cuDNN's copies of them, need to exist at once.
    """

    def forward(
        self,
        input_tensor: torch.Tensor,
        causal: bool = True,
        timestep: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """As ltx-core's own ``forward``, which it is for a small input and where a graph is to be kept."""
        bands = -(-input_tensor.nbytes // BAND_BYTES)
        plain = self.in_channels == self.out_channels and not self.inject_noise and not self.timestep_conditioning
        if bands == 1 or torch.is_grad_enabled() or not plain or not isinstance(self.norm1, PixelNorm):
            return super().forward(input_tensor, causal, timestep, generator)
        height = input_tensor.shape[3]
        rows = max(2 * HALO_ROWS, -(-height // bands))
        above = input_tensor[:, :, :, :0]  # the rows above the band, as they were
        for first in range(0, height, rows):
            last = min(first + rows, height)
            below = min(last + HALO_ROWS, height)
            source = torch.cat([above, input_tensor[:, :, :, first:below]], dim=3)
            at = above.shape[3]
            above = input_tensor[:, :, :, last - HALO_ROWS : last].clone()
            # Where a band ends within the picture, a convolution's padding makes its outermost row wrong.
            hidden = self.conv1(self.non_linearity(self.norm1(source)), causal=causal)
            del source
            hidden = self.conv2(self.non_linearity(self.norm2(hidden)), causal=causal)
            input_tensor[:, :, :, first:last] += hidden[:, :, :, at : at + last - first]
            del hidden
        return input_tensor


def _make_lean(decoder: Any) -> Any:
    for module in decoder.modules():
        if type(module) is ResnetBlock3D:
            module.__class__ = LeanResnetBlock
    return decoder


ROW_BANDS = ModuleOps(name="row_bands", matcher=lambda module: isinstance(module, VideoDecoder), mutator=_make_lean)


def decode_video(
    latent: torch.Tensor, decoder: VideoDecoder, tiling: TilingConfig | None, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """The video latent ``(1, 128, F', H', W')`` to chunks ``(F, H, W, 3)`` uint8, as many as ltx-core's own decode."""
    if tiling is None:
        yield _as_uint8(decoder(latent, generator=generator))
        return
    shape = VideoLatentShape.from_torch_shape(latent.shape).upscale(decoder.video_downscale_factors)
    groups = decoder._group_tiles_by_temporal_slice(decoder._prepare_tiles(latent, tiling))
    spans = [group[0].out_coords[2] for group in groups]
    overlapping: list[tuple[int, Sequence[Any]]] = []  # groups that still touch the frames ahead, with their start
    carried = None  # the sums of those groups, for the frames that the next one touches too
    for group, (span, following) in zip(groups, pairwise([*spans, None]), strict=True):
        frames = span.stop - span.start
        sums = torch.zeros(shape._replace(frames=frames).to_torch_shape(), dtype=latent.dtype, device=latent.device)
        for tile in group:
            _add_tile(sums, decoder(latent[tile.in_coords], generator=generator), tile)
        if carried is not None:
            sums[:, :, : carried.shape[2]] += carried
            carried = None
        overlapping = [(start, tiles) for start, tiles in overlapping if tiles[0].out_coords[2].stop > span.start]
        overlapping.append((span.start, group))
        finished = min(frames, following.start - span.start) if following is not None else frames
        chunk = _finish(sums, finished, span.start, overlapping)
        if finished < frames:
            carried = sums[:, :, finished:].clone()
        del sums
        yield chunk
        del chunk


def _add_tile(sums: torch.Tensor, decoded: torch.Tensor, tile: Any) -> None:
    """Add a decoded tile, weighted, to the frames of its group."""
    mask = _Mask(tile, sums.device, sums.dtype)
    frames = min(sums.shape[2], decoded.shape[2])
    for first in range(0, frames, SLAB_FRAMES):
        slab = slice(first, min(first + SLAB_FRAMES, frames))
        sums[:, :, slab, mask.rows, mask.columns] += decoded[:, :, slab] * mask.of(slab)


def _finish(sums: torch.Tensor, frames: int, start: int, overlapping: list[tuple[int, Sequence[Any]]]) -> torch.Tensor:
    """The first ``frames`` of ``sums``, which begins at frame ``start`` of the video, divided by their weights."""
    _, channels, _, height, width = sums.shape
    finished = torch.empty(frames, height, width, channels, dtype=torch.uint8, device=sums.device)
    groups = [(start - begin, [_Mask(tile, sums.device, sums.dtype) for tile in tiles]) for begin, tiles in overlapping]
    for first in range(0, frames, SLAB_FRAMES):
        slab = slice(first, min(first + SLAB_FRAMES, frames))
        weights = sums.new_zeros(slab.stop - slab.start, height, width)
        for offset, masks in groups:
            own = torch.zeros_like(weights)
            for mask in masks:
                part = mask.of(slice(slab.start + offset, slab.stop + offset))
                own[: part.shape[0], mask.rows, mask.columns] += part
            weights += own
        finished[slab] = _as_uint8(sums[:, :, slab] / weights.clamp(min=1e-8))
    return finished


class _Mask:
    """A tile's blending weights by their factors along time, height and width."""

    def __init__(self, tile: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.rows, self.columns = tile.out_coords[3], tile.out_coords[4]
        self._time, self._height, self._width = (mask.to(device) for mask in tile.masks_1d[2:])
        self._dtype = dtype

    def of(self, frames: slice) -> torch.Tensor:
        """The weights ``(F, H, W)`` of some of the tile's frames; fewer where it ends before."""
        time = self._time[frames, None, None]
        return (time * self._height[:, None] * self._width).to(self._dtype)


def _as_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames ``(1, 3, F, H, W)`` in [-1, 1] to ``(F, H, W, 3)`` in [0, 255]."""
    return (((frames + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0).to(torch.uint8)[0].permute(1, 2, 3, 0)
