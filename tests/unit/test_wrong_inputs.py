"""Inputs of wrong types and sizes: each an error of the house that names the field, before anything runs."""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from i2v_lab.cli import options
from i2v_lab.cli.app import main
from i2v_lab.errors import I2VLabError, InvalidImage, InvalidRequest, UnknownModel, shown
from i2v_lab.files import check_file, check_folder, check_new_folder
from i2v_lab.paths import data_dir, find_still
from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture
from i2v_lab.pipeline.contract.media import check_size, load_still
from i2v_lab.pipeline.registry import RUNNERS, check_request
from i2v_lab.plain_yaml import MAX_BYTES, load_yaml
from i2v_lab.request import MAX_FRAMES, MAX_SIDE, I2VRequest, Tiling
from i2v_lab.runs.forecast import _still_size
from i2v_lab.runs.plans import load_plan
from i2v_lab.runs.spec import RunSpec, make_request

HUGE = 10**6000


class _Hostile:
    def __repr__(self) -> str:
        raise RuntimeError

    def __str__(self) -> str:
        return "a\nb"


WRONG = [None, True, "64", b"64", 64.0, float("nan"), float("inf"), HUGE, -HUGE, [], {}, _Hostile(), object]
WRONG += [np.bool_(1), np.arange(9)]
REQUEST = I2VRequest(image="still.png", width=64, height=64, frames=9)
SPEC = RunSpec(request=REQUEST, model="ltx-2.3-tiny")


def _refused(make, *fields: str) -> None:
    with pytest.raises(I2VLabError) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert tuple(caught.value.fields) == fields


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_a_field_of_a_wrong_type_is_named(value):
    for name in ("width", "height", "frames", "seed"):
        _refused(lambda name=name: replace(REQUEST, **{name: value}), name)
    for name in ("variant", "quantization", "decode_scope", "memory"):
        _refused(lambda name=name: replace(REQUEST, **{name: value}), name)
    for name in ("image", "prompt", "negative_prompt"):
        if not isinstance(value, str):
            _refused(lambda name=name: replace(REQUEST, **{name: value}), name)
    if value is not None:
        _refused(lambda: replace(REQUEST, tiling=value), "tiling")
    if not isinstance(value, float) or not 1 <= value <= 240:
        _refused(lambda: replace(REQUEST, fps=value), "fps")
    for name in ("tile_px", "tile_overlap_px", "tile_frames", "tile_overlap_frames"):
        _refused(lambda name=name: Tiling(**{name: value}), name)
    for name in ("request", "model", "runner", "consumer", "profiler", "generations", "write_video"):
        if not (name == "write_video" and value is True):
            named = "pipeline" if name == "runner" else name
            _refused(lambda name=name: replace(SPEC, **{name: value}), named)
    if value is not None:
        _refused(lambda: replace(SPEC, vram_cap_bytes=value), "vram_cap_bytes")
    _refused(lambda: I2VRequest.from_json(value), "image" if isinstance(value, dict) else "request")
    _refused(lambda: RunSpec.from_json(value), "spec")
    if value is not None and not (isinstance(value, list | dict) and not value):
        with pytest.raises(InvalidRequest):
            replace(SPEC, techniques=value)
        with pytest.raises(InvalidRequest):
            replace(SPEC, techniques=[value])


def test_numbers_of_numpy_are_the_same_request():
    same = {"width": np.int64(64), "height": np.uint8(64), "frames": torch.tensor(9), "fps": np.float32(24)}
    assert replace(REQUEST, **same, image=Path("still.png")) == REQUEST
    assert replace(REQUEST, **same).digest() == REQUEST.digest()


def test_sizes_have_a_bound_and_texts_are_utf_8():
    for name, most in (("width", MAX_SIDE), ("height", MAX_SIDE), ("frames", MAX_FRAMES)):
        assert getattr(replace(REQUEST, **{name: most}), name) == most
        _refused(lambda name=name, most=most: replace(REQUEST, **{name: most + 1}), name)
    check_size(16384, 16384)
    _refused(lambda: check_size(16448, 64), "width")
    _refused(lambda: check_size(64, 16448), "height")
    for name in ("prompt", "negative_prompt"):
        for text in ("\udcff", "a\ud800b"):
            _refused(lambda name=name, text=text: replace(REQUEST, **{name: text}), name)
    assert replace(REQUEST, prompt="a\0b").prompt == "a\0b"
    _refused(lambda: replace(REQUEST, image="a\0b"), "image")
    assert find_still("a\0b") == Path("a\0b")
    assert find_still("x" * 300) == Path("x" * 300)


def test_a_value_is_shown_in_one_short_line():
    nested: list[object] = []
    nested.append(nested)
    for value in (HUGE, _Hostile(), nested, np.arange(10**6), "x" * 10**6, {1: {2: {3: list(range(99))}}}, "a\nb"):
        assert "\n" not in shown(value)
        assert len(shown(value)) < 1000
    error = InvalidRequest("no", message=1, self=2)
    assert error.fields == pickle.loads(pickle.dumps(error)).fields == {"message": 1, "self": 2}


@pytest.mark.parametrize(
    "model", [name for name in architecture_names() if "tiny" in name and not load_architecture(name).pipeline]
)
def test_a_single_latent_position_is_refused_where_the_model_cannot_run_it(model):
    architecture = load_architecture(model)
    _refused(lambda: check_request(architecture, make_request(model, width=64, height=64, frames=1)), "frames")
    if "decoder" not in model:
        check_request(architecture, make_request(model, width=128, height=128, frames=9))


