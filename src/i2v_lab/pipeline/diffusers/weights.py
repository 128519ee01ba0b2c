"""Weights of diffusers' models: random, or a folder as a model's repository has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.weight_folders import MODEL_INDEX, require_files
from i2v_lab.pipeline.contract.weight_headers import weights_refused

OPTION = "--weights"


@dataclass(frozen=True)
class DiffusersWeights:
    """Weights of an architecture.

    Attributes:
        architecture: Whose.
        folder: Verified; without one, weights are drawn when the components are built.
    """

    architecture: Architecture
    folder: Path | None = None


def resolve_weights(
    architecture: Architecture, weights: Path | None = None, progress: Callable[..., None] = lambda *_: None
) -> DiffusersWeights:
    """The weights of a model: of a folder that was verified, or random ones.

    Args:
        architecture: Whose.
        weights: A folder with ``model_index.json`` and a folder for each component, whose weights are safetensors.
        progress: Not called: headers alone are read.

    Raises:
        CheckpointError: A file is missing or damaged, is code, or belongs to another model.
    """
    if weights is None or not architecture.pipeline:
        return DiffusersWeights(architecture)
    folder = Path(weights)
    require_files(folder, [MODEL_INDEX, "*.safetensors"], OPTION, architecture.name)
    index = json.loads((folder / MODEL_INDEX).read_bytes())
    _require_equal(folder / MODEL_INDEX, "_class_name", architecture.pipeline, index.get("_class_name"), architecture)
    for name, config in architecture.config.items():
        path = folder / name / "config.json"
        if path.is_file():
            found = json.loads(path.read_bytes())
            for key, value in config.items():
                known = found.get("architectures", [None])[0] if key == "_class_name" else None
                _require_equal(path, key, value, known or found.get(key, value), architecture)
            require_files(folder / name, ["*.safetensors"], OPTION, f"{architecture.name} {name}")
    return DiffusersWeights(architecture, folder)


def skeleton_weights(architecture: Architecture) -> DiffusersWeights:
    """Random weights: under fake tensors nothing is drawn."""
    return DiffusersWeights(architecture)


def _require_equal(path: Path, key: str, wanted: Any, found: Any, architecture: Architecture) -> None:
    if json.dumps(wanted, sort_keys=True) != json.dumps(found, sort_keys=True):
        words = f"has {key}={found!r}, and model={architecture.name!r} {wanted!r}; name the model that it is"
        raise weights_refused(OPTION, path, "config", words, key=key)
