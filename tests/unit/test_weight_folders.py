"""Folders of weights: no code of their own, no file that would make a reader wait, no pointer in place of a file."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from i2v_lab.errors import CheckpointError
from i2v_lab.paths import package_dir
from i2v_lab.pipeline.contract.weight_folders import MAX_FILES, require_files
from i2v_lab.pipeline.ltx2.gemma import tokenizer_ops
from i2v_lab.pipeline.ltx2.weights import GEMMA_FILES, OPTIONS, resolve_weights
from i2v_lab.pipeline.ltx_video.weights import T5_FILES
from i2v_lab.pipeline.ltx_video.weights import resolve_weights as resolve_ltx_video

CODE = "open('ran', 'w')\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.fixture
def gemma(tiny_files, tmp_path) -> Path:
    """The tiny model's Gemma folder, its weights linked."""
    folder = tmp_path / "gemma"
    shutil.copytree(tiny_files["gemma"], folder, copy_function=_linked)
    return folder


def _linked(source: str, target: str) -> None:
    shutil.copyfile(source, target) if source.endswith(".json") else os.link(source, target)


def _refused(folder: Path, patterns=GEMMA_FILES, option="--gemma") -> dict[str, object]:
    with pytest.raises(CheckpointError) as caught:
        require_files(folder, patterns, option, "model")
    assert "\n" not in str(caught.value)
    return caught.value.fields


def _change(path: Path, **values: object) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))


@pytest.mark.parametrize(
    ("name", "values", "key"),
    [
        *(
            (name, {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "auto_map")
            for name in (
                "tokenizer_config.json",
                "config.json",
                "preprocessor_config.json",
                "processor_config.json",
                "generation_config.json",
                "special_tokens_map.json",
                "further/down/config.json",
            )
        ),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "other/repo--evil.Evil"}}}, "auto_map"),
        ("config.json", {"list": [[{"auto_map": "evil.Evil"}]]}, "auto_map"),
        ("config.json", {"custom_pipelines": {"evil": {"impl": "evil.Evil"}}}, "custom_pipelines"),
        ("generation_config.json", {"custom_generate": "evil"}, "custom_generate"),
        ("config.json", {"trust_remote_code": True}, "trust_remote_code"),
        ("model_index.json", {"_class_name": ["evil", "Evil"]}, "_class_name"),
        ("model_index.json", {"text_encoder": ["evil", "Evil"]}, "text_encoder"),
        ("model_index.json", {"text_encoder": ["os", "Evil"]}, "text_encoder"),
        ("model_index.json", {"text_encoder": ["../evil", "Evil"]}, "text_encoder"),
        ("model_index.json", {"text_encoder": [["evil"], "Evil"]}, "text_encoder"),
    ],
)
def test_code_that_a_folder_names_is_refused_while_it_is_verified(gemma, monkeypatch, name, values, key):
    monkeypatch.chdir(gemma)
    (gemma / "evil.py").write_text(CODE)
    (gemma / name).parent.mkdir(parents=True, exist_ok=True)
    _change(gemma / name, **values)
    assert _refused(gemma) == {"option": "--gemma", "path": gemma / name, "fault": "code", "key": key}
    assert not Path("ran").exists()


def test_a_component_of_diffusers_is_not_taken_from_a_file_of_the_folder(gemma):
    _change(gemma / "model_index.json", _class_name="LTX2Pipeline", connectors=["ltx2", "LTX2TextConnectors"])
    require_files(gemma, GEMMA_FILES, "--gemma", "model")
    (gemma / "connectors").mkdir()
    (gemma / "connectors" / "ltx2.py").write_text(CODE)
    assert _refused(gemma)["key"] == "connectors"


def test_what_is_no_code_is_let_through(gemma):
    _change(gemma / "config.json", auto_map={}, trust_remote_code=False, chat_template="{{ bos_token }}")
    _change(gemma / "vocab.json", auto_map=7, custom_pipelines=8)  # words of a vocabulary
    index = {"_class_name": "A", "_diffusers_version": "0", "vae": ["diffusers", "B"], "image_encoder": [None, None]}
    _change(gemma / "model_index.json", **index, text_encoder=["transformers", "T5EncoderModel"])
    (gemma / "convert.py").write_text(CODE)
    require_files(gemma, GEMMA_FILES, "--gemma", "model")