def test_a_large_model_takes_one_frame_of_64_pixels():
    check_request(load_architecture("ltx-2.3-22b"), make_request("ltx-2.3-22b", width=64, height=64, frames=1))
    widths = [width for width, _ in RUNNERS["ltx-2"].sizes.sizes((10**30, 1), 2176)]
    assert len(widths) == 1
    assert max(width for width, _ in RUNNERS["ltx-2"].sizes.sizes((16, 1), 2176)) <= MAX_SIDE


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 0.0, 1e-30, 1e20, -float("inf")])
def test_a_cap_that_no_device_has_is_refused(value):
    _refused(lambda: options.cap_bytes(value), "vram_cap_gib")
    assert (options.cap_bytes(None), options.cap_bytes(0.5)) == (None, 2**29)


# --- Files ---


def test_a_still_that_is_no_regular_file_is_not_waited_for_and_postscript_is_not_run(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for path in (tmp_path / "fifo.png", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(InvalidImage, match="is no regular file"):
            load_still(path)
        assert _still_size(str(path)) == "unreadable"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(InvalidImage, match="is not a picture"):
        load_still(tmp_path / "a.eps")


def test_the_size_of_a_still_of_implausible_size_is_for_the_pipeline_to_refuse(tmp_path, monkeypatch):
    Image.new("L", (60, 40)).save(tmp_path / "a.png")
    for limit in (2399, 1100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert _still_size(str(tmp_path / "a.png")) in ("unreadable", "(60, 40)")


def test_outputs_are_refused_before_anything_runs_and_nothing_is_left(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for bad in [tmp_path / "file" / "x", Path("/proc/none/x"), tmp_path / ("x" * 300), Path("a\0b")]:
        _refused(lambda bad=bad: check_file(bad, "csv", "a.csv"), "path")
        _refused(lambda bad=bad: check_folder(bad, "timeline"), "folder")
    _refused(lambda: check_file(tmp_path, "csv", "a.csv"), "path")
    _refused(lambda: check_file(Path("/dev/null"), "csv", "a.csv"), "path")
    _refused(lambda: check_folder(tmp_path / "file", "timeline"), "folder")
    _refused(lambda: check_folder(tmp_path / "loop", "timeline"), "folder")
    _refused(lambda: check_new_folder(tmp_path / "full", "profile"), "folder")
    check_file(tmp_path / "file", "csv", "a.csv")
    check_file(tmp_path / "new" / "below" / "a.csv", "csv", "a.csv")
    check_folder(tmp_path / "new", "timeline")
    check_new_folder(tmp_path / "new", "profile")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "loop"]


# --- YAML ---

LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
LAUGHS += "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n"
MERGES += "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [LAUGHS, MERGES, "[" * 20_000, "{a: " * 20_000, "&a [*a]", "a: &a {b: *a}", "a: 2001-99-99", "a: " + "9" * 5000]
    + ["\x00", "a: !!python/object:os.system x", "? [a]\n: b", "a: [", "#" * (MAX_BYTES + 1)],
    ids=range(13),
)
def test_yaml_that_grows_recurses_or_is_none_is_refused_soon(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError):
        load_yaml(tmp_path / "plan.yaml")
    with pytest.raises(InvalidRequest) as caught:
        load_plan(tmp_path / "plan.yaml")
    assert "\n" not in str(caught.value)
    assert list(caught.value.fields) == ["plan"]


def test_yaml_with_aliases_is_read_and_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")
    assert load_yaml(tmp_path / "a.yaml") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}
    (tmp_path / "none.yaml").touch()
    assert load_yaml(tmp_path / "none.yaml") is None
    for plan in (data_dir() / "plans").glob("*.yaml"):
        assert load_yaml(plan)["groups"]
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "gone", Path("/dev/zero")):
        with pytest.raises(OSError):
            load_yaml(path)


@pytest.mark.parametrize(
    ("run", "field"),
    [
        ("message: 3", "message"),
        ("self: 3", "self"),
        ("tiling: 3", "tiling"),
        ("tiling: {bad: 3}", "tiling"),
        ("techniques: 3", "techniques"),
        ("techniques: [[3]]", "technique"),
        ("pipeline: [3]", "pipeline"),
        ("model: {a: b}", "model"),
        ("vram_cap_gib: .inf", "vram_cap_gib"),
        ("width: [64]", "width"),
        ("fps: fast", "fps"),
        ("generations: 1.5", "generations"),
        ("seed: " + "9" * 4000, "seed"),
        (f"expected_seconds: {'9' * 4000}", "expected_seconds"),
    ],
)
def test_a_value_of_a_plan_of_a_wrong_type_is_named(tmp_path, run, field):
    seconds = "" if "expected" in run else ", expected_seconds: 1"
    model = "" if "model" in run else ", model: ltx-2.3-tiny"
    (tmp_path / "plan.yaml").write_text(f"groups: [{{runs: [{{{run}{seconds}{model}}}]}}]")
    _refused(lambda: load_plan(tmp_path / "plan.yaml"), field)


def test_a_model_is_asked_for_by_name():
    for name in (None, ["ltx-2.3-tiny"], {}, 3, "", "../x"):
        with pytest.raises(UnknownModel):
            load_architecture(name)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["forecast", "--width", "inf"], "--width"),
        (["forecast", "--seed", "9" * 5000], "--seed"),
        (["forecast", "--fps", "fast"], "--fps"),
        (["forecast", "--memory", "none"], "--memory"),
        (["forecast", "--nothing", "3"], "--nothing"),
        (["generate"], "--image"),
        (["fit"], "--gpu"),
        (["show", "a", "b", "c"], "c"),
        (["nothing"], "nothing"),
    ],
    ids=range(9),
)
def test_an_option_that_does_not_parse_is_one_line_too(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["i2v-lab", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("i2v-lab: ")
    assert named in said
    assert said.count("\n") == 1
