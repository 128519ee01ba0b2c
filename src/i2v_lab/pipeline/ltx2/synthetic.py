"""Random weights in the real layout: the same names, shapes, dtypes and metadata, none of the knowledge.

Peak memory does not depend on the values, so these stand in for the real weights wherever memory is studied. Values are
seeded per tensor by its name: the same on every machine, whichever subset is made and in whichever order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.random_tensors import synthetic_tensor, uninitialized_tensor
from i2v_lab.pipeline.ltx2 import components as ltx2

SCHEME = "synthetic:"
FILES = {
    "checkpoint": "checkpoint.safetensors",
    "gemma": "gemma/model.safetensors",
    "upsampler": "upsampler.safetensors",
    "lora": "distilled-lora.safetensors",
}


class SyntheticStateDictLoader:
    """ltx-core's ``StateDictLoader`` protocol over tensors that are made when they are asked for, with no file.

    Paths are ``synthetic:checkpoint``, ``synthetic:gemma``, ``synthetic:upsampler`` and ``synthetic:lora``.

    Args:
        architecture: What to make.
        values: Without, tensors stay uninitialized: enough where only their memory counts.
    """

    def __init__(self, architecture: Architecture, *, values: bool = True) -> None:
        self._architecture = architecture
        self._make = synthetic_tensor if values else uninitialized_tensor

    def metadata(self, path: str) -> dict[str, Any]:
        """The configuration that the builder reads from a file's metadata."""
        values: dict[str, Any] = json.loads(metadata(self._architecture, path.removeprefix(SCHEME)).get("config", "{}"))
        return values

    def keys(self, path: str) -> list[str]:
        """The names of all tensors in a file."""
        return list(ltx2.file_layout(self._architecture, path.removeprefix(SCHEME)))

    def tensor(self, path: str, key: str, device: torch.device) -> torch.Tensor:
        """One of them, made on ``device``."""
        return self._make(key, ltx2.file_layout(self._architecture, path.removeprefix(SCHEME))[key], device)

    def load(
        self, path: str | list[str], sd_ops: Any | None = None, device: torch.device | None = None
    ) -> ltx2.StateDict:
        """Make the tensors whose checkpoint keys ``sd_ops`` lets through, on ``device``, under their module keys."""
        target = device or torch.device("cpu")
        made: dict[str, torch.Tensor] = {}
        for one in [path] if isinstance(path, str) else path:
            layout = ltx2.file_layout(self._architecture, one.removeprefix(SCHEME))
            for key, shape in layout.items():
                mapped = key if sd_ops is None else sd_ops.apply_to_key(key)
                if mapped is None:
                    continue
                tensor = self._make(key, shape, target)
                made.update(sd_ops.apply_to_key_value(mapped, tensor) if sd_ops is not None else [(mapped, tensor)])
        size = sum(tensor.nbytes for tensor in made.values())
        return ltx2.StateDict(sd=made, device=target, size=size, dtype={t.dtype for t in made.values()})


def metadata(architecture: Architecture, file: str) -> dict[str, str]:
    """A weight file's safetensors metadata, as the real files carry it."""
    if file == "checkpoint":
        return {"config": json.dumps(architecture.config), "model_version": architecture.model_version}
    if file == "upsampler":
        return {"config": json.dumps(architecture.upsampler)}
    return {"format": "pt"}


def write_weights(architecture: Architecture, folder: Path) -> Iterator[Path]:
    """Write every weight file of an architecture below ``folder``, and Gemma's tokenizer and configurations.

    Yields:
        Each safetensors file, once it is complete.
    """
    write_gemma_folder(architecture, folder / "gemma")
    for file, name in FILES.items():
        tensors = {key: synthetic_tensor(key, shape) for key, shape in ltx2.file_layout(architecture, file).items()}
        save_file(tensors, folder / name, metadata=metadata(architecture, file))
        yield folder / name


def write_gemma_folder(architecture: Architecture, folder: Path) -> None:
    """Write what a Gemma folder holds besides its weights: tokenizer, image processor, configuration.

    The tokenizer is byte-level: every byte of the text is one token. As in every LTX prompt, encoding pads to 1,024
    tokens, so memory is that of the real vocabulary's tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ltx2.gemma_dimensions(architecture.gemma):
        config = ltx2.gemma_config()
    specials = {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(specials.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    image_tokens = ("boi_token", "eoi_token", "image_token")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in specials.items() if name not in image_tokens},
        "extra_special_tokens": {name: specials[name] for name in image_tokens},
    }
    image_size = config["vision_config"]["image_size"]
    processor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "image_seq_length": config["mm_tokens_per_image"],
    }
    for name, values in {
        "tokenizer_config.json": tokenizer_config,
        "preprocessor_config.json": processor,
        "config.json": config,
    }.items():
        (folder / name).write_text(json.dumps(values, indent=1))
    # ltx-core finds the tokenizer's folder by this file's name and reads tokenizer.json beside it.
    (folder / "tokenizer.model").touch()
