"""Damaged weights, stills, plans and parameters: an error of ours in one line, or a right result; in bounded time."""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import yaml
from fault_injection import INPUTS, SMALL, STILL, damage, each
from PIL import Image

from i2v_lab.cli.app import app
from i2v_lab.errors import I2VLabError
from i2v_lab.paths import data_dir, notebooks_dir
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.contract.media import load_still
from i2v_lab.pipeline.ltx2.weights import resolve_weights
from i2v_lab.reproduce.parameters import declared_parameters, plan_parameters
from i2v_lab.runs.plans import load_plan

BOUND_S = 20.0
BOUND_KIB = 1 << 20
FORMATS = {
    "PNG": {}, "JPEG": {}, "GIF": {}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {}, "BMP": {}, "JPEG2000": {},
    "AVIF": {}, "ICO": {}, "ICNS": {}, "PPM": {}, "TGA": {}, "DDS": {},
}  # fmt: skip
ODD: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf"), "", "x", "1024",
    "\x00", "[bold]", "é" * 300, [], [[]], {}, {"x": None}, ["a", 1], {"1": {"2": {"3": []}}},
]  # fmt: skip


def _outcome(call: Callable[[], object]) -> tuple[str, list[str]]:
    """How a call ends, and what is wrong with that."""
    began_s, most_kib = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = []
    try:
        call()
        outcome = "a right result"
    except I2VLabError as error:
        outcome = "one line"
        if "\n" in str(error) or not str(error):
            problems.append(f"not one line: {error}")
    except Exception as error:
        outcome = "raised"
        problems.append(f"{type(error).__name__}: {error}")
    if (seconds := time.perf_counter() - began_s) > BOUND_S:
        problems.append(f"took {seconds:.0f} s")
    if (more_kib := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most_kib) > BOUND_KIB:
        problems.append(f"took {more_kib >> 10} MiB")
    return outcome, problems


def _mutated(value: Any, chance: random.Random) -> Any:
    """A copy with one node replaced, removed, renamed or repeated."""
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.15:
        return chance.choice(ODD)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    how = chance.random()
    if how < 0.75:
        copy[key] = _mutated(value[key], chance)
    elif isinstance(copy, list):
        if how < 0.87:
            del copy[key]
        else:
            copy.append(chance.choice(ODD))
    elif how < 0.87:
        copy[str(chance.choice(["", "x", key + "s" if isinstance(key, str) else key]))] = copy.pop(key)
    else:
        copy[chance.choice(["x", "__class__", 1, None])] = chance.choice(ODD)
    return copy


@each(INPUTS, 0.10)
def test_damaged_weights(seeds, tiny_files, tmp_path, tally):
    architecture = load_architecture("ltx-2.3-tiny")
    work = tmp_path / "weights"
    for seed in seeds:
        chance = random.Random(f"weights {seed}")
        option = chance.choice(list(tiny_files))
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        source = tiny_files[option]
        target = work / source.name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        file = chance.choice(sorted(target.rglob("*"))) if target.is_dir() else target
        contents = file.read_bytes()
        if file.suffix == ".json" and chance.random() < 0.5:
            how, contents = "mutate", json.dumps(_mutated(json.loads(contents), chance)).encode()
        else:
            how, contents = damage(contents, chance)
        file.write_bytes(contents)
        files: dict[str, Any] = {**tiny_files, option: target}
        outcome, problems = _outcome(lambda files=files: resolve_weights(architecture, **files, needs_lora=True))
        if outcome == "a right result" and (file.suffix == ".json" or chance.random() < 0.05):  # as far as headers say
            outcome, problems = _outcome(lambda files=files: _generate(files, tmp_path / "video.mp4"))
        tally.count(outcome, problems, f"{seed} {how} of {file.name}")


def _generate(files: dict[str, Any], out: Path) -> None:
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        app(
            ["generate", "--image", STILL, *SMALL, "--variant", "dev", *options, "--out", str(out)],
            standalone_mode=False,
        )
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9


@pytest.fixture(scope="session")
def pictures(still) -> dict[str, bytes]:
    """The still in every format that this Pillow writes."""
    found = {}
    with Image.open(still) as picture:
        for name, options in FORMATS.items():
            stream = io.BytesIO()
            try:
                picture.convert("RGB").resize((64, 64)).save(stream, name, **options)
            except (KeyError, OSError):
                continue  # an older Pillow
            found[name] = stream.getvalue()
    assert len(found) >= 10
    return found


@each(INPUTS, 0.10)
def test_damaged_stills(seeds, pictures, tmp_path, tally):
    file = tmp_path / "still"
    for seed in seeds:
        chance = random.Random(f"still {seed}")
        name = chance.choice(sorted(pictures))
        how, contents = damage(pictures[name], chance)
        file.write_bytes(contents)

        def load() -> None:
            pixels = load_still(file)
            assert pixels.dtype == "uint8"
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert min(pixels.shape[:2]) >= 2

        outcome, problems = _outcome(load)
        tally.count(outcome, problems, f"{seed} {how} of {name}")


@each(INPUTS, 0.10)
def test_damaged_plans(seeds, tmp_path, tally):
    plans = {path.name: path.read_bytes() for path in sorted((data_dir() / "plans").glob("*.yaml"))}
    file = tmp_path / "plan.yaml"
    for seed in seeds:
        chance = random.Random(f"plan {seed}")
        name = chance.choice(sorted(plans))
        file.write_bytes(_damaged_yaml(plans[name], chance))
        outcome, problems = _outcome(lambda: load_plan(file))
        tally.count(outcome, problems, f"{seed} of {name}")


@each(INPUTS, 0.10)
def test_damaged_parameters(seeds, tmp_path, tally):
    """Parameter files, and the notebooks that declare the parameters."""
    names = sorted(path.stem for path in notebooks_dir().glob("*.ipynb"))
    notebook = notebooks_dir() / f"{names[0]}.ipynb"
    good = {
        "width": 64,
        "height": 64,
        "frames": 9,
        "model": "ltx-2.3-tiny",
        names[1]: {"tilings": ["64/32/16/8"]},
        names[2]: {"device": "cpu"},
    }
    file = tmp_path / "parameters.yaml"
    notebooks = [notebooks_dir() / f"{name}.ipynb" for name in names]
    for seed in seeds:
        chance = random.Random(f"parameters {seed}")
        if chance.random() < 0.2:
            copy = tmp_path / notebook.name
            contents = notebook.read_bytes()
            copy.write_bytes(
                damage(contents, chance)[1]
                if chance.random() < 0.5
                else json.dumps(_mutated(json.loads(contents), chance)).encode()
            )
            outcome, problems = _outcome(lambda copy=copy: declared_parameters(copy))
            tally.count(outcome, problems, f"{seed} of a notebook")
            continue
        file.write_bytes(_damaged_yaml(yaml.safe_dump(good).encode(), chance))
        outcome, problems = _outcome(lambda: plan_parameters(notebooks, notebooks, {}, [file]))
        tally.count(outcome, problems, f"{seed} of a file")


def _damaged_yaml(contents: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.4:
        return damage(contents, chance)[1]
    value = yaml.safe_load(contents)
    for _ in range(chance.randrange(1, 4)):
        value = _mutated(value, chance)
    return yaml.safe_dump(value, allow_unicode=True).encode()
