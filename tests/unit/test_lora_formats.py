"""Formats of LoRA files: what is applied, how it is scaled, what is refused and what is told."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import CheckpointError
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy
from i2v_lab.pipeline.ltx2.components import Ledger
from i2v_lab.pipeline.ltx2.weights import Weights, resolve_weights
from i2v_lab.request import Quantization
from i2v_lab.runs.store import read_run

CPU = torch.device("cpu")
NAMES = [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")]
NAMES += [("lora_A.default", "lora_B.default")]
LAYER = "transformer_blocks.1.attn1.to_q"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def lora(tiny) -> Tensors:
    """The LoRA of the tiny model, by names without a prefix."""
    return {key.removeprefix("diffusion_model."): tensor for key, tensor in load_file(tiny.lora).items()}


@pytest.fixture
def resolved(tiny, tiny_files, tmp_path, monkeypatch):
    monkeypatch.setenv("I2V_LAB_CACHE", str(tmp_path / "cache"))

    def resolve(tensors: Tensors, needs_lora: bool = True, **metadata: str) -> Weights:
        path = tmp_path / f"lora-{len(list(tmp_path.glob('lora-*')))}.safetensors"
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata=metadata or None)
        return resolve_weights(tiny.architecture, **{**tiny_files, "lora": path}, needs_lora=needs_lora)

    return resolve


def _fused(weights: Weights, *, with_lora: bool = True) -> Tensors:
    state = Ledger(weights, CPU, Quantization.BF16, with_lora=with_lora).transformer().state_dict()
    return {key.removeprefix("velocity_model."): value for key, value in state.items()}


def _named(lora: Tensors, prefix: str, a: str = "lora_A", b: str = "lora_B") -> Tensors:
    return {prefix + key.replace("lora_A", a).replace("lora_B", b): tensor for key, tensor in lora.items()}


def _expected(weights: Weights, lora: Tensors, scale: float) -> Tensors:
    """Every weight plus scale * B @ A, computed in float32."""
    state = _fused(weights, with_lora=False)
    for key in [key for key in lora if key.endswith(".lora_A.weight")]:
        name = key.replace(".lora_A.weight", ".weight")
        delta = (lora[key.replace("lora_A", "lora_B")].float() * scale) @ lora[key].float()
        state[name] = delta.bfloat16() + state[name]
    return state


def _assert_equal(seen: Tensors, expected: Tensors) -> None:
    assert seen.keys() == expected.keys()
    assert [key for key in seen if not torch.equal(seen[key], expected[key])] == []


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        *((prefix, names) for prefix in ("diffusion_model.", "transformer.", "") for names in NAMES[:2]),
        ("transformer.", NAMES[2]),
        ("", NAMES[3]),
        ("base_model.model.", NAMES[3]),
        ("base_model.model.transformer.", NAMES[0]),
    ],
)
def test_every_prefix_and_name_of_pairs_gives_the_same_weights(tiny, lora, resolved, prefix, names):
    weights = resolved(_named(lora, prefix, *names))
    assert weights.notes == ("LoRA: 68 of 68 layers",)
    _assert_equal(_fused(weights), _fused(tiny))
    assert not torch.equal(_fused(weights)[f"{LAYER}.weight"], _fused(tiny, with_lora=False)[f"{LAYER}.weight"])


def _alphas(lora: Tensors, value: float) -> Tensors:
    return {key.replace("lora_A.weight", "alpha"): torch.tensor(value) for key in lora if ".lora_A." in key}


def _adapter(**values: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in values.items()})}


def test_alpha_scales_by_alpha_over_rank_from_the_file_or_its_metadata(tiny, lora, resolved):
    rank = tiny.architecture.lora_rank
    for alpha in (1.0, 3.0, 2.0 * rank):
        for weights in (
            resolved(_named(lora | _alphas(lora, alpha), "diffusion_model.")),
            resolved(_named(lora, "transformer."), **_adapter(r=rank, lora_alpha=alpha, use_dora=False)),
        ):
            assert weights.notes == (f"LoRA: 68 of 68 layers, scaled by {alpha / rank:g}",)
            _assert_equal(_fused(weights), _expected(weights, lora, alpha / rank))
    weights = resolved(lora | _alphas(lora, rank))
    assert weights.notes == ("LoRA: 68 of 68 layers",)
    _assert_equal(_fused(weights), _fused(tiny))


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.float8_e4m3fn, torch.bfloat16)]
)
def test_a_pair_of_two_dtypes_is_multiplied_in_float32(lora, resolved, dtypes):
    mixed = {key: tensor.to(dtypes[".lora_B." in key]) for key, tensor in lora.items()}
    weights = resolved(mixed)
    _assert_equal(_fused(weights), _expected(weights, mixed, 1.0))


def test_streamed_blocks_have_the_same_weights(lora, resolved):
    weights = resolved(_named(lora | _alphas(lora, 3.0), "transformer.").copy())
    resident = _fused(weights)
    ledger = Ledger(weights, CPU, Quantization.BF16, TECHNIQUES[MemoryPolicy.STREAMED], with_lora=True)
    stream = next(module.weight_stream for module in ledger.transformer().modules() if "weight_stream" in vars(module))
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        for key, tensor in stream._loads[block]().items():
            assert torch.equal(tensor, resident[key])
    stream.close()


def test_what_is_applied_is_told(tiny, lora, resolved):
    few = {key: tensor for key, tensor in lora.items() if key.startswith(LAYER)}
    assert resolved(few).notes == ("LoRA: 1 of 68 layers",)
    assert resolved(few, needs_lora=False).notes == ("LoRA: not applied, which only --variant dev does",)
    for name, words in (
        ("patchify_proj", ", and 1 outside the blocks"),
        (
            "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q",
            "; 1 of the embeddings connectors are not applied",
        ),
    ):
        weight = load_file(tiny.checkpoint)[f"model.diffusion_model.{name}.weight"]
        pair = {
            f"{name}.lora_A.weight": torch.ones(2, weight.shape[1]).bfloat16(),
            f"{name}.lora_B.weight": torch.ones(weight.shape[0], 2).bfloat16(),
        }
        weights = resolved(few | pair)
        assert weights.notes == (f"LoRA: 1 of 68 layers{words}",)
        plain, fused = _fused(weights, with_lora=False), _fused(weights)
        changed = {key for key in plain if not torch.equal(plain[key], fused[key])}
        assert changed == {f"{LAYER}.weight"} | ({"patchify_proj.weight"} if name == "patchify_proj" else set())
    half = {**lora, f"{LAYER}.alpha": torch.tensor(tiny.architecture.lora_rank / 2)}
    assert resolved(half).notes == ("LoRA: 68 of 68 layers, scaled by 0.5 to 1",)


ONE = torch.ones(1)
BAD = {
    "DoRA": (f"{LAYER}.dora_scale", "format"),
    "DoRA of PEFT": (f"{LAYER}.lora_magnitude_vector", "format"),
    "LoKr": (f"{LAYER}.lokr_w1", "format"),
    "LoHa": (f"{LAYER}.hada_w1_a", "format"),
    "LoCon": (f"{LAYER}.lora_mid.weight", "format"),
    "differences": (f"diffusion_model.{LAYER}.diff", "format"),
    "differences of biases": (f"diffusion_model.{LAYER}.diff_b", "format"),
    "a layer that does not exist": ("transformer_blocks.99.attn1.to_q.lora_A.weight", "unknown"),
    "an alpha of no layer": ("alpha", "unknown"),
    "a layer of Kohya's names": ("lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight", "unknown"),
    "a bias": (f"{LAYER}.lora_B.bias", "unknown"),
    "an alpha of several numbers": (f"{LAYER}.alpha", "architecture"),
    "an alpha that is no number": (f"diffusion_model.{LAYER}.alpha", "values"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_other_formats_and_layers_are_refused_by_name(lora, resolved, tmp_path, case):
    key, fault = BAD[case]
    value = {"architecture": torch.ones(2), "values": torch.tensor(float("nan"))}.get(fault, ONE)
    fields = _refused(resolved, {**lora, key: value})
    assert fields == {
        "option": "--lora",
        "path": tmp_path / "lora-0.safetensors",
        "fault": fault,
        "tensor": key,
        "dtype": "F32",
    }


def _refused(resolved, tensors: Tensors, **metadata: str) -> dict[str, object]:
    with pytest.raises(CheckpointError) as caught:
        resolved(tensors, **metadata)
    assert "\n" not in str(caught.value)
    return dict(caught.value.fields)


def test_integers_an_alpha_alone_and_other_adapters_are_refused(lora, resolved, tmp_path):
    key = f"{LAYER}.lora_A.weight"
    fields = _refused(resolved, {**lora, key: lora[key].to(torch.int8)})
    assert (fields["fault"], fields["tensor"], fields["dtype"]) == ("dtype", key, "I8")
    fields = _refused(resolved, {f"{LAYER}.alpha": ONE})
    assert (fields["fault"], fields["missing"]) == ("incomplete", [key])
    for name, value in {"use_dora": True, "use_rslora": True, "alpha_pattern": {LAYER: 2}}.items():
        fields = _refused(resolved, lora, **_adapter(lora_alpha=4, **{name: value}))
        assert (fields["fault"], fields["tensor"]) == ("format", name)
    twice = f"transformer.{LAYER}.lora_A.weight"
    fields = _refused(resolved, {**lora, twice: lora[key]})
    assert (fields["fault"], fields["tensor"]) == ("duplicate", key)  # the second in the file's order
    for text in ("[]", "no json", '{"transformer.lora_alpha": "much"}', '{"lora_alpha": NaN}'):
        assert _refused(resolved, lora, lora_adapter_metadata=text)["fault"] == "config"
    fields = _refused(resolved, lora | _alphas(lora, 2.0), **_adapter(lora_alpha=8))  # one says 2, the other 8
    assert fields["fault"] == "values"


def test_generate_tells_what_was_applied_and_records_it(tiny_files, still, tmp_path):
    options = [word for name, path in tiny_files.items() for word in (f"--{name}", str(path))]
    size = ["--width", "64", "--height", "64", "--frames", "9", "--json", "--profile", str(tmp_path / "run")]
    result = CliRunner().invoke(
        app,
        ["generate", "--image", str(still), "--variant", "dev", "--out", str(tmp_path / "v.mp4"), *size, *options],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert "LoRA: 68 of 68 layers" in result.stderr.splitlines()
    assert json.loads(result.stdout)["output"] == str(tmp_path / "v.mp4")
    assert read_run(tmp_path / "run").metadata["weights"] == ["LoRA: 68 of 68 layers"]


@pytest.mark.parametrize("names", NAMES)
def test_half_a_pair_names_the_other_half_in_the_same_way(lora, resolved, names):
    tensors = _named(lora, "", *names)
    gone = f"{LAYER}.{names[1]}.weight"
    with pytest.raises(CheckpointError) as caught:
        resolved({key: tensor for key, tensor in tensors.items() if key != gone})
    assert (caught.value.fields["fault"], caught.value.fields["missing"]) == ("incomplete", [gone])


def test_two_adapters_in_one_file_are_refused(lora, resolved):
    with pytest.raises(CheckpointError) as caught:
        resolved(_named(lora, "", *NAMES[3]) | _named(lora, ""))
    assert caught.value.fields["fault"] == "duplicate"
