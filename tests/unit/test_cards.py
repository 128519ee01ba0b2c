"""Cards by the names that nvidia-smi prints, sizes as people write them, and what ``fit`` says where nothing fits."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from i2v_lab.capacity import fit as fit_module
from i2v_lab.capacity.cards import RESERVED_MARGIN_PERCENT, USABLE, gpu_memory_bytes, gpu_table, judge
from i2v_lab.cli.app import app
from i2v_lab.errors import InvalidRequest
from i2v_lab.paths import data_dir
from i2v_lab.profiling.records import Forecast, PhaseRecord
from i2v_lab.studies.accuracy import measured_table
from i2v_lab.units import GIB

TABLE = dict(zip(gpu_table()["gpu"], gpu_table()["memory_bytes"], strict=True))


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("GeForce RTX 3060 12GB", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 4050 Laptop GPU", "RTX 4050 Laptop 6GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        (" RTX   4090 24 gb", "RTX 4090"),
        ("l40s 48GB", "L40S"),
        ("rtx 5060ti 16 GB", "RTX 5060 Ti 16GB"),
        *((name, name) for name in TABLE),
        *((name.upper(), name) for name in TABLE),
    ],
)
def test_a_card_is_known_by_what_nvidia_smi_prints_and_by_less(printed, name):
    assert gpu_memory_bytes(printed) == TABLE[name]


@pytest.mark.parametrize(
    ("printed", "gib", "kind"),
    [
        ("NVIDIA RTX A6000", 48, "workstation"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, "consumer"),
        ("NVIDIA GeForce RTX 4070 Ti", 12, "consumer"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, "consumer"),
        ("Tesla V100-SXM2-32GB", 32, "data-centre"),
        ("NVIDIA H100 NVL", 94, "data-centre"),
    ],
)
def test_a_card_of_which_the_nominal_memory_is_known_has_it_less_a_margin(printed, gib, kind):
    assert gpu_memory_bytes(printed) == int(gib * USABLE[kind] * GIB)


@given(st.integers(1, 900) | st.sampled_from([0.5, 23.5]), st.sampled_from(["GB", "GiB", " gb", "gib", "G", "  "]))
def test_a_size_is_gib_however_it_is_written(gib, unit):
    assert gpu_memory_bytes(f"{gib}{unit}") == int(gib * GIB)


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("RTX 4900", "RTX 4090"),
        ("RTX 40900", "RTX 4090"),
        ("H10O", "H100"),
        ("L40 S2", "L40S"),
        ("A100", "A100 40GB or A100 80GB"),
        ("RTX 4060 16GB", "RTX 4060 8GB"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "A100"),
    ],
)
def test_a_typing_error_gets_what_was_meant(typed, near):
    with pytest.raises(InvalidRequest) as caught:
        gpu_memory_bytes(typed)
    assert "did you mean" in str(caught.value)
    assert near in str(caught.value)
    assert caught.value.fields == {"gpu": typed}


@pytest.mark.parametrize("typed", ["", "0", "0GB", "-1", "-1GiB", "infGiB", "1e400GiB", "9" * 30, "9" * 400 + "GiB"])
def test_what_is_no_size_and_no_card_is_refused(typed):
    with pytest.raises(InvalidRequest) as caught:
        gpu_memory_bytes(typed)
    assert list(caught.value.fields) == ["gpu"]


# --- What "fits" means ---


@pytest.mark.parametrize(
    ("memory_bytes", "verdict"), [(1060 * 2**20 + 50, "fits"), (1060 * 2**20 + 49, "tight"), (900 * 2**20 + 49, "no")]
)
def test_a_card_fits_with_a_margin_above_the_reserved_bytes(memory_bytes, verdict):
    phase = PhaseRecord("a", None, 0, 900 * 2**20, 0, 1000 * 2**20, 900 * 2**20, 0, 0, 0, True)
    assert judge(Forecast((phase,), 50, 0), "a card", memory_bytes).verdict == verdict


def test_the_margin_suffices_in_every_committed_record():
    """By the forecasts of ``data/accuracy.csv``, which has every comparable record as it was measured."""
    table = pd.read_csv(data_dir() / "accuracy.csv")
    measured = measured_table(diffusers=True).groupby(["gpu", "model", "run"])
    kept = table.set_index(["gpu", "model", "run"]).sort_index()
    for name in ("peak_bytes", "peak_reserved_bytes"):
        assert kept[name].equals(measured[name].max())
    assert len(table) == 110
    forecast = table["forecast_reserved_bytes"]
    assert (table["peak_reserved_bytes"] <= forecast + forecast * RESERVED_MARGIN_PERCENT // 100).all()
    own = table[table["model"] == "ltx-2.3-22b"]
    assert len(own) == 53  # as the documentation says
    assert ((own["forecast_bytes"] / own["peak_bytes"] - 1).abs() < 0.0107).all()


# --- Where nothing fits ---

NEEDS = {"resident": 20, "lean": 15}  # GiB, as asked


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize(
    ("gpu", "memory", "fits"),
    [("24GB", "resident", "as asked"), ("8GB", "lean", "placed"), ("0.5GB", "resident", "not at all")],
)
def test_where_nothing_fits_as_asked_the_placement_that_does_is_named_and_the_status_is_1(
    monkeypatch, gpu, memory, fits, form
):
    real = fit_module.forecast_request

    def forecast(request, *rest):
        if request.memory.value not in NEEDS:
            return real(request, *rest)
        need = NEEDS[request.memory.value] * GIB
        return Forecast((PhaseRecord("a", None, 0, need, 0, need, need, 0, 0, 0, True),), 0, 0)

    monkeypatch.setattr(fit_module, "forecast_request", forecast)  # as asked; the tiny model is placed
    words = ["fit", "--gpu", gpu, "--memory", memory, "--model", "ltx-2.3-tiny", "--width", "64", "--height", "64"]
    result = CliRunner().invoke(app, [*words, "--frames", "9", *form])
    assert result.exit_code == (0 if fits == "as asked" else 1)
    if form:
        answer = json.loads(result.stdout)
        assert (answer["request"] is not None) == (fits == "as asked")
        assert (answer["instead"] is not None) == (fits == "placed")
        assert (answer["needed_bytes"] <= gpu_memory_bytes(gpu)) == (fits != "not at all")
    elif fits == "placed":
        assert f"with --memory {memory} the smallest request takes {NEEDS[memory]}.00 GiB" in result.stdout
        assert "i2v-lab generate --device cuda --model ltx-2.3-tiny" in result.stdout
        assert "--vram-budget 8GiB" in result.stdout
    elif fits == "not at all":
        assert "GiB are needed at least" in result.stdout
