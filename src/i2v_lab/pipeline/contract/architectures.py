"""Architectures as data: what a model is made of, read from ``data/architectures/*.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from i2v_lab.errors import UnknownModel, did_you_mean, shown
from i2v_lab.paths import data_dir
from i2v_lab.request import Tiling

TINY = "-tiny"  # ends the name of the small model in the file of a large one
LISTED = "`i2v-lab models` lists all"
OWN = ("tiny", "parameters", "repository", "note")  # are not those of the model that another is `like`


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
        pipeline: For diffusers, the class of the pipeline; empty for LTX-2's two stages, which are two of them.
        arguments: Of its constructor, besides the components.
        dtypes: Of its components' weights, by name; the name ``""`` is for all others.
        sizes: The sizes that it takes, as the fields of a :class:`~i2v_lab.pipeline.contract.sizes.SizeRule`, where its
            runner has no rule for all models.
        image_first: Whether its pipeline encodes the still before the prompt.
        parameters: How many there are in each component, where they were counted.
        source: Where the configuration was published.
        note: What else there is to know.
        repository: Names of the repositories that have its weights, for diffusers.
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
    pipeline: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    image_first: bool = False
    parameters: dict[str, int] = field(default_factory=dict)
    source: str = ""
    note: str = ""
    repository: tuple[str, ...] = ()
    requires: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Canonical JSON of everything that determines the weights' layout; equal text means equal layout."""
        names = ["config", "upsampler", "gemma", "text_encoder", "lora_rank"]
        names += [name for name in ("pipeline", "arguments", "dtypes") if getattr(self, name)]
        layout = {name: getattr(self, name) for name in names}
        return json.dumps(layout, sort_keys=True)


def architecture_names() -> list[str]:
    """Names of all known architectures, sorted; a model with a ``tiny`` section in its file is two of them."""
    return sorted(name for name, path in _files().items() if path.parent.name == "architectures")


def model_names() -> list[str]:
    """:func:`architecture_names`, and models of ``data/published/models``: those of published peaks alone."""
    return sorted(_files())


@cache
def _files() -> dict[str, Path]:
    """The file of each architecture."""
    found = {}
    folders = [data_dir() / "published" / "models", data_dir() / "architectures"]
    for path in (path for folder in folders for path in folder.glob("*.json")):
        found[path.stem] = path
        if "tiny" in json.loads(path.read_text(encoding="utf-8")):
            found[path.stem + TINY] = path
    return found


def load_architecture(name: str) -> Architecture:
    """Read one architecture.

    Raises:
        UnknownModel: No file of that name; the message lists those that exist.

    Example:
        >>> load_architecture("ltx-2.3-22b").config["transformer"]["num_layers"]
        48
    """
    if not isinstance(name, str) or name not in _files():
        names = architecture_names()
        raise UnknownModel(
            f"model={shown(name)} is not a known architecture; {did_you_mean(name, names, LISTED)}", model=name
        )
    return _read(name)


@cache
def _read(name: str) -> Architecture:
    path = _files()[name]
    values = json.loads(path.read_text(encoding="utf-8"))
    if "like" in values:
        like = _files()[values.pop("like")]
        values = _merged(json.loads(like.read_text(encoding="utf-8")), {**dict.fromkeys(OWN), **values})
    if name != path.stem:
        values = _merged(values, {**values["tiny"], "name": name})
    known = set(Architecture.__dataclass_fields__)
    fields: dict[str, Any] = {key: value for key, value in values.items() if key in known}
    for key in ("variants", "repository"):
        if key in fields:
            fields[key] = tuple(fields[key])
    if fields["request"].get("tiling") is not None:
        fields["request"]["tiling"] = Tiling(**fields["request"]["tiling"])
    return Architecture(**fields)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested values with some of them replaced; ``None`` removes one."""
    merged = dict(values)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged
