"""diffusers' memory settings: what is refused, and that forecasts under them are what an H100 was measured to take."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from i2v_lab.capacity.cards import fitting_bytes, gpu_memory_bytes
from i2v_lab.cli.app import app
from i2v_lab.cli.options import build_request, memory_settings
from i2v_lab.errors import ForecastError, InvalidRequest, RunnerUnavailable
from i2v_lab.events import Phase
from i2v_lab.lab.controls import memory_settings as offered_settings
from i2v_lab.lab.controls import request_for_model, sizes
from i2v_lab.memory_settings import NO_SETTINGS, MemorySettings, TransformerQuantization
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture
from i2v_lab.pipeline.diffusers.quantized import build_quantized
from i2v_lab.pipeline.registry import RUNNERS, check_request
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.fake.workspaces import load_workspaces
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import Mode, execute
from i2v_lab.runs.forecast import forecast_spec
from i2v_lab.runs.recorded import by_generation, recorded_runs, spec_of
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.studies.pipelines import policy_name, policy_specs
from i2v_lab.studies.placed import best_placements, least_forecast, settings_tried
from i2v_lab.studies.published import varied

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of torch, for NumPy
TINY = "cogvideox-5b-i2v-tiny"
ANY = st.builds(
    dict,
    offload=st.sampled_from(["none", "model", "sequential", "group-leaf", "group-block", "disk"]),
    offload_stream=st.booleans(),
    offload_blocks=st.integers(0, 3),
    vae_tiling=st.booleans(),
    vae_tile=st.dictionaries(
        st.sampled_from(["tile_sample_min_height", "tile_overlap_factor_width"]), st.integers(-1, 64)
    ),
    vae_slicing=st.booleans(),
    layerwise_casting=st.booleans(),
    quantization=st.sampled_from(["none", "gguf-q8_0", "torchao-int8-weight-only", "bnb-int8"]),
    dtypes=st.dictionaries(st.sampled_from(["vae", "default"]), st.sampled_from(["float32", "bfloat16", "int8"])),
)


def _outcome(values: dict[str, Any]) -> tuple[MemorySettings | None, InvalidRequest | None]:
    try:
        return MemorySettings.from_json(values), None
    except InvalidRequest as error:
        return None, error


@settings(deadline=None)
@given(ANY)
def test_settings_are_refused_with_their_value_or_survive_json_and_the_command_line(values):
    made, error = _outcome(values)
    if made is None:
        assert set(error.fields) & ({*values} | {*values["vae_tile"]} | {*values["dtypes"]})
        assert "\n" not in str(error)
        return
    assert MemorySettings.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert hash(made) == hash(MemorySettings.from_json(values))
    assert made.is_default is (made == NO_SETTINGS) is (made.name == "") is (made.options == "")
    arguments = {name: values[name] for name in values if name not in ("vae_tile", "dtypes", "offload")}
    pairs = {name: [f"{key}={value}" for key, value in values[name].items()] for name in ("vae_tile", "dtypes")}
    told = memory_settings(values["offload"], **arguments, vae_tile=pairs["vae_tile"], dtype=pairs["dtypes"])
    assert told == made


def test_a_request_without_settings_keeps_its_digest():
    request = I2VRequest(image="still.png")
    assert request.digest() == I2VRequest.from_json({"image": "still.png"}).digest()
    other = I2VRequest(image="still.png", settings={"offload": "model"}, steps=4)
    assert I2VRequest.from_json(other.to_json()) == other
    assert other.digest() != request.digest()


# --- Refusals ---


@pytest.mark.parametrize(
    ("model", "asked", "fields"),
    [
        ("svd-xt-tiny", {"settings": {"vae_tiling": True}}, {"vae_tiling": True}),
        (
            TINY,
            {"settings": {"vae_tiling": True, "vae_tile": {"tile_height": 64}}},
            {"tile_height": 64},
        ),
    ],
)
def test_what_an_autoencoder_does_not_have_is_refused_before_anything_else_is_built(model, asked, fields):
    request = make_request(model, **asked)
    with pytest.raises(InvalidRequest) as refused:
        RUNNERS["diffusers"].pipeline(
            RUNNERS["diffusers"].skeleton_weights(load_architecture(model)), "cpu", settings=request.settings
        )
    assert refused.value.fields == fields


def test_a_prompt_is_refused_by_a_model_that_takes_none_and_dropped_by_the_views():
    with pytest.raises(InvalidRequest) as refused:
        check_request(load_architecture("svd-xt"), make_request("svd-xt", prompt="waves"))
    assert refused.value.fields == {"prompt": "waves"}
    other = request_for_model(make_request(TINY, prompt="waves", settings={"offload": "model"}), "svd-xt")
    assert (other.prompt, other.settings) == ("", NO_SETTINGS)
    check_request(load_architecture("svd-xt"), other)


def test_a_pipeline_takes_requests_with_its_own_settings_alone():
    pipeline = RUNNERS["diffusers"].pipeline(RUNNERS["diffusers"].skeleton_weights(load_architecture(TINY)), "cpu")
    with pytest.raises(InvalidRequest) as refused:
        pipeline(make_request(TINY, settings={"vae_tiling": True}))
    assert refused.value.fields["settings"]["vae_tiling"] is True


def test_offloading_of_blocks_fails_in_a_forecast_as_on_a_card():
    """On an H100: Input type (CUDABFloat16Type) and weight type (CPUBFloat16Type) should be the same."""
    spec = RunSpec(request=make_request(TINY, steps=1, settings={"offload": "group-block"}), model=TINY)
    with pytest.raises(ForecastError) as failed:
        execute(spec, Mode.FAKE, "cuda")
    assert failed.value.fields["cause"] == "fails on a card"
    assert failed.value.fields["settings"]["offload"] == "group-block"


# --- What is offered ---


@pytest.mark.parametrize("model", [TINY, "framepack-i2v-tiny"])  # the second one fails with sequential offload
def test_the_least_of_a_request_is_that_of_the_settings_that_are_tried(model):
    request = make_request(model, steps=1)
    tried = settings_tried(request, model, 0)
    least = min(map(fitting_bytes, tried.values()))
    assert least < fitting_bytes(tried[request])
    assert fitting_bytes(least_forecast(request, model)) == least


def test_fit_answers_what_the_explorer_and_the_answer_page_do():
    request = make_request(TINY, width=64, height=64, frames=9)
    needs = sorted({fitting_bytes(each) for each in settings_tried(request, TINY, 0).values()})
    gpu = f"{needs[0] / 2**30 + 1e-9:.9f}GiB"
    (placed,) = best_placements(request, TINY, [(gpu, needs[0])])
    asked = ["fit", "--gpu", gpu, "--model", TINY, "--width", "64", "--height", "64", "--frames", "9", "--json"]
    answer = json.loads(CliRunner().invoke(app, asked).stdout)
    assert answer["request"]["settings"] == placed.request.settings.to_json()
    assert answer["needed_bytes"] <= gpu_memory_bytes(gpu)


def test_studies_and_views_offer_what_a_model_takes():
    assert [policy_name(spec) for spec in policy_specs(make_request(TINY), TINY, varied(TINY, "policy_sizes"))] == [
        "resident",
        "offload-model",
        "offload-group-leaf_stream",
        "offload-sequential",
    ]
    assert sizes("cogvideox-5b-i2v", make_request("cogvideox-5b-i2v")) == ["720x480"]
    assert [label for label, _ in offered_settings("ltx-2.3-tiny", make_request("ltx-2.3-tiny"))] == ["none"]
    for model in ("wan-2.2-ti2v-5b", "svd-xt"):
        for text in sizes(model, make_request(model)):
            width, height = map(int, text.split("x"))
            check_request(load_architecture(model), make_request(model, width=width, height=height))


def test_the_models_command_lists_every_model_and_describes_one():
    listed = {each["name"]: each for each in json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)}
    assert {"wan-2.1-i2v-14b", "wan-2.2-i2v-a14b", "wan-2.2-ti2v-5b", "hunyuanvideo-i2v", "svd-xt"} <= set(listed)
    assert not any(name.endswith("-tiny") for name in listed)
    wan = listed["wan-2.2-i2v-a14b"]
    assert sum(wan["parameters"].values()) > 34e9
    assert wan["phases"] == ["encode_prompt", "encode_image", "denoise_stage_1", "denoise_stage_2", "decode_video"]
    two_stages = [phase.value for phase in Phase]
    for model, phases in (
        ("ltx-2-19b-diffusers", ["encode_prompt", "encode_image", "denoise_stage_1", "decode_video", "decode_audio"]),
        ("ltx-2.3-22b-diffusers", [*two_stages[:5], "decode_video", "decode_audio"]),
        ("ltx-2.3-22b", two_stages),
        ("ltxv-13b-0.9.8", [*two_stages[:5], "decode_video"]),
        ("hunyuanvideo-i2v", ["encode_image", "encode_prompt", "denoise_stage_1", "decode_video"]),
        ("svd-xt", ["encode_image", "denoise_stage_1", "decode_video"]),
    ):
        assert listed[model]["phases"] == phases
    described = CliRunner().invoke(app, ["models", "wan-2.2-i2v-a14b"]).stdout
    assert "transformer_2: 14.29 B parameters" in described


def test_the_list_of_models_is_as_wide_as_columns_says_and_loses_nothing(monkeypatch):
    names = [name for name in architecture_names() if "tiny" not in name]
    for columns, widest in (("", 120), ("0", 120), ("200", 200), ("80", 80), ("48", 48)):
        monkeypatch.setenv("COLUMNS", columns)
        shown = CliRunner().invoke(app, ["models"]).stdout.splitlines()
        lines = [line for line in shown if not line.startswith("model=")]  # what the installed versions lack
        table = lines[: next(index for index, line in enumerate(lines) if line.startswith("parameters:"))]
        assert max(map(len, table)) <= widest
        if columns == "48":  # each model in lines of its own
            phases = "".join(table).replace(" ", "")
            found = [line.rstrip() for line in table if line[0] != " "]
            counts = [phases.count(heading) for heading in ("parameters:", "default:", "phases:")]
            assert counts == [phases.count("Bdefault:"), len(names), len(names)]  # not all are known
        else:
            phases = "".join(line[table[0].index("phases") :] for line in table[1:]).replace(" ", "")
            found = [line.split()[0] for line in table[1:] if line[0] != " "]
        assert phases.count("decode_video") == len(names)
        assert found == names


# --- Measured on an H100 ---


@pytest.mark.parametrize("model", ["cogvideox-5b-i2v", "ltx-video-2b", "svd-xt"])
def test_measured_runs_are_forecast_within_half_a_percent(model):
    """Phases without a text encoder: T5's attention depends on the version of transformers."""
    runs = [run for run in recorded_runs().runs if run.metadata["model"] == model]
    assert len(runs) >= 3
    run = min(runs, key=lambda each: len(spec_of(each).request.settings.name))
    measured = [phase for _, phase in by_generation(run.of(PhaseRecord))]
    forecast = {phase.phase: phase for phase in forecast_spec(spec_of(run)).phases}
    assert [phase.phase for phase in measured] == list(forecast)
    for phase in measured:
        assert forecast[phase.phase].peak_reserved_bytes == pytest.approx(phase.peak_reserved_bytes, rel=0.1)
        if phase.phase != "encode_prompt":
            assert forecast[phase.phase].peak_bytes == pytest.approx(phase.peak_bytes, rel=0.005)


def test_six_models_were_measured_under_three_settings_or_more():
    counted = Counter(spec_of(run).model for run in recorded_runs().runs if spec_of(run).architecture.pipeline)
    assert len([model for model, count in counted.items() if count >= 3]) >= 6


def test_attention_is_forecast_as_it_was_measured():
    """Up to the rest of a cached block that is too small to be split off, which depends on what was there before."""
    recorded = json.loads((data_dir() / "measured" / "attention-h100.json").read_text())
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    with forecasting("cuda", workspaces=load_workspaces()) as profiler, profiler.phase("attention"), torch.no_grad():
        torch.zeros(64, 64, device="cuda") @ torch.zeros(64, 64, device="cuda")
        for dtype, (batch, heads, rows, keys, width), mask, peak_bytes, _ in recorded["rows"][::3]:
            query = torch.zeros(batch, heads, rows, width, device="cuda", dtype=dtypes[dtype])
            key = torch.zeros(batch, heads, keys, width, device="cuda", dtype=dtypes[dtype])
            added = _mask(mask, batch, heads, rows, keys, dtypes[dtype])
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=added)
            forecast_bytes = torch.cuda.max_memory_allocated() - before
            assert -4096 <= forecast_bytes - peak_bytes <= 0.04 * peak_bytes + 2**20, (dtype, mask)
            del query, key, added


def _mask(name: str, batch: int, heads: int, rows: int, keys: int, dtype: torch.dtype) -> torch.Tensor | None:
    if name == "none":
        return None
    if name == "heads last":
        return torch.zeros(batch, rows, keys, heads, device="cuda", dtype=dtype).permute(0, 3, 1, 2)
    kind = {"bool": torch.bool, "bool 1row": torch.bool, "bool full": torch.bool, "float32 mask": torch.float32}
    shape = (batch, heads if name in ("float", "bool full") else 1, 1 if "1row" in name else rows, keys)
    return torch.zeros(*shape, device="cuda", dtype=kind.get(name, dtype))


# --- Quantization ---


def _peaks(spec: RunSpec, mode: Mode) -> dict[str, int]:
    return {record.phase: record.peak_bytes for record in execute(spec, mode, "cpu").phases}


@pytest.mark.parametrize("quantization", ["torchao-int8-weight-only", "torchao-float8-weight-only", "gguf-q8_0"])
def test_a_quantized_transformer_takes_in_every_phase_what_is_forecast(quantization):
    spec = RunSpec(request=make_request(TINY, steps=1, settings={"quantization": quantization}), model=TINY)
    plain = RunSpec(request=make_request(TINY, steps=1), model=TINY)
    forecast = _peaks(spec, Mode.FAKE)  # first: importing diffusers makes a few tensors of its own
    assert forecast == _peaks(spec, Mode.REAL)
    assert all(forecast[phase] < peak for phase, peak in _peaks(plain, Mode.FAKE).items())


