"""Every parameter of every notebook is checked before anything runs: its type, its range, and what it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_notebooks import SMALL

from i2v_lab.errors import DeviceUnavailable, I2VLabError, InvalidRequest, UnknownModel
from i2v_lab.paths import notebooks_dir
from i2v_lab.reproduce.parameters import checks_parameters, declared_parameters, plan_parameters
from i2v_lab.studies.parameters import TYPES, check_parameters

NOTEBOOKS = sorted(notebooks_dir().glob("*.ipynb"))
DECLARED = {path.stem: declared_parameters(path) for path in NOTEBOOKS}
PAIRS = [(path, name) for path in NOTEBOOKS for name in DECLARED[path.stem]]

# Values of the right type that a notebook cannot run with.
WRONG: dict[str, list[Any]] = {
    "source": ["guess", ""],
    "model": ["ltx-3", ""],
    "small_model": ["ltx-3"],
    "width": [1000, -64, 10**9],
    "height": [700, -64],
    "frames": [50, -1],
    "small_width": [100, -64],
    "small_height": [100],
    "small_frames": [8],
    "image": ["no/such.png", "a\0b"],
    "prompt": ["rain \ud800"],
    "seed": [-5, 2**63],
    "generations": [0, -1],
    "judged": [-1],
    "sizes": [["1024"], ["1000x768"], [1024]],
    "tilings": [["768/64"], ["100/64/80/24"], [None]],
    "frame_counts": [[4], ["25"], [-7]],
    "gpus": [["RTX 9"], [24]],
    "published": [["nobody"]],
    "card": ["RTX 9"],
    "gpu": ["RTX 9", "T4"],
    "techniques": [["magic"], ["streamed_text", "text_only"]],
    "others": [["magic"]],
    "budgets": [[0], [-4], [float("nan")], ["8"]],
    "device": ["tpu", "metal"],
    "out_dir": ["", "a\0b"],
}
OTHER_TYPE = {str: 5, int: "64", list: "1024x768"}


def _given(notebook: Path, **values: Any) -> dict[str, Any]:
    return {name: each.default for name, each in DECLARED[notebook.stem].items()} | values


@pytest.mark.parametrize(("notebook", "name"), PAIRS, ids=[f"{path.stem}-{name}" for path, name in PAIRS])
def test_every_parameter_is_refused_with_another_type_and_outside_its_rule(notebook, name):
    assert checks_parameters(notebook)
    first = TYPES[name][0]
    assert first in (DECLARED[notebook.stem][name].types or ())
    for value in (OTHER_TYPE[first], None, True, *WRONG[name]):
        with pytest.raises(I2VLabError) as refused:
            check_parameters(_given(notebook, **{name: value}))
        assert type(refused.value) in (InvalidRequest, UnknownModel)
        assert "\n" not in str(refused.value)
        assert refused.value.fields


def test_what_the_notebooks_run_with_is_accepted():
    for path in NOTEBOOKS:
        for source in ("forecast", "measure", "recorded"):
            check_parameters(_given(path, source=source))
            check_parameters(_given(path, **SMALL[path.stem], source=source, model="ltx-2.3-tiny", device="cpu"))
    check_parameters({"unknown": 1, "width": 0})


def test_a_size_is_checked_by_the_rules_of_its_model():
    ltx, wan = {"model": "ltx-2.3-22b"}, {"model": "wan-2.2-ti2v-5b"}
    check_parameters({**wan, "width": 1280, "height": 704, "frames": 121})
    check_parameters({**ltx, "width": 1024, "height": 768, "frames": 97})
    for model, name, value in ((wan, "width", 1000), (ltx, "width", 1000), (wan, "frames", 120)):
        with pytest.raises(InvalidRequest) as refused:
            check_parameters({**model, name: value})
        assert refused.value.fields == {name: value}
    with pytest.raises(InvalidRequest) as refused:  # of the tiny model, not of the other
        check_parameters({"small_model": "auto", "small_width": 100})
    assert refused.value.fields == {"small_width": 100}


def test_a_measured_run_needs_its_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_parameters({"source": "forecast", "device": "cuda"})
    with pytest.raises(DeviceUnavailable):
        check_parameters({"source": "measure", "device": "cuda"})


def test_reproduce_refuses_in_one_line_what_a_notebook_would_refuse():
    for name, value in (("width", 1000), ("generations", 0), ("card", "RTX 9")):
        with pytest.raises(InvalidRequest) as refused:
            plan_parameters(NOTEBOOKS, NOTEBOOKS, {name: value})
        assert "\n" not in str(refused.value)
    assert plan_parameters(NOTEBOOKS, NOTEBOOKS, {"generations": 2})[5] == {"generations": 2}