def test_both_runners_verify_their_folders(gemma, tiny, tiny_files, ltxv_tiny, tmp_path):
    _change(gemma / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(CheckpointError) as caught:
        resolve_weights(tiny.architecture, **{**tiny_files, "gemma": gemma})
    assert caught.value.fields["fault"] == "code"
    t5 = tmp_path / "t5"
    shutil.copytree(ltxv_tiny.text_encoder, t5, copy_function=_linked)
    _change(t5 / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Evil"})
    files = {"checkpoint": Path(ltxv_tiny.checkpoint), "upsampler": Path(ltxv_tiny.upsampler)}
    with pytest.raises(CheckpointError) as caught:
        resolve_ltx_video(ltxv_tiny.architecture, text_encoder=t5, **files)
    assert caught.value.fields["fault"] == "code"


def test_a_tokenizer_that_was_given_code_after_it_was_verified_runs_none_and_asks_nobody(gemma, monkeypatch):
    monkeypatch.chdir(gemma)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    (gemma / "evil.py").write_text(CODE)
    _change(gemma / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    load = tokenizer_ops(str(gemma))[0].mutator
    with suppress(CheckpointError):  # some versions of transformers take their own class instead
        load(SimpleNamespace())
    assert not Path("ran").exists()
    (gemma / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        load(SimpleNamespace())
    assert (caught.value.fields["option"], caught.value.fields["fault"]) == ("--gemma", "format")


def test_every_call_of_from_pretrained_says_that_it_trusts_no_code():
    paths = [path for path in package_dir().rglob("*.py") if path.name != "without_weights.py"]  # replaces such calls
    sources = [path.read_text() for path in paths]
    calls = [call for text in sources for call in re.findall(r"\.from_pretrained\(((?:[^()]|\([^()]*\))*)\)", text)]
    assert len(calls) >= 3
    assert all("trust_remote_code=False" in call and "local_files_only=True" in call for call in calls)
    assert not any(re.search(r"torch\.load\(|pickle\.load|weights_only", text) for text in sources)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"])
def test_a_pointer_in_place_of_a_small_file_is_told(gemma, name):
    (gemma / name).unlink(missing_ok=True)
    (gemma / name).write_text(POINTER)
    fields = {"option": "--gemma", "path": gemma / name, "fault": "format", "kind": "Git LFS pointer"}
    assert _refused(gemma) == fields
    (gemma / name).rename(gemma / "picture.png")  # which nothing reads
    if name != "tokenizer.json":
        require_files(gemma, GEMMA_FILES, "--gemma", "model")


@pytest.mark.parametrize("name", ["tokenizer.model", "model.safetensors", "config.json", "extra.json"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "gone", "loop"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(gemma, monkeypatch, name, kind):
    monkeypatch.chdir(gemma)  # a socket's path is short
    (gemma / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(gemma / name)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(name)
    else:
        (gemma / name).symlink_to("gone" if kind == "gone" else name)
    assert _refused(gemma)["fault"] == ("not-a-file" if kind in ("fifo", "socket") else "unreadable")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "", "\xff", "[" * 100_000, '{"a":' * 100_000])
def test_json_of_another_kind_or_nested_too_deeply_is_refused(gemma, text):
    (gemma / "config.json").write_text(text, encoding="latin-1")
    assert _refused(gemma)["fault"] == "format"


def test_a_folder_that_is_no_folder_of_weights_is_not_searched_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("i2v_lab.pipeline.contract.weight_folders.MAX_FILES", 3)
    for number in range(4):
        (tmp_path / str(number)).touch()
    assert _refused(tmp_path, T5_FILES, "--text-encoder")["fault"] == "not-a-folder"
    assert MAX_FILES > 1000
    assert set(OPTIONS) >= {"gemma"}
