"""How weight files store their values: float8 with scales, integers, unknown keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from i2v_lab.errors import CheckpointError
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy
from i2v_lab.pipeline.contract import scaled_fp8
from i2v_lab.pipeline.contract.scaled_fp8 import CHUNK_ELEMENTS, dequantized
from i2v_lab.pipeline.ltx2.components import Ledger
from i2v_lab.pipeline.ltx2.layout import gemma_dimensions
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.pipeline.ltx2.synthetic import metadata as synthetic_metadata
from i2v_lab.pipeline.ltx2.weights import resolve_weights
from i2v_lab.pipeline.ltx_video.weights import resolve_weights as resolve_ltx_video
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.request import I2VRequest, Quantization

CPU = torch.device("cpu")
POLICIES = ("resident", "lean", "streamed")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KEY = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("I2V_LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tensors(tiny) -> Tensors:
    return load_file(tiny.checkpoint)


@pytest.fixture
def saved(tiny, tmp_path, own_cache):
    def save(tensors: Tensors, name: str = "weights", file: str = "checkpoint", **metadata: str) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata={**synthetic_metadata(tiny.architecture, file), **metadata})
        return path

    return save


def _in_float8(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Every matrix in float8 with a scale, of all the kinds that there are; and what that is, in bfloat16."""
    stored, meant = dict(tensors), dict(tensors)
    matrices = [key for key, tensor in tensors.items() if key.endswith(".weight") and tensor.ndim > 1]
    for index, key in enumerate(matrices):
        weight, layer = tensors[key].float(), key.removesuffix(".weight")
        dtype = E5M2 if index % 5 == 4 else E4M3
        scale = weight.abs().max() / 448
        if index % 3 == 1:
            scale = weight.abs().flatten(1).amax(1).clamp(min=1e-3) / 448
        elif index % 3 == 2:
            scale = scale.reshape(1)
        wide = scale.reshape(-1, *[1] * (weight.ndim - 1)) if scale.ndim else scale
        stored[key] = (weight / wide).to(dtype)
        stored[f"{layer}.{'scale_weight' if index % 2 else 'weight_scale'}"] = scale
        stored[f"{layer}.{'scale_input' if index % 2 else 'input_scale'}"] = torch.tensor(0.5)
        meant[key] = (stored[key].float() * wide).bfloat16()
    assert len(matrices) > 5
    return stored, meant


def _refused(tiny, files: dict[str, Path]) -> dict[str, object]:
    read: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        resolve_weights(tiny.architecture, **files, needs_lora=True, progress=lambda name, *_: read.append(name))
    assert "\n" not in str(caught.value)
    assert read == []  # before a value of any file is read
    return dict(caught.value.fields)


# --- Float8 with scales -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 2, 3), (2, CHUNK_ELEMENTS // 2 + 3), (0, 4)])
def test_a_product_is_that_in_float32_rounded_once(shape):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).to(E4M3)
    for scale in (torch.tensor(0.0123), torch.rand(shape[:1], generator=generator)):
        wide = scale.reshape(-1, *[1] * (len(shape) - 1)) if scale.ndim else scale
        assert torch.equal(dequantized(weight, scale), (weight.float() * wide).bfloat16())


