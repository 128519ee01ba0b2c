"""How a generation may hold less device memory: policies to choose from, and the techniques that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from i2v_lab.errors import InvalidRequest


class MemoryPolicy(StrEnum):
    """A named set of techniques.

    ``resident``: every phase as upstream runs it, with its components' weights on the device. ``lean``: the same
    weights and fewer activations. ``streamed``: lean, and weights are copied to the device block by block. ``auto``
    stands for the fastest of these that fits a card, and is resolved before a run.

    Example:
        >>> MemoryPolicy("lean") is MemoryPolicy.LEAN
        True
    """

    RESIDENT = "resident"
    LEAN = "lean"
    STREAMED = "streamed"
    AUTO = "auto"


class Technique(StrEnum):
    """One way to lower the peak of one phase. Which of them a runner supports is data of that runner.

    ``shared_modulations``: the transformer keeps modulations once for each distinct timestep, and accumulates in place.
    ``token_chunks``: it processes tokens in chunks (needs ``shared_modulations``). ``text_only``: Gemma without its
    vision tower and its key-value cache. ``feature_chunks``: its hidden states are normalized in chunks of tokens.
    ``blend_in_place``: decoded tiles are accumulated in one buffer, and finished frames returned at once.
    ``row_bands``: the decoder's residual blocks process rows in bands. ``streamed_text`` (needs ``text_only``),
    ``streamed_transformer`` and ``streamed_vae``: weights of these components are copied block by block.
    ``model_offload`` and ``group_offload``: diffusers' own offloading, of whole components or of single layers.
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
    MODEL_OFFLOAD = "model_offload"
    GROUP_OFFLOAD = "group_offload"


Techniques = frozenset[Technique]

# The one is built on the other; Gemma's head, which is tied to its embedding, must not be streamed besides.
NEEDS: Mapping[Technique, Technique] = {
    Technique.TOKEN_CHUNKS: Technique.SHARED_MODULATIONS,
    Technique.STREAMED_TEXT: Technique.TEXT_ONLY,
}
EXCLUDES: Mapping[Technique, Technique] = {Technique.MODEL_OFFLOAD: Technique.GROUP_OFFLOAD}
OFFLOADING = frozenset({Technique.MODEL_OFFLOAD, Technique.GROUP_OFFLOAD})  # from one memory to another

_LEAN = frozenset(
    {
        Technique.SHARED_MODULATIONS,
        Technique.TOKEN_CHUNKS,
        Technique.TEXT_ONLY,
        Technique.FEATURE_CHUNKS,
        Technique.BLEND_IN_PLACE,
        Technique.ROW_BANDS,
    }
)
# Each policy names its techniques: one that is added to Technique changes no policy, and so no record.
TECHNIQUES: Mapping[MemoryPolicy, Techniques] = {
    MemoryPolicy.RESIDENT: frozenset(),
    MemoryPolicy.LEAN: _LEAN,
    MemoryPolicy.STREAMED: _LEAN | {Technique.STREAMED_TEXT, Technique.STREAMED_TRANSFORMER, Technique.STREAMED_VAE},
}


def policy_of(techniques: Techniques) -> MemoryPolicy | None:
    """The policy that stands for exactly these techniques; ``None`` if there is none.

    Example:
        >>> policy_of(frozenset()).value
        'resident'
    """
    return next((policy for policy, own in TECHNIQUES.items() if own == techniques), None)


def to_techniques(names: Iterable[str]) -> Techniques:
    """Techniques by their names.

    Raises:
        InvalidRequest: One is unknown, lacks what it needs, or excludes another.

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
    for technique, other in EXCLUDES.items():
        if technique in chosen and other in chosen:
            raise InvalidRequest(f"technique='{technique}' excludes {other}; name one", technique=technique.value)
    return chosen
