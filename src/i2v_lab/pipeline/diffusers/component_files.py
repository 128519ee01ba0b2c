"""Verification of a component's weight files before they are loaded: every header against the component's parameters.

The module is built on the meta device from the folder's own configuration. How a tensor's name in a file becomes a
parameter is decided by the libraries: transformers loads tensors without values, diffusers renames them as it does when
it loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import constants as diffusers_names
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from i2v_lab.pipeline.contract.file_kinds import other_prefix
from i2v_lab.pipeline.contract.weight_headers import Stored, read_headers, reason, weights_refused

Shapes = Mapping[str, tuple[int, ...]]


def is_loaded(kind: Any) -> bool:
    """Whether a component has weights that ``from_pretrained`` reads."""
    return isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin | transformers.PreTrainedModel)


def verify_component(folder: Path, kind: Any, config: dict[str, Any], files: Mapping[Path, Any], option: str) -> None:
    """Check that a component's weight files have exactly the tensors that loading it takes.

    Args:
        folder: Of the component.
        kind: Its class, of diffusers or transformers.
        config: The values of its ``config.json``.
        files: The values of the folder's JSON files, from
            :func:`~i2v_lab.pipeline.contract.weight_folders.require_files`.
        option: The command-line option that named the folder.

    Raises:
        CheckpointError: A file is missing, a pickle or damaged, or a tensor is missing, unknown or of another shape;
            ``fields`` has the ``option``, the ``path``, the ``fault`` and the ``tensor``.
    """
    is_transformers = issubclass(kind, transformers.PreTrainedModel)
    paths = _weight_files(folder, is_transformers, files, option)
    stored = read_headers(paths, option)
    shapes = {key: each.shape for key, each in stored.items()}
    try:
        load = _loaded_by_transformers if is_transformers else _loaded_by_diffusers
        missing, unknown, wrong, expected = load(kind, config, shapes)
    except Exception as error:  # of values of a wrong type almost anything
        words = f"cannot be loaded as {kind.__name__} ({reason(error)}); download it again"
        raise weights_refused(option, folder / "config.json", "format", words) from error
    _refuse(paths[0], kind.__name__, stored, (missing, unknown, wrong, expected), option)


def _refuse(
    path: Path,
    model: str,
    stored: Mapping[str, Stored],
    found: tuple[list[str], list[str], Shapes, Shapes],
    option: str,
) -> None:
    missing, unknown, wrong, expected = found
    prefixes = other_prefix(list(stored), list(expected)) if missing and unknown else None
    if prefixes is not None:
        words = (
            f"has the tensors of {model} under '{prefixes[0]}' instead of '{prefixes[1]}', as another program names "
            "them; use the original file, or rename them"
        )
        raise weights_refused(option, path, "architecture", words, prefix=prefixes[0], expected=prefixes[1])
    if wrong:
        key = min(wrong)
        file = stored[key].path if key in stored else path
        words = f"has {key} of shape {list(wrong[key])}, and {model} {list(expected.get(key, ()))}; use its own file"
        raise weights_refused(option, file, "architecture", words, tensor=key, shape=tuple(wrong[key]))
    if missing:
        words = f"lacks {len(missing)} tensors of {model}, the first {missing[0]}; download it again"
        raise weights_refused(option, path, "incomplete", words, tensor=missing[0], missing=missing)
    if unknown:
        key = unknown[0]
        file = stored[key].path if key in stored else path
        words = f"has {len(unknown)} tensors that {model} does not have, the first {key}; use its own file"
        raise weights_refused(option, file, "unknown", words, tensor=key)


# --- Which files are read ---


def _weight_files(folder: Path, is_transformers: bool, files: Mapping[Path, Any], option: str) -> list[Path]:
    """The files that loading reads: one, or those that the index names."""
    if is_transformers:
        whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    else:
        whole = folder / diffusers_names.SAFETENSORS_WEIGHTS_NAME
        index = folder / diffusers_names.SAFE_WEIGHTS_INDEX_NAME
    if index in files and not (is_transformers and whole.is_file()):  # diffusers prefers the index
        names = files[index].get("weight_map") if isinstance(files[index], dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise weights_refused(option, index, "format", "has no weight_map of files; download it again")
        return [folder / name for name in sorted(set(names.values()))]
    if whole.is_file():
        return [whole]
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".safetensors", ".pt", ".ckpt"))
    words = f"holds no {whole.name}" + (f" but {', '.join(others[:3])}" if others else "")
    remedy = "download it in safetensors, without a variant"
    raise weights_refused(option, folder, "incomplete", f"{words}; {remedy}", missing=whole.name)


# --- What the libraries make of them ---


def _loaded_by_diffusers(
    kind: Any, config: dict[str, Any], shapes: Shapes
) -> tuple[list[str], list[str], Shapes, Shapes]:
    with torch.device("meta"):
        module = kind.from_config(config)
        tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
    module._fix_state_dict_keys_on_load(tensors)
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    ignored = kind._keys_to_ignore_on_load_unexpected or ()
    missing = [key for key in expected if key not in tensors]
    unknown = [key for key in tensors if key not in expected and not any(re.search(each, key) for each in ignored)]
    wrong = {
        key: tuple(tensor.shape)
        for key, tensor in tensors.items()
        if key in expected and tuple(tensor.shape) != expected[key]
    }
    return missing, unknown, wrong, expected


def _loaded_by_transformers(
    kind: Any, config: dict[str, Any], shapes: Shapes
) -> tuple[list[str], list[str], Shapes, Shapes]:
    with _silent():
        module, found = kind.from_pretrained(
            None,
            config=kind.config_class.from_dict(config),
            state_dict={key: torch.empty(shape, device="meta") for key, shape in shapes.items()},
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    wrong = {key: tuple(shape) for key, shape, _ in found["mismatched_keys"]}
    return sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), wrong, expected


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' own reports and bar."""
    level, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bar:
            transformers_logging.enable_progress_bar()
