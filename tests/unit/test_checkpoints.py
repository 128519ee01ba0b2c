"""Weights: the real layout, real and synthetic alike, and proof before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ltx_core.loader import SafetensorsModelStateDictLoader, StateDict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from i2v_lab import cli
from i2v_lab.errors import CheckpointError, OutputError, UnknownModel
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract import synthetic as synthetic_files
from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture
from i2v_lab.pipeline.contract.random_tensors import synthetic_tensor
from i2v_lab.pipeline.ltx2.components import Ledger
from i2v_lab.pipeline.ltx2.layout import COMPONENTS, FILES, file_layout, gemma_dimensions, meta_component
from i2v_lab.pipeline.ltx2.loader import ScaledStateDictLoader
from i2v_lab.pipeline.ltx2.synthetic import SyntheticStateDictLoader
from i2v_lab.pipeline.ltx2.synthetic import metadata as synthetic_metadata
from i2v_lab.pipeline.ltx2.weights import Weights, resolve_weights, synthetic_weights
from i2v_lab.request import Quantization

CPU, META = torch.device("cpu"), torch.device("meta")
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


@pytest.fixture(scope="session")
def tensors(tiny) -> dict[str, torch.Tensor]:
    return load_file(tiny.checkpoint)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, without records of verified files."""
    monkeypatch.setenv("I2V_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- The layout -------------------------------------------------------------------------------------------------------


def test_the_22b_layout_has_the_published_tensors(large):
    checkpoint = file_layout(large, "checkpoint")
    audio_encoder = [key for key in checkpoint if key.startswith("audio_vae.encoder.")]
    assert (len(checkpoint), len(audio_encoder)) == (5947, 44)
    assert len(file_layout(large, "gemma")) == 1065


def test_the_22b_layout_has_the_published_parameters(large):
    values = json.loads((data_dir() / "architectures" / "ltx-2.3-22b.json").read_text())["parameters"]
    values["text_encoder"] = values.pop("text_encoder (Gemma 3 12B)")
    in_fp8 = values.pop("of which fp8-cast")
    assert values == {name: sum(p.numel() for p in meta_component(large, name).parameters()) for name in values}
    transformer = Ledger(synthetic_weights(large), META, Quantization.FP8_CAST).transformer()
    assert sum(p.numel() for p in transformer.parameters() if p.dtype == torch.float8_e4m3fn) == in_fp8
    assert sum(p.numel() for p in transformer.parameters()) == values["transformer"]


def test_both_models_have_the_same_modules_at_another_size(tiny, large):
    """The tiny model is the same architecture: every kind of tensor of one is in the other."""

    def kinds(architecture) -> set[str]:
        return {re.sub(r"\d+", "*", key) for key in file_layout(architecture, "checkpoint")}

    assert len(kinds(large)) > 200
    extra = kinds(tiny.architecture) ^ kinds(large)
    # The audio VAE has no block of its own a level, which leaves out those and nothing else.
    assert all(key.startswith("audio_vae.") for key in extra), sorted(extra)


def _load(weights: Weights, component: str, device: torch.device) -> tuple[torch.nn.Module, StateDict, object]:
    builder = getattr(Ledger(weights, device, Quantization.BF16), BUILDERS[component])
    with gemma_dimensions(weights.architecture.gemma):
        module = builder.meta_model(builder.model_config(), builder.module_ops)
    paths = list(builder.model_path) if isinstance(builder.model_path, tuple) else [builder.model_path]
    state = builder.load_sd(paths, registry=builder.registry, device=device, sd_ops=builder.model_sd_ops)
    return module, state, module.load_state_dict(state.sd, strict=False, assign=True)


def _assert_complete(component: str, result: object) -> None:
    assert result.missing_keys == []
    assert result.unexpected_keys == []  # nor connectors, which lie under the transformer's prefix


@pytest.mark.parametrize("component", list(BUILDERS))
def test_synthetic_files_load_through_ltx_core_with_nothing_missing_or_left_over(tiny, component):
    assert not tiny.is_synthetic
    module, state, result = _load(tiny, component, CPU)
    _assert_complete(component, result)
    assert [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta] == []
    assert state.dtype == {torch.bfloat16}


@pytest.mark.parametrize("component", list(BUILDERS))
def test_the_22b_loads_through_the_loader_protocol_with_no_file_and_no_memory(large, component):
    weights = synthetic_weights(large)
    assert weights.is_synthetic
    module, state, result = _load(weights, component, META)
    _assert_complete(component, result)
    assert all(tensor.is_meta for tensor in state.sd.values())
    assert state.dtype == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("component", list(BUILDERS))
def test_weights_without_a_file_are_the_same_as_the_files(tiny, component):
    builder = getattr(Ledger(tiny, CPU, Quantization.BF16), BUILDERS[component])
    spec = COMPONENTS[component]
    loader = SyntheticStateDictLoader(tiny.architecture)
    made = loader.load([f"synthetic:{spec.file}"], builder.model_sd_ops, CPU)
    paths = list(builder.model_path) if isinstance(builder.model_path, tuple) else [builder.model_path]
    read = builder.model_loader.load(paths, builder.model_sd_ops, CPU)
    assert made.sd.keys() == read.sd.keys()
    assert all(torch.equal(made.sd[key], read.sd[key]) for key in made.sd)
    assert (made.size, made.dtype, made.device) == (read.size, read.dtype, read.device)
    if spec.file != "gemma":
        assert loader.metadata(f"synthetic:{spec.file}") == builder.model_config()


def test_the_lora_without_a_file_is_the_same_as_the_file(tiny):
    made = SyntheticStateDictLoader(tiny.architecture).load("synthetic:lora").sd
    read = load_file(tiny.lora)
    assert made.keys() == read.keys()
    assert all(torch.equal(made[key], read[key]) for key in made)
    ranks = {made[key].shape[0] for key in made if ".lora_A." in key}
    assert ranks == {tiny.architecture.lora_rank}


def test_metadata_and_dtype_are_what_the_real_loader_reads(tiny):
    for path, config in ((tiny.checkpoint, tiny.architecture.config), (tiny.upsampler, tiny.architecture.upsampler)):
        assert SafetensorsModelStateDictLoader().metadata(path) == config
    with safe_open(tiny.checkpoint, framework="pt") as file:
        assert file.metadata() == {"config": json.dumps(tiny.architecture.config), "model_version": "2.3.0"}
    for path in (tiny.checkpoint, tiny.upsampler, tiny.lora, *tiny.gemma_shards):
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


# --- Synthetic weights ------------------------------------------------------------------------------------------------


def test_tensors_depend_on_their_name_and_nothing_else():
    one = synthetic_tensor("a.weight", (4, 8))
    synthetic_tensor("b.weight", (4, 8))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(one, synthetic_tensor("a.weight", (4, 8)))
    assert torch.equal(torch.get_rng_state(), state)  # nor is the caller's generator touched
    assert not torch.equal(one, synthetic_tensor("b.weight", (4, 8)))
    assert one.dtype == torch.bfloat16


def test_tensors_are_the_same_on_every_machine():
    assert synthetic_tensor("a.weight", (1, 4)).tolist() == [[0.05810546875, -0.03466796875, -0.56640625, 1.046875]]
    many = synthetic_tensor("b.weight", (300, 1000)).view(torch.int16).numpy().tobytes()
    assert hashlib.sha256(many).hexdigest().startswith("46845bb93cc9")  # with torch 2.11, 2.14 and 2.15


def test_tensors_do_not_depend_on_which_others_are_made(tiny):
    loader = SyntheticStateDictLoader(tiny.architecture)
    whole = loader.load("synthetic:checkpoint").sd
    decoder = loader.load("synthetic:checkpoint", COMPONENTS["video_decoder"].key_ops).sd
    assert torch.equal(decoder["conv_in.conv.weight"], whole["vae.decoder.conv_in.conv.weight"])
    assert list(loader.load("synthetic:checkpoint", device=META).sd) == list(whole)


def test_values_keep_activations_in_bounds(tensors):
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    square = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    assert tensors[square].float().std().item() == pytest.approx(tensors[square].shape[1] ** -0.5, rel=0.05)
    norms = [key for key in tensors if key.endswith("norm.weight") and tensors[key].ndim == 1]
    assert norms
    assert all((tensors[key] == 1).all() for key in norms)
    assert (tensors["vae.per_channel_statistics.mean-of-means"] == 0).all()
    assert (tensors["vae.per_channel_statistics.std-of-means"] == 1).all()


def test_a_second_run_takes_the_weights_that_are_there(tiny):
    before = Path(tiny.checkpoint).stat()
    again = synthetic_weights(tiny.architecture)
    assert again.checkpoint == tiny.checkpoint
    assert os.stat(again.checkpoint).st_mtime_ns == before.st_mtime_ns  # noqa: PTH116


def test_two_processes_may_make_the_same_weights_at_once(own_cache, forked_python):
    code = (
        "from i2v_lab.pipeline.contract.architectures import load_architecture as a\n"
        "from i2v_lab.pipeline.ltx2.weights import synthetic_weights as s\n"
        "print(s(a('ltx-2.3-tiny')).checkpoint)"
    )
    children = [subprocess.Popen([*forked_python, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {child.communicate()[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert [Path(path).parent for path in paths] == list((own_cache / "synthetic").iterdir())
    architecture = load_architecture("ltx-2.3-tiny")
    made = load_file(paths.pop())
    assert {key: tuple(tensor.shape) for key, tensor in made.items()} == file_layout(architecture, "checkpoint")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_weights_that_were_not_finished_are_not_left_behind(tiny, own_cache, monkeypatch, error):
    def breaking(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(synthetic_files, "save_file", breaking)
    with pytest.raises((KeyboardInterrupt, OutputError)) as caught:
        synthetic_weights(tiny.architecture)
    if isinstance(error, OSError):
        assert caught.value.fields == {"path": own_cache}
        assert "(No space left on device)" in str(caught.value)
    assert list((own_cache / "synthetic").iterdir()) == []
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("cache", "reason"), [("/proc/cache", "No such file or directory"), ("{tmp}/file/cache", "Not a directory")]
)
def test_a_cache_that_cannot_be_written_is_named(tiny, tiny_files, tmp_path, monkeypatch, cache, reason):
    (tmp_path / "file").touch()
    cache = cache.format(tmp=tmp_path)
    monkeypatch.setenv("I2V_LAB_CACHE", cache)
    with pytest.raises(OutputError) as caught:
        synthetic_weights(tiny.architecture)
    assert caught.value.fields == {"path": Path(cache)}
    assert f"({reason})" in str(caught.value)
    assert caught.value.exit_status == 2
    # Weights of one's own need no cache: they are only read again the next time.
    assert resolve_weights(tiny.architecture, **tiny_files).checkpoint == tiny.checkpoint


# --- Verification -----------------------------------------------------------------------------------------------------


def test_real_weights_are_verified_tensor_by_tensor(tiny, tiny_files, own_cache):
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(name: str, done: int, total: int) -> None:
        seen.setdefault(name, []).append((done, total))

    weights = resolve_weights(tiny.architecture, **tiny_files, needs_lora=True, progress=progress)
    assert weights == Weights(
        tiny.architecture,
        tiny.checkpoint,
        tiny.gemma_root,
        tiny.gemma_shards,
        tiny.upsampler,
        tiny.lora,
        lora_keys=weights.lora_keys,
        notes=("LoRA: 68 of 68 layers",),
        loader=weights.loader,
    )
    assert type(weights.loader) is ScaledStateDictLoader
    counts = {
        name: len(file_layout(tiny.architecture, file))
        for file, name in zip(FILES, map(os.path.basename, FILES.values()), strict=True)
    }
    assert seen == {name: [(n, count) for n in range(1, count + 1)] for name, count in counts.items()}


def test_values_are_read_once_and_again_when_a_file_changes(tiny, tiny_files, own_cache, tmp_path, tensors):
    upsampler = tmp_path / "upsampler.safetensors"
    shutil.copy(tiny_files["upsampler"], upsampler)
    seen: list[str] = []

    def verify() -> set[str]:
        seen.clear()
        files = {**tiny_files, "upsampler": upsampler}
        resolve_weights(tiny.architecture, **files, progress=lambda name, *_: seen.append(name))
        return set(seen)

    assert verify() == {
        "checkpoint.safetensors",
        "model.safetensors",
        "upsampler.safetensors",
        "distilled-lora.safetensors",
    }
    assert len(list((own_cache / "verified").iterdir())) == 4
    assert verify() == set()
    os.utime(upsampler, ns=(1, 1))
    assert verify() == {"upsampler.safetensors"}
    assert verify() == set()
    changed = load_file(upsampler)
    changed["initial_conv.bias"][0] = float("nan")
    save_file(changed, upsampler, metadata=synthetic_metadata(tiny.architecture, "upsampler"))
    for _ in range(2):  # what was refused once is not taken the second time
        with pytest.raises(CheckpointError) as caught:
            verify()
        assert (caught.value.fields["kind"], caught.value.fields["tensor"]) == ("NaN", "initial_conv.bias")


def test_the_lora_is_asked_for_only_where_it_is_needed(tiny, tiny_files):
    given = {**tiny_files, "lora": None}
    assert resolve_weights(tiny.architecture, **given).lora == ""
    assert _refusal(tiny, given, needs_lora=True).fields == {"missing": ["--lora"]}


def test_gemma_may_come_in_several_files_in_a_folder_further_down(tiny, tiny_files, own_cache, tmp_path):
    folder = tmp_path / "gemma" / "snapshot"
    shutil.copytree(tiny_files["gemma"], folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(whole)
    for number, part in enumerate((keys[:20], keys[20:]), start=1):
        save_file({key: whole[key] for key in part}, folder / f"model-0000{number}-of-00002.safetensors")
    weights = resolve_weights(tiny.architecture, **{**tiny_files, "gemma": tmp_path / "gemma"})
    assert [Path(path).name for path in weights.gemma_shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    _, _, result = _load(weights, "text_encoder", CPU)
    assert result.missing_keys == []
    (folder / "model-00002-of-00002.safetensors").unlink()
    missing = [key for key in file_layout(tiny.architecture, "gemma") if key in keys[20:]]
    _assert_refused(
        _refusal(tiny, {**tiny_files, "gemma": tmp_path / "gemma"}),
        "gemma",
        folder / "model-00001-of-00002.safetensors",
        "incomplete",
        missing=missing,
    )


# --- Bad weights ------------------------------------------------------------------------------------------------------


def _refusal(
    tiny: Weights, files: dict[str, Path | None], needs_lora: bool = False, architecture=None
) -> CheckpointError:
    read: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        resolve_weights(
            architecture or tiny.architecture,
            **files,
            needs_lora=needs_lora,
            progress=lambda name, *_: read.append(name),
        )
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.fields) == (str(caught.value), caught.value.fields)
    if caught.value.fields.get("fault") != "values":
        assert read == []  # a wrong layout is found before the first value of any file is read
    return caught.value


def _assert_refused(error: CheckpointError, option: str, path: Path, fault: str, **fields: object) -> None:
    assert error.fields == {"option": f"--{option}", "path": path, "fault": fault, **fields}
    assert str(error).startswith(f"--{option} '{path}' ")


@pytest.fixture
def saved(tiny, tmp_path, own_cache):
    def save(name: str, changed: dict[str, torch.Tensor], file: str = "checkpoint", **metadata: str) -> Path:
        save_file(changed, tmp_path / name, metadata=metadata or synthetic_metadata(tiny.architecture, file))
        return tmp_path / name

    return save


def test_a_checkpoint_that_is_no_file_is_refused(tiny, tiny_files, tmp_path):
    missing = tmp_path / "missing.safetensors"
    for path, fault in {missing: "not-found", tmp_path: "not-a-file", tmp_path / ("a" * 300): "unreadable"}.items():
        for option in ("checkpoint", "upsampler", "lora"):
            _assert_refused(_refusal(tiny, {**tiny_files, option: path}), option, path, fault)


@pytest.mark.parametrize("length", [0, 7, 5000, -1000, -1])
def test_a_truncated_checkpoint_is_refused(tiny, tiny_files, tmp_path, length):
    for option in ("checkpoint", "upsampler", "lora"):
        cut = tmp_path / f"{option}.safetensors"
        cut.write_bytes(tiny_files[option].read_bytes()[:length])
        _assert_refused(_refusal(tiny, {**tiny_files, option: cut}), option, cut, "format")


class CodeOnUnpickling:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


def test_a_pickle_is_refused_and_never_opened(tiny, tiny_files, tmp_path):
    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    torch.save({"a": CodeOnUnpickling(trace)}, path)
    error = _refusal(tiny, {**tiny_files, "checkpoint": path})
    _assert_refused(error, "checkpoint", path, "format", kind="pickle")
    assert "(pickled checkpoints are not read)" in str(error)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have


def test_another_architecture_is_refused(tiny, tiny_files, tensors, saved, large):
    other = saved("other.safetensors", {"some.weight": torch.zeros(3)})
    for option in ("checkpoint", "upsampler"):
        error = _refusal(tiny, {**tiny_files, option: other})
        _assert_refused(error, option, other, "architecture")
        assert str(error).endswith("use the weights of ltx-2.3-tiny, or name their architecture with --model")
    key = "model.diffusion_model.patchify_proj.weight"
    wide = saved("wide.safetensors", {**tensors, key: torch.zeros(3, 7, dtype=torch.bfloat16)})
    error = _refusal(tiny, {**tiny_files, "checkpoint": wide})
    _assert_refused(error, "checkpoint", wide, "architecture", tensor=key)
    assert f"{key} has shape (3, 7), not (64, 128)" in str(error)
    error = _refusal(tiny, tiny_files, architecture=large)
    key = "model.diffusion_model.scale_shift_table"
    _assert_refused(error, "checkpoint", Path(tiny.checkpoint), "architecture", tensor=key)
    assert f"{key} has shape (2, 64), not (2, 4096); use the weights of ltx-2.3-22b" in str(error)


def test_a_checkpoint_that_lacks_tensors_is_refused(tiny, tiny_files, tensors, saved):
    layout = list(file_layout(tiny.architecture, "checkpoint"))
    for gone in ([layout[0]], [layout[-1]], [key for key in layout if key.startswith("vocoder.")][:100]):
        few = saved("few.safetensors", {key: value for key, value in tensors.items() if key not in gone})
        error = _refusal(tiny, {**tiny_files, "checkpoint": few})
        _assert_refused(error, "checkpoint", few, "incomplete", missing=gone)


@pytest.mark.parametrize(
    ("word", "value"), [("NaN", float("nan")), ("infinity", float("inf")), ("infinity", -float("inf"))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_a_checkpoint_with_values_that_are_not_numbers_is_refused(tiny, tiny_files, tensors, saved, word, value, dtype):
    if dtype == torch.float8_e4m3fn and word == "infinity":
        pytest.skip("float8_e4m3fn has no infinity")
    for key in (min(tensors), max(tensors)):  # first and last in the file, its last value
        damaged = tensors[key].clone()
        damaged.view(-1)[-1] = value
        path = saved("damaged.safetensors", {**tensors, key: damaged.to(dtype)})
        error = _refusal(tiny, {**tiny_files, "checkpoint": path})
        _assert_refused(error, "checkpoint", path, "values", tensor=key, kind=word)


def test_tensors_that_nothing_reads_are_refused(tiny, tiny_files, tensors, saved):
    for extra in ({"step": torch.tensor([3])}, {"scale": torch.ones(2).to(torch.float8_e4m3fn)}):
        path = saved("extra.safetensors", {**tensors, **extra})
        fields = _refusal(tiny, {**tiny_files, "checkpoint": path}).fields
        assert (fields["fault"], fields["tensor"]) == ("unknown", next(iter(extra)))


def test_a_file_without_its_configuration_is_refused(tiny, tiny_files, tensors, saved):
    """ltx-core would build by its defaults, or by what is there, and fail at the weights."""
    upsampler = load_file(tiny_files["upsampler"])
    narrow = json.dumps({**tiny.architecture.upsampler, "mid_channels": 64})
    for option, values in (("checkpoint", tensors), ("upsampler", upsampler)):
        for config in (None, "{}", "[]", "not json", narrow):
            metadata = {"format": "pt"} if config is None else {"config": config}
            path = saved("bare.safetensors", values, **metadata)
            _assert_refused(_refusal(tiny, {**tiny_files, option: path}), option, path, "config")
    more = json.dumps({**tiny.architecture.config, "comment": "from elsewhere"})
    path = saved("more.safetensors", tensors, config=more)
    assert resolve_weights(tiny.architecture, **{**tiny_files, "checkpoint": path}).checkpoint == str(path)


def test_an_incomplete_or_damaged_gemma_folder_is_refused(tiny, tiny_files, tmp_path):
    gone = tmp_path / "gone"
    for path in (gone, tiny_files["checkpoint"]):
        _assert_refused(_refusal(tiny, {**tiny_files, "gemma": path}), "gemma", path, "not-a-folder")
    names = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"]
    for name in [*names, "model.safetensors"]:
        folder = tmp_path / name
        shutil.copytree(tiny_files["gemma"], folder)
        (folder / name).unlink()
        pattern = "model*.safetensors" if name == "model.safetensors" else name
        error = _refusal(tiny, {**tiny_files, "gemma": folder})
        _assert_refused(error, "gemma", folder, "incomplete", missing=pattern)
        if name.endswith(".json"):
            (folder / name).write_text("{half of it")
            _assert_refused(_refusal(tiny, {**tiny_files, "gemma": folder}), "gemma", folder / name, "format")


def test_bad_gemma_weights_are_refused(tiny, tiny_files, own_cache, tmp_path):
    folder = tmp_path / "gemma"
    shutil.copytree(tiny_files["gemma"], folder)
    shard = folder / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    _assert_refused(_refusal(tiny, {**tiny_files, "gemma": folder}), "gemma", shard, "format")
    shard.write_bytes(whole)
    damaged = load_file(shard)
    key = next(iter(damaged))
    damaged[key].view(-1)[0] = float("nan")
    save_file(damaged, shard)
    error = _refusal(tiny, {**tiny_files, "gemma": folder})
    _assert_refused(error, "gemma", shard, "values", tensor=key, kind="NaN")


def test_the_lora_of_another_model_is_refused(tiny, tiny_files, saved):
    lora = load_file(tiny_files["lora"])
    a = next(key for key in lora if ".lora_A." in key)
    b = a.replace(".lora_A.", ".lora_B.")

    def faults(changed: dict[str, torch.Tensor]) -> dict[str, object]:
        path = saved("lora.safetensors", changed, "lora")
        fields = dict(_refusal(tiny, {**tiny_files, "lora": path}, needs_lora=True).fields)
        assert (fields.pop("option"), fields.pop("path")) == ("--lora", path)
        return fields

    def without(*keys: str) -> dict[str, torch.Tensor]:
        return {key: value for key, value in lora.items() if key not in keys}

    other = {"unet.lora_A.weight": torch.zeros(4, 4), "unet.lora_B.weight": torch.zeros(4, 4)}
    assert faults(other) == {"fault": "architecture"}
    for key, shape in ((a, (4, 999)), (b, (999, 4)), (a, (4,))):
        assert faults({**lora, key: torch.zeros(shape)}) == {"fault": "architecture", "tensor": key}
    assert faults(without(a)) == {"fault": "incomplete", "missing": [a]}
    assert faults(without(b)) == {"fault": "incomplete", "missing": [b]}
    found = faults({**lora, a: torch.zeros(3, lora[a].shape[1])})
    assert found in (
        {"fault": "incomplete", "tensor": a, "ranks": (3, 4)},
        {"fault": "incomplete", "tensor": b, "ranks": (4, 3)},
    )
    values = faults({**lora, b: lora[b] * float("inf")})
    assert (values["fault"], values["tensor"]) == ("values", b)


def test_a_lora_of_another_rank_or_of_fewer_layers_is_taken(tiny, tiny_files, saved):
    lora = load_file(tiny_files["lora"])
    kept = [key for key in lora if "transformer_blocks.1." in key]
    wide = {key: torch.cat([lora[key]] * 2, dim=0 if ".lora_A." in key else 1) for key in kept}
    path = saved("lora.safetensors", wide, "lora")
    weights = resolve_weights(tiny.architecture, **{**tiny_files, "lora": path}, needs_lora=True)
    assert weights.notes == ("LoRA: 34 of 68 layers",)
    plain, fused = (
        Ledger(weights, CPU, Quantization.BF16, with_lora=with_lora).transformer().state_dict()
        for with_lora in (False, True)
    )
    changed = {key for key in plain if not torch.equal(plain[key], fused[key])}
    assert changed
    assert all("transformer_blocks.1." in key for key in changed)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (["checkpoint"], ["--gemma", "--upsampler", "--lora"]),
        (["lora"], ["--checkpoint", "--gemma", "--upsampler"]),
        (["checkpoint", "gemma"], ["--upsampler", "--lora"]),
        (["gemma", "upsampler", "lora"], ["--checkpoint"]),
    ],
)
def test_some_options_without_the_others_are_refused(tiny, tiny_files, given, missing):
    files = {name: path if name in given else None for name, path in tiny_files.items()}
    assert _refusal(tiny, files, needs_lora=True).fields == {"missing": missing}


def test_an_unknown_model_is_refused_with_those_that_are_known():
    assert {"ltx-2.3-22b", "ltx-2.3-tiny", "ltxv-tiny"} <= set(architecture_names())
    everything = "use one of: " + ", ".join(architecture_names())
    near = "did you mean ltx-2.3-tiny or ltx-2-tiny"
    for name, remedy in {
        "../secrets": everything,
        "": everything,
        "LTX-2.3-TINY": f"{near} or ltxv-tiny? `i2v-lab models` lists all",
        "ltx-2.3-tiny.json": f"{near}? `i2v-lab models` lists all",
    }.items():
        with pytest.raises(UnknownModel) as caught:
            load_architecture(name)
        assert caught.value.fields == {"model": name}
        assert str(caught.value).endswith(f"; {remedy}")
        assert caught.value.exit_status == 2


# --- Through the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def generate(tmp_path, still, tiny_files, own_cache, monkeypatch, capsys):
    """``i2v-lab generate`` by its entry point, in this process: (exit status, stdout, stderr)."""
    (tmp_path / "out").mkdir()
    previous = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")

    def run(**changed: Path | None) -> tuple[int, str, str]:
        options = [
            word for name, path in {**tiny_files, **changed}.items() if path for word in (f"--{name}", str(path))
        ]
        out = ["--image", str(still), "--out", str(tmp_path / "out" / "video.mp4"), "--json", "--variant", "dev"]
        monkeypatch.setattr(sys, "argv", ["i2v-lab", "generate", *out, *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (caught.value.code, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, previous)
    assert list((tmp_path / "out").iterdir()) == []


def test_every_family_of_bad_weights_ends_the_command_with_status_2_one_line_and_nothing_left(
    generate, tiny_files, tensors, saved, tmp_path
):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_files["checkpoint"].read_bytes()[:-10])
    key = next(iter(tensors))
    lora = saved("lora.safetensors", {"unet.lora_A.weight": torch.zeros(4, 4)}, "lora")
    for changed, words in (
        ({"checkpoint": tmp_path / "none"}, "does not exist; check the path"),
        ({"checkpoint": cut}, "is truncated or not a safetensors file"),
        ({"checkpoint": saved("a", {"a": torch.zeros(1)})}, "is of another architecture than ltx-2.3-tiny; use"),
        (
            {"checkpoint": saved("b", {key: tensors[key]} | {k: v for k, v in tensors.items() if "vocoder" not in k})},
            "lacks",
        ),
        ({"checkpoint": saved("c", {**tensors, key: tensors[key] * float("nan")})}, f"holds NaN in {key}"),
        ({"gemma": tmp_path}, "holds no tokenizer.model; give a complete Gemma 3 folder"),
        ({"lora": lora}, "none of its 1 LoRA tensors names a layer of the transformer"),
        ({"upsampler": None}, "--checkpoint, --gemma, --lora given without --upsampler: real weights come together"),
    ):
        status, out, err = generate(**changed)
        assert (status, out) == (2, "")
        assert words in err
        messages = [line for line in err.splitlines() if line.startswith("i2v-lab: ")]
        assert err.splitlines()[-1:] == messages
