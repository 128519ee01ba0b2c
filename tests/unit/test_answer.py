"""The answer page's data: which requests, ways and cards, and what is best on each; by the tiny models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from i2v_lab.capacity.cards import fitting_bytes
from i2v_lab.memory_settings import MemorySettings, Offload
from i2v_lab.pipeline.contract.architectures import architecture_names
from i2v_lab.reporting.site.answer import matrix, render_answer
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import DEFAULT_STILL, RunSpec, make_request
from i2v_lab.studies import answer as study
from i2v_lab.studies import placed as placed_study
from i2v_lab.studies.placed import fastest_settings

CARDS = ["RTX 4090", "T4"]
MODEL = "ltx-2.3-tiny-diffusers"


@pytest.fixture(scope="module")
def answer():
    request = make_request(MODEL, image=DEFAULT_STILL, width=128, height=64, frames=9, fps=120)
    placed = make_request("ltx-2.3-tiny", image=DEFAULT_STILL, width=64, height=64, frames=9)
    asked = {MODEL: [request], "ltx-2.3-tiny": [placed]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "requests_of", asked.__getitem__)
        patch.setattr(placed_study, "OFFLOADS", (Offload.NONE, Offload.MODEL))  # one forecast less
        patch.setattr(placed_study, "DECODE_VIDEO", "none")  # nor tiles
        patch.setattr(
            study, "on_all_cores", lambda work, specs: list(map(work, specs))
        )  # which would not see the patches
        return study.answer(list(asked), CARDS)


def test_every_point_has_its_ways_and_the_fastest_that_fits_each_card(answer):
    assert [card["name"] for card in answer["cards"]] == ["T4", "RTX 4090"]  # ascending
    assert [card["rates"] for card in answer["cards"]] == ["", "published"]
    others, placed = answer["points"]
    assert (others["placed"], placed["placed"]) == (False, True)
    assert [way["name"] for way in others["ways"]][:2] == ["resident", "offload-model"]
    assert others["ways"][0]["host_bytes"] == 0 < others["ways"][1]["host_bytes"]
    assert others["ways"][1]["options"] == "--offload model"
    assert others["least_bytes"] == min(way["needed_bytes"] for way in others["ways"])
    assert set(others["ways"][0]["seconds"]) == {"RTX 4090", "H100 80GB"}  # a T4 has no rates
    for point in (others, placed):
        assert point["best"].keys() == {"T4", "RTX 4090"}
        for card in answer["cards"]:
            way = point["ways"][point["best"][card["name"]]]
            assert way["needed_bytes"] <= card["memory_bytes"]
    assert others["best"] == {"T4": 0, "RTX 4090": 0}
    assert json.loads(json.dumps(answer)) == answer


def test_a_card_that_is_too_small_gets_what_is_needed(answer):
    request = make_request(MODEL, image=DEFAULT_STILL, width=128, height=64, frames=9, fps=120)
    spec = RunSpec(request=request, model=MODEL)
    offloaded = replace(request, settings=MemorySettings(offload="model"))
    tried = {each: forecast_request(each, MODEL) for each in (request, offloaded)}  # cached
    least_bytes = min(map(fitting_bytes, tried.values()))
    point = study._settings_point(tried, spec, {"T4": least_bytes, "L4": least_bytes - 1})
    assert point["best"]["L4"] is None
    assert point["best"]["T4"] is not None
    assert point["least_bytes"] == least_bytes
    assert fastest_settings(tried, "L4", least_bytes - 1).request is None


def test_every_model_of_full_size_is_shown_at_the_size_nearest_to_832x480_that_it_has():
    for model in (each for each in architecture_names() if "tiny" not in each and each != "ltx-2.3-22b"):
        own = make_request(model)
        [size] = study.sizes_of(model)
        near = all(abs(side - common) <= 32 for side, common in zip(size, (832, 480), strict=True))
        assert near or size == (own.width, own.height)
    assert study.sizes_of("wan-2.2-ti2v-5b") == [(832, 480)]
    assert study.sizes_of("hunyuanvideo-1.5-i2v") == [(848, 480)]
    assert len(study.sizes_of("ltx-2.3-22b")) == 5


def test_the_page_is_one_file_with_every_answer_in_words(answer, tmp_path):
    page = render_answer(answer, tmp_path).read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert [cell["name"] for cell in matrix(answer)[0]["cells"]] == ["resident", "resident"]
    assert page.count("<script") == 4