@pytest.mark.parametrize(
    ("quantization", "block_bytes", "values"),
    [("gguf-q8_0", 34, 32), ("gguf-q6_k", 210, 256), ("gguf-q5_k", 176, 256), ("gguf-q4_k", 144, 256)],
)
def test_blocks_of_gguf_are_counted_and_compute_finite_numbers(quantization, block_bytes, values):
    architecture = load_architecture(TINY)
    config = {**architecture.config["transformer"], "attention_head_dim": 128, "num_attention_heads": 2}
    wide = replace(architecture, config={**architecture.config, "transformer": config})
    model = build_quantized(wide, "transformer", TransformerQuantization(quantization), torch.bfloat16)
    layer = model.transformer_blocks[0].attn1.to_q
    assert layer.weight.untyped_storage().nbytes() == 256 * 256 // values * block_bytes
    assert layer(torch.ones(1, 256, dtype=torch.bfloat16)).isfinite().all()
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "values", "fields"),
    [
        (TINY, {"quantization": "bnb-int8"}, {"quantization": "bnb-int8"}),
        (TINY, {"quantization": "bnb-nf4"}, {"quantization": "bnb-nf4"}),
        (TINY, {"quantization": "torchao-int4-weight-only"}, {"quantization": "torchao-int4-weight-only"}),
        (TINY, {"quantization": "gguf-q8_0", "layerwise_casting": True}, {"quantization": "gguf-q8_0"}),
        (
            TINY,
            {"quantization": "gguf-q8_0", "offload": "sequential"},
            {"quantization": "gguf-q8_0", "offload": "sequential"},
        ),
        ("svd-xt-tiny", {"quantization": "gguf-q8_0"}, {"quantization": "gguf-q8_0", "model": "svd-xt-tiny"}),
        ("ltx-2.3-tiny", {"quantization": "gguf-q8_0"}, {"quantization": "gguf-q8_0"}),
        (
            "ltx-2.3-tiny-diffusers",
            {"quantization": "gguf-q8_0"},
            {"quantization": "gguf-q8_0", "model": "ltx-2.3-tiny-diffusers"},
        ),
    ],
)
def test_a_quantization_that_cannot_be_honoured_is_refused_before_anything_is_built(model, values, fields):
    with pytest.raises(InvalidRequest) as refused:
        check_request(load_architecture(model), make_request(model, settings=values))
    assert refused.value.fields == fields
    assert "\n" not in str(refused.value)


