"""Weights of ltx-video's models: the real files' layout, real files verified, synthetic ones made."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from i2v_lab.pipeline.contract import random_tensors
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.random_tensors import DTYPE, synthetic_tensor, uninitialized_tensor
from i2v_lab.pipeline.contract.weight_files import (
    FILE_LIMIT_BYTES,
    Progress,
    cached_folder,
    elements,
    is_described,
    kept_layout,
    require_files,
    require_together,
    verify_tensors,
    verify_values,
)
from i2v_lab.pipeline.ltx_video import passes as ltx_video

OPTIONS = {"checkpoint": "--checkpoint", "text_encoder": "--text-encoder", "upsampler": "--upsampler"}
SCHEME = "synthetic:"
FILES = {
    "checkpoint": "checkpoint.safetensors",
    "text_encoder": "t5/text_encoder/model.safetensors",
    "upsampler": "upsampler.safetensors",
}
T5_FILES = (
    "text_encoder/config.json",
    "text_encoder/*.safetensors",
    "tokenizer/tokenizer_config.json",
    "tokenizer/spiece.model",
)
# What a checkpoint's statistics consist of; real files have more, which nobody reads.
STATISTICS = ("mean-of-means", "std-of-means")


class Loader(Protocol):
    """Reads tensors, or makes them."""

    def load(
        self, paths: Sequence[str], prefix: str, device: torch.device, dtype: torch.dtype = DTYPE
    ) -> dict[str, torch.Tensor]:
        """All tensors whose names begin with ``prefix``, on ``device``, under their names in the file."""


@dataclass(frozen=True)
class LtxVideoWeights:
    """Where the tensors of one model come from; real and synthetic weights look alike from here on.

    Attributes:
        architecture: What they are the weights of.
        checkpoint: Path of the file with the transformer and the VAE.
        text_encoder: Folder with ``text_encoder`` and ``tokenizer``, as PixArt-alpha publishes T5-XXL.
        text_encoder_shards: Paths of T5's weight files.
        upsampler: Path of the spatial latent upsampler.
        loader: Reads them.
    """

    architecture: Architecture
    checkpoint: str
    text_encoder: str
    text_encoder_shards: tuple[str, ...]
    upsampler: str
    loader: Loader

    @property
    def is_synthetic(self) -> bool:
        """True where tensors are made when asked for, with no file behind them."""
        return self.checkpoint.startswith(SCHEME)


class FileLoader:
    """Reads safetensors files, tensor by tensor, straight to the device."""

    def load(
        self, paths: Sequence[str], prefix: str, device: torch.device, dtype: torch.dtype = DTYPE
    ) -> dict[str, torch.Tensor]:
        """As :class:`Loader` has it."""
        tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for key in file.keys():  # noqa: SIM118
                    if key.startswith(prefix):
                        tensors[key] = file.get_tensor(key).to(dtype)
        return tensors


class MakingLoader:
    """Makes tensors when they are asked for.

    Args:
        architecture: What to make.
        make: A tensor of a name, shape, device and dtype.
    """

    def __init__(self, architecture: Architecture, make: Callable[..., torch.Tensor]) -> None:
        self._architecture = architecture
        self._make = make

    def load(
        self, paths: Sequence[str], prefix: str, device: torch.device, dtype: torch.dtype = DTYPE
    ) -> dict[str, torch.Tensor]:
        """As :class:`Loader` has it."""
        return {
            key: self._make(key, shape, device, dtype)
            for path in paths
            for key, shape in file_layout(self._architecture, path.removeprefix(SCHEME)).items()
            if key.startswith(prefix)
        }


@cache
def file_layout(architecture: Architecture, file: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in one weight file: ``checkpoint``, ``text_encoder`` or ``upsampler``."""
    recipe = f"{architecture.to_json()}:{version('ltx-video')}:{Path(__file__).read_text()}"
    return kept_layout(f"ltxv-{file}", recipe, lambda: _work_out_layout(architecture, file))


