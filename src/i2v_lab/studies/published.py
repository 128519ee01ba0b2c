"""Reference values of the published study, and each study's parameters by model; both from ``data``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pandas as pd

from i2v_lab.errors import InvalidRequest
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.contract.sizes import SizeRule
from i2v_lab.pipeline.registry import check_request, runner_of
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.runs.spec import make_request
from i2v_lab.units import GIB

KEYS = ["model", "width", "height", "frames", "decode_scope", "tile_px", "tile_frames", "consumer"]


@cache
def published() -> dict[str, Any]:
    """All of ``data/published/no_grad_study.json``."""
    return dict(json.loads((data_dir() / "published" / "no_grad_study.json").read_text(encoding="utf-8")))


def citation() -> str:
    """The published study in Markdown: author, title with a link to it, and its set-up.

    Example:
        >>> citation().startswith("shinji shimizu, [My high-res image-to-video kept OOMing")
        True
    """
    study = published()
    title, _, place = study["source"].rpartition(", ")
    return f"{study['author']}, [{title.strip(chr(34))}]({study['url']}), {place}. Its set-up: {study['setup']}."


def published_runs() -> pd.DataFrame:
    """Every run of the published study, at its own tiling.

    Returns:
        ``model, width, height, frames, decode_scope, tile_px, tile_frames, consumer, published_bytes,
        published_seconds, published_outcome, published_note``; for a run that ended ``out of memory`` the bytes are
        the most it had requested, and the note says what else was on the card.
    """
    study = published()
    default = {"tile_px": Tiling().tile_px, "tile_frames": Tiling().tile_frames}
    complete = pd.DataFrame([*study["before_after"], *study["resolutions"]]).assign(published_outcome="complete")
    failed = pd.DataFrame(study["out_of_memory"]).assign(published_outcome="out of memory")
    table = pd.concat([complete, failed], ignore_index=True).fillna({**default, "note": ""})
    table["published_bytes"] = (table["peak_gib"] * GIB).round().astype("Int64")
    table["published_seconds"] = table["seconds"].astype("Float64")
    table = table.astype({"tile_px": "Int64", "tile_frames": "Int64"})
    table = table.assign(model=study["model"], consumer="plain").rename(columns={"note": "published_note"})
    columns = [*KEYS, "published_bytes", "published_seconds", "published_outcome", "published_note"]
    return table[columns].drop_duplicates(KEYS).reset_index(drop=True)


def beside_published(runs: pd.DataFrame) -> pd.DataFrame:
    """Join the published study's columns to runs.

    Args:
        runs: Of :func:`~i2v_lab.runs.sources.runs_frame`.

    Returns:
        ``runs`` with ``published_bytes, published_seconds, published_outcome, published_note``; missing, or empty,
        where the study has no such run. The study does not say by how much its tiles overlap: any overlap is joined.
    """
    plain = (runs["variant"] == "distilled") & (runs["quantization"] == "fp8-cast")
    joined = runs.merge(published_runs(), on=KEYS, how="left")
    for name in ("published_bytes", "published_seconds"):
        joined[name] = joined[name].where(plain.to_numpy())
    for name in ("published_outcome", "published_note"):
        joined[name] = joined[name].where(plain.to_numpy()).fillna("").astype("str")
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
    """A study's list of parameter values: as given, or the model's own.

    Those are in ``data/studies.json``; for a model without an entry they are around its default size and number of
    frames.

    Args:
        model: An architecture's name.
        what: The list's name in that file, such as ``sizes``.
        given: Takes precedence if it is not empty.

    Raises:
        UnknownModel: Nothing is given, and there is no such model.
    """
    if given:
        return list(given)
    known = json.loads((data_dir() / "studies.json").read_text(encoding="utf-8"))
    return list(known[model][what] if model in known else _around_default(model, what))


def _around_default(model: str, what: str) -> list[Any]:
    architecture = load_architecture(model)
    rule, own = runner_of(architecture).size_rule(architecture), make_request(model)
    if what == "tilings":
        return ["none"]
    if what == "policy_sizes":
        return [f"{own.width}x{own.height}"]
    if what in ("frames", "map_frames"):
        smaller = (own.frames - 1) // 2 // rule.frame_step * rule.frame_step + 1
        return sorted({smaller, own.frames})
    return [f"{width}x{height}" for width, height in sizes_around(rule, own)]


def sizes_around(
    rule: SizeRule, request: I2VRequest, scales: Sequence[float] = (0.5, 0.75, 1.0)
) -> list[tuple[int, int]]:
    """Sizes that a model takes, near the request's own scaled by each factor, ascending.

    Example:
        >>> from i2v_lab.pipeline.contract.sizes import SizeRule
        >>> rule = SizeRule(pixel_multiple=16, min_pixels=16, frame_step=4, spatial_scale=8, temporal_scale=4)
        >>> sizes_around(rule, I2VRequest(image="still.png", width=832, height=480))
        [(416, 240), (624, 352), (832, 480)]
    """
    if rule.only:
        near = sorted(rule.only, key=lambda size: abs(size[0] * size[1] - request.width * request.height))
        return sorted(
            {(request.width, request.height), *near[: len(scales)]}, key=lambda size: (size[0] * size[1], size)
        )
    multiple, least = rule.pixel_multiple, rule.min_pixels
    found = {
        (
            max(least, math.ceil(scale * request.width / multiple - 0.5) * multiple),
            max(least, math.ceil(scale * request.height / multiple - 0.5) * multiple),
        )
        for scale in scales
    }
    return sorted({*found, (request.width, request.height)}, key=lambda size: (size[0] * size[1], size))


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
