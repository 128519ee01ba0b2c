"""LTX-2's synthetic weights: random tensors in the real layout, and the Gemma folder that goes with them."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from ltx_core.loader import StateDict

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.byte_tokenizer import IMAGE_TOKENS, SPECIALS, byte_tokenizer
from i2v_lab.pipeline.contract.synthetic import SCHEME, SyntheticWeights, TensorsOnDemand, config_metadata
from i2v_lab.pipeline.ltx2.layout import FILES, file_layout, gemma_config, gemma_dimensions


class SyntheticStateDictLoader(TensorsOnDemand):
    """ltx-core's ``StateDictLoader`` protocol over tensors that are made on demand, with no file.

    Paths are ``synthetic:checkpoint``, ``synthetic:gemma``, ``synthetic:upsampler`` and ``synthetic:lora``.

    Args:
        architecture: Whose weights.
        values: Without, tensors are left uninitialized, which is enough where only memory is studied.
    """

    def __init__(self, architecture: Architecture, *, values: bool = True) -> None:
        super().__init__(architecture, file_layout, values=values)

    def part(self, path: str, key: str) -> None:
        """None: a tensor is in no file."""

    def scale(self, path: str, key: str) -> None:
        """None: no tensor has a scale."""

    def identity(self, path: str) -> Hashable:
        """What determines the values of a file's tensors."""
        return path, self._architecture.to_json(), self._values

    def metadata(self, path: str) -> dict[str, Any]:
        """The configuration that the builder reads from a file's metadata."""
        values = metadata(self._architecture, path.removeprefix(SCHEME))
        config: dict[str, Any] = json.loads(values.get("config", "{}"))
        return config

    def load(self, path: str | list[str], sd_ops: Any | None = None, device: torch.device | None = None) -> StateDict:
        """Make the tensors whose checkpoint keys ``sd_ops`` lets through.

        Args:
            path: Of one weight file, or of several.
            sd_ops: ltx-core's map from checkpoint keys to module keys; all tensors under their own keys without one.
            device: Where they are made; the CPU by default.

        Returns:
            The tensors in bfloat16, by their module keys.
        """
        target = device or torch.device("cpu")
        made: dict[str, torch.Tensor] = {}
        for one in [path] if isinstance(path, str) else path:
            for key in self.keys(one):
                mapped = key if sd_ops is None else sd_ops.apply_to_key(key)
                if mapped is None:
                    continue
                tensor = self.tensor(one, key, target)
                made.update(sd_ops.apply_to_key_value(mapped, tensor) if sd_ops is not None else [(mapped, tensor)])
        size = sum(tensor.nbytes for tensor in made.values())
        return StateDict(sd=made, device=target, size=size, dtype={t.dtype for t in made.values()})


def metadata(architecture: Architecture, file: str) -> dict[str, str]:
    """A weight file's safetensors metadata, as the real files carry it."""
    if file == "checkpoint":
        return {**config_metadata(architecture.config), "model_version": architecture.model_version}
    return config_metadata(architecture.upsampler if file == "upsampler" else None)


def write_gemma_folder(architecture: Architecture, folder: Path) -> None:
    """Write what a Gemma folder holds besides its weights: tokenizer, image processor, configuration.

    Args:
        architecture: Whose Gemma.
        folder: The folder of weights; Gemma's is ``gemma`` in it.
    """
    folder = folder / "gemma"
    folder.mkdir(parents=True, exist_ok=True)
    with gemma_dimensions(architecture.gemma):
        config = gemma_config()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in SPECIALS.items() if name not in IMAGE_TOKENS},
        "extra_special_tokens": {name: SPECIALS[name] for name in IMAGE_TOKENS},
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
        (folder / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
    # ltx-core finds the tokenizer's folder by this file's name and reads tokenizer.json beside it.
    (folder / "tokenizer.model").touch()


SYNTHETIC = SyntheticWeights(
    package="ltx-core",
    files=FILES,
    layout=file_layout,
    metadata=metadata,
    write_tokenizer=write_gemma_folder,
    source=__file__,
    dtypes={},
)