def test_a_quantization_no_layer_is_wide_enough_for_is_refused():
    with pytest.raises(InvalidRequest) as refused:
        build_quantized(load_architecture(TINY), "transformer", TransformerQuantization.GGUF_Q4_K, torch.bfloat16)
    assert refused.value.fields == {"quantization": "gguf-q4_k", "model": TINY}


def test_a_quantization_without_its_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(sys, "path", [])
    request = make_request(TINY, settings={"quantization": "gguf-q8_0"})
    with pytest.raises(RunnerUnavailable, match=r"pip install 'i2v-lab\[quantization\]'") as refused:
        check_request(load_architecture(TINY), request)
    assert refused.value.fields == {"quantization": "gguf-q8_0", "missing": "gguf"}


def test_gguf_is_refused_with_the_kernels_that_a_forecast_does_not_know(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_GGUF_CUDA_KERNELS", "true")
    with pytest.raises(InvalidRequest) as refused:
        check_request(load_architecture(TINY), make_request(TINY, settings={"quantization": "gguf-q8_0"}))
    assert refused.value.fields == {"quantization": "gguf-q8_0"}


def test_one_option_of_the_command_line_takes_both_kinds_of_quantization():
    assert memory_settings(quantization="gguf-q4_0") == MemorySettings(quantization="gguf-q4_0")
    assert memory_settings(quantization="fp8-cast") == memory_settings(quantization="bf16") == NO_SETTINGS
    with pytest.raises(InvalidRequest) as refused:
        memory_settings(quantization="fp8")
    assert refused.value.fields == {"quantization": "fp8"}
    architecture = load_architecture(TINY)
    request = build_request(
        architecture, (None,) * 4, False, image="still.png", quantization="gguf-q4_0", settings=NO_SETTINGS
    )
    assert request.quantization.value == "bf16"
    with pytest.raises(InvalidRequest) as refused:
        build_request(architecture, (None,) * 4, False, image="still.png", quantization="fp8-cast")
    assert refused.value.fields == {"quantization": "fp8-cast"}


def test_settings_without_a_quantization_have_the_digest_of_before_there_was_one():
    offloaded = MemorySettings(offload="model")
    assert "quantization" not in offloaded.to_json()
    quantized = MemorySettings(offload="model", quantization="gguf-q4_k")
    assert MemorySettings.from_json(quantized.to_json()) == quantized
    assert quantized.options == "--offload model --quantization gguf-q4_k"
    assert quantized.name == "offload-model_gguf-q4-k"


@pytest.mark.parametrize(("gpu", "fits"), [("0.2GiB", False), ("24GiB", True)])
def test_fit_goes_past_settings_that_fail_on_a_card(gpu, fits):
    """FramePack does not run with sequential offload."""
    shape = ["--model", "framepack-i2v-tiny", "--width", "64", "--height", "64", "--frames", "33"]
    shown = CliRunner().invoke(app, ["fit", "--gpu", gpu, "--offload", "model", *shape])
    assert shown.exit_code == (0 if fits else 1)
    assert ("are needed at least" in shown.stdout) is not fits