def test_a_product_takes_no_float32_copy_of_the_tensor():
    weight = torch.ones(64, CHUNK_ELEMENTS // 8).to(E4M3)
    with LiveStorageMeter() as meter:
        before = meter.allocated_bytes()
        result = dequantized(weight, torch.tensor(0.5))
        assert meter.peak_bytes() - before <= weight.nbytes + result.nbytes + 4 * CHUNK_ELEMENTS + 1024


@pytest.fixture
def scaled_and_meant(tiny, tiny_files, tensors, saved, tmp_path):
    """Weights in float8 with scales in every file, and those that they are meant to be."""
    found = []
    files = {name: load_file(path) for name, path in tiny_files.items() if name in ("checkpoint", "upsampler")}
    files["gemma"] = load_file(tiny_files["gemma"] / "model.safetensors")
    for side, marker in ((0, {"model.diffusion_model.scaled_fp8": torch.empty(0, dtype=E4M3)}), (1, {})):
        paths = {"lora": tiny_files["lora"]}
        for name, content in files.items():
            changed = _in_float8(content)[side] | (marker if name == "checkpoint" else {})
            paths[name] = saved(changed, f"{name}-{side}", name)
        folder = tmp_path / f"gemma-{side}"
        shutil.copytree(tiny_files["gemma"], folder)
        shutil.move(paths["gemma"], folder / "model.safetensors")
        found.append(resolve_weights(tiny.architecture, **{**paths, "gemma": folder}, needs_lora=True))
    return found


@pytest.mark.parametrize("quantization", list(Quantization))
def test_every_component_in_float8_with_scales_is_what_it_is_meant_to_be(scaled_and_meant, quantization):
    for component in (
        "transformer",
        "text_encoder",
        "gemma_embeddings_processor",
        "video_encoder",
        "video_decoder",
        "audio_decoder",
        "vocoder",
        "spatial_upsampler",
    ):
        scaled, meant = (
            getattr(Ledger(weights, CPU, quantization, with_lora=component == "transformer"), component)().state_dict()
            for weights in scaled_and_meant
        )
        assert scaled.keys() == meant.keys()
        for key in meant:
            assert scaled[key].dtype == meant[key].dtype
            assert torch.equal(scaled[key].float(), meant[key].float()), (component, key)


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("variant", ["distilled", "dev"])
def test_frames_from_float8_with_scales_are_those_of_the_products_in_every_policy(
    scaled_and_meant, still, memory, variant
):
    request = I2VRequest(
        image=str(still), width=64, height=64, frames=9, fps=120, memory=memory, variant=variant, quantization="bf16"
    )
    frames = []
    for weights in scaled_and_meant:
        with TwoStagePipeline(weights)(request).video as chunks:
            frames.append(torch.cat(list(chunks)))
    assert torch.equal(*frames)


def test_a_block_in_float8_takes_no_more_while_it_is_streamed_than_one_tensor(scaled_and_meant, monkeypatch):
    monkeypatch.setattr(scaled_fp8, "CHUNK_ELEMENTS", 2**10)  # so small that a tensor of the tiny model has several
    for weights in scaled_and_meant:
        ledger = Ledger(weights, CPU, Quantization.BF16, TECHNIQUES[MemoryPolicy.STREAMED])
        stream = next(m.weight_stream for m in ledger.transformer().modules() if "weight_stream" in vars(m))
        block = "transformer_blocks.1"
        parameters = stream._model.get_submodule(block).named_parameters(remove_duplicate=False)
        own_names = {f"{block}.{name}" for name, _ in parameters}
        assert stream._loads[block]().keys() == own_names  # without scales
        with LiveStorageMeter() as meter:
            before = meter.allocated_bytes()
            tensors = stream._loads[block]()
            own = sum(tensor.nbytes for tensor in tensors.values())
            largest = max(tensor.nbytes for tensor in tensors.values())
            assert meter.allocated_bytes() - before == own
            assert meter.peak_bytes() - before <= own + 2 * largest
        stream.close()


def test_float8_without_scales_is_cast_as_before(tiny, tiny_files, tensors, saved):
    cast = {key: value.to(E4M3) if ".attn1.to_q.weight" in key else value for key, value in tensors.items()}
    path = saved(cast)
    weights = resolve_weights(tiny.architecture, **{**tiny_files, "checkpoint": path})
    state = Ledger(weights, CPU, Quantization.BF16).transformer().state_dict()
    name = next(name for name in state if name.endswith("transformer_blocks.0.attn1.to_q.weight"))
    assert torch.equal(state[name], cast[KEY].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, E5M2])
@pytest.mark.parametrize("quantization", list(Quantization))
def test_weights_in_any_float_take_a_lora_in_every_policy(tiny, tiny_files, tensors, saved, dtype, quantization):
    changed = {key: value.to(dtype) if value.ndim > 1 else value for key, value in tensors.items()}
    builds = []
    for name, content in (("changed", changed), ("meant", {key: value.bfloat16() for key, value in changed.items()})):
        weights = resolve_weights(tiny.architecture, **{**tiny_files, "checkpoint": saved(content, name)})
        builds.append(Ledger(weights, CPU, quantization, with_lora=True).transformer().state_dict())
        streamed = Ledger(weights, CPU, quantization, TECHNIQUES[MemoryPolicy.STREAMED], with_lora=True).transformer()
        stream = next(module.weight_stream for module in streamed.modules() if "weight_stream" in vars(module))
        for key, value in stream._loads["transformer_blocks.0"]().items():
            assert torch.equal(value.float(), builds[-1][f"velocity_model.{key}"].float())
        stream.close()
    for key, value in builds[1].items():
        assert builds[0][key].dtype == value.dtype
        assert torch.equal(builds[0][key].float(), value.float())