def _work_out_layout(architecture: Architecture, file: str) -> dict[str, tuple[int, ...]]:
    def shapes(component: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
        state = ltx_video.meta_component(architecture, component).state_dict()
        return {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}

    if file == "upsampler":
        return shapes("spatial_upsampler")
    if file == "text_encoder":
        return {key: shape for key, shape in shapes(file).items() if key != "encoder.embed_tokens.weight"}
    channels = (architecture.config["vae"]["latent_channels"],)
    statistics = {f"{ltx_video.STATISTICS_PREFIX}{name}": channels for name in STATISTICS}
    return shapes("transformer", ltx_video.TRANSFORMER_PREFIX) | shapes("vae", ltx_video.VAE_PREFIX) | statistics


def resolve_weights(
    architecture: Architecture,
    *,
    checkpoint: Path | None = None,
    text_encoder: Path | None = None,
    upsampler: Path | None = None,
    progress: Progress = lambda *_: None,
) -> LtxVideoWeights:
    """Find, verify and name the weights of a model.

    With no path at all the weights are synthetic: files in the cache for a small model, made on demand for a large one.

    Args:
        architecture: The model.
        checkpoint: Transformer and VAE, safetensors.
        text_encoder: The T5 folder, with ``text_encoder`` and ``tokenizer`` in it.
        upsampler: The spatial upsampler, safetensors.
        progress: Called with a file's name, tensors checked, and tensors in all.

    Raises:
        CheckpointError: A file is missing, truncated, of another architecture, lacks tensors or holds NaN.
        OutputError: Synthetic weights cannot be kept in the cache.
    """
    given = {"checkpoint": checkpoint, "text_encoder": text_encoder, "upsampler": upsampler}
    if not any(given.values()):
        return synthetic_weights(architecture)
    require_together(given, list(given), OPTIONS)
    assert checkpoint is not None
    assert text_encoder is not None
    assert upsampler is not None
    require_files(text_encoder, T5_FILES, OPTIONS["text_encoder"], "T5")
    shards = tuple(sorted((text_encoder / "text_encoder").glob("*.safetensors")))
    files = {"checkpoint": (checkpoint,), "text_encoder": shards, "upsampler": (upsampler,)}
    sections = {"checkpoint": "config", "upsampler": "upsampler"}
    for name, paths in files.items():
        layout = partial(file_layout, file=name)
        described = partial(is_described, architecture, sections[name], layout) if name in sections else None
        verify_tensors(paths, OPTIONS[name], architecture.name, layout(architecture), described)
    for name, paths in files.items():  # last, since with real weights this takes minutes
        verify_values(OPTIONS[name], paths, progress)
    return LtxVideoWeights(
        architecture, str(checkpoint), str(text_encoder), tuple(map(str, shards)), str(upsampler), FileLoader()
    )


def synthetic_weights(architecture: Architecture) -> LtxVideoWeights:
    """Random weights in the real layout."""
    if elements(file_layout(architecture, "checkpoint")) * DTYPE.itemsize > FILE_LIMIT_BYTES:
        return _on_demand(architecture, _drawn)
    folder = _cached_folder(architecture, with_weights=True)
    path = {file: str(folder / name) for file, name in FILES.items()}
    return LtxVideoWeights(
        architecture, path["checkpoint"], str(folder / "t5"), (path["text_encoder"],), path["upsampler"], FileLoader()
    )


def skeleton_weights(architecture: Architecture) -> LtxVideoWeights:
    """Weights in the real layout without values, made on demand: all that a forecast of memory needs."""
    for file in FILES:
        file_layout(architecture, file)  # kept from here on; under fake tensors it would take longer
    return _on_demand(architecture, uninitialized_tensor)


def _drawn(key: str, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    return synthetic_tensor(key, shape, device).to(dtype)


def _on_demand(architecture: Architecture, make: Callable[..., torch.Tensor]) -> LtxVideoWeights:
    folder = _cached_folder(architecture, with_weights=False)
    path = {file: f"{SCHEME}{file}" for file in FILES}
    loader = MakingLoader(architecture, make)
    return LtxVideoWeights(
        architecture, path["checkpoint"], str(folder / "t5"), (path["text_encoder"],), path["upsampler"], loader
    )


def _cached_folder(architecture: Architecture, *, with_weights: bool) -> Path:
    code = "".join(Path(str(name)).read_text() for name in (__file__, random_tensors.__file__))
    recipe = f"{architecture.to_json()}:{code}:{version('ltx-video')}"

    def fill(folder: Path) -> None:
        write_t5_folder(architecture, folder / "t5")
        if with_weights:
            metadata = {"checkpoint": architecture.config, "upsampler": architecture.upsampler}
            for file, name in FILES.items():
                dtype = torch.float32 if file == "upsampler" else DTYPE
                layout = file_layout(architecture, file)
                tensors = {key: _drawn(key, shape, "cpu", dtype) for key, shape in layout.items()}
                described = {"config": json.dumps(metadata[file])} if file in metadata else {"format": "pt"}
                save_file(tensors, folder / name, metadata=described)

    return cached_folder(architecture.name, recipe, fill, "" if with_weights else "-tokenizer")


def write_t5_folder(architecture: Architecture, folder: Path) -> None:
    """Write what a T5 folder holds besides its weights: configuration, and a tokenizer that knows every byte.

    As in every LTX-Video prompt, encoding pads to 256 tokens, so memory is that of the real vocabulary's tokenizer.
    """
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5", **architecture.text_encoder}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config, indent=1))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["waves roll in below the lighthouse", "a tower against the evening sky"] * 10),
        model_writer=model,
        model_type="char",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=3,
    )
    (folder / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "legacy": True, "extra_ids": 100, "model_max_length": 512}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
