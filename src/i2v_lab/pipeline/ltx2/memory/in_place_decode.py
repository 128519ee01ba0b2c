"""The tiled video decode with one frame buffer: ltx-core's tiles and decoder, blended in place.

ltx-core holds two consecutive temporal groups of tiles, each with a buffer of blending weights as large as its frames,
and divides them into a third buffer. Here one buffer holds the sums; of the preceding group only the overlapping frames
are held; blending weights are computed from their one-dimensional factors for a few frames at a time; and frames are
yielded as soon as no later tile overlaps them. The order of roundings is ltx-core's, so frames are bit-identical.
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

SLAB_FRAMES = 8  # frames that are blended and converted at a time
BAND_BYTES = 192 * 2**20  # of a residual block's input that is processed at a time
HALO_ROWS = 2  # rows that two convolutions of kernel height 3, one after the other, read beyond a band


class RowBandResnetBlock(ResnetBlock3D):
    """ltx-core's residual block, computed by bands of rows in place: the output overwrites the input.

    Rows at a band's edge are computed twice, at most a tenth of the work, so that intermediate results, and cuDNN's
    copies of them, exist for one band at a time.

    Attributes:
        band_bytes: Of the input in a band.
    """

    band_bytes = BAND_BYTES

    def forward(
        self,
        input_tensor: torch.Tensor,
        causal: bool = True,
        timestep: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The block's output, as of ltx-core's own ``forward``, in the memory of ``input_tensor``.

        It differs by roundings where cuDNN selects other convolution kernels for a band than for the whole input: see
        ``tests/gpu/test_policies_at_22b.py``. On a CPU it is bit-identical.

        ltx-core's own ``forward`` runs for an input of one band, with grad enabled, and for blocks with noise, timestep
        conditioning or a shortcut convolution.

        Args:
            input_tensor: ``(1, channels, F, H, W)``; overwritten.
            causal: Whether convolutions pad in time on the left only.
            timestep: For blocks with timestep conditioning.
            generator: For blocks that inject noise.
        """
        bands = -(-input_tensor.nbytes // self.band_bytes)
        plain = self.in_channels == self.out_channels and not self.inject_noise and not self.timestep_conditioning
        if bands == 1 or torch.is_grad_enabled() or not plain or not isinstance(self.norm1, PixelNorm):
            return super().forward(input_tensor, causal, timestep, generator)
        height = input_tensor.shape[3]
        rows = max(2 * HALO_ROWS, -(-height // bands))
        above = input_tensor[:, :, :, :0]  # the input rows above the band, before they were overwritten
        for first in range(0, height, rows):
            last = min(first + rows, height)
            below = min(last + HALO_ROWS, height)
            source = torch.cat([above, input_tensor[:, :, :, first:below]], dim=3)
            offset = above.shape[3]
            above = input_tensor[:, :, :, last - HALO_ROWS : last].clone()
            # Where a band ends inside the frame, the convolutions' padding makes the outermost rows wrong: the halo.
            hidden = self.conv1(self.non_linearity(self.norm1(source)), causal=causal)
            del source
            hidden = self.conv2(self.non_linearity(self.norm2(hidden)), causal=causal)
            input_tensor[:, :, :, first:last] += hidden[:, :, :, offset : offset + last - first]
            del hidden
        return input_tensor


def row_bands(band_bytes: int | None) -> ModuleOps:
    """The operation that has the decoder's residual blocks process bands of so many bytes."""

    def use_row_bands(decoder: Any) -> Any:
        for module in decoder.modules():
            if type(module) is ResnetBlock3D:
                module.__class__ = RowBandResnetBlock
                module.band_bytes = band_bytes or BAND_BYTES
        return decoder

    return ModuleOps(name="row_bands", matcher=lambda module: isinstance(module, VideoDecoder), mutator=use_row_bands)


def decode_video(
    latent: torch.Tensor, decoder: VideoDecoder, tiling: TilingConfig | None, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Decode a video latent, as ltx-core's function of this name.

    Args:
        latent: ``(1, 128, F', H', W')``.
        decoder: ltx-core's.
        tiling: The decoder's tiles; ``None`` decodes the latent at once.
        generator: For the decoder's noise.

    Yields:
        Chunks ``(F, H, W, 3)``, uint8, one for each temporal group of tiles, as ltx-core's own decode.
    """
    if tiling is None:
        yield _as_uint8(decoder(latent, generator=generator))
        return
    shape = VideoLatentShape.from_torch_shape(latent.shape).upscale(decoder.video_downscale_factors)
    groups = decoder._group_tiles_by_temporal_slice(decoder._prepare_tiles(latent, tiling))
    spans = [group[0].out_coords[2] for group in groups]
    overlapping: list[tuple[int, Sequence[Any]]] = []  # (first frame, tiles) of groups that overlap frames to come
    carried = None  # their sums, for the frames that the next group overlaps too
    for group, (span, following) in zip(groups, pairwise([*spans, None]), strict=True):
        frames = span.stop - span.start
        sums = torch.zeros(shape._replace(frames=frames).to_torch_shape(), dtype=latent.dtype, device=latent.device)
        for tile in group:
            decoded = decoder(latent[tile.in_coords], generator=generator)
            TileMask(tile, sums.device, sums.dtype).forward(sums, 0, decoded)
            del decoded
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


def _finish(sums: torch.Tensor, frames: int, start: int, overlapping: list[tuple[int, Sequence[Any]]]) -> torch.Tensor:
    """The first ``frames`` of ``sums``, from frame ``start`` on, divided by their weights: ``(F, H, W, 3)`` uint8."""
    _, channels, _, height, width = sums.shape
    finished = torch.empty(frames, height, width, channels, dtype=torch.uint8, device=sums.device)
    where = (sums.device, sums.dtype)
    groups = [(start - begin, [TileMask(tile, *where) for tile in tiles]) for begin, tiles in overlapping]
    for first in range(0, frames, SLAB_FRAMES):
        slab = slice(first, min(first + SLAB_FRAMES, frames))
        weights = sums.new_zeros(slab.stop - slab.start, height, width)
        for offset, masks in groups:
            own = torch.zeros_like(weights)
            for mask in masks:
                mask.forward(own, slab.start + offset)
            weights += own
        finished[slab] = _as_uint8(sums[:, :, slab] / weights.clamp(min=1e-8))
    return finished


class TileMask(torch.nn.Module):
    """A tile's blending weights, stored as their factors along time, height and width.

    A module for forecasts to memoize: small tiles are many, and most of them alike. Called by ``forward``, so that what
    it allocates is attributed to no module.
    """

    time: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor

    def __init__(self, tile: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._rows, self._columns = tile.out_coords[3], tile.out_coords[4]
        for name, mask in zip(("time", "height", "width"), tile.masks_1d[2:], strict=True):
            self.register_buffer(name, mask.to(device), persistent=False)
        self._dtype = dtype

    def forward(self, sums: torch.Tensor, first: int, decoded: torch.Tensor | None = None) -> None:
        """Add the weights of the tile's frames from ``first`` on to the tile's part of ``sums``.

        Args:
            sums: ``(..., F, H, W)``; changed in place, no further than the tile's last frame.
            first: Of the tile's frames, the one that the first of ``sums`` is.
            decoded: ``(1, 3, F, h, w)``, the frames that the weights are multiplied by.
        """
        target = sums[..., self._rows, self._columns]
        frames = min(target.shape[-3], self.time.shape[0] - first)
        for start in range(0, frames, SLAB_FRAMES):
            stop = min(start + SLAB_FRAMES, frames)
            weights = self._weights(first + start, first + stop)
            target[..., start:stop, :, :] += weights if decoded is None else decoded[:, :, start:stop] * weights
            del weights

    def _weights(self, start: int, stop: int) -> torch.Tensor:
        return (self.time[start:stop, None, None] * self.height[:, None] * self.width).to(self._dtype)


def _as_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames ``(1, 3, F, H, W)`` in [-1, 1] to ``(F, H, W, 3)`` in [0, 255]."""
    return (((frames + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0).to(torch.uint8)[0].permute(1, 2, 3, 0)
