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
from i2v_lab.pipeline.diffusers.component_files import is_loaded, verify_component
from i2v_lab.pipeline.diffusers.components import CLASS, find_class

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
        CheckpointError: A file is missing or damaged, is code, a pickle, or belongs to another model; or a tensor is
            missing, unknown or of another shape.
    """
    if weights is None or not architecture.pipeline:
        return DiffusersWeights(architecture)
    folder = Path(weights)
    files = require_files(folder, [MODEL_INDEX, "*.safetensors"], OPTION, architecture.name)
    index = files[folder / MODEL_INDEX]
    if not isinstance(index, dict):
        raise weights_refused(OPTION, folder / MODEL_INDEX, "format", "is no JSON object; download it again")
    _require_equal(folder / MODEL_INDEX, "_class_name", architecture.pipeline, index.get("_class_name"), architecture)
    for name, config in architecture.config.items():
        path = folder / name / "config.json"
        kind = find_class(architecture, config[CLASS])
        if is_loaded(kind) and path not in files:
            words = f"does not exist; give a complete {architecture.name} folder"
            raise weights_refused(OPTION, path, "incomplete", words, missing=f"{name}/config.json")
        if path in files:
            found = files[path]
            for key, value in config.items():
                known = next(iter(found.get("architectures") or ()), None) if key == CLASS else None
                _require_equal(path, key, value, known or found.get(key, value), architecture)
            if is_loaded(kind):
                verify_component(path.parent, kind, found, files, OPTION)
    return DiffusersWeights(architecture, folder)


def skeleton_weights(architecture: Architecture) -> DiffusersWeights:
    """Random weights: under fake tensors nothing is drawn."""
    return DiffusersWeights(architecture)


def _require_equal(path: Path, key: str, wanted: Any, found: Any, architecture: Architecture) -> None:
    if not _is_alike(wanted, found):
        words = f"has {key}={found!r}, and model={architecture.name!r} {wanted!r}; name the model that it is"
        raise weights_refused(OPTION, path, "config", words, key=key)


def _is_alike(wanted: Any, found: Any) -> bool:
    """Whether two JSON values are equal; of an object, what both have: a folder's has the defaults too."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return all(_is_alike(value, found.get(key, value)) for key, value in wanted.items())
    return json.dumps(wanted, sort_keys=True) == json.dumps(found, sort_keys=True)
