"""How a generation may hold less device memory: policies to choose from, and the techniques that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from i2v_lab.errors import InvalidRequest, shown
from i2v_lab.events import Phase


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

    Attributes:
        SHARED_MODULATIONS: The transformer keeps modulations once for each distinct timestep, and accumulates in place.
        TOKEN_CHUNKS: Its queries and feed-forward process tokens in chunks; needs ``shared_modulations``.
        TEXT_ONLY: Gemma's vision tower is not loaded, and its key-value cache not filled.
        STREAMED_TEXT: The text encoder's weights are copied to the device block by block; needs ``text_only``.
        FEATURE_CHUNKS: Gemma's hidden states are normalized in chunks of tokens.
        STREAMED_TRANSFORMER: The transformer's weights are copied to the device block by block.
        BLEND_IN_PLACE: Decoded tiles are accumulated in one buffer, and finished frames returned at once.
        ROW_BANDS: The decoder's residual blocks process rows in bands.
        STREAMED_VAE: The weights of the video encoder and decoder are copied to the device block by block.
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

# A label for tables and figures, and the phase whose peak it lowers: in the order in which the study adds them, each at
# the position where it lowers the peak of the run, or else that of its phase.
LABELS: Mapping[Technique, tuple[str, Phase]] = {
    Technique.SHARED_MODULATIONS: ("modulations shared by timestep", Phase.DENOISE_STAGE_2),
    Technique.TOKEN_CHUNKS: ("tokens in chunks", Phase.DENOISE_STAGE_2),
    Technique.TEXT_ONLY: ("vision tower not loaded", Phase.ENCODE_PROMPT),
    Technique.STREAMED_TEXT: ("text encoder streamed", Phase.ENCODE_PROMPT),
    Technique.FEATURE_CHUNKS: ("text features in chunks", Phase.ENCODE_PROMPT),
    Technique.STREAMED_TRANSFORMER: ("transformer streamed", Phase.DENOISE_STAGE_2),
    Technique.BLEND_IN_PLACE: ("tiles blended in place", Phase.DECODE_VIDEO),
    Technique.ROW_BANDS: ("decoder in bands of rows", Phase.DECODE_VIDEO),
    Technique.STREAMED_VAE: ("decoder streamed", Phase.DECODE_VIDEO),
}

# The one is built on the other; Gemma's head, which is tied to its embedding, must not be streamed besides.
NEEDS: Mapping[Technique, Technique] = {
    Technique.TOKEN_CHUNKS: Technique.SHARED_MODULATIONS,
    Technique.STREAMED_TEXT: Technique.TEXT_ONLY,
}

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
        InvalidRequest: One is unknown, or lacks what it needs.

    Example:
        >>> sorted(to_techniques(["text_only"]))
        [<Technique.TEXT_ONLY: 'text_only'>]
    """
    known = set(Technique)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InvalidRequest(f"techniques={shown(names)} is not a list of names; use one", techniques=names)
    found = list(names)
    for name in found:
        if not isinstance(name, str) or name not in known:
            raise InvalidRequest(f"technique={shown(name)} is unknown; use {', '.join(Technique)}", technique=name)
    chosen = frozenset(Technique(name) for name in found)
    for technique, other in NEEDS.items():
        if technique in chosen and other not in chosen:
            raise InvalidRequest(f"technique='{technique}' needs {other}; name both", technique=technique.value)
    return chosen
