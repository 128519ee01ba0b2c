"""Provenance: what a record says of versions, code, commit and machine, and what a cached result depends on."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from i2v_lab.paths import data_dir, package_dir
from i2v_lab.pipeline.contract.architectures import architecture_names, load_architecture
from i2v_lab.pipeline.registry import RUNNERS
from i2v_lab.reproduce.stamps import code_digests
from i2v_lab.runs import provenance
from i2v_lab.runs.forecast import cache_path
from i2v_lab.runs.provenance import RENDERING, code_digest, git_commit, run_metadata, runner_packages
from i2v_lab.runs.recorded import spec_of
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.runs.store import Run
from i2v_lab.studies import third_party_leaks

MODELS = {"ltx-2": "ltx-2.3-tiny", "ltx-pipelines": "ltx-2.3-tiny", "ltx-video": "ltxv-tiny", "diffusers": "ltx-2-tiny"}
OWN = sorted(runner.name for runner in RUNNERS.values())


def _spec(runner: str, **changes: object) -> RunSpec:
    model = MODELS[runner]
    return RunSpec(request=make_request(model, width=64, height=64, frames=9), model=model, runner=runner, **changes)


# --- Metadata ---


def test_metadata_say_where_a_run_happened():
    argv = ["/usr/bin/i2v-lab", "generate"]
    metadata = run_metadata("cpu", model="ltx-2.3-tiny", request={"width": 64}, seed=7, argv=argv, note="x")
    assert json.loads(json.dumps(metadata)) == metadata
    assert (metadata["model"], metadata["seed"], metadata["request"]) == ("ltx-2.3-tiny", 7, {"width": 64})
    assert metadata["argv"] == ["i2v-lab", "generate"]
    assert (metadata["device"], metadata["device_name"], metadata["driver_version"]) == ("cpu", None, None)
    assert metadata["note"] == "x"
    assert metadata["platform"]
    assert 1 <= metadata["cores"] <= os.cpu_count()
    assert datetime.fromisoformat(metadata["started_at"]).utcoffset() == timedelta(0)


@pytest.mark.parametrize("runner", OWN)
def test_metadata_of_a_spec_name_its_own_model_runner_request_code_and_packages(runner):
    spec = _spec(runner)
    metadata = run_metadata("cpu", spec=spec)
    assert json.loads(json.dumps(metadata)) == metadata
    assert (metadata["model"], metadata["runner"], metadata["seed"]) == (MODELS[runner], runner, spec.request.seed)
    assert (metadata["request"], metadata["spec"]) == (spec.request.to_json(), spec.to_json())
    assert metadata["code"] == code_digest(runner)
    assert list(metadata["versions"]) == ["python", "i2v-lab", *RUNNERS[runner].packages]
    assert metadata["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(metadata["versions"].values())
    assert spec_of(Run(Path("run"), metadata, (), "complete")) == spec


def test_what_cannot_be_found_out_is_none(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    metadata = run_metadata("cuda:1", model="m", packages=["i2v-lab-not-installed"])
    assert metadata["versions"]["i2v-lab-not-installed"] is None
    assert (metadata["git_commit"], metadata["git_modified"]) == (None, None)
    assert (metadata["device_name"], metadata["driver_version"]) == (None, None)


class _Nvml:
    """Two cards, as the driver numbers them."""

    NVMLError = type("NVMLError", (Exception,), {})
    names = ("first card", "second card")

    def __init__(self) -> None:
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return range(2)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-a": 0, "GPU-b": 1}[uuid]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]


@pytest.mark.parametrize(
    ("visible", "device", "name"),
    [
        ("", "cuda", "first card"),
        ("", "cuda:1", "second card"),
        ("1", "cuda:0", "second card"),
        ("1, 0", "cuda:1", "first card"),
        ("GPU-b", "cuda", "second card"),
        ("1", "cuda:1", None),
        ("", "cuda:2", None),
        ("", "cpu", None),
    ],
)
def test_the_device_is_the_one_that_cuda_means(monkeypatch, visible, device, name):
    nvml = _Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    metadata = run_metadata(device)
    assert metadata["device_name"] == name
    assert metadata["driver_version"] == (name and "570.1")
    assert nvml.open == 0


def test_the_commit_is_that_of_the_checkout_and_of_nothing_around_it(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True
        ).stdout

    assert git_commit(tmp_path) == (None, None)
    git("init")
    assert git_commit(tmp_path) == (None, None)  # no commit yet
    for name in ("src", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "one")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD").strip()
    assert git_commit(tmp_path) == (commit, False)
    (tmp_path / "docs" / "file").write_text("two")
    assert git_commit(tmp_path) == (commit, False)  # no run depends on it
    (tmp_path / "src" / "file").write_text("two")
    assert git_commit(tmp_path) == (commit, True)
    (tmp_path / "site-packages").mkdir()
    assert git_commit(tmp_path / "site-packages") == (None, None)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert git_commit(tmp_path) == (commit, True)


# --- Versions ---


@pytest.fixture
def upgraded(monkeypatch) -> Callable[[str], None]:
    """Pretends that a package was upgraded."""
    real = provenance.installed_version

    def upgrade(package: str) -> None:
        def version(name: str) -> str | None:
            return "999" if name == package else real(name)

        monkeypatch.setattr(provenance, "installed_version", version)

    return upgrade


def test_the_packages_of_all_runners_are_those_of_each():
    for name, runner in RUNNERS.items():
        assert runner_packages([name]) == runner.packages
    every = runner_packages()
    assert set(every) == {package for runner in RUNNERS.values() for package in runner.packages}
    assert len(set(every)) == len(every)
    assert {"torch", "diffusers", "ltx-core", "ltx-pipelines", "ltx-video", "transformers"} <= set(every)


@pytest.mark.parametrize("runner", OWN)
def test_a_forecast_is_computed_again_after_an_upgrade_of_its_own_runners_packages_only(runner, upgraded):
    before = cache_path(_spec(runner))
    for package in runner_packages():
        upgraded(package)
        assert (cache_path(_spec(runner)) != before) is (package in RUNNERS[runner].packages), package


def test_a_record_has_the_version_of_every_package_of_its_runner(upgraded):
    for name, runner in RUNNERS.items():
        for package in runner.packages:
            upgraded(package)
            assert run_metadata("cpu", spec=_spec(name))["versions"][package] == "999"


def test_leaks_are_looked_for_again_after_an_upgrade_of_any_pipeline_examined(still, upgraded):
    before = third_party_leaks._cache_path(str(still), "ltx-2.3-tiny")
    for package in ("torch", "diffusers", "transformers", "ltx-core", "ltx-pipelines"):
        upgraded(package)
        assert third_party_leaks._cache_path(str(still), "ltx-2.3-tiny") != before, package


def test_a_notebook_is_rendered_again_after_an_upgrade_of_anything_that_it_computes_or_renders_with():
    assert set(code_digests()) >= {*runner_packages(), *RENDERING}


# --- The digest of the code ---


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A copy of the package and of its data, which may be edited."""
    copy = tmp_path / "i2v_lab"
    shutil.copytree(package_dir(), copy, ignore=shutil.ignore_patterns("__pycache__", "data", "notebooks"))
    (tmp_path / "data").mkdir()
    shutil.copy(data_dir() / "workspaces.json", tmp_path / "data")
    monkeypatch.setattr(provenance, "package_dir", lambda: copy)
    monkeypatch.setattr(provenance, "data_dir", lambda: tmp_path / "data")
    return copy