def test_what_describes_float8_is_taken(tiny, tiny_files, tensors, saved):
    stored, _ = _in_float8(tensors)
    description = {"format": "float8_e4m3fn"}
    layer = KEY.removesuffix(".weight")
    stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
    layers = json.dumps({"format_version": "1.0", "layers": {layer: description}})
    path = saved(stored, _quantization_metadata=layers)
    assert resolve_weights(tiny.architecture, **{**tiny_files, "checkpoint": path}).checkpoint == str(path)


def test_ltx_video_applies_scales(ltxv_tiny, own_cache, tmp_path):
    files = {name: Path(getattr(ltxv_tiny, name)) for name in ("checkpoint", "text_encoder", "upsampler")}
    frames = []
    for side in (0, 1):
        paths = dict(files)
        for name in ("checkpoint", "upsampler"):
            with safe_open(files[name], framework="pt") as file:
                metadata = file.metadata()
            paths[name] = tmp_path / f"{name}-{side}.safetensors"
            save_file(_in_float8(load_file(files[name]))[side], paths[name], metadata=metadata)
        weights = resolve_ltx_video(ltxv_tiny.architecture, **paths)
        frames.append(weights.loader.load((weights.checkpoint,), "", CPU))
    assert frames[0].keys() == frames[1].keys()
    assert all(torch.equal(frames[0][key], frames[1][key]) for key in frames[1])


# --- Refusals ---------------------------------------------------------------------------------------------------------


def _described(**description: object) -> Tensors:
    return {f"{KEY[:-7]}.comfy_quant": torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)}


ONE = torch.tensor(0.1)
SCALE = f"{KEY}_scale"
BAD = {
    "int8": ({KEY: torch.int8, SCALE: ONE}, "dtype", KEY, "I8"),
    "uint8": ({KEY: torch.uint8}, "dtype", KEY, "U8"),
    "a scale of bfloat16": ({SCALE: ONE}, "dtype", KEY, "BF16"),
    "scales of blocks": ({KEY: E4M3, SCALE: torch.ones(2, 2)}, "dtype", SCALE, "F32"),
    "scales of inputs": ({KEY: E4M3, SCALE: torch.ones(1, 64)}, "dtype", SCALE, "F32"),
    "a scale in float64": ({KEY: E4M3, SCALE: ONE.double()}, "dtype", SCALE, "F64"),
    "an exponent": ({KEY: E4M3, SCALE: torch.tensor(1, dtype=torch.uint8)}, "dtype", SCALE, "U8"),
    "two scales": (
        {KEY: E4M3, SCALE: ONE, f"{KEY[:-7]}.scale_weight": ONE},
        "dtype",
        f"{KEY[:-7]}.scale_weight",
        "F32",
    ),
    "a second scale": ({KEY: E4M3, SCALE: ONE, f"{SCALE}_2": ONE}, "unknown", f"{SCALE}_2", "F32"),
    "an inverse": ({KEY: E4M3, f"{SCALE}_inv": ONE}, "unknown", f"{SCALE}_inv", "F32"),
    "a zero point": ({f"{KEY[:-7]}.zero_point": ONE}, "unknown", f"{KEY[:-7]}.zero_point", "F32"),
    "a scale of nothing": ({"gone.weight_scale": ONE}, "unknown", "gone.weight_scale", "F32"),
    "a layer of nothing": ({"gone.weight": ONE}, "unknown", "gone.weight", "F32"),
    "int8 described": ({KEY: E4M3, SCALE: ONE, **_described(format="int8_tensorwise")}, "dtype", KEY, None),
    "rotated": ({KEY: E4M3, SCALE: ONE, **_described(format="float8_e4m3fn", convrot=True)}, "dtype", KEY, None),
}


@pytest.mark.parametrize("case", list(BAD))
def test_weights_that_are_not_read_are_refused_by_name(tiny, tiny_files, tensors, saved, case):
    changes, fault, tensor, dtype = BAD[case]
    changed = {
        **tensors,
        **{
            key: tensors[key].to(value) if isinstance(value, torch.dtype) else value.clone()
            for key, value in changes.items()
        },
    }
    path = saved(changed)
    fields = _refused(tiny, {**tiny_files, "checkpoint": path})
    assert (fields["option"], fields["path"], fields["fault"]) == ("--checkpoint", path, fault)
    assert fields["tensor"] == tensor
    assert dtype is None or fields["dtype"] == dtype


