"""Published peaks beside forecasts: which run stands for a row, what is compared with what, and that no row is lost."""

from __future__ import annotations

import pytest
from test_published_memory import ROW, write

from i2v_lab.errors import InvalidRequest
from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture, model_names
from i2v_lab.profiling.records import Forecast
from i2v_lab.runs.forecast import forecast_spec
from i2v_lab.studies.published_forecasts import counted_bytes, published_spec, published_summary, published_table
from i2v_lab.studies.published_memory import PublishedPeak, read_published

TINY = {
    "model": "wan-2.2-ti2v-5b-tiny",
    "width": "64",
    "height": "64",
    "frames": "5",
    "steps": "1",
    "dtype": "",
    "offload": "none",
    "other": "",
}


@pytest.fixture(scope="module")
def peaks() -> dict[str, PublishedPeak]:
    return {peak.id: peak for peak in read_published()}


def printed(n_bytes: float) -> dict[str, str]:
    """The columns of a peak of so many bytes."""
    return {"printed": f"{n_bytes / 2**20:.6f}", "peak_gib": f"{n_bytes / 2**30:.9f}", "unit": "MiB"}


# --- The run that a row stands for ---


def test_the_settings_of_a_row_are_those_of_its_run(tmp_path):
    path = write(
        tmp_path / "memory.csv",
        {"other": "dtypes.vae=float32; offload_blocks=4", "offload": "group-block", "vae_slicing": "yes"},
        {"id": "b", "dtype": "float16", "other": "offload_stream=true", "offload": "group-leaf"},
        {"id": "c", "quantization": "layerwise-fp8", "vae_tiling": "yes", "offload": "", "dtype": "", "other": ""},
    )
    runs = [published_spec(peak) for peak in read_published(path)]
    requests = [run.request for run in runs]
    assert {(r.width, r.height, r.frames, r.steps) for r in requests} == {(1280, 704, 121, 50)}
    first, second, third = (request.settings for request in requests)
    assert (first.offload, first.offload_blocks, first.vae_slicing) == ("group-block", 4, True)
    assert dict(first.dtypes).get("vae", load_architecture(ROW["model"]).dtypes.get("vae")) == "float32"
    assert (second.offload, second.offload_stream, dict(second.dtypes)["default"]) == ("group-leaf", True, "float16")
    assert (third.offload, third.layerwise_casting, third.vae_tiling, third.dtypes) == ("none", True, True, ())


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"model": "flux-1-dev"}, "model"),
        ({"frames": ""}, "frames"),
        ({"width": ""}, "width"),
        ({"batch": "4"}, "batch"),
        ({"quantization": "bnb-4bit"}, "quantization"),
        ({"other": "fused QKV projections"}, "other"),
        ({"other": "offload_stream=yes"}, "other"),
        ({"other": "dtypes.vae=float8"}, "vae"),
        ({"other": "dtypes.nothing=float32"}, "nothing"),
        ({"offload": "model", "other": "offload_blocks=4"}, "offload_blocks"),
        ({"width": "1281"}, "width"),
    ],
)
def test_a_row_that_no_run_stands_for_says_which_column_it_is(tmp_path, columns, named):
    (peak,) = read_published(write(tmp_path / "memory.csv", columns))
    with pytest.raises(InvalidRequest) as caught:
        published_spec(peak)
    assert named in caught.value.fields


def test_most_published_peaks_of_models_here_are_compared(peaks):
    runs = {}
    for name, peak in peaks.items():
        try:
            runs[name] = published_spec(peak).name
        except InvalidRequest:
            continue
    assert len(runs) >= 35
    assert "_offload-model" in runs["blog-hunyuanvideo-offload"]
    assert "blog-hunyuanvideo-4bit" not in runs


def test_models_of_published_peaks_alone_are_not_offered_but_can_be_forecast():
    only = set(model_names()) - set(architecture_names())
    assert {"hunyuanvideo", "cogvideox-5b", "cogvideox-2b", "cogvideox-1.5-5b", "wan-2.1-t2v-1.3b", "svd"} <= only
    for name in only:
        model = load_architecture(name)
        assert (model.name, model.runner) == (name, "diffusers")
        assert "tiny" not in name
    text_model, image_model = load_architecture("cogvideox-5b"), load_architecture("cogvideox-5b-i2v")
    assert text_model.config["vae"] == image_model.config["vae"]
    assert (text_model.config["transformer"]["in_channels"], text_model.parameters) == (16, {})
    assert "ofs_embed_dim" not in load_architecture("cogvideox-1.5-5b").config["transformer"]


