"""Chunks of tokens, and modulations that are stored once for each distinct timestep instead of for each token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

Bounds = tuple[int, ...]  # 0, ..., number of tokens; tokens between two bounds share one timestep


@dataclass(frozen=True)
class Chunk:
    """A range of tokens that is processed at a time.

    Attributes:
        first: Index of the first token.
        last: Index after the last token.
        rows: ``(row, start, stop)`` for each timestep in the chunk: its row in the modulations, and the range of the
            chunk's tokens that have it.
    """

    first: int
    last: int
    rows: tuple[tuple[int, int, int], ...]

    @property
    def span(self) -> slice:
        """The chunk's slice of the token axis."""
        return slice(self.first, self.last)


Chunks = tuple[Chunk, ...]  # contiguous, covering all tokens


@cache
def split_tokens(bounds: Bounds, max_tokens: int) -> Chunks:
    """The fewest chunks of at most ``max_tokens``, of nearly equal size, so that all run the same kernels.

    Example:
        >>> [(chunk.first, chunk.last) for chunk in split_tokens((0, 10), 4)]
        [(0, 3), (3, 6), (6, 10)]
    """
    tokens = bounds[-1]
    count = -(-tokens // max_tokens)
    chunks = []
    for first, last in pairwise(tokens * number // count for number in range(count + 1)):
        spans = [(max(start, first) - first, min(stop, last) - first) for start, stop in pairwise(bounds)]
        rows = tuple((row, start, stop) for row, (start, stop) in enumerate(spans) if start < stop)
        chunks.append(Chunk(first, last, rows))
    return tuple(chunks)


def single_chunk(tokens: int) -> Chunks:
    """All tokens in one chunk."""
    return split_tokens((0, tokens), tokens)


def multiply_(x: torch.Tensor, values: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Multiply a chunk's tokens in place by the values of their timesteps.

    Args:
        x: ``(1, chunk tokens, width)``; modified.
        values: ``(1, timesteps, width)``, or ``(1, 1, width)`` for all tokens.
        chunk: The tokens of ``x``.

    Returns:
        ``x``.
    """
    for row, first, last in _rows(values, chunk):
        x[:, first:last].mul_(values[:, row : row + 1])
    return x


def add_(x: torch.Tensor, values: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Add to a chunk's tokens in place the values of their timesteps; arguments as for :func:`multiply_`."""
    for row, first, last in _rows(values, chunk):
        x[:, first:last].add_(values[:, row : row + 1])
    return x


def expanded(values: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """The values of each token of a chunk, ``(1, chunk tokens, width)``; arguments as for :func:`multiply_`."""
    parts = [values[:, row : row + 1].expand(-1, last - first, -1) for row, first, last in _rows(values, chunk)]
    return torch.cat(parts, dim=1)


def _rows(values: torch.Tensor, chunk: Chunk) -> tuple[tuple[int, int, int], ...]:
    return chunk.rows if values.shape[1] > 1 else ((0, 0, chunk.last - chunk.first),)
