"""Tokens by chunks, and what modulates them: one row for each timestep, not for each token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

Bounds = tuple[int, ...]  # tokens from one bound to the next have one timestep; from 0 to their number


@dataclass(frozen=True)
class Chunk:
    """Tokens that are worked on at a time.

    Attributes:
        first: The first of them.
        last: The one after the last.
        rows: Their timesteps: the number of each, and from which to which of the chunk's tokens have it.
    """

    first: int
    last: int
    rows: tuple[tuple[int, int, int], ...]

    @property
    def span(self) -> slice:
        """Where they are among all tokens."""
        return slice(self.first, self.last)


Chunks = tuple[Chunk, ...]  # one after the other, all tokens


@cache
def chunks_of(bounds: Bounds, most: int) -> Chunks:
    """All tokens in as few chunks of at most ``most`` as there must be, alike in size, so that all meet one kernel."""
    tokens = bounds[-1]
    count = -(-tokens // most)
    chunks = []
    for first, last in pairwise(tokens * number // count for number in range(count + 1)):
        spans = [(max(start, first) - first, min(stop, last) - first) for start, stop in pairwise(bounds)]
        rows = tuple((row, start, stop) for row, (start, stop) in enumerate(spans) if start < stop)
        chunks.append(Chunk(first, last, rows))
    return tuple(chunks)


def whole(tokens: int) -> Chunks:
    """All tokens at a time."""
    return chunks_of((0, tokens), tokens)


def multiply(x: torch.Tensor, values: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Multiply a chunk's tokens by what belongs to their timesteps.

    Args:
        x: ``(1, tokens, width)``; it is changed in place.
        values: ``(1, timesteps, width)``; with one row it is that of all tokens.
        chunk: Which tokens they are.
    """
    for row, first, last in _rows(values, chunk):
        x[:, first:last].mul_(values[:, row : row + 1])
    return x


def add(x: torch.Tensor, values: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """As :func:`multiply`, added."""
    for row, first, last in _rows(values, chunk):
        x[:, first:last].add_(values[:, row : row + 1])
    return x


def expanded(values: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """A row for each token of a chunk, ``(1, tokens, width)``; arguments as in :func:`multiply`."""
    parts = [values[:, row : row + 1].expand(-1, last - first, -1) for row, first, last in _rows(values, chunk)]
    return torch.cat(parts, dim=1)


def _rows(values: torch.Tensor, chunk: Chunk) -> tuple[tuple[int, int, int], ...]:
    return chunk.rows if values.shape[1] > 1 else ((0, 0, chunk.last - chunk.first),)
