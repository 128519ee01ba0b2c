"""The parameters of the notebooks, each with its type and its rule; checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from i2v_lab.capacity.cards import gpu_memory_bytes
from i2v_lab.capacity.device_profile import device_profile
from i2v_lab.errors import InvalidRequest, shown
from i2v_lab.paths import find_still
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import check_request
from i2v_lab.request import I2VRequest
from i2v_lab.runs.sources import Source, choose_model, small_model_of, to_source
from i2v_lab.studies.pipelines import check_third_party
from i2v_lab.studies.published import study_request, to_size, to_tiling
from i2v_lab.studies.published_memory import read_published
from i2v_lab.studies.techniques import step_specs

Values = Mapping[str, Any]

MAX_BUDGET_GIB = 1024
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("source", "model", "small_model", "image", "prompt", "device", "out_dir", "card", "gpu"), (str,)),
    **dict.fromkeys(("width", "height", "frames", "small_width", "small_height", "small_frames"), (int,)),
    **dict.fromkeys(("seed", "generations", "judged"), (int,)),
    **dict.fromkeys(("sizes", "tilings", "frame_counts", "gpus", "published"), (list, tuple)),
    **dict.fromkeys(("techniques", "others", "budgets"), (list, tuple)),
}
NAMES = {str: "a text", int: "an integer", list: "a list"}
ITEMS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("sizes", "tilings", "gpus", "published", "techniques", "others"), (str,)),
    "frame_counts": (int,),
    "budgets": (int, float),
}


def check_parameters(given: Values) -> None:
    """Refuse values of a notebook's parameters with which it could not run to its end, in a second, before it runs.

    Args:
        given: Values by name, of all parameters that the notebook declares; other names are ignored, so that a
            notebook can give its ``globals()``.

    Raises:
        InvalidRequest: A value has another type or breaks a rule, or the model does not support the request.
        UnknownModel: There is no such model.
        DeviceUnavailable: Runs are to be measured on a device that is not there.

    Example:
        >>> check_parameters({"model": "ltx-2.3-22b", "source": "forecast", "width": 1024, "height": 768})
        >>> check_parameters({"generations": 0})
        Traceback (most recent call last):
        i2v_lab.errors.InvalidRequest: generations=0 is not above 0; use 1 or more
    """
    values = {name: given[name] for name in TYPES if name in given}
    for name, value in values.items():
        _check_type(name, value, TYPES[name])
        for item in value if name in ITEMS else ():
            _check_type(f"an item of {name}", item, ITEMS[name], field=name)
    for name, check in RULES.items():
        if name in values:
            check(values)


def _check_type(label: str, value: Any, types: tuple[type, ...], field: str = "") -> None:
    if not isinstance(value, types) or isinstance(value, bool):
        wanted = "a number" if float in types else NAMES[types[0]]
        raise InvalidRequest(f"{label}={shown(value)} is not {wanted}; give one", **{field or label: value})


def _source(values: Values) -> None:
    to_source(values["source"])


def _model(values: Values) -> None:
    model = _chosen(values)
    for size in [(values.get("width", 0), values.get("height", 0)), *_sizes(values)]:
        for frames in dict.fromkeys([values.get("frames", 0), *values.get("frame_counts", ())]):
            _request(model, (*size, frames), values)


def _small_model(values: Values) -> None:
    model = values["small_model"]
    model = small_model_of(_chosen(values)) if model == "auto" else choose_model(model, Source.MEASURE)
    size = tuple(values.get(f"small_{name}", 0) for name in ("width", "height", "frames"))
    try:
        _request(model, size, values)
    except InvalidRequest as error:  # of the small model's width, not of the other's
        words, fields = str(error), dict(error.fields)
        for name in ("width", "height", "frames"):
            if name in fields:
                words = words.replace(f"{name}=", f"small_{name}=", 1)
                fields[f"small_{name}"] = fields.pop(name)
        raise InvalidRequest(words, **fields) from error


def _chosen(values: Values) -> str:
    return choose_model(
        values.get("model", "auto"), values.get("source", Source.FORECAST), values.get("device", "auto")
    )


def _sizes(values: Values) -> list[tuple[int, int]]:
    return [to_size(size) for size in values.get("sizes", ())]


def _request(model: str, size: Sequence[int], values: Values) -> I2VRequest:
    names = ("width", "height", "frames")
    for name, value in zip(names, size, strict=True):
        if value < 0:
            raise InvalidRequest(f"{name}={value} is negative; use 0 for the model's default", **{name: value})
    rest = {name: values[name] for name in ("image", "prompt", "seed") if name in values}
    return study_request(model, *size, **rest)


def _tilings(values: Values) -> None:
    model = _chosen(values)
    request = _request(model, [values.get(name, 0) for name in ("width", "height", "frames")], values)
    for text in values["tilings"]:
        check_request(load_architecture(model), replace(request, tiling=to_tiling(text)))


def _image(values: Values) -> None:
    if not find_still(values["image"]).is_file():
        raise InvalidRequest(
            f"image={shown(values['image'])} is no file, here or below data/; use a path such as stills/lighthouse.png",
            image=values["image"],
        )


def _device(values: Values) -> None:
    name = values["device"]
    if name not in ("auto", "cpu") and name.partition(":")[0] != "cuda":
        raise InvalidRequest(f"device={shown(name)} is unknown; use auto, cpu or cuda", device=name)
    if values.get("source") == Source.MEASURE:
        from i2v_lab.pipeline.contract.generation import resolve_device

        resolve_device(name)


def _out_dir(values: Values) -> None:
    if not values["out_dir"].strip() or "\0" in values["out_dir"]:
        raise InvalidRequest(
            f"out_dir={shown(values['out_dir'])} is no folder; use one such as build", out_dir=values["out_dir"]
        )


def _least(name: str, least: int, most: int, remedy: str) -> Callable[[Values], None]:
    def check(values: Values) -> None:
        value = values[name]
        if value < least:
            words = "negative" if least == 0 else f"not above {least - 1}"
            raise InvalidRequest(f"{name}={shown(value)} is {words}; use {remedy}", **{name: value})
        if value > most:
            raise InvalidRequest(f"{name}={shown(value)} is above {most}; use that or less", **{name: value})

    return check


def _card(values: Values) -> None:
    gpu_memory_bytes(values["card"])


def _gpus(values: Values) -> None:
    for gpu in values["gpus"]:
        gpu_memory_bytes(gpu)


def _published(values: Values) -> None:
    known = {peak.id for peak in read_published()}
    for name in values["published"]:
        if name not in known:
            words = f"published={shown(name)} is no row of data/published/memory.csv; use one of its ids, such as"
            raise InvalidRequest(f"{words} {min(known)}", published=name)


def _techniques(values: Values) -> None:
    model = _chosen(values)
    size = _sizes(values)[-1] if values.get("sizes") else (values.get("width", 0), values.get("height", 0))
    step_specs(_request(model, (*size, values.get("frames", 0)), values), model, values["techniques"])


def _others(values: Values) -> None:
    check_third_party(values["others"])


def _gpu(values: Values) -> None:
    device_profile(values["gpu"])


def _budgets(values: Values) -> None:
    for budget in values["budgets"]:
        if not 0 < budget <= MAX_BUDGET_GIB:  # nor is NaN
            raise InvalidRequest(
                f"budgets={shown(budget)} is not between 0 and {MAX_BUDGET_GIB}; use GiB such as 8", budgets=budget
            )


RULES: dict[str, Callable[[Values], None]] = {
    "source": _source,
    "device": _device,
    "out_dir": _out_dir,
    "image": _image,
    "model": _model,
    "small_model": _small_model,
    "tilings": _tilings,
    "card": _card,
    "generations": _least("generations", 1, 1000, "1 or more"),
    "judged": _least("judged", 0, 10**9, "0 for all of them"),
    "gpus": _gpus,
    "published": _published,
    "techniques": _techniques,
    "others": _others,
    "gpu": _gpu,
    "budgets": _budgets,
}
"""In this order: those of a parameter may use the values of the ones before."""