def test_peaks_that_others_measured_at_full_size_are_what_is_forecast():
    """On an A100, with diffusers of January 2025."""
    table = published_table(ids=["blog-cogvideox-1.5-5b"])
    assert table["status"].tolist() == ["within 5 %"]
    assert table["error"].abs().max() < 0.003


# --- What is compared with what ---


def test_each_quantity_is_compared_with_what_the_forecast_says_of_it(tmp_path):
    (peak,) = read_published(write(tmp_path / "memory.csv", TINY))
    forecast: Forecast = forecast_spec(published_spec(peak))
    allocated, reserved = forecast.peak.peak_bytes, forecast.peak_reserved_bytes
    card = reserved + forecast.context_bytes
    assert allocated < reserved < card
    wanted = {"allocated": allocated, "not stated": allocated, "reserved": reserved}
    wanted |= {"nvidia-smi": card, "minimum card": card}
    assert {quantity: counted_bytes(quantity, forecast) for quantity in wanted} == wanted
    rows = [
        {**TINY, "id": "same", "quantity": "reserved", **printed(reserved)},
        {**TINY, "id": "less", "quantity": "allocated", **printed(allocated / 1.04), "reason": "not needed"},
        {**TINY, "id": "far", "quantity": "allocated", **printed(allocated / 1.06)},
        {**TINY, "id": "known", "quantity": "nvidia-smi", **printed(card / 0.9), "reason": "another version"},
        {
            **TINY,
            "id": "tried",
            "quantity": "nvidia-smi",
            **printed(card / 0.9),
            "reason": "not explained; tiles",
        },
        {**TINY, "id": "batch", "batch": "2", "reason": "images"},
        {**TINY, "id": "odd", "frames": "10"},
        {**TINY, "id": "no-size", "width": "", "frames": ""},
        {**TINY, "id": "other-model", "model": "flux-1-dev"},
    ]
    path = write(tmp_path / "memory.csv", *rows)
    table = published_table(path).set_index("id")
    assert list(table.index) == [row["id"] for row in rows]
    statuses = ["within 5 %", "within 5 %", "not explained", "explained", "not explained", *["not compared"] * 4]
    assert list(table["status"]) == statuses
    assert table["forecast_bytes"].dropna().tolist() == [reserved, allocated, allocated, card, card]
    assert table["error"].dropna().round(4).tolist() == [0.0, 0.04, 0.06, -0.1, -0.1]
    assert (table.loc["known", "reason"], table.loc["far", "reason"]) == ("another version", "")
    assert table.loc["tried", "reason"] == "not explained; tiles"
    assert table.loc["no-size", "reason"] == "width, frames not stated"
    assert table.loc["batch", "reason"] == "batch of 2, where a request here is one video; images"
    assert table.loc["other-model", "reason"] == "flux-1-dev is no model here"
    assert "frames=10" in table.loc["odd", "reason"]
    summary = published_summary(table.reset_index()).set_index("quantity")
    assert summary.loc["all", ["peaks", "compared", "within"]].tolist() == [9, 5, 2]
    assert summary.loc["reserved", ["peaks", "compared", "within"]].tolist() == [1, 1, 1]
    assert round(summary.loc["all", "worst_error"], 3) == 0.1
    assert published_table(path, ["far"])["id"].tolist() == ["far"]
    assert published_table(path, models=["flux-1-dev"])["id"].tolist() == ["other-model"]
    with pytest.raises(InvalidRequest) as caught:
        published_table(path, ["near"])
    assert caught.value.fields == {"id": "near"}


def test_a_summary_of_rows_without_a_forecast_knows_no_error(tmp_path):
    path = write(tmp_path / "memory.csv", {"model": "flux-1-dev"})
    summary = published_summary(published_table(path))
    assert summary["compared"].tolist() == [0, 0]
    assert summary[["median_error", "worst_error"]].isna().all(axis=None)
