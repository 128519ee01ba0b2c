"""Reference values of the published study, and each study's parameters by model; both from ``data``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pandas as pd

from i2v_lab.errors import InvalidRequest
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import check_request
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.runs.spec import make_request
from i2v_lab.units import GIB

KEYS = ["model", "width", "height", "frames", "decode_scope", "tile_px", "tile_frames", "consumer"]


@cache
def published() -> dict[str, Any]:
    """All of ``data/published/no_grad_study.json``."""
    return dict(json.loads((data_dir() / "published" / "no_grad_study.json").read_text(encoding="utf-8")))


def published_runs() -> pd.DataFrame:
    """Every run of the published study, at its own tiling.

    Returns:
        ``model, width, height, frames, decode_scope, tile_px, tile_frames, consumer, published_bytes,
        published_seconds, published_outcome``; for a run that ended ``out of memory`` the bytes are the most it
        had requested.
    """
    study = published()
    default = {"tile_px": Tiling().tile_px, "tile_frames": Tiling().tile_frames}
    complete = pd.DataFrame([*study["before_after"], *study["resolutions"]]).assign(published_outcome="complete")
    failed = pd.DataFrame(study["out_of_memory"]).assign(published_outcome="out of memory")
    table = pd.concat([complete, failed], ignore_index=True).fillna(default).assign(model=study["model"])
    table["published_bytes"] = (table["peak_gib"] * GIB).round().astype("Int64")
    table["published_seconds"] = table["seconds"].astype("Float64")
    table = table.astype({"tile_px": "Int64", "tile_frames": "Int64"}).assign(consumer="plain")
    columns = [*KEYS, "published_bytes", "published_seconds", "published_outcome"]
    return table[columns].drop_duplicates(KEYS).reset_index(drop=True)


def beside_published(runs: pd.DataFrame) -> pd.DataFrame:
    """Join the published study's columns to runs.

    Args:
        runs: Of :func:`~i2v_lab.runs.sources.runs_frame`.

    Returns:
        ``runs`` with ``published_bytes, published_seconds, published_outcome``; missing, or empty, where the study has
        no such run.
    """
    plain = (runs["variant"] == "distilled") & (runs["quantization"] == "fp8-cast")
    joined = runs.merge(published_runs(), on=KEYS, how="left")
    for name in ("published_bytes", "published_seconds"):
        joined[name] = joined[name].where(plain.to_numpy())
    joined["published_outcome"] = joined["published_outcome"].where(plain.to_numpy()).fillna("").astype("str")
    return joined


def published_peak(request: I2VRequest, model: str) -> int | None:
    """The published peak of a run in bytes; ``None`` if no run of this size was published, or it did not complete."""
    runs = published_runs()
    same = (runs["model"] == model) & (runs["decode_scope"] == request.decode_scope.value)
    for name in ("width", "height", "frames"):
        same &= runs[name] == getattr(request, name)
    found = runs[same & (runs["published_outcome"] == "complete")]["published_bytes"]
    return None if found.empty else int(found.iloc[0])


def varied(model: str, what: str, given: Sequence[Any] = ()) -> list[Any]:
    """A study's list of parameter values: as given, or the model's default in ``data/studies.json``.

    Args:
        model: An architecture's name.
        what: The list's name in that file, such as ``sizes``.
        given: Takes precedence if it is not empty.

    Raises:
        InvalidRequest: Nothing is given, and the file has no entry for the model.
    """
    if given:
        return list(given)
    known = json.loads((data_dir() / "studies.json").read_text(encoding="utf-8"))
    if model not in known:
        raise InvalidRequest(
            f"model={model!r} has no entry in data/studies.json; give {what} as a parameter", model=model
        )
    return list(known[model][what])


def to_size(text: str) -> tuple[int, int]:
    """Parse ``"1024x768"`` as width and height.

    Raises:
        InvalidRequest: It has another format.
    """
    try:
        width, height = (int(part) for part in text.split("x"))
    except (ValueError, AttributeError):
        raise InvalidRequest(f"size={text!r} is not a size; write it as 1024x768", size=text) from None
    return width, height


def to_tiling(text: str) -> Tiling | None:
    """Parse ``"768/64/80/24"`` as a tiling, and ``"none"`` as ``None``.

    Raises:
        InvalidRequest: It has another format, or breaks a rule of :class:`~i2v_lab.request.Tiling`.
    """
    if text == "none":
        return None
    try:
        numbers = [int(part) for part in text.split("/")]
    except (ValueError, AttributeError):
        numbers = []
    if len(numbers) != 4:
        raise InvalidRequest(f"tiling={text!r} is not a tiling; write it as 768/64/80/24, or none", tiling=text)
    return Tiling(*numbers)


def study_request(model: str, width: int = 0, height: int = 0, frames: int = 0, **rest: Any) -> I2VRequest:
    """A study's base request; 0 stands for the model's default width, height or number of frames.

    Raises:
        InvalidRequest: The model does not support it.
    """
    asked = {"width": width, "height": height, "frames": frames}
    request = make_request(model, **{name: value for name, value in asked.items() if value}, **rest)
    check_request(load_architecture(model), request)
    return request
