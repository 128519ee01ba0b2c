"""LoRA files of LTX-2: their formats, what is applied of them, and how it is scaled.

Layers are named after ComfyUI (``diffusion_model.``), after diffusers (``transformer.``) or without a prefix, each also
below PEFT's ``base_model.model.``; pairs as in :data:`PAIRS`. A pair's product is scaled by alpha / rank, with alpha
from ``<layer>.alpha``, or from the adapter's configuration that diffusers writes into the metadata; by 1 without an
alpha. ltx-core's own key map knows the first prefix and the first names, and no alpha; what it does not know it drops.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ltx_core.loader.sd_ops import KeyValueOperationResult
from safetensors import safe_open

from i2v_lab.errors import CheckpointError
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.weight_dtypes import verify_dtypes
from i2v_lab.pipeline.contract.weight_files import architecture_remedy
from i2v_lab.pipeline.contract.weight_headers import Stored, read_headers, weights_refused
from i2v_lab.pipeline.ltx2.layout import file_layout, transformer_key_ops

OPTION = "--lora"
PREFIXES = ("diffusion_model.", "transformer.", "")
PEFT_PREFIX = "base_model.model."  # before the others, where PEFT's own module was saved
PAIRS = (  # endings of the two matrices' names
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),  # diffusers before it had PEFT
    (".lora_A.default.weight", ".lora_B.default.weight"),  # PEFT, with the name of its adapter
)
PARTS = {ending: part for pair in PAIRS for ending, part in zip(pair, "AB", strict=True)}
TWINS = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])}
ALPHA = ".alpha"
CHECKPOINT_PREFIX = "model.diffusion_model."
OTHER_FORMATS = {  # what is in a key of a format that is not a plain LoRA
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "loha_": "LoHa",
    "lora_mid": "LoCon with lora_mid",
    ".oft_": "OFT",
    ".diff.": "differences of weights",
    ".diff_b.": "differences of weights",
}
OTHER_OPTIONS = ("use_dora", "use_rslora", "alpha_pattern")  # of an adapter's configuration
METADATA = "lora_adapter_metadata"
_REMEDY = "use a plain LoRA of this model (lora_A and lora_B, or lora_down and lora_up)"


@dataclass(frozen=True)
class LoraKeys:
    """What is applied of a LoRA file: stands in for ltx-core's key map when the file is loaded.

    Attributes:
        names: For each tensor that is applied its name in the file and its name for ltx-core.
        factors: For the names for ltx-core the factor of a tensor, whose product is then computed in float32; without
            one the tensor is taken as it is.
        summary: What is applied, in a line.
    """

    names: Mapping[str, str]
    factors: Mapping[str, float]
    summary: str

    def apply_to_key(self, key: str) -> str | None:
        """The name for ltx-core of a tensor of the file; ``None`` for one that is not applied."""
        return self.names.get(key)

    def apply_to_key_value(self, key: str, value: torch.Tensor) -> list[KeyValueOperationResult]:
        """The tensor with its factor.

        Args:
            key: The name for ltx-core.
            value: The tensor as stored.
        """
        factor = self.factors.get(key)
        return [KeyValueOperationResult(key, value if factor is None else value.float() * factor)]


@dataclass
class _Layer:
    """The keys in the file of one layer's tensors."""

    name: str
    parts: dict[str, str]
    alpha: str | None = None


def read_lora(path: Path, architecture: Architecture) -> LoraKeys:
    """Read a LoRA's header and its scales, and check both. Reads no other tensor.

    Args:
        path: The safetensors file.
        architecture: The model that it is applied to.

    Raises:
        CheckpointError: It is of another format or architecture, names a layer that does not exist, or lacks a tensor;
            ``fields`` has the ``path``, the ``fault``, and the ``tensor`` or what is ``missing``.
    """
    stored = read_headers([path], OPTION)
    for key, item in stored.items():
        kind = next((kind for word, kind in OTHER_FORMATS.items() if word in f"{key}."), None)
        if kind is not None:
            raise _refused(path, "format", f"is no plain LoRA but {kind} ({key}); {_REMEDY}", key, item)
    shapes = _transformer_layers(architecture)
    layers, others = _layers(stored, path, architecture)
    with safe_open(path, framework="pt") as file:
        default = _metadata_alpha(file.metadata() or {}, path)
        alphas = {layer.alpha: float(file.get_tensor(layer.alpha)) for layer in layers if layer.alpha is not None}
    names: dict[str, str] = {}
    factors: dict[str, float] = {}
    scales = []
    for layer in layers:
        rank = _verify_pair(layer, stored, shapes[layer.name], path, architecture)
        alpha = default if layer.alpha is None else alphas[layer.alpha]
        if layer.alpha is not None and (not math.isfinite(alpha or 0.0) or default not in (None, alpha)):
            words = f"has {layer.alpha} = {alpha:g}, not finite or not the {default} of its metadata; export it again"
            raise _refused(path, "values", words, layer.alpha, stored[layer.alpha])
        scales.append(1.0 if alpha is None else alpha / rank)
        own = {layer.parts[part]: f"{layer.name}.lora_{part}.weight" for part in "AB"}
        names |= own
        if scales[-1] != 1 or {stored[key].dtype for key in own} != {"BF16"}:
            factors |= {name: scales[-1] if ".lora_B." in name else 1.0 for name in own.values()}
    return LoraKeys(names, factors, _summary(layers, others, scales, architecture))


