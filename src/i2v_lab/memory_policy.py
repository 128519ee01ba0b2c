"""How a generation may hold less of the device at a time: policies to choose from, and techniques they consist of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from i2v_lab.errors import InvalidRequest


class MemoryPolicy(StrEnum):
    """How much of the device a generation holds at a time.

    ``resident`` runs every phase as ltx-core does, with its components' weights on the device. ``lean`` has the same
    weights and no activations that it can do without. ``streamed`` is lean, and weights arrive block by block. ``auto``
    stands for the fastest of these that a card takes, and is resolved before the run.

    Example:
        >>> MemoryPolicy("lean") is MemoryPolicy.LEAN
        True
    """

    RESIDENT = "resident"
    LEAN = "lean"
    STREAMED = "streamed"
    AUTO = "auto"


class Technique(StrEnum):
    """One thing that a policy does about one phase.

    ``shared_modulations``: the transformer keeps modulations once for each distinct timestep and sums in place.
    ``token_chunks``: it works on some tokens at a time (needs ``shared_modulations``). ``text_only``: Gemma without its
    vision tower and its cache. ``feature_chunks``: its hidden states are normed for some tokens at a time.
    ``blend_in_place``: decoded tiles are added up in one buffer, and finished frames handed on at once.
    ``row_bands``: the decoder's residual blocks work on some rows at a time. ``streamed_text`` (needs ``text_only``),
    ``streamed_transformer`` and ``streamed_vae``: weights of these components arrive block by block.
    """

    SHARED_MODULATIONS = "shared_modulations"
    TOKEN_CHUNKS = "token_chunks"  # noqa: S105
    TEXT_ONLY = "text_only"
    FEATURE_CHUNKS = "feature_chunks"
    BLEND_IN_PLACE = "blend_in_place"
    ROW_BANDS = "row_bands"
    STREAMED_TEXT = "streamed_text"
    STREAMED_TRANSFORMER = "streamed_transformer"
    STREAMED_VAE = "streamed_vae"


Techniques = frozenset[Technique]

# The one is made of the other, or Gemma's head, which is its embedding once more, would be streamed as well.
NEEDS: Mapping[Technique, Technique] = {
    Technique.TOKEN_CHUNKS: Technique.SHARED_MODULATIONS,
    Technique.STREAMED_TEXT: Technique.TEXT_ONLY,
}
_STREAMED = {Technique.STREAMED_TEXT, Technique.STREAMED_TRANSFORMER, Technique.STREAMED_VAE}
TECHNIQUES: Mapping[MemoryPolicy, Techniques] = {
    MemoryPolicy.RESIDENT: frozenset(),
    MemoryPolicy.LEAN: frozenset(Technique) - _STREAMED,
    MemoryPolicy.STREAMED: frozenset(Technique),
}


def to_techniques(names: Iterable[str]) -> Techniques:
    """Techniques by their names.

    Raises:
        InvalidRequest: One is unknown, or lacks what it needs.

    Example:
        >>> sorted(to_techniques(["text_only"]))
        [<Technique.TEXT_ONLY: 'text_only'>]
    """
    known = set(Technique)
    found = list(names)
    for name in found:
        if name not in known:
            raise InvalidRequest(f"technique={name!r} is unknown; use {', '.join(Technique)}", technique=name)
    chosen = frozenset(Technique(name) for name in found)
    for technique, other in NEEDS.items():
        if technique in chosen and other not in chosen:
            raise InvalidRequest(f"technique='{technique}' needs {other}; name both", technique=technique.value)
    return chosen
