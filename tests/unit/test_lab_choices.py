"""What the views choose, offer and remember: placements, memory settings, budgets, and what to do."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import ipywidgets as widgets
import pytest

from i2v_lab import Explorer, Generate, I2VRequest
from i2v_lab.capacity.budget import as_budget, budget_bytes
from i2v_lab.capacity.cards import fitting_bytes
from i2v_lab.capacity.placement import resolve_memory
from i2v_lab.errors import ForecastError
from i2v_lab.lab.exploration import Exploration
from i2v_lab.lab.generation_job import State
from i2v_lab.lab.held import fastest_settings_within
from i2v_lab.lab.last_choice import Choice, choice_path, recall, remember
from i2v_lab.lab.question import DEFAULT_GPU, Question
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import MemorySettings, Offload, TransformerQuantization
from i2v_lab.profiling.records import Forecast, PhaseRecord
from i2v_lab.runs.execute import FAILS_ON_A_CARD
from i2v_lab.runs.spec import make_request
from i2v_lab.runs.store import read_run
from i2v_lab.studies.placed import best_placements, forecast_that_runs
from i2v_lab.units import GIB

TINY, WAN = "ltx-2.3-tiny", "wan-2.2-ti2v-5b-tiny"
TILES = ("", "_vae-tiling")


def _request(**changes) -> I2VRequest:
    return I2VRequest(**{"image": "stills/lighthouse.png", "width": 64, "height": 64, "frames": 9, **changes})


def _asked(**values) -> Exploration:
    exploration = Exploration(Question(**values))
    exploration.ask(exploration.question, wait=True)
    return exploration


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A user who watches, with a state folder of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TQDM_DISABLE", "0")
    return tmp_path / "state"


# --- The fastest that fits ---


def test_memory_auto_is_what_the_solver_finds_for_the_card_or_the_budget(tiny):
    asked = _request(memory="auto")
    answer = _asked(request=asked, model=TINY, gpu="L4").answer
    assert answer.held.request.memory is MemoryPolicy.RESIDENT
    assert answer.held.verdict == "fits"
    least = _asked(request=asked, model=TINY, gpu="L4", budget="0.01GiB").answer
    assert least.held.verdict == "no"
    assert least.sentence.startswith("It does not fit: the budget is 10.2 MiB of L4, and even")
    assert [each.changes for each in least.remedies] == [{"budget": as_budget(least.needed_bytes)}]
    within = as_budget(least.needed_bytes)
    answer = _asked(request=asked, model=TINY, gpu="L4", budget=within).answer
    found = resolve_memory(_request(), budget_bytes(within), TINY, gpu="L4")
    assert answer.held.request == found.request
    assert answer.held.cap_bytes == found.cap_bytes
    assert answer.held.verdict == "fits"
    assert "published rates" in answer.duration
    assert "host memory" in answer.host
    assert answer.room_bytes == budget_bytes(within)


def test_an_answer_that_follows_from_cached_forecasts_is_there_at_once(tiny):
    exploration = _asked(request=_request(memory="auto"), model=TINY, gpu="L4")
    other = replace(exploration.question, gpu="H200", budget="2GiB")
    exploration.ask(other)
    assert not exploration.working
    assert exploration.answer.question == other


def test_what_does_not_fit_as_it_is_names_what_does_once_that_is_known(tiny):
    resident = _asked(request=_request(), model=TINY, gpu="L4")
    budget = as_budget(resident.answer.needed_bytes - 24 * 2**20)
    resident.ask(replace(resident.question, budget=budget))
    answer = resident.answer
    assert answer.held.verdict != "fits"
    own, larger = {"memory": MemoryPolicy.AUTO}, {"budget": as_budget(answer.needed_bytes)}
    assert [each.changes for each in answer.remedies] == [own, larger]
    assert "memory auto" in answer.sentence
    known = replace(answer, instead=replace(answer.held, name="12 of 56 blocks resident"))
    assert "It runs with 12 of 56 blocks resident, predicted to take" in known.sentence
    assert [each.label for each in known.remedies] == [
        "Use 12 of 56 blocks resident",
        f"Set the budget to {larger['budget']}",
    ]
    card = _asked(request=_request(), model=TINY, gpu="0.5GiB").answer
    assert card.remedies[1].changes == {"gpu": "RTX 4050 Laptop 6GB", "budget": ""}


def test_a_model_of_diffusers_is_held_by_the_settings_that_fit_and_that_fit_finds(monkeypatch):
    asked, tried = make_request(WAN), []

    def made_up(request: I2VRequest, model: str, device: str) -> Forecast:
        """A quarter of the weights with offloading, half of the activations with tiles."""
        assert (model, device) == (WAN, "cuda")
        tried.append(request.settings.name)
        if request.settings.offload is Offload.GROUP_LEAF:
            raise ForecastError("no", cause=FAILS_ON_A_CARD)
        peak = (1 if request.settings.offloads else 4) * GIB + (1 if request.settings.vae_tiling else 2) * GIB
        phase = PhaseRecord("decode_video", None, 4 * GIB, peak, 0, peak, peak, 0, 0.0, 0.1, True)
        return Forecast((phase,), context_bytes=0, seconds=0.1)

    held = fastest_settings_within(asked, WAN, 8 * GIB, "RTX 4090", forecast=made_up)
    assert (held.request, held.verdict, held.host_bytes, tried) == (asked, "fits", 0, [""])
    held = fastest_settings_within(asked, WAN, 4 * GIB, "RTX 4090", forecast=made_up)
    assert held.request.settings == MemorySettings(offload="model")
    assert (held.verdict, held.host_bytes, held.chosen) == ("fits", 4 * GIB, True)
    assert set(tried) == {name + tiles for name in ("offload-model", "offload-sequential") for tiles in TILES} | {""}
    held = fastest_settings_within(asked, WAN, GIB, "RTX 4090", forecast=made_up)
    assert held.request.settings == MemorySettings(offload="model", vae_tiling=True)
    assert (held.verdict, held.needed_bytes) == ("no", fitting_bytes(made_up(held.request, WAN, "cuda")))
    streamed = replace(asked, settings=MemorySettings(offload="group-leaf", offload_stream=True))  # what does not fit
    held = fastest_settings_within(streamed, WAN, 8 * GIB, "RTX 4090", forecast=made_up)
    assert held.request.settings == MemorySettings()

    def every(specs):
        return [forecast_that_runs(each, lambda one: made_up(one.request, WAN, "cuda")) for each in specs]

    monkeypatch.setattr("i2v_lab.studies.placed.forecasts_that_run", every)
    for memory_bytes in (8 * GIB, 4 * GIB, GIB):
        held = fastest_settings_within(asked, WAN, memory_bytes, "RTX 4090", forecast=made_up)
        (placed,) = best_placements(asked, WAN, [("RTX 4090", memory_bytes)])
        assert placed.needed_bytes == held.needed_bytes
        assert placed.request == (held.request if held.verdict == "fits" else None)

    def failing(*_):
        raise ForecastError("no", cause=FAILS_ON_A_CARD)

    monkeypatch.setattr("i2v_lab.studies.placed.forecast_spec", failing)
    with pytest.raises(ForecastError, match="no"):  # under whatever settings
        fastest_settings_within(asked, WAN, GIB, "RTX 4090", forecast=failing)


@pytest.mark.parametrize(
    ("budget", "problem"),
    [("12TiB", "vram_budget='12TiB' is no size"), ("48", "above the"), ("auto", "device='cuda'"), ("-1", "is no size")],
)
def test_a_budget_that_is_none_is_a_problem_in_one_line(budget, problem, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    exploration = _asked(request=_request(), model=TINY, gpu="RTX 4090", budget=budget)
    assert problem in exploration.problem
    assert "\n" not in exploration.problem
    assert not exploration.working


@pytest.mark.parametrize("budget", ["", "12GiB"])
@pytest.mark.parametrize("memory", ["auto", "lean"])
def test_the_code_of_a_question_with_a_budget_gives_its_answer(tiny, budget, memory):
    question = Question(request=_request(memory=memory), model=TINY, gpu="L4", budget=budget)
    *body, last = question.code().splitlines()
    scope: dict[str, object] = {}
    exec("\n".join(body), scope)
    result = eval(last, scope)
    if memory == "auto":
        assert result.request.memory is MemoryPolicy.RESIDENT
    else:
        assert (result.gpu, result.verdict, result.memory_bytes == 12 * GIB) == ("L4", "fits", bool(budget))


# --- Controls ---


def test_controls_show_how_the_model_can_be_held_and_a_button_sets_what_fits(tiny):
    explorer = Explorer(_request(), TINY, "L4")
    controls = explorer.controls
    shown = {name for name, control in controls.items() if control.layout.display != "none"}
    assert {"memory", "budget", "tiling", "quantization"} <= shown
    assert not {"settings", "transformer"} & shown
    controls["budget"].value = "0.01"
    _wait(explorer.exploration)
    button = _first_button(explorer)
    assert button.description == "Search for the fastest that fits"
    button.click()
    _wait(explorer.exploration)
    assert controls["memory"].value is MemoryPolicy.AUTO
    _first_button(explorer).click()
    assert controls["budget"].value.endswith("GiB")
    _wait(explorer.exploration)
    assert explorer.exploration.answer.held.verdict == "fits"
    assert explorer._remedies.box.children == ()
    controls["model"].value = WAN
    shown = {name for name, control in controls.items() if control.layout.display != "none"}
    assert {"settings", "transformer", "budget"} <= shown
    assert not {"memory", "tiling", "quantization"} & shown
    controls["settings"].value = MemorySettings(offload=Offload.MODEL)
    controls["transformer"].value = TransformerQuantization.GGUF_Q8_0
    request = explorer.exploration.question.request
    assert request.settings == MemorySettings(offload="model", quantization="gguf-q8_0")
    assert request.memory is MemoryPolicy.RESIDENT
    controls["settings"].value = MemorySettings(offload=Offload.SEQUENTIAL)
    assert "quantization=gguf-q8_0 is not for offload=" in explorer._status_box.value
    controls["settings"].value = None
    assert explorer.exploration.question.request.memory is MemoryPolicy.AUTO
    explorer.close()


def _first_button(explorer: Explorer) -> widgets.Button:
    """A background forecast that has ended is drawn a moment later, in its thread."""
    deadline = time.monotonic() + 60
    while not explorer._remedies.box.children and time.monotonic() < deadline:
        time.sleep(0.02)
    return explorer._remedies.box.children[0]


def _wait(exploration: Exploration) -> None:
    deadline = time.monotonic() + 60
    while exploration.working and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not exploration.working


@pytest.mark.parametrize("gpu", ["NVIDIA GeForce RTX 4090", "rtx4090", "24GiB"])
def test_a_card_is_named_as_anybody_names_it(tiny, gpu):
    explorer = Explorer(_request(), TINY, gpu)
    assert explorer.controls["gpu"].value == ("24GiB" if gpu == "24GiB" else "RTX 4090")
    explorer.close()


def test_a_generation_with_a_budget_waits_for_its_forecast_and_stays_within(tiny, tmp_path):
    generate = Generate(tmp_path, _request(), TINY, "cpu", budget="1GiB")
    assert generate.widget is not None
    generate.start()
    deadline = time.monotonic() + 60
    while generate.job.state is State.IDLE and time.monotonic() < deadline:
        time.sleep(0.02)
    generate.job.wait()
    assert generate.job.state is State.DONE, generate.job.message
    metadata = read_run(generate.job.folder).metadata
    assert metadata["spec"]["vram_cap_bytes"] == 2**30
    generate.controls["budget"].value = "0.001"
    generate.start()
    _wait(generate.exploration)
    assert "Not started: it does not fit." in generate._note.value
    generate.controls["budget"].value = "a lot"
    generate.start()
    assert "is no size" in generate._note.value
    generate.close()


# --- The last choice ---


def test_a_view_opens_with_what_was_chosen_last_where_nothing_is_given(tiny, state):
    explorer = Explorer(_request(), TINY, "L4")
    assert explorer.controls["gpu"].value == "L4"
    explorer.controls["gpu"].value = "H200"
    explorer.controls["budget"].value = "6"
    explorer.close()
    again = Explorer()
    assert again.exploration.question.gpu == "H200"
    assert again.exploration.question.budget == "6"
    assert again.exploration.question.model == TINY
    again.close()
    given = Explorer(_request(), TINY)
    assert (given.exploration.question.gpu, given.exploration.question.budget) == (DEFAULT_GPU, "")
    given.close()


def test_a_damaged_choice_is_ignored_with_a_note(tiny, state):
    remember("explorer", Choice(_request(), TINY, "L4", "6GiB"))
    path = choice_path("explorer")
    assert recall("explorer") == (Choice(_request(), TINY, "L4", "6GiB"), "")
    good = json.loads(path.read_text())
    damaged = ["", "{", "[]", "null", "\x00", "[" * 9999]
    for name, value in (("model", "gone"), ("gpu", "RTX 0"), ("budget", "x"), ("request", {}), ("model", 3)):
        damaged.append(json.dumps({**good, name: value}))
    damaged.append(json.dumps({**good, "request": {**good["request"], "width": 65}}))
    for text in damaged:
        path.write_text(text)
        choice, note = recall("explorer")
        assert choice is None, text
        assert str(path) in note
        assert "\n" not in note
    explorer = Explorer()
    assert explorer.exploration.question.gpu == DEFAULT_GPU
    assert "The last choice is not restored" in explorer.note
    explorer.close()
    path.unlink()
    path.mkdir()
    assert recall("explorer")[0] is None
    remember("explorer", Choice(_request(), TINY))  # cannot be kept, and nobody is stopped by it


def test_a_headless_notebook_neither_restores_nor_keeps_a_choice(tiny, state, monkeypatch):
    remember("generate", Choice(_request(), TINY, budget="6GiB"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    generate = Generate("runs", device="cpu")
    assert generate.budget == ""
    generate.close()


def test_what_a_placement_reserves_stays_within_the_memory_that_it_was_found_for(tiny):
    """Or its bars would go beyond the line of a card that it fits."""
    exploration = _asked(request=_request(memory="auto"), model=TINY, gpu="L4", budget="1.2GiB")
    answer = exploration.answer
    assert answer.held.verdict == "fits"
    for phase in answer.held.forecast.phases:
        assert phase.peak_bytes <= phase.peak_reserved_bytes <= answer.held.cap_bytes
    assert answer.held.forecast.peak_reserved_bytes + answer.context_bytes <= answer.room_bytes
