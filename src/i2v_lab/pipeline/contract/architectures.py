"""Architectures as data: what a model is made of, read from ``data/architectures/*.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from i2v_lab.errors import UnknownModel, shown
from i2v_lab.paths import data_dir
from i2v_lab.request import Tiling


@dataclass(frozen=True, eq=False)
class Architecture:
    """One model, in the form in which its runner reads it from a checkpoint's safetensors metadata.

    Compares and hashes by identity: :func:`load_architecture` makes one object a name.

    Attributes:
        name: ``ltx-2.3-22b``, ``ltxv-2b-0.9.8-distilled``, ...
        model_version: As in the checkpoint's metadata; ltx-pipelines picks its sampling defaults by it.
        config: ``transformer`` and ``vae`` sections; ``audio_vae`` and ``vocoder``, or ``scheduler``. For diffusers,
            what differs from the defaults of each component's class.
        upsampler: The spatial latent upsampler's configuration.
        gemma: What differs from ltx-core's built-in Gemma 3 12B: ``text_config``, ``vision_config``, top-level keys.
        sampling: What differs from ltx-pipelines' defaults for this version: ``num_inference_steps``, ``stg_blocks``;
            for ltx-video the published settings of both passes, by variant; for diffusers arguments of both stages.
        request: What to ask for where the caller does not say: width, height, frames, and what its runner needs; a
            tiling as the fields of :class:`~i2v_lab.request.Tiling`.
        runner: Whose code runs it (see :mod:`i2v_lab.pipeline.contract.runner`).
        variants: Which of the samplers there are weights for.
        text_encoder: The T5 encoder's configuration, for ltx-video.
        lora_rank: Rank of the distilled LoRA.
        requires: The lowest version of each distribution that has the model, where the runner's lowest does not.
    """

    name: str
    model_version: str
    config: dict[str, Any]
    request: dict[str, Any]
    upsampler: dict[str, Any] = field(default_factory=dict)
    lora_rank: int = 0
    runner: str = "ltx-2"
    variants: tuple[str, ...] = ("distilled", "dev")
    text_encoder: dict[str, Any] = field(default_factory=dict)
    gemma: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Canonical JSON of everything that determines the weights' layout; equal text means equal layout."""
        names = ("config", "upsampler", "gemma", "text_encoder", "lora_rank")
        layout = {name: getattr(self, name) for name in names}
        return json.dumps(layout, sort_keys=True)


def architecture_names() -> list[str]:
    """Names of all known architectures, sorted."""
    return sorted(path.stem for path in (data_dir() / "architectures").glob("*.json"))


def load_architecture(name: str) -> Architecture:
    """Read one architecture.

    Raises:
        UnknownModel: No file of that name; the message lists those that exist.

    Example:
        >>> load_architecture("ltx-2.3-22b").config["transformer"]["num_layers"]
        48
    """
    names = architecture_names()
    if not isinstance(name, str) or name not in names:
        raise UnknownModel(
            f"model={shown(name)} is not a known architecture; use one of: {', '.join(names)}", model=name
        )
    return _read(name)


@cache
def _read(name: str) -> Architecture:
    values = json.loads((data_dir() / "architectures" / f"{name}.json").read_text(encoding="utf-8"))
    known = set(Architecture.__dataclass_fields__)
    fields: dict[str, Any] = {key: value for key, value in values.items() if key in known}
    if "variants" in fields:
        fields["variants"] = tuple(fields["variants"])
    if fields["request"].get("tiling") is not None:
        fields["request"]["tiling"] = Tiling(**fields["request"]["tiling"])
    return Architecture(**fields)
