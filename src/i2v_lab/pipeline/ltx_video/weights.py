"""ltx-video's weights: the files that a run reads, verified before any tensor is loaded, or synthetic ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.random_tensors import DTYPE
from i2v_lab.pipeline.contract.scaled_fp8 import dequantized, own_keys, scale_keys
from i2v_lab.pipeline.contract.synthetic import TensorsOnDemand, is_on_demand
from i2v_lab.pipeline.contract.weight_files import (
    Progress,
    config_matches,
    require_together,
    verify_tensors,
    verify_values,
)
from i2v_lab.pipeline.contract.weight_folders import require_files
from i2v_lab.pipeline.ltx_video.layout import FILES, UNREAD, file_layout
from i2v_lab.pipeline.ltx_video.synthetic import SYNTHETIC

OPTIONS = {"checkpoint": "--checkpoint", "text_encoder": "--text-encoder", "upsampler": "--upsampler"}
T5_FILES = (
    "text_encoder/config.json",
    "text_encoder/*.safetensors",
    "tokenizer/tokenizer_config.json",
    "tokenizer/spiece.model",
)


class Loader(Protocol):
    """Loads the tensors of weight files, or makes them on demand."""

    def load(
        self, paths: Sequence[str], prefix: str, device: torch.device, dtype: torch.dtype = DTYPE
    ) -> dict[str, torch.Tensor]:
        """All tensors of ``paths`` whose names begin with ``prefix``, on ``device``, under their names in the file."""


@dataclass(frozen=True)
class LtxVideoWeights:
    """The weight files of one model and what reads them, real or synthetic.

    Attributes:
        architecture: The model.
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
        """Whether tensors are made on demand, with no file."""
        return is_on_demand(self.checkpoint)


class SafetensorsLoader:
    """Reads safetensors files, tensor by tensor, straight to the device; scales of float8 weights are applied."""

    def load(
        self, paths: Sequence[str], prefix: str, device: torch.device, dtype: torch.dtype = DTYPE
    ) -> dict[str, torch.Tensor]:
        """As :meth:`Loader.load`."""
        tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            with safe_open(path, framework="pt", device=str(device)) as file:
                scales = scale_keys(file.keys())
                for key in own_keys(file.keys()):
                    if key.startswith(prefix):
                        tensor = file.get_tensor(key)
                        scaled = key in scales
                        tensors[key] = (
                            dequantized(tensor, file.get_tensor(scales[key]), dtype) if scaled else tensor.to(dtype)
                        )
        return tensors


class OnDemandLoader(TensorsOnDemand):
    """Makes tensors on demand, with no file."""

    def load(
        self, paths: Sequence[str], prefix: str, device: torch.device, dtype: torch.dtype = DTYPE
    ) -> dict[str, torch.Tensor]:
        """As :meth:`Loader.load`."""
        return {
            key: self.tensor(path, key, device, dtype)
            for path in paths
            for key in self.keys(path)
            if key.startswith(prefix)
        }


def resolve_weights(
    architecture: Architecture,
    *,
    checkpoint: Path | None = None,
    text_encoder: Path | None = None,
    upsampler: Path | None = None,
    progress: Progress = lambda *_: None,
) -> LtxVideoWeights:
    """Find and verify the weights of a model.

    With no path at all the weights are synthetic: files in the cache for a small model, made on demand for a large one.

    Args:
        architecture: The model.
        checkpoint: Transformer and VAE, safetensors.
        text_encoder: The T5 folder, with ``text_encoder`` and ``tokenizer`` in it.
        upsampler: The spatial upsampler, safetensors.
        progress: Called with a file's name, the number of tensors verified, and of tensors in all.

    Raises:
        CheckpointError: A file is missing, truncated, of another architecture, lacks tensors or has values that are
            not finite; ``fields`` has its ``path``, and the ``tensor`` or what is ``missing``.
        OutputError: Synthetic weights cannot be written to the cache.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> resolve_weights(load_architecture("ltxv-tiny"), checkpoint=Path("gone.safetensors"))
        Traceback (most recent call last):
        ...
        i2v_lab.errors.CheckpointError: ...
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
        configured = partial(config_matches, architecture, sections[name], layout) if name in sections else None
        verify_tensors(paths, OPTIONS[name], architecture.name, layout(architecture), configured, UNREAD)
    for name, paths in files.items():  # last, since with real weights this takes minutes
        verify_values(OPTIONS[name], paths, progress)
    return LtxVideoWeights(
        architecture, str(checkpoint), str(text_encoder), tuple(map(str, shards)), str(upsampler), SafetensorsLoader()
    )


def synthetic_weights(architecture: Architecture) -> LtxVideoWeights:
    """Random weights in the real layout (see :mod:`i2v_lab.pipeline.contract.synthetic`).

    Raises:
        OutputError: The cache cannot be written.
    """
    if not SYNTHETIC.fit_in_files(architecture):
        return _on_demand(architecture, values=True)
    folder = SYNTHETIC.folder(architecture, with_weights=True)
    return _located(architecture, folder, SYNTHETIC.paths(folder), SafetensorsLoader())


def skeleton_weights(architecture: Architecture) -> LtxVideoWeights:
    """Weights in the real layout without values, made on demand: enough for a forecast of memory.

    Raises:
        OutputError: The cache cannot be written.
    """
    for file in FILES:
        file_layout(architecture, file)  # cached now: under fake tensors, computing it would take longer
    return _on_demand(architecture, values=False)


def _on_demand(architecture: Architecture, *, values: bool) -> LtxVideoWeights:
    folder = SYNTHETIC.folder(architecture, with_weights=False)
    return _located(architecture, folder, SYNTHETIC.paths(), OnDemandLoader(architecture, file_layout, values=values))


def _located(architecture: Architecture, folder: Path, paths: dict[str, str], loader: Loader) -> LtxVideoWeights:
    shards = (paths["text_encoder"],)
    return LtxVideoWeights(architecture, paths["checkpoint"], str(folder / "t5"), shards, paths["upsampler"], loader)
