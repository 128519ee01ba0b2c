"""How many tokens a prompt has beyond those that a text encoder takes, which its tokenizer drops without a word."""

from __future__ import annotations

from typing import Any

from i2v_lab.events import EventSink, Note, Phase

STAND_IN_VOCABULARY = 1024  # more than the tokenizers of synthetic weights have, fewer than any real one


def dropped_tokens(tokenizer: Any, prompt: str, limit: int) -> int:
    """The number of tokens at the end of a prompt that are not encoded.

    Args:
        tokenizer: Of transformers.
        prompt: As it is encoded, without white space around it.
        limit: The tokens that the text encoder takes, special ones included.

    Example:
        >>> from i2v_lab.pipeline.contract.byte_tokenizer import byte_tokenizer
        >>> from transformers import PreTrainedTokenizerFast
        >>> dropped_tokens(PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()), "waves", 3)
        2
    """
    return max(0, len(tokenizer(prompt.strip(), verbose=False).input_ids) - limit)


def note_dropped_tokens(emit: EventSink, tokenizer: Any, topic: str, prompt: str, limit: int) -> None:
    """Report a prompt that its text encoder takes in part only.

    Args:
        emit: Gets a :class:`~i2v_lab.events.Note`, if tokens are dropped.
        tokenizer: Of transformers.
        topic: ``prompt`` or ``negative_prompt``.
        prompt: As in :func:`dropped_tokens`.
        limit: Likewise.
    """
    dropped = dropped_tokens(tokenizer, prompt, limit)
    if dropped:
        counted = ", counted by the synthetic weights' tokenizer" if len(tokenizer) < STAND_IN_VOCABULARY else ""
        name = topic.replace("_", " ")
        text = (
            f"{name}: the text encoder takes {limit} tokens of {limit + dropped}; the last {dropped} are dropped"
            f"{counted}; shorten it"
        )
        emit(Note(Phase.ENCODE_PROMPT, topic, dropped, text))