def _digests() -> dict[str, str]:
    return {name: code_digest.__wrapped__(name) for name in RUNNERS}


def _changed(before: dict[str, str]) -> set[str]:
    return {name for name, digest in _digests().items() if digest != before[name]}


def test_the_copy_has_the_digest_of_the_package(package):
    assert _digests() == {name: code_digest(name) for name in RUNNERS}


LTX_2 = {"ltx-2", "ltx-pipelines"}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("events.py", set(RUNNERS)),
        ("memory_policy.py", set(RUNNERS)),
        ("request.py", set(RUNNERS)),
        ("pipeline/contract", set(RUNNERS)),
        ("pipeline/registry.py", set(RUNNERS)),
        ("profiling", set(RUNNERS)),
        ("profiling/fake", set(RUNNERS)),
        ("runs/execute.py", set(RUNNERS)),
        ("runs/spec.py", set(RUNNERS)),
        ("pipeline/ltx2", LTX_2),
        ("pipeline/ltx2/memory", LTX_2),
        ("pipeline/ltx_video", {"ltx-video"}),
        ("pipeline/diffusers", {"diffusers"}),
        ("reporting", set()),
        ("studies", set()),
        ("cli", set()),
        ("capacity", set()),
        ("doctor", set()),
        ("lab", set()),
        ("reproduce", set()),
        ("runs/plans.py", set()),
        ("runs/recorded.py", set()),
        ("runs/sources.py", set()),
    ],
)
def test_code_counts_for_the_runners_that_execute_it_and_for_no_other(package, place, expected):
    before = _digests()
    path = package / place
    files = [path] if path.is_file() else sorted(path.glob("*.py"))
    for file in (files[0], files[-1]):
        text = file.read_text()
        file.write_text(f"{text}\nCHANGED = 1\n")
        assert _changed(before) == expected, file
        file.write_text(text)
    if path.is_dir():
        (path / "added.py").write_text("ADDED = 1\n")
        assert _changed(before) == expected
        (path / "added.py").unlink()
    assert not _changed(before)


