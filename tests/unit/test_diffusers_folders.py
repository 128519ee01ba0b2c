"""A folder of a diffusers' model: every header is checked against the component before anything is loaded."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2v_lab.errors import CheckpointError
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.diffusers.pipeline import DiffusersPipeline
from i2v_lab.pipeline.diffusers.weights import DiffusersWeights, _is_alike, resolve_weights

MODEL = load_architecture("ltx-video-2b-tiny")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"
FILES = {"transformer": TRANSFORMER, "text_encoder": ENCODER}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The tiny model as diffusers saves it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    DiffusersPipeline(DiffusersWeights(MODEL)).pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "T5TokenizerFast"]  # where ours stands in
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def _rewritten(path: Path, change) -> str:
    """Change the tensors of a file; returns the name of the first."""
    tensors = load_file(path)
    first = min(tensors)
    change(tensors, first)
    save_file(tensors, path, {"format": "pt"})
    return first


def _refused(folder: Path) -> dict:
    with pytest.raises(CheckpointError) as caught:
        resolve_weights(MODEL, folder)
    assert "\n" not in str(caught.value)
    return caught.value.fields


def test_a_folder_that_diffusers_saved_is_taken_and_each_json_file_is_opened_once(folder, monkeypatch):
    opened = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read(path))
    assert resolve_weights(MODEL, folder).folder == folder
    assert sorted(opened) == sorted(folder.rglob("*.json"))


@pytest.mark.parametrize("name", FILES)
def test_tensors_that_are_missing_unknown_or_of_another_shape_are_refused_with_file_and_name(folder, name):
    path = folder / FILES[name]
    whole = path.read_bytes()

    first = _rewritten(path, lambda tensors, first: tensors.pop(first))
    found = _refused(folder)
    assert (found["path"], found["fault"], found["tensor"]) == (path, "incomplete", first)

    path.write_bytes(whole)
    _rewritten(path, lambda tensors, _: tensors.update({"extra.weight": torch.zeros(2)}))
    found = _refused(folder)
    assert (found["path"], found["fault"], found["tensor"]) == (path, "unknown", "extra.weight")

    path.write_bytes(whole)
    first = _rewritten(path, lambda tensors, first: tensors.update({first: torch.zeros(3, *tensors[first].shape)}))
    found = _refused(folder)
    assert (found["path"], found["fault"], found["tensor"]) == (path, "architecture", first)

    path.write_bytes(whole)
    tensors = {f"model.{key}": tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    found = _refused(folder)
    assert (found["path"], found["fault"], found["prefix"]) == (path, "architecture", "model.")

    path.write_bytes(whole[:-8])
    assert (found := _refused(folder))["path"] == path
    assert found["fault"] == "format"


@pytest.mark.parametrize("name", FILES)
def test_files_of_several_parts_are_verified_by_their_index(folder, name):
    path = folder / FILES[name]
    tensors = load_file(path)
    path.unlink()
    shards = [path.with_name(f"{path.stem}-0000{number}-of-00002.safetensors") for number in (1, 2)]
    parts = [sorted(tensors)[::2], sorted(tensors)[1::2]]
    for shard, keys in zip(shards, parts, strict=True):
        save_file({key: tensors[key] for key in keys}, shard, {"format": "pt"})
    names = {key: shard.name for shard, keys in zip(shards, parts, strict=True) for key in keys}
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    assert resolve_weights(MODEL, folder).folder == folder

    shards[1].unlink()
    found = _refused(folder)
    assert (found["path"], found["fault"]) == (shards[1], "not-found")
    index.write_text(json.dumps({"weight_map": []}))
    found = _refused(folder)
    assert (found["path"], found["fault"]) == (index, "format")


@pytest.mark.parametrize("name", FILES)
def test_a_component_with_a_pickle_or_a_variant_alone_or_without_a_configuration_is_refused(folder, name):
    path = folder / FILES[name]
    variant = path.with_name(f"{path.stem}.fp16.safetensors")
    path.rename(variant)
    found = _refused(folder)
    assert (found["path"], found["fault"], found["missing"]) == (path.parent, "incomplete", path.name)
    variant.unlink()
    path.with_suffix(".bin").write_bytes(pickle.dumps({}))
    found = _refused(folder)
    assert (found["path"], found["fault"], found["missing"]) == (path.parent, "incomplete", path.name)
    (path.parent / "config.json").unlink()
    found = _refused(folder)
    assert (found["path"], found["missing"]) == (path.parent / "config.json", f"{name}/config.json")


def test_a_model_index_that_is_no_object_is_refused(folder):
    (folder / "model_index.json").write_text("[]")
    assert _refused(folder)["fault"] == "format"


def test_a_nested_configuration_with_the_defaults_of_its_class_is_that_of_the_model_and_another_value_is_not():
    """Those of a text encoder of two parts, which diffusers saves with every default."""
    wanted = {"text_config": {"hidden_size": 32, "layers": [1, 2]}}
    saved = {"text_config": {"hidden_size": 32, "layers": [1, 2], "attention_dropout": 0.0}}
    assert _is_alike(wanted, saved)
    assert not _is_alike(wanted, {"text_config": {"hidden_size": 64, "layers": [1, 2]}})
    assert not _is_alike(wanted, {"text_config": [32]})