def test_a_file_with_some_of_its_scales_is_refused(tiny, tiny_files, tensors, saved):
    stored, _ = _in_float8(tensors)
    scale = next(key for key in (SCALE, f"{KEY[:-7]}.scale_weight") if key in stored)
    path = saved({key: value for key, value in stored.items() if key != scale})
    fields = _refused(tiny, {**tiny_files, "checkpoint": path})
    assert fields == {"option": "--checkpoint", "path": path, "fault": "incomplete", "missing": [SCALE]}
    marked = saved({**tensors, KEY: tensors[KEY].to(E4M3), "scaled_fp8": torch.empty(0, dtype=E4M3)}, "marked")
    fields = _refused(tiny, {**tiny_files, "checkpoint": marked})
    assert (fields["fault"], fields["missing"]) == ("incomplete", [SCALE])


def test_layers_of_another_format_in_the_metadata_are_refused(tiny, tiny_files, tensors, saved):
    for text in (json.dumps({"layers": {KEY[:-7]: {"format": "nvfp4"}}}), "[]", "no json"):
        path = saved(tensors, _quantization_metadata=text)
        fields = _refused(tiny, {**tiny_files, "checkpoint": path})
        assert (fields["fault"], fields["path"]) == ("dtype", path)


def test_every_file_is_verified_and_none_may_have_what_another_has(tiny, tiny_files, saved, tmp_path):
    upsampler = load_file(tiny_files["upsampler"])
    path = saved(
        {**upsampler, "initial_conv.weight": upsampler["initial_conv.weight"].to(torch.int8)}, file="upsampler"
    )
    fields = _refused(tiny, {**tiny_files, "upsampler": path})
    assert (fields["fault"], fields["tensor"], fields["dtype"]) == ("dtype", "initial_conv.weight", "I8")
    folder = tmp_path / "gemma"
    shutil.copytree(tiny_files["gemma"], folder)
    whole = load_file(folder / "model.safetensors")
    key = min(whole)
    save_file({key: whole[key]}, folder / "model-2.safetensors")
    fields = _refused(tiny, {**tiny_files, "gemma": folder})
    assert (fields["fault"], fields["tensor"]) == ("duplicate", key)
    weight = next(key for key in whole if key.endswith(".q_proj.weight"))
    save_file({f"{weight}_scale": ONE}, folder / "model-2.safetensors")
    save_file({**whole, weight: whole[weight].to(E4M3)}, folder / "model.safetensors")
    fields = _refused(tiny, {**tiny_files, "gemma": folder})  # the scale in another file than its weight
    assert (fields["fault"], fields["tensor"]) == ("dtype", f"{weight}_scale")
    (folder / "model-2.safetensors").unlink()
    save_file({**whole, "language_model.lm_head.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with gemma_dimensions(tiny.architecture.gemma):  # tied to the embedding: known, and not read
        weights = resolve_weights(tiny.architecture, **{**tiny_files, "gemma": folder})
    assert weights.gemma_root == str(folder)


@pytest.mark.parametrize(
    ("content", "kind", "remedy"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF", "use the safetensors file of the model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer", "git lfs pull"),
        (b"PK\x03\x04" + bytes(64), "pickle", "use the safetensors file of the model"),
        (b"\x80\x02}q\x00." + bytes(64), "pickle", "use the safetensors file of the model"),
        (b'{"metadata": {}, "weight_map": {}}', "JSON", "name the safetensors file itself"),
        (b"<!DOCTYPE html><html></html>" + bytes(9), "HTML", "download it again"),
    ],
)
def test_what_a_file_is_and_what_to_do_is_said(tiny, tiny_files, tmp_path, content, kind, remedy):
    path = tmp_path / "weights"
    path.write_bytes(content)
    for option in ("checkpoint", "upsampler", "lora"):
        with pytest.raises(CheckpointError, match=remedy) as caught:
            resolve_weights(tiny.architecture, **{**tiny_files, option: path})
        assert caught.value.fields == {"option": f"--{option}", "path": path, "fault": "format", "kind": kind}


def test_a_git_lfs_pointer_in_a_folder_is_named(tiny, tiny_files, tmp_path):
    for name in ("tokenizer.json", "tokenizer.model", "model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(tiny_files["gemma"], folder)
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        fields = _refused(tiny, {**tiny_files, "gemma": folder})
        assert (fields["path"], fields["kind"]) == (folder / name, "Git LFS pointer")


@pytest.mark.parametrize(("old", "new"), [("model.diffusion_model.", "diffusion_model."), ("", "net.module.")])
def test_tensors_under_another_prefix_are_named(tiny, tiny_files, tensors, saved, old, new):
    path = saved({new + key.removeprefix(old): value for key, value in tensors.items() if key.startswith(old)})
    fields = _refused(tiny, {**tiny_files, "checkpoint": path})
    assert (fields["fault"], fields["prefix"], fields["expected"]) == ("architecture", new, old)