def test_comments_docstrings_and_formatting_do_not_count_and_any_code_does(package):
    file = package / "events.py"
    code = '"""What it is."""\n\n\nclass A:\n    """One."""\n\n'
    code += '    def f(self, x=1):\n        """Two."""\n        return [x, "a"]\n'
    file.write_text(code)
    before = _digests()
    same = [
        code.replace("What it is.", "What else it is."),
        code.replace('    """One."""\n\n', ""),
        code.replace('        """Two."""\n', '        """Two.\n\n        Three.\n        """\n'),
        code.replace('[x, "a"]', "[  # why\n            x,\n            'a',\n        ]"),
        f"# A comment.\n{code}\n\n# Another.\n",
    ]
    for text in same:
        file.write_text(text)
        assert not _changed(before), text
    other = [
        code.replace("x=1", "x=2"),
        code.replace('"a"', '"b"'),
        code.replace("return [x", "return [1"),
        code.replace("class A", "class B"),
        code.replace('"a"]', '"a"]\n        "Not a docstring: it stands second."'),
    ]
    for text in other:
        file.write_text(text)
        assert _changed(before) == set(RUNNERS), text


def test_the_model_of_workspaces_counts_by_its_bytes(package):
    before = _digests()
    path = package.parent / "data" / "workspaces.json"
    path.write_text(path.read_text() + " ")
    assert _changed(before) == set(RUNNERS)


# What a run imports besides, on which no figure of it depends: errors and their words, where files are, how they are
# written and shown, and this description itself.
WITHOUT_FIGURES = {"__init__", "errors", "paths", "files", "units", "display"}
WITHOUT_FIGURES |= {"runs.store", "runs.record_files", "runs.provenance"}


@pytest.mark.parametrize("runner", OWN)
def test_every_module_that_a_run_imports_counts(runner):
    """Followed statically, imports in functions included, from ``execute`` and every module of the runner's folder."""
    folder = package_dir()
    homes = {part.partition(".")[0] for part in RUNNERS[runner].parts.values()}
    todo = [
        folder / "runs" / "execute.py",
        *(file for home in homes for file in (folder / "pipeline" / home).rglob("*.py")),
    ]
    seen: set[Path] = set()
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += _imported(file, folder)
    counted = {folder / name for name in provenance.EXECUTED} | {folder / "pipeline" / home for home in homes}
    left = {file for file in seen if not counted & {file, *file.parents}}
    names = {".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__") for file in left}
    elsewhere = {name for name in names if name.startswith("pipeline.")}  # other runners, as the registry's data
    assert not elsewhere & {f"pipeline.{home}" for home in homes}
    assert names - elsewhere - {"pipeline", "runs"} <= WITHOUT_FIGURES


def _imported(file: Path, folder: Path) -> list[Path]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found = []
    for name in names:
        if name.startswith("i2v_lab."):
            path = folder.joinpath(*name.split(".")[1:])
            found += [each for each in (path.with_suffix(".py"), path / "__init__.py") if each.exists()]
    return found


def test_every_architecture_counts_in_the_key_of_its_forecasts(monkeypatch):
    """Its JSON is no code; a forecast's key has it besides."""
    for name in architecture_names():
        architecture = load_architecture(name)
        spec = RunSpec(request=make_request(name), model=name)
        before = cache_path(spec)
        monkeypatch.setitem(architecture.config, "changed", 1)
        assert cache_path(spec) != before, name
