"""What fits which card, and how long it takes: every model at a few sizes, on every card, for one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from i2v_lab.capacity.cards import fitting_bytes, gpu_table
from i2v_lab.capacity.device_profile import NOT_MEASURED, REFERENCE, has_profile
from i2v_lab.capacity.time_model import seconds_on
from i2v_lab.errors import InvalidRequest, RunnerUnavailable
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture
from i2v_lab.pipeline.registry import check_request, runner_of
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest
from i2v_lab.runs.sources import Observation, Source
from i2v_lab.runs.spec import DEFAULT_STILL, FULL_SIZE_MODEL, RunSpec, make_request
from i2v_lab.studies.placed import (
    RESIDENT,
    Placed,
    best_placements,
    forecasts_in_turn,
    on_all_cores,
    rates_of,
    settings_ways,
    waiting_bytes,
)
from i2v_lab.units import GIB

COMMON = (832, 480)
"""A size that most models were published with, at which they are compared."""
ALIKE = 0.1  # of the pixels: the model's own size where it is as near
BUDGETS_GIB = (*range(3, 17), 20, 24, 28, 32, 40, 48, 64, 80)


def sizes_of(model: str) -> list[tuple[int, int]]:
    """The sizes that a model is shown at, in ascending order.

    Example:
        >>> sizes_of("wan-2.2-ti2v-5b"), sizes_of("ltx-2-19b-diffusers"), sizes_of("framepack-i2v")
        ([(832, 480)], [(768, 512)], [(480, 832)])
    """
    return sorted({(each.width, each.height) for each in requests_of(model)}, key=lambda size: size[0] * size[1])


def requests_of(model: str) -> list[I2VRequest]:
    """The requests that a model is shown with.

    Args:
        model: An architecture's name.

    Returns:
        Those of ``answer`` in ``data/studies.json``, else one at the size nearest to :data:`COMMON`, with the
        model's own number of frames: a second size would double the time that the page takes.
    """
    own = make_request(model, image=DEFAULT_STILL)
    known = json.loads((data_dir() / "studies.json").read_text(encoding="utf-8")).get(model, {})
    if "answer" in known:
        shapes = [map(int, each.split("x")) for each in known["answer"]]
        return [replace(own, width=width, height=height, frames=frames) for width, height, frames in shapes]
    architecture = load_architecture(model)
    multiple = runner_of(architecture).size_rule(architecture).pixel_multiple
    width, height = (round(side / multiple) * multiple for side in COMMON)
    if abs(width * height / (own.width * own.height) - 1) <= ALIKE:
        return [own]
    common = replace(own, width=width, height=height)
    try:
        check_request(architecture, common)
    except InvalidRequest:  # a model of one size
        return [own]
    return [common]


def answer_of(observations: Sequence[Observation], gpus: Sequence[str] = ()) -> dict[str, Any]:
    """The best placements for the answer page, beside the study of a model.

    Args:
        observations: Of :func:`~i2v_lab.studies.card_map.map_specs`. Of the model of full size every other model is
            there too; of another model only what was observed, and of recorded runs nothing.
        gpus: Names in ``data/gpus.csv``; all of them if empty.

    Returns:
        As :func:`answer`.
    """
    if observations[0].spec.model == FULL_SIZE_MODEL and observations[0].source is not Source.RECORDED:
        return answer(gpus=gpus)
    seen = [each.spec for each in observations if each.run is not None and each.source is not Source.RECORDED]
    return _answer(list(dict.fromkeys(seen)), gpus, {})


def answer(models: Sequence[str] = (), gpus: Sequence[str] = ()) -> dict[str, Any]:
    """The best placement of every request on every card, as JSON values.

    Args:
        models: Names of architectures; every one of full size whose package is installed, if empty.
        gpus: Names in ``data/gpus.csv``; all of them if empty.

    Returns:
        ``cards``: of each ``name, memory_bytes, rates`` (``measured``, ``published`` or empty). ``models``: names.
        ``unavailable``: of those whose package is missing, why. ``reference``: the card whose seconds are given for a
        size of memory; ``caveat`` of published rates. ``points``: of each ``model, width, height, frames``; ``placed``:
        whether its placements are solved; ``ways``, each with ``name, needed_bytes, peak_bytes, peak_phase,
        host_bytes, options, seconds`` by card; ``best``: for each card the index of the fastest way that fits it, or
        ``None``; and ``least_bytes``, what is needed at least.
    """
    names = list(models) or [each for each in architecture_names() if "tiny" not in each]
    unavailable, asked = {}, []
    for model in names:
        architecture = load_architecture(model)
        try:
            runner_of(architecture).require_package(architecture)
        except RunnerUnavailable as error:
            unavailable[model] = str(error)
            continue
        asked += [RunSpec(request=request, model=model) for request in requests_of(model)]
    return _answer(asked, gpus, unavailable)


def smallest_cards(answer: Mapping[str, Any]) -> pd.DataFrame:
    """The smallest card that runs each request of the answer page.

    Args:
        answer: Of :func:`answer`.

    Returns:
        ``model, size, frames, gpu, memory_bytes, name, needed_bytes, host_bytes, predicted_seconds, rates``; the cells
        of the card are missing where none runs it, but for ``needed_bytes``, which is what is needed at least.
    """
    rows = []
    for point in answer["points"]:
        card = next((each for each in answer["cards"] if point["best"][each["name"]] is not None), None)
        way = None if card is None else point["ways"][point["best"][card["name"]]]
        row = {"model": point["model"], "size": f"{point['width']}x{point['height']}", "frames": point["frames"]}
        row |= {"needed_bytes": point["least_bytes"]}
        if card is not None and way is not None:
            row |= {"gpu": card["name"], "memory_bytes": card["memory_bytes"], "rates": card["rates"]}
            row |= {name: way[name] for name in ("name", "needed_bytes", "host_bytes")}
            row["predicted_seconds"] = way["seconds"].get(card["name"])
        rows.append(row)
    columns = ["model", "size", "frames", "gpu", "memory_bytes", "name", "needed_bytes", "host_bytes"]
    table = pd.DataFrame(rows, columns=[*columns, "predicted_seconds", "rates"])
    kinds = {**dict.fromkeys(["memory_bytes", "needed_bytes", "host_bytes"], "Int64"), "predicted_seconds": "Float64"}
    return table.astype(kinds)


def _answer(asked: Sequence[RunSpec], gpus: Sequence[str], unavailable: Mapping[str, str]) -> dict[str, Any]:
    table = gpu_table().sort_values("memory_bytes", kind="stable")
    cards = {
        str(gpu): int(size)
        for gpu, size in zip(table["gpu"], table["memory_bytes"], strict=True)
        if not gpus or gpu in gpus
    }
    points = on_all_cores(partial(_point, cards=cards), asked)
    return {
        "cards": [{"name": gpu, "memory_bytes": size, "rates": rates_of(gpu)} for gpu, size in cards.items()],
        "models": list(dict.fromkeys(spec.model for spec in asked)),
        "unavailable": dict(unavailable),
        "reference": REFERENCE,
        "caveat": NOT_MEASURED,
        "points": points,
    }


def _point(spec: RunSpec, cards: Mapping[str, int]) -> dict[str, Any]:
    if spec.runner_spec.techniques:
        return _placed_point(spec, cards)
    return _settings_point(settings_ways(spec, forecasts_in_turn), spec, cards)


def _settings_point(tried: Mapping[I2VRequest, Forecast], spec: RunSpec, cards: Mapping[str, int]) -> dict[str, Any]:
    ways: list[dict[str, Any]] = []
    needs: list[int] = []
    for request, forecast in tried.items():
        seconds = {gpu: seconds_on(forecast, gpu) for gpu in {**cards, REFERENCE: 0}}
        needs.append(fitting_bytes(forecast))
        ways.append(
            {
                "name": request.settings.name or RESIDENT,
                "needed_bytes": needs[-1],
                "peak_bytes": forecast.peak.peak_bytes,
                "peak_phase": forecast.peak.phase,
                "host_bytes": waiting_bytes(request, tried),
                "options": request.settings.options,
                "seconds": {gpu: round(each, 1) for gpu, each in seconds.items() if each is not None},
            }
        )
    best = {}
    for gpu, memory_bytes in cards.items():
        fit = [index for index, need in enumerate(needs) if need <= memory_bytes]
        by = gpu if has_profile(gpu) else REFERENCE
        best[gpu] = min(fit, key=lambda index: ways[index]["seconds"][by], default=None)
    return {**_shape(spec), "ways": ways, "best": best, "least_bytes": min(needs)}


def _placed_point(spec: RunSpec, cards: Mapping[str, int]) -> dict[str, Any]:
    budgets = [*cards.items(), *((REFERENCE, gib * GIB) for gib in BUDGETS_GIB)]
    found = best_placements(spec.request, spec.model, budgets)
    ways: dict[I2VRequest, dict[str, Any]] = {}
    for (gpu, _), placed in zip(budgets, found, strict=True):
        if placed.request is not None:
            way = ways.setdefault(placed.request, _way(placed))
            if placed.predicted_seconds is not None:
                way["seconds"][gpu] = round(placed.predicted_seconds, 1)
    order = list(ways)
    best = {
        gpu: None if placed.request is None else order.index(placed.request)
        for gpu, placed in zip(cards, found, strict=False)
    }
    least_bytes = min(placed.needed_bytes for placed in found)
    return {**_shape(spec), "ways": list(ways.values()), "best": best, "least_bytes": least_bytes}


def _way(placed: Placed) -> dict[str, Any]:
    return {
        "name": placed.name,
        "needed_bytes": placed.needed_bytes,
        "peak_bytes": placed.peak_bytes,
        "peak_phase": placed.peak_phase,
        "host_bytes": placed.host_bytes,
        "options": "",
        "seconds": {},
    }


def _shape(spec: RunSpec) -> dict[str, Any]:
    request = spec.request
    shape = {"model": spec.model, "width": request.width, "height": request.height, "frames": request.frames}
    return {**shape, "placed": bool(spec.runner_spec.techniques)}
