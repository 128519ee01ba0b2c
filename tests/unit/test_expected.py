"""How long commands take is said before they start, where there is something to wait for, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from i2v_lab.cli import expected
from i2v_lab.cli.app import app
from i2v_lab.profiling.records import Forecast, PhaseRecord
from i2v_lab.runs import forecast as forecast_module
from i2v_lab.runs.spec import RunSpec, make_request

FULL, TINY = "ltx-2.3-22b", "ltx-2.3-tiny"
KNOWN = Forecast((PhaseRecord("decode_video", None, 0, 2**30, 0, 2**30, 2**30, 0, 0.0, 1.0, True),), 0, 0.0)


def _specs(model: str, count: int) -> list[RunSpec]:
    return [RunSpec(request=make_request(model, frames=9 + 8 * index), model=model) for index in range(count)]


@pytest.fixture
def cache(monkeypatch):
    """Frames of which a forecast is cached."""
    known: set[int] = set()
    found = lambda spec, device="cuda": KNOWN if spec.request.frames in known else None  # noqa: E731
    monkeypatch.setattr(forecast_module, "cached_forecast", found)
    monkeypatch.setattr(forecast_module, "is_cached", lambda *of: found(*of) is not None)
    return known


def test_forecasts_that_are_not_cached_are_counted_once_each(cache, capsys):
    specs = _specs(FULL, 3)
    assert expected.announce_forecasts([*specs, *specs])
    assert capsys.readouterr().err == "i2v-lab: 3 forecasts to compute, in about 38 s\n"
    cache.add(9)
    assert expected.announce_forecasts(specs, processes=2)
    assert capsys.readouterr().err == "i2v-lab: 2 forecasts to compute, in about 20 s\n"
    cache.update((17, 25))
    assert not expected.announce_forecasts(specs)
    assert not expected.announce_forecasts(_specs(TINY, 1))  # too short
    assert capsys.readouterr().err == ""


def test_a_search_is_announced_with_its_first_forecast_that_is_not_cached(cache, capsys):
    cache.update((9, 17))
    search = expected.AnnouncedSearch(6)
    for spec in _specs(FULL, 4):
        search.before(spec)
    assert search.said
    assert capsys.readouterr().err == "i2v-lab: a search: up to 4 forecasts to compute, in at most about 47 s\n"


def test_a_generation_on_a_card_is_predicted_where_its_forecast_is_known(cache, capsys):
    request = make_request(FULL, frames=9)
    expected.announce_generation(request, FULL, "cuda", "NVIDIA H100 80GB HBM3")
    assert "was not forecast; `i2v-lab forecast` predicts it in about 20 s" in capsys.readouterr().err
    cache.add(9)
    expected.announce_generation(request, FULL, "cuda", "NVIDIA H100 80GB HBM3")
    assert "predicted to take 0.00 s on NVIDIA H100 80GB HBM3" in capsys.readouterr().err
    expected.announce_generation(request, FULL, "cuda", "Instinct MI300X")
    assert "is not known: it has no published rates here" in capsys.readouterr().err
    expected.announce_generation(request, FULL, "cpu", "")
    expected.announce_generation(request, TINY, "cuda", "NVIDIA H100 80GB HBM3")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cached", [False, True])
def test_a_sweep_says_beforehand_how_long_it_takes(cache, monkeypatch, tmp_path, cached):
    cache.update((9, 17) if cached else ())
    grid, out = tmp_path / "grid.yaml", tmp_path / "out.csv"
    grid.write_text(f"model: {FULL}\nframes: [9, 17]\n", encoding="utf-8")
    monkeypatch.setattr("i2v_lab.capacity.sweep.forecast_rows", lambda specs, *_: [{"error": None} for _ in specs])
    shown = CliRunner().invoke(app, ["sweep", str(grid), "--out", str(out), "--workers", "1"])
    assert shown.exit_code == 0
    assert shown.stderr == ("" if cached else "i2v-lab: 2 forecasts to compute, in about 29 s\n")
    assert Path(out).is_file()
