"""What stands in for files that a model of random weights has none of: a vocabulary, and a safety checker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class ByteTokenizer(PreTrainedTokenizerFast):
    """A tokenizer of which every byte is a token, and some texts are one each: those that a pipeline looks for.

    Pipelines pad prompts to a fixed length, so that memory is that of the real tokenizer.

    Args:
        special: Texts that are one token, with their ids; the first is the padding.
        model_max_length: Tokens that a prompt is cut to where the pipeline does not say.
        chat_template: As a tokenizer of transformers has it.

    Example:
        >>> ByteTokenizer({"<pad>": 0, "<image>": 300})("a<image>")["input_ids"][-1]
        300
    """

    def __init__(
        self, special: Mapping[str, int] | None = None, model_max_length: int = 512, chat_template: str | None = None
    ) -> None:
        special = dict(special or {"<pad>": 0})
        free = iter(sorted(set(range(len(special) + 257)) - set(special.values())))
        vocabulary = {**special, **{letter: next(free) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())}}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
        padding = next(iter(special))
        super().__init__(
            tokenizer_object=tokenizer,
            pad_token=padding,
            model_max_length=model_max_length,
            clean_up_tokenization_spaces=False,
            padding_side="right",
        )
        if chat_template is not None:
            self.chat_template = chat_template


class ByteProcessor(ByteTokenizer):
    """The same where a pipeline has a processor of texts, images and videos: those are dropped."""

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **options: Any) -> Any:
        """Tokenize the text alone."""
        return super().__call__(text, **options)


class NoSafetyChecker:
    """In the place of Cosmos's guardrail, which is another package with weights of its own: lets everything pass."""

    def to(self, *_: Any, **__: Any) -> NoSafetyChecker:
        """Return itself."""
        return self

    def check_text_safety(self, prompt: str) -> bool:
        """Whether a prompt may be generated from: always."""
        return True

    def check_video_safety(self, video: Any) -> Any:
        """The video."""
        return video
