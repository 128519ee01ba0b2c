"""Tokenizers and image processors of a script: from local files, or such as make inputs of the same sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from i2v_lab.pipeline.contract.byte_tokenizer import IMAGE_TOKENS, SPECIALS, byte_tokenizer
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
BYTES = "one token for each byte: its vocabulary is not on this machine"
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

    def tokenizer(kind: type) -> Callable[..., Any]:
        def load(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            name = pretrained_model_name_or_path
            folder = _folder(folders, name, kwargs)
            made = folders.stand_in(folder, kwargs.get("subfolder"))
            if made is not None:
                assume(f"tokenizer of {folders.name_of(name, kwargs.get('subfolder'))}", BYTES)
                return made
            if folder is not None and _has(folder, kwargs, VOCABULARIES):
                return unpatched(kind, "from_pretrained")(cls, str(folder), *args, **kwargs)
            made = stand_in_tokenizer(cls.__name__, _config(folder, kwargs))
            assume(f"tokenizer of {folders.name_of(name, kwargs.get('subfolder'))}", BYTES)
            return made

        return load

    def processor(kind: type) -> Callable[..., Any]:
        def load(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            name = pretrained_model_name_or_path
            folder = _folder(folders, name, kwargs)
            made = folders.stand_in(folder, kwargs.get("subfolder"))
            if made is not None:
                assume(f"tokenizer of {folders.name_of(name, kwargs.get('subfolder'))}", BYTES)
                return made
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


def stand_in_tokenizer(kind: str, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes in the place of one whose vocabulary is missing.

    Args:
        kind: Name of its class.
        config: ``tokenizer_config.json``, or empty.

    Returns:
        One that pads to the same length, whose messages need no template.

    Example:
        >>> len(stand_in_tokenizer("CLIPTokenizer", {})("a wave", padding="max_length")["input_ids"])
        77
    """
    lengths = (length for name, length in LENGTHS.items() if kind.startswith(name))
    length = config.get("model_max_length") or next(lengths, None)
    named = {name: token for name, token in SPECIALS.items() if name not in IMAGE_TOKENS}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(),
        clean_up_tokenization_spaces=False,
        extra_special_tokens={name: SPECIALS[name] for name in IMAGE_TOKENS},
        model_max_length=length if isinstance(length, int) else None,
        **named,
    )
    tokenizer.chat_template = MESSAGES
    return tokenizer


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