def _transformer_layers(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the linear layers of the transformer, by their names."""
    key_ops = transformer_key_ops(architecture)
    found = {key_ops.apply_to_key(key): shape for key, shape in file_layout(architecture, "checkpoint").items()}
    return {
        name.removesuffix(".weight"): shape
        for name, shape in found.items()
        if name is not None and name.endswith(".weight") and len(shape) == 2
    }


def _layers(stored: Mapping[str, Stored], path: Path, architecture: Architecture) -> tuple[list[_Layer], list[str]]:
    """The layers of the transformer that the file names, and those of the embeddings connectors beside it."""
    transformer, checkpoint = _transformer_layers(architecture), file_layout(architecture, "checkpoint")
    found: dict[str, _Layer] = {}
    others: set[str] = set()
    unknown = []
    for key, item in stored.items():
        suffix = next((suffix for suffix in (*PARTS, ALPHA) if key.endswith(suffix)), None)
        inner = key.removeprefix(PEFT_PREFIX)
        prefix = next(prefix for prefix in PREFIXES if inner.startswith(prefix))
        name = inner.removeprefix(prefix).removesuffix(suffix or "")
        if suffix is None or f"{CHECKPOINT_PREFIX}{name}.weight" not in checkpoint:
            unknown.append(key)
        elif name not in transformer:
            others.add(name)
        else:
            layer = found.setdefault(name, _Layer(name, {}))
            part = PARTS.get(suffix)
            if (layer.alpha if part is None else layer.parts.get(part)) is not None:
                words = f"names {name} twice, the second time as {key}; export it again"
                raise _refused(path, "duplicate", words, key, item)
            if part is not None:
                layer.parts[part] = key
            else:
                if math.prod(item.shape) != 1:
                    words = f"has {key} of shape {item.shape}, not one number; export it again"
                    raise _refused(path, "architecture", words, key, item)
                layer.alpha = key
    model = architecture.name
    if not found:
        count = sum(key.endswith(tuple(PARTS)) for key in stored)
        words = (
            f"is of another architecture than {model}: none of its {count} LoRA tensors names a layer of the "
            f"transformer; {architecture_remedy(model)}"
        )
        raise weights_refused(OPTION, path, "architecture", words)
    if unknown:
        words = f"has {len(unknown)} tensors that name no layer of {model}, the first {unknown[0]}; {_REMEDY}"
        raise _refused(path, "unknown", words, unknown[0], stored[unknown[0]])
    return list(found.values()), sorted(others)


def _verify_pair(
    layer: _Layer, stored: Mapping[str, Stored], weight: tuple[int, ...], path: Path, architecture: Architecture
) -> int:
    """Check a layer's pair of matrices; returns its rank."""
    if len(layer.parts) < 2:
        key = next(iter(layer.parts.values()), f"{layer.name}.lora_B.weight")
        ending = next(ending for ending in TWINS if key.endswith(ending))
        missing = key.removesuffix(ending) + TWINS[ending]
        words = f"lacks {missing}; download or export it again"
        raise weights_refused(OPTION, path, "incomplete", words, missing=[missing])
    a, b = (layer.parts[part] for part in "AB")
    verify_dtypes({key: stored[key] for key in (a, b)}, OPTION)
    for key, axis in ((a, 1), (b, 0)):  # the other axis is the rank, which may be any
        shape = stored[key].shape
        if len(shape) != 2 or shape[axis] != weight[axis] or 0 in shape:
            model = architecture.name
            words = f"is of another architecture than {model}: {key} has shape {shape}; {architecture_remedy(model)}"
            raise weights_refused(OPTION, path, "architecture", words, tensor=key)
    ranks = stored[a].shape[0], stored[b].shape[1]
    if ranks[0] != ranks[1]:
        words = f"has {a} of rank {ranks[0]} and {b} of rank {ranks[1]}; download or export it again"
        raise weights_refused(OPTION, path, "incomplete", words, tensor=a, ranks=ranks)
    return ranks[0]


def _metadata_alpha(metadata: Mapping[str, str], path: Path) -> float | None:
    """The alpha of an adapter's configuration, which diffusers writes into the metadata."""
    if METADATA not in metadata:
        return None
    try:
        values = {key.removeprefix("transformer."): value for key, value in json.loads(metadata[METADATA]).items()}
        other = next((name for name in OTHER_OPTIONS if values.get(name)), None)
        alpha = values.get("lora_alpha")
        found = None if alpha is None else float(alpha)
        if found is not None and not math.isfinite(found):
            raise ValueError(f"lora_alpha is {found}")
    except (AttributeError, TypeError, ValueError) as error:
        words = f"has a '{METADATA}' in its metadata that is not readable ({error}); export it again"
        raise weights_refused(OPTION, path, "config", words) from error
    if other is not None:
        words = f"is a LoRA with {other}={values[other]!r} in its metadata, which is not applied; {_REMEDY}"
        raise weights_refused(OPTION, path, "format", words, tensor=other)
    return found


def _summary(
    layers: Sequence[_Layer], others: Sequence[str], scales: Sequence[float], architecture: Architecture
) -> str:
    blocks = [layer for layer in layers if layer.name.startswith("transformer_blocks.")]
    words = f"LoRA: {len(blocks)} of {len(file_layout(architecture, 'lora')) // 2} layers"
    if len(layers) > len(blocks):
        words += f", and {len(layers) - len(blocks)} outside the blocks"
    if set(scales) != {1.0}:
        low, high = min(scales), max(scales)
        words += f", scaled by {low:g}" + (f" to {high:g}" if high > low else "")
    return words + (f"; {len(others)} of the embeddings connectors are not applied" if others else "")


def _refused(path: Path, fault: Any, words: str, key: str, item: Stored) -> CheckpointError:
    return weights_refused(OPTION, path, fault, words, tensor=key, dtype=item.dtype)
