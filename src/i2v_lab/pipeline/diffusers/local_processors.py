"""Tokenizers and image processors of a script: from local files, or such as make inputs of the same sizes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from i2v_lab.pipeline.contract.byte_tokenizer import IMAGE_TOKENS, SPECIALS
from i2v_lab.pipeline.diffusers.configuration_folders import ConfigurationFolders, missing
from i2v_lab.thread_patches import unpatched

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")
# Of tokenizers whose configuration is not there: the lengths that prompts are padded to.
LENGTHS = {"CLIP": 77, "T5": 512, "UMT5": 512}
WORDS = "one token for every four letters: its vocabulary is not on this machine"
WORD = "<word>"
MAX_TOKEN = 32  # characters; a longer one is a template, which takes as many tokens as a byte tokenizer needs it to
MESSAGES = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if 'text' in part else '' }}{% endfor %}{% endif %}"
    "{% endfor %}"
)


def processor_patches(
    folders: ConfigurationFolders, assume: Callable[[str, str], None]
) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """What to replace so that tokenizers and processors come from local files, and by what.

    Args:
        folders: Finds them.
        assume: Told of every one that no file describes.
    """

    def of_architecture(cls: Any, name: Any, folder: Any, kwargs: dict[str, Any]) -> Any:
        """The stand-in that an architecture of this package describes; ``None`` where none does."""
        config = folders.stand_in(folder, kwargs.get("subfolder"))
        if config is None:
            return None
        assume(f"tokenizer of {folders.name_of(name, kwargs.get('subfolder'))}", WORDS)
        return stand_in_tokenizer(cls.__name__, config)

    def tokenizer(kind: type) -> Callable[..., Any]:
        def load(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            name = pretrained_model_name_or_path
            folder = _folder(folders, name, kwargs)
            own = of_architecture(cls, name, folder, kwargs)
            if own is not None:
                return own
            if folder is not None and _has(folder, kwargs, VOCABULARIES):
                return unpatched(kind, "from_pretrained")(cls, str(folder), *args, **kwargs)
            assume(f"tokenizer of {folders.name_of(name, kwargs.get('subfolder'))}", WORDS)
            return stand_in_tokenizer(cls.__name__, _config(folder, kwargs))

        return load

    def processor(kind: type) -> Callable[..., Any]:
        def load(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            name = pretrained_model_name_or_path
            folder = _folder(folders, name, kwargs)
            own = of_architecture(cls, name, folder, kwargs)
            if own is not None:
                return own
            if folder is not None and _has(folder, kwargs, PROCESSORS):
                return unpatched(kind, "from_pretrained")(cls, str(folder), *args, **kwargs)
            if not issubclass(cls, ImageProcessingMixin):
                raise missing(name, " or ".join(PROCESSORS))
            where = folders.name_of(name, kwargs.get("subfolder"))
            assume(f"{cls.__name__} of {where}", "its defaults: its configuration is not on this machine")
            return cls()

        return load

    for kind in (PreTrainedTokenizerBase, AutoTokenizer):
        yield kind, "from_pretrained", tokenizer(kind)
    for kind in (
        ImageProcessingMixin,
        FeatureExtractionMixin,
        ProcessorMixin,
        AutoImageProcessor,
        AutoFeatureExtractor,
        AutoProcessor,
    ):
        yield kind, "from_pretrained", processor(kind)


class WordTokenizer(PreTrainedTokenizerFast):
    """A tokenizer of which every four letters of a word are a token, and so is every text that a pipeline looks for.

    A real one makes somewhat fewer tokens of a text. Pipelines pad or cut them to a length of theirs, and cut off as
    many as a real one makes of their template.

    Args:
        special: Texts that are one token, with their ids; the first is the padding.
        model_max_length: Tokens that a text is cut to where the caller does not say.
        **tokens: ``eos_token`` and the like.

    Example:
        >>> WordTokenizer({"<pad>": 0, "<image>": 300})("a waving, <image>")["input_ids"]
        [1, 1, 1, 1, 300]
    """

    def __init__(self, special: Mapping[str, int], model_max_length: int | None = None, **tokens: Any) -> None:
        word = next(number for number in itertools.count(1) if number not in special.values())
        tokenizer = Tokenizer(models.WordLevel(vocab={**special, WORD: word}, unk_token=WORD))
        pieces = pre_tokenizers.Split(Regex(r"\w{1,4}|[^\w\s]"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pieces])
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
        super().__init__(
            tokenizer_object=tokenizer,
            pad_token=next(iter(special)),
            model_max_length=model_max_length,
            clean_up_tokenization_spaces=False,
            padding_side="right",
            **tokens,
        )
        self.chat_template = MESSAGES


class WordProcessor(WordTokenizer):
    """The same where a pipeline has a processor of texts, images and videos: those are dropped."""

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **options: Any) -> Any:
        """Tokenize the text alone."""
        return super().__call__(text, **options)


def stand_in_tokenizer(kind: str, config: dict[str, Any]) -> WordTokenizer:
    """A tokenizer in the place of one whose vocabulary is missing.

    Args:
        kind: Name of its class.
        config: ``tokenizer_config.json``, or what an architecture says: ``special``, ``model_max_length``.

    Returns:
        One that pads to the same length, whose messages need no template.

    Example:
        >>> len(stand_in_tokenizer("CLIPTokenizer", {})("a wave", padding="max_length")["input_ids"])
        77
    """
    lengths = (length for name, length in LENGTHS.items() if kind.startswith(name))
    length = config.get("model_max_length") or next(lengths, None)
    length = length if isinstance(length, int) else None
    if config.get("special"):
        made = WordProcessor if config.get("_class_name") == "ByteProcessor" else WordTokenizer
        special = {text: number for text, number in config["special"].items() if len(text) <= MAX_TOKEN}
        return made(special, length)
    special = {token: number for number, token in enumerate(SPECIALS.values())}
    named = {name: token for name, token in SPECIALS.items() if name not in (*IMAGE_TOKENS, "pad_token")}
    extra = {name: SPECIALS[name] for name in IMAGE_TOKENS}
    return WordTokenizer(special, length, extra_special_tokens=extra, **named)


def _folder(folders: ConfigurationFolders, name: Any, kwargs: dict[str, Any]) -> Path | None:
    where = {key: kwargs.pop(key, None) for key in ("revision", "cache_dir")}
    return folders.find(name, **where)


def _has(folder: Path, kwargs: dict[str, Any], files: tuple[str, ...]) -> bool:
    return any((folder / (kwargs.get("subfolder") or "") / file).is_file() for file in files)


def _config(folder: Path | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    path = (folder or Path()) / (kwargs.get("subfolder") or "") / "tokenizer_config.json"
    if folder is None or not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}
