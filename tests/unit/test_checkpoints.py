"""Weights: the real layout, real and synthetic alike, and proof before anything is loaded."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from i2v_lab.errors import CheckpointError, UnknownModel
from i2v_lab.pipeline import ltx2, synthetic
from i2v_lab.pipeline.architectures import load_architecture
from i2v_lab.pipeline.checkpoints import resolve_weights, synthetic_weights
from i2v_lab.request import Quantization

CPU = torch.device("cpu")
BUILDERS = {
    "transformer": "transformer_builder",
    "embeddings_processor": "embeddings_processor_builder",
    "video_encoder": "vae_encoder_builder",
    "video_decoder": "vae_decoder_builder",
    "audio_encoder": "audio_encoder_builder",
    "audio_decoder": "audio_decoder_builder",
    "vocoder": "vocoder_builder",
    "text_encoder": "text_encoder_builder",
    "spatial_upsampler": "upsampler_builder",
}


@pytest.fixture(scope="session")
def large():
    return load_architecture("ltx-2.3-22b")


def test_the_22b_layout_has_the_published_tensors_and_parameters(large):
    checkpoint = ltx2.file_layout(large, "checkpoint")
    audio_encoder = [key for key in checkpoint if key.startswith("audio_vae.encoder.")]
    assert (len(checkpoint) - len(audio_encoder), len(audio_encoder)) == (5903, 44)
    assert len(ltx2.file_layout(large, "gemma")) == 1065
    parameters = {
        name: sum(p.numel() for p in ltx2.meta_component(large, name).parameters())
        for name in ("transformer", "embeddings_processor", "video_encoder", "video_decoder", "spatial_upsampler")
    }
    assert parameters == {
        "transformer": 18_988_838_144,
        "embeddings_processor": 3_172_227_584,
        "video_encoder": 318_936_897,
        "video_decoder": 407_169_072,
        "spatial_upsampler": 497_867_904,
    }
    gemma = sum(torch.Size(shape).numel() for shape in ltx2.file_layout(large, "gemma").values())
    assert gemma == 12_187_325_040


@pytest.mark.parametrize("component", list(BUILDERS))
def test_synthetic_files_load_through_ltx_core_with_nothing_missing_or_left_over(tiny, component):
    builder = getattr(ltx2.Ledger(tiny, CPU, Quantization.BF16), BUILDERS[component])
    with ltx2.gemma_dimensions(tiny.architecture.gemma):
        module = builder.meta_model(builder.model_config(), builder.module_ops)
    paths = list(builder.model_path) if isinstance(builder.model_path, tuple) else [builder.model_path]
    state = builder.load_sd(paths, registry=builder.registry, device=CPU, sd_ops=builder.model_sd_ops)
    result = module.load_state_dict(state.sd, strict=False, assign=True)
    computed = module.state_dict()  # Gemma's position buffers are filled in by ltx-core, not read
    assert [key for key in result.missing_keys if computed[key].is_meta] == []
    extra = ("video_embeddings_connector.", "audio_embeddings_connector.") if component == "transformer" else ()
    # Real checkpoints keep the connectors under the transformer's prefix; upstream reads and drops them too.
    assert [key for key in result.unexpected_keys if not key.startswith(extra or "no such prefix")] == []
    assert state.dtype == {torch.bfloat16}


@pytest.mark.parametrize("component", list(BUILDERS))
def test_weights_without_a_file_are_the_same_as_the_files(tiny, component):
    builder = getattr(ltx2.Ledger(tiny, CPU, Quantization.BF16), BUILDERS[component])
    spec = ltx2.COMPONENTS[component]
    loader = synthetic.SyntheticStateDictLoader(tiny.architecture)
    made = loader.load([f"synthetic:{spec.file}"], builder.model_sd_ops, CPU)
    paths = list(builder.model_path) if isinstance(builder.model_path, tuple) else [builder.model_path]
    read = builder.model_loader.load(paths, builder.model_sd_ops, CPU)
    assert made.sd.keys() == read.sd.keys()
    assert all(torch.equal(made.sd[key], read.sd[key]) for key in made.sd)
    assert (made.size, made.dtype) == (read.size, read.dtype)
    if spec.file != "gemma":
        assert loader.metadata(f"synthetic:{spec.file}") == builder.model_config()


def test_the_22b_builds_through_the_loader_protocol_with_no_file(large, caplog):
    weights = synthetic_weights(large)
    assert weights.is_synthetic
    ledger = ltx2.Ledger(weights, torch.device("meta"), Quantization.BF16)
    with caplog.at_level(logging.CRITICAL):
        transformer = ledger.transformer_builder.build(device=torch.device("meta"), dtype=torch.bfloat16)
        decoder = ledger.vae_decoder_builder.build(device=torch.device("meta"), dtype=torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) == 18_988_838_144
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}


def test_tensors_depend_on_their_name_and_nothing_else():
    one = synthetic.synthetic_tensor("a.weight", (4, 8))
    synthetic.synthetic_tensor("b.weight", (4, 8))
    torch.manual_seed(5)
    assert torch.equal(one, synthetic.synthetic_tensor("a.weight", (4, 8)))
    assert not torch.equal(one, synthetic.synthetic_tensor("b.weight", (4, 8)))


def test_real_weights_take_the_same_path(tiny, tiny_files):
    seen = []
    progress = lambda name, index, total: seen.append(name)  # noqa: E731
    weights = resolve_weights(tiny.architecture, **tiny_files, needs_lora=True, progress=progress)
    assert weights.checkpoint == tiny.checkpoint
    assert weights.gemma_shards == tiny.gemma_shards
    assert "checkpoint.safetensors" in seen
    seen.clear()
    resolve_weights(tiny.architecture, **tiny_files, needs_lora=True, progress=progress)
    assert seen == []  # found good once, its values are not read again until it changes


def _refusal(tiny, tiny_files, **changed) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_weights(tiny.architecture, **{**tiny_files, **changed}, needs_lora=True)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_bad_checkpoints_are_refused_with_the_reason(tiny, tiny_files, tmp_path):
    checkpoint = tiny_files["checkpoint"]
    tensors = load_file(checkpoint)
    metadata = synthetic.metadata(tiny.architecture, "checkpoint")
    first = next(iter(ltx2.file_layout(tiny.architecture, "checkpoint")))

    def saved(name, changed):
        save_file(changed, tmp_path / name, metadata=metadata)
        return tmp_path / name

    missing = tmp_path / "missing.safetensors"
    assert _refusal(tiny, tiny_files, checkpoint=missing) == f"--checkpoint '{missing}' does not exist; check the path"

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:-1000])
    assert f"--checkpoint '{cut}' is truncated or not a safetensors file" in _refusal(tiny, tiny_files, checkpoint=cut)

    pickled = tmp_path / "weights.pt"
    torch.save(tensors, pickled)
    assert "(pickled checkpoints are not read)" in _refusal(tiny, tiny_files, checkpoint=pickled)

    other = saved("other.safetensors", {"some.weight": torch.zeros(3)})
    assert _refusal(tiny, tiny_files, checkpoint=other) == (
        f"--checkpoint '{other}' is of another architecture than ltx-2.3-tiny; use the weights of ltx-2.3-tiny, or "
        "name their architecture with --model"
    )

    wide = saved("wide.safetensors", {**tensors, first: torch.zeros(3, 7, dtype=torch.bfloat16)})
    assert f"{first} has shape (3, 7), not" in _refusal(tiny, tiny_files, checkpoint=wide)

    few = saved("few.safetensors", {key: value for key, value in tensors.items() if key != first})
    assert f"lacks 1 of {len(tensors)} tensors, the first {first}; download or export it again" in _refusal(
        tiny, tiny_files, checkpoint=few
    )

    for word, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        spoilt = tensors[first].clone()
        spoilt.view(-1)[-1] = value
        path = saved(f"{word}.safetensors", {**tensors, first: spoilt})
        assert f"holds {word} in {first}; download or export it again" in _refusal(tiny, tiny_files, checkpoint=path)


def test_bad_gemma_folders_and_loras_are_refused_with_the_reason(tiny, tiny_files, tmp_path):
    gone = tmp_path / "gone"
    assert _refusal(tiny, tiny_files, gemma=gone) == (
        f"--gemma '{gone}' is not a folder; give the folder of Gemma 3's files"
    )
    for name in ("tokenizer.model", "tokenizer.json", "preprocessor_config.json", "model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(tiny_files["gemma"], folder)
        (folder / name).unlink()
        assert f"--gemma '{folder}' holds no {name.replace('model.safe', 'model*.safe')}; give a complete" in _refusal(
            tiny, tiny_files, gemma=folder
        )
    lora = load_file(tiny_files["lora"])
    key = next(key for key in lora if ".lora_A." in key)
    save_file({"other.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    assert "none of its 1 LoRA tensors names a layer of the transformer" in _refusal(
        tiny, tiny_files, lora=tmp_path / "other.safetensors"
    )
    save_file({name: value for name, value in lora.items() if name != key}, tmp_path / "few.safetensors")
    assert f"lacks {key}" in _refusal(tiny, tiny_files, lora=tmp_path / "few.safetensors")


def test_some_options_without_the_others_are_refused(tiny, tiny_files):
    assert _refusal(tiny, tiny_files, upsampler=None, lora=None) == (
        "--checkpoint, --gemma given without --upsampler, --lora: real weights come together; add the missing, or "
        "give none"
    )


def test_metadata_is_what_the_real_loader_reads(tiny):
    with safe_open(tiny.checkpoint, framework="pt") as file:
        assert file.metadata()["model_version"] == "2.3.0"
    assert ltx2.SafetensorsModelStateDictLoader().metadata(tiny.checkpoint) == tiny.architecture.config
    assert ltx2.SafetensorsModelStateDictLoader().metadata(tiny.upsampler) == tiny.architecture.upsampler


def test_an_unknown_model_is_refused_with_those_that_are_known():
    with pytest.raises(UnknownModel) as caught:
        load_architecture("../secrets")
    assert str(caught.value) == (
        "model='../secrets' is not a known architecture; use one of: ltx-2.3-22b, ltx-2.3-tiny"
    )


def test_two_processes_may_make_the_same_weights_at_once(tmp_path, monkeypatch):
    code = (
        "from i2v_lab.pipeline.architectures import load_architecture as a\n"
        "from i2v_lab.pipeline.checkpoints import synthetic_weights as s\n"
        "print(s(a('ltx-2.3-tiny')).checkpoint)"
    )
    monkeypatch.setenv("I2V_LAB_CACHE", str(tmp_path))
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {child.communicate()[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert len(paths) == 1
    assert len(list((tmp_path / "synthetic").iterdir())) == 1
