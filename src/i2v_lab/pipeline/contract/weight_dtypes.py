"""Verification of how a weight file stores its values: dtypes that are read, and the scales of float8 weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from i2v_lab.errors import CheckpointError
from i2v_lab.pipeline.contract.scaled_fp8 import DESCRIPTION, INPUT_SCALES, fits, is_marker, scale_keys, weight_of
from i2v_lab.pipeline.contract.weight_headers import Stored, unknown_refused, weights_refused

FLOATS = ("BF16", "F16", "F32", "F64")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALE_DTYPES = ("BF16", "F16", "F32")  # each exact in float32
FORMATS = ("float8_e4m3fn", "float8_e5m2")  # as quantization descriptions name them
REMEDY = "use a file in bfloat16, or in float8 with one weight_scale a tensor or channel"


def verify_dtypes(stored: Mapping[str, Stored], option: str) -> None:
    """Refuse weights in integers, packed values and other types that are not read.

    Args:
        stored: The weights.
        option: The command-line option that named their files.

    Raises:
        CheckpointError: With the ``tensor`` and its ``dtype``.
    """
    for key, item in stored.items():
        if item.dtype not in (*FLOATS, *FLOAT8):
            raise _dtype_refused(option, item, key, f"holds {key} in {item.dtype}, which is not read")


def verify_scales(paths: Sequence[Path], stored: Mapping[str, Stored], expected: Collection[str], option: str) -> None:
    """Check the companions of float8 weights: each belongs to one, and gives a product that is known.

    Args:
        paths: The files.
        stored: All their tensors.
        expected: The names of the weights.
        option: The command-line option that named the files.

    Raises:
        CheckpointError: With the ``tensor`` and its ``dtype``; or with the scales that are ``missing``, where only
            some float8 matrices of a file have scales.
    """
    scales = scale_keys(stored)
    for key, item in stored.items():
        weight = weight_of(key)
        if is_marker(key):
            if len(item.shape) != 1 or item.shape[0] > 2:
                raise unknown_refused(option, stored, [key])
        elif weight is not None:
            if weight not in expected:
                raise unknown_refused(option, stored, [key])
            _verify_companion(stored, key, weight, option)
            if key not in scales.values() and key.rpartition(".")[2] not in (*INPUT_SCALES, DESCRIPTION):
                raise _dtype_refused(option, item, key, f"has two scales for {weight}: {key} and {scales[weight]}")
    if scales or any(map(is_marker, stored)):
        float8 = [key for key, item in stored.items() if item.dtype in FLOAT8 and len(item.shape) > 1]
        missing = [f"{key}_scale" for key in float8 if key.endswith(".weight") and key not in scales]
        if missing:
            words = (
                f"lacks the scales of {len(missing)} of {len(float8)} float8 weights, the first {missing[0]}; download "
                "or export it again"
            )
            path = stored[missing[0].removesuffix("_scale")].path
            raise weights_refused(option, path, "incomplete", words, missing=missing)
    for path in paths:
        for layer, description in _descriptions(path, stored):
            _verify_description(option, path, layer, description)


def _verify_companion(stored: Mapping[str, Stored], key: str, weight: str, option: str) -> None:
    item, base = stored[key], stored[weight]
    name = key.rpartition(".")[2]
    if base.path != item.path:
        words = f"has {key}, but {weight} is in '{base.path.name}'; keep both in one file"
        raise _dtype_refused(option, item, key, words, remedy="")
    if base.dtype not in FLOAT8:
        words = f"has {key} for {weight} in {base.dtype}, where only float8 has a scale"
        raise _dtype_refused(option, base, weight, words)
    if name not in (*INPUT_SCALES, DESCRIPTION) and (
        item.dtype not in SCALE_DTYPES or not fits(item.shape, base.shape)
    ):
        words = (
            f"has {key} in {item.dtype} of shape {item.shape} for {weight} of shape {base.shape}, which is not known"
        )
        raise _dtype_refused(option, item, key, words)


def _descriptions(path: Path, stored: Mapping[str, Stored]) -> Iterator[tuple[str, Any]]:
    """What a file says about the format of its layers, by their names: in its metadata, and in tensors of its own."""
    described = [key for key, item in stored.items() if item.path == path and key.endswith(f".{DESCRIPTION}")]
    with safe_open(path, framework="pt") as file:
        metadata = _parsed((file.metadata() or {}).get("_quantization_metadata", "{}"))
        layers = metadata.get("layers", {}) if isinstance(metadata, dict) else None
        yield from layers.items() if isinstance(layers, dict) else [("_quantization_metadata", metadata)]
        for key in described:
            yield key.removesuffix(f".{DESCRIPTION}"), _parsed(bytes(file.get_tensor(key).flatten().tolist()))


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _verify_description(option: str, path: Path, layer: str, description: Any) -> None:
    """Refuse a format other than float8 with one scale, such as one whose weights were rotated."""
    known = isinstance(description, dict) and description.get("format") in FORMATS
    if not known or set(description) - {"format", "full_precision_matrix_mult"}:
        words = f"describes {layer} as {description!r}, which is not read; {REMEDY}"
        raise weights_refused(option, path, "dtype", words, tensor=f"{layer}.weight", dtype=description)


def _dtype_refused(option: str, item: Stored, key: str, words: str, remedy: str = f"; {REMEDY}") -> CheckpointError:
    return weights_refused(option, item.path, "dtype", words + remedy, tensor=key, dtype=item.dtype)
