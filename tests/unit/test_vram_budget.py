"""``--vram-budget``: sizes, what is refused before anything runs, and a generation within its budget."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.cli.placed import ALLOCATOR_VARIABLES, budget_bytes, use_expandable_segments
from i2v_lab.errors import DeviceUnavailable, InvalidRequest, VramCapExceeded
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.runs.store import read_run

TINY = ["--model", "ltx-2.3-tiny", "--width", "64", "--height", "64", "--frames", "9", "--fps", "120"]


@pytest.fixture(autouse=True)
def _own_allocator(monkeypatch):
    monkeypatch.setenv(ALLOCATOR_VARIABLES[0], "backend:native")


def run(*words: str):
    return CliRunner().invoke(app, list(words))


SIZES = {"12GiB": 12 * 2**30, "12": 12 * 2**30, " 1.5 gb ": 3 * 2**29, "900MiB": 900 * 2**20, "0.5g": 2**29}


@pytest.mark.parametrize("text", SIZES)
def test_a_budget_is_a_size(text):
    assert budget_bytes(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "0", "12TiB", "-4", "4 4", "nan", "1e3", "0.0000000001", "9" * 9, "٤"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InvalidRequest) as caught:
        budget_bytes(text)
    assert caught.value.fields == {"vram_budget": text}


REFUSED = {
    "size": (["generate", "--vram-budget", "large"], {"vram_budget": "large"}),
    "pair": (["generate", "--resident-blocks", "transformer"], {"resident_blocks": "transformer"}),
    "not streamed": (["generate", "--resident-blocks", "transformer=3"], {"component": "transformer"}),
    "too many": (["generate", "--memory", "streamed", "--resident-blocks", "transformer=11"], {"transformer": 11}),
    "chunks": (["generate", "--chunk-tokens", "64"], {"chunk_tokens": 64}),
    "prefetch": (["forecast", "--vram-budget", "4", "--memory", "lean", "--prefetch", "2"], {"prefetch": 2}),
    "nothing to explain": (["generate", "--explain"], {"explain": True}),
    "nor for a forecast": (["forecast", "--explain"], {"explain": True}),
    "nor for a plan": (["measure", "--plan", "data/plans/policies.yaml", "--out", "-", "--explain"], {"explain": True}),
    "nor for a search": (["fit", "--gpu", "24", "--memory", "lean", "--explain"], {"explain": True}),
    "no card named": (["fit"], {"gpu": None, "vram_budget": None}),
    "two cards": (["fit", "--gpu", "24", "--vram-budget", "12"], {"gpu": "24", "vram_budget": "12"}),
    "two sizes": (["forecast", "--vram-cap-gib", "8", "--vram-budget", "12"], {"vram_cap_gib": 8, "vram_budget": "12"}),
    "policy": (["fit", "--vram-budget", "12", "--memory", "lean"], {"memory": "lean", "vram_budget": "12"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_be_honoured_are_refused(name, still):
    words, fields = REFUSED[name]
    image = ["--image", str(still)] if words[0] == "generate" else []
    result = run(*words, *image, *(TINY if words[0] != "measure" else []))
    assert isinstance(result.exception, InvalidRequest), result.output
    assert result.exception.fields == fields


@pytest.mark.parametrize("command", ["generate", "forecast", "fit"])
def test_a_model_that_cannot_be_placed_is_refused(command, still):
    image = ["--image", str(still)] if command == "generate" else []
    result = run(command, *image, "--model", "ltxv-tiny", "--vram-budget", "4GiB")
    assert isinstance(result.exception, InvalidRequest)
    assert result.exception.fields == {"model": "ltxv-tiny"}


def test_fit_names_the_fastest_placement_on_a_card_or_what_is_needed_and_ends_with_1():
    """A card that nothing resident fits is not turned away; one that nothing fits gets the smallest budget there is."""
    shape = TINY[:-2]
    refused = run("fit", "--gpu", "0.5GiB", *shape, "--json")
    assert refused.exit_code == 1
    nothing = json.loads(refused.stdout)
    assert (nothing["request"], nothing["sizes"][0]["command"]) == (None, None)
    needed_bytes = nothing["needed_bytes"]
    assert run("fit", "--gpu", f"{(needed_bytes - 1) / 2**30:.9f}GiB", *shape).exit_code == 1
    found = run("fit", "--gpu", f"{needed_bytes / 2**30 + 1e-9:.9f}GiB", *shape, "--json")
    assert found.exit_code == 0
    (row,) = json.loads(found.stdout)["sizes"]
    request = I2VRequest.from_json(json.loads(found.stdout)["request"])
    assert request.placed.policy != "resident"  # resident needs more
    assert (row["width"], row["frames"], row["needed_bytes"]) == (64, 9, needed_bytes)
    assert row["host_bytes"] > 0
    assert "--vram-budget" in row["command"]
    named = json.loads(run("fit", "--gpu", "RTX 4090", *shape, "--json").stdout)
    assert named["predicted_seconds"] == named["sizes"][0]["predicted_seconds"] > 0
    assert named["predicted_measured"] is False


def test_a_generation_stays_within_its_budget_and_says_why(still, tmp_path, tiny):
    """On the CPU, where every live byte counts against the cap."""
    out = ["--image", str(still), "--out", str(tmp_path / "video.mp4"), "--profile", str(tmp_path / "run")]
    words = ["generate", *TINY, *out, "--device", "cpu", "--json"]
    request = make_request("ltx-2.3-tiny", image=str(still), width=64, height=64, frames=9, fps=120, memory="streamed")
    least = -(-forecast_request(request, "ltx-2.3-tiny", "cpu").peak.peak_bytes // 2**20) + 1  # MiB
    result = run(*words, "--vram-budget", f"{least}MiB", "--explain")
    assert result.exception is None, result.output
    report = json.loads(result.stdout)
    found = report["placement"]
    assert report["peak_bytes"] <= found["allocatable_bytes"] == found["memory_bytes"] == least * 2**20
    run_spec = RunSpec.from_json(read_run(tmp_path / "run").metadata["spec"])
    assert run_spec.placement.to_json() == found["placement"]
    assert report["memory"] == found["memory"] == "placed"
    assert run_spec.vram_cap_bytes == least * 2**20
    assert {one["component"] for one in found["components"]} >= {"video_encoder", "video_decoder"}
    for line in (f"budget {least}.0 MiB", "video_decoder: ", "encode_image: "):
        assert line in result.stderr
    refused = run("generate", *TINY, *out[:4], "--device", "cpu", "--vram-budget", f"{least - 2}MiB").exception
    assert isinstance(refused, DeviceUnavailable)
    assert refused.fields["memory_bytes"] < refused.fields["needed_bytes"] <= least * 2**20


def test_a_generation_that_needs_more_than_its_cap_names_the_budget_and_leaves_no_video(still, tmp_path, monkeypatch):
    monkeypatch.setattr("i2v_lab.capacity.placement.cap_bytes", lambda *_: 1_000_000)
    out = tmp_path / "video.mp4"
    error = run(
        "generate", *TINY, "--image", str(still), "--out", str(out), "--device", "cpu", "--vram-budget", "1GiB"
    ).exception
    assert isinstance(error, VramCapExceeded)
    assert (error.fields["cap_bytes"], error.fields["budget_bytes"]) == (1_000_000, 2**30)
    assert error.fields["phase"] in ("encode_prompt", "encode_image")
    assert "\n" not in str(error)
    assert not out.exists()


def test_segments_are_expandable_unless_the_environment_says_otherwise(monkeypatch):
    use_expandable_segments()
    assert os.environ[ALLOCATOR_VARIABLES[0]] == "backend:native"
    monkeypatch.delenv(ALLOCATOR_VARIABLES[0])
    monkeypatch.setattr("sys.platform", "win32")
    use_expandable_segments()
    assert ALLOCATOR_VARIABLES[0] not in os.environ
    monkeypatch.setattr("sys.platform", "linux")
    use_expandable_segments()
    assert os.environ[ALLOCATOR_VARIABLES[0]] == "expandable_segments:True"
