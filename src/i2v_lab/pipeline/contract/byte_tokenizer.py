"""A byte-level tokenizer in the place of Gemma's: every byte of the text is one token.

Encoding pads to 1,024 tokens, as with the real vocabulary, so memory is that of the real tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer, models, pre_tokenizers

SPECIALS: Mapping[str, str] = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
IMAGE_TOKENS = ("boi_token", "eoi_token", "image_token")


def byte_tokenizer() -> Tokenizer:
    """The tokenizer; special tokens have the first ids.

    Example:
        >>> byte_tokenizer().encode("wave").tokens
        ['w', 'a', 'v', 'e']
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(SPECIALS.values()))
    return tokenizer
