"""The doctor reports what is broken, which package requires it, and what to do; and nothing else."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import distributions
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.cli.doctor import doctor_table, verdict
from i2v_lab.doctor import checks as doctor
from i2v_lab.doctor.checks import Check, State, examine
from i2v_lab.doctor.packages import Packages
from i2v_lab.installed import named
from i2v_lab.units import GIB, MIB

HEALTHY = {
    "i2v-lab": (
        "0.2.0",
        [
            "torch>=2.11,<2.15",
            "torchaudio>=2.11",
            "torchvision>=0.26",
            "ltx-core==1.0.0",
            "transformers>=4.57.1,<6",
            "tokenizers>=0.22",
            "jupyterlab>=4.3,<5",
        ],
    ),
    "torch": ("2.11.0", ["sympy"]),
    "torchaudio": ("2.11.0", []),
    "torchvision": ("0.26.0", ["torch==2.11.0"]),
    "sympy": ("1.14", ["gmpy2; extra == 'fast'", "colorama; sys_platform == 'nowhere'"]),
    "ltx-core": ("1.0.0", ["transformers>=4.52", "torch"]),
    "ltx-pipelines": ("1.0.0", ["ltx-core"]),
    "ltx-video": ("0.1.2", ["transformers<4.52.0,>=4.47.2", "huggingface-hub~=0.30"]),
    "transformers": ("4.57.6", ["huggingface-hub<1.0,>=0.34", "tokenizers<=0.23,>=0.22"]),
    "huggingface-hub": ("0.36.2", []),
    "tokenizers": ("0.22.2", []),
    "diffusers": ("0.39.0", ["huggingface_hub<2.0"]),
    "av": ("18.1.0", []),
    "jupyterlab": ("4.6.6", []),
}


@pytest.fixture
def made(tmp_path):
    """An environment as its metadata on disk: healthy but for what is given; ``None`` takes a package away."""

    def make(**changes: tuple[str, list[str]] | None) -> Packages:
        for name, package in {**HEALTHY, **{key.replace("_", "-"): value for key, value in changes.items()}}.items():
            if package is not None:
                folder = tmp_path / f"{name.replace('-', '_')}-{package[0]}.dist-info"
                folder.mkdir()
                lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {package[0]}"]
                lines += [f"Requires-Dist: {requirement}" for requirement in package[1]]
                (folder / "METADATA").write_text("\n".join(lines) + "\n")
        (tmp_path / "left_behind-1.0.dist-info").mkdir()
        return Packages(distributions(path=[str(tmp_path)]))

    return make


@pytest.mark.parametrize("library", ["importlib.metadata", "importlib_metadata"])  # Dask has the second take over
def test_a_folder_that_a_broken_installation_left_behind_is_no_package(tmp_path, library):
    texts = {"left_behind": None, "nameless": "Version: 1.0\n", "whole": "Name: Whole\nVersion: 1.0\n"}
    for name, text in texts.items():
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        if text is not None:
            (folder / "METADATA").write_text(text)
    found = list(importlib.import_module(library).distributions(path=[str(tmp_path)]))
    assert len(found) == 3
    assert [name for name, _ in named(found)] == ["whole"]
    assert Packages(found).version("whole") == "1.0"


def _failing(packages: Packages) -> dict[str, Check]:
    return {check.name: check for check in examine(packages) if check.state is not State.OK}


CURRENT = {
    "transformers": ("5.24.0", ["huggingface-hub>=2"]),
    "huggingface_hub": ("2.4.0", []),
    "diffusers": ("0.42.1", ["huggingface_hub>=1"]),
}


@pytest.mark.parametrize(
    ("changes", "unmet"),
    [
        ({}, ["transformers<4.52.0,>=4.47.2; 4.57.6"]),
        (CURRENT, ["transformers<4.52.0,>=4.47.2; 5.24.0", "huggingface-hub~=0.30; 2.4.0"]),
    ],
)
def test_what_ltx_video_declares_in_vain_is_explained_and_no_failure(made, changes, unmet):
    packages = made(**changes)
    assert [str(each) for each in packages.unmet] == [f"ltx-video needs {each} is installed" for each in unmet]
    assert _failing(packages) == {}
    (ltx_video,) = doctor.check_packages(packages, ("ltx-video",))
    assert all(each in ltx_video.advice for each in [*unmet, doctor.LTX_VIDEO])
    (transformers,) = doctor.check_packages(packages, ("transformers",))
    assert (transformers.state, transformers.advice) == (State.OK, "")


def test_a_package_outside_the_range_that_is_declared_for_it_is_reported_with_the_range(made):
    packages = made(transformers=("6.0.0", []), jupyterlab=("5.0", []))
    checks = {check.name: check for check in doctor.check_packages(packages, doctor.SHOWN)}
    found = {
        name: (checks[name].state, checks[name].found) for name in ("transformers", "jupyterlab", "ltx-core", "av")
    }
    assert found == {
        "transformers": (State.BROKEN, "6.0.0 (range <6,>=4.57.1)"),
        "jupyterlab": (State.WARNING, "5.0 (range <5,>=4.3)"),
        "ltx-core": (State.OK, "1.0.0 (range ==1.0.0)"),
        "av": (State.OK, "18.1.0"),
    }


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_torchaudio_and_torchvision_that_do_not_load_are_broken(made, monkeypatch, error):
    broken = set()

    def load(module: str) -> None:
        if module in broken:
            raise error("compiled with\nanother CUDA")

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    packages = made()
    assert (doctor.check_torch_family(packages).state, doctor.check_torch_family(packages).advice) == (State.OK, "")
    for module in ("torchaudio", "torchvision"):
        broken.add(module)
        check = doctor.check_torch_family(packages)
        assert check.state is State.BROKEN
        assert check.advice.startswith(f"{module} cannot be loaded (compiled with)")
        broken.clear()


def test_unmet_requirements_of_this_environment_are_those_of_pip_check():
    output = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False).stdout
    packages = {line.split()[0] for line in output.splitlines() if " has requirement " in line or " requires " in line}
    assert {each.package for each in Packages().unmet} == packages


@pytest.mark.parametrize(
    ("changes", "name", "state", "found", "advice"),
    [
        ({"tokenizers": ("0.21.0", [])}, "tokenizers", "broken", "0.21.0", "i2v-lab needs tokenizers>=0.22; 0.21.0 is"),
        ({"tokenizers": None}, "tokenizers", "broken", "missing", "pip install 'tokenizers<=0.23,>=0.22'."),
        ({"huggingface_hub": ("1.2.0", [])}, "huggingface-hub", "broken", "1.2.0", "needs huggingface-hub<1.0,>=0.34"),
        ({"torch": ("2.15.0", ["sympy"])}, "torch family", "broken", "torch 2.15.0", "i2v-lab needs torch<2.15,>=2.11"),
        ({"torchvision": ("0.25.0", [])}, "torch family", "broken", "torchvision 0.25.0", "needs torchvision>=0.26"),
        ({"torchaudio": None}, "torch family", "broken", "torchaudio missing", "'torch<2.15,>=2.11'"),
        ({"torch": ("2.11.1", [])}, "torch family", "broken", "torch 2.11.1", "torchvision needs torch==2.11.0"),
        ({"sympy": None}, "other requirements", "broken", "torch needs sympy; none", "pip install 'sympy'."),
        ({"rival": ("1", ["av<5"])}, "other requirements", "warning", "rival needs av<5; 18.1.0", "does not need"),
        ({"ltx_video": None}, "ltx-video", "warning", "missing", "pip install --no-deps ltx-video==0.1.2. Until then"),
        ({"jupyterlab": None}, "jupyterlab", "warning", "missing", "`i2v-lab lab` cannot be used"),
        ({"i2v_lab": None}, "other requirements", "broken", "i2v-lab itself is not installed", "pip install -e ."),
    ],
)  # fmt: skip
def test_a_broken_package_is_reported_with_advice(made, changes, name, state, found, advice):
    failing = _failing(made(**changes))
    assert failing[name].state == state
    assert found in failing[name].found
    assert advice in failing[name].advice


def test_a_machine_without_a_gpu_is_ok_and_a_gpu_that_torch_does_not_see_is_a_warning(monkeypatch):
    import pynvml
    import torch

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert (doctor.check_driver().state, doctor.check_driver().found) == (State.OK, "none")
    assert doctor.check_cuda().state is State.OK

    card = SimpleNamespace(free=70 * GIB, total=80 * GIB)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion_v2", lambda: 12040)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "550.54")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: card)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "NVIDIA Something")
    found = doctor.check_driver().found
    assert found == "550.54, up to CUDA 12.4: NVIDIA Something (70.00 GiB of 80.00 GiB free)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = doctor.check_cuda()
    assert check.state is State.WARNING
    assert "The driver supports CUDA 12 at most: install a newer one" in check.advice
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "Install torch with CUDA" in doctor.check_cuda().advice


def test_encoders_disk_memory_and_shared_memory(monkeypatch, tmp_path):
    assert doctor.check_encoders().state is State.OK
    monkeypatch.setattr(doctor, "ENCODERS", ("libx264", "none-such"))
    assert doctor.check_encoders().state is State.BROKEN
    assert "without none-such: no MP4" in doctor.check_encoders().found

    deep = tmp_path / "not" / "made"
    assert doctor.check_disk("cache folder", deep, "x").found.startswith(f"{deep}: ")
    assert not deep.exists()
    usage = SimpleNamespace(free=MIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor.check_disk("cache folder", tmp_path, "set X to a folder").state is State.BROKEN
    usage.free = GIB
    check = doctor.check_disk("cache folder", tmp_path, "set X to a folder")
    assert check.state is State.WARNING
    assert check.advice == "Free some space, or set X to a folder with at least 2.00 GiB"
    (tmp_path / "file").touch()
    check = doctor.check_disk("cache folder", tmp_path / "file" / "below", "set X to a folder")
    assert check.state is State.BROKEN
    assert check.advice.startswith("It is not writable")

    assert [doctor.check_memory(free).state for free in (GIB // 2, GIB, 3 * GIB)] == ["broken", "warning", "ok"]
    assert doctor.check_shared_memory(tmp_path, free=MIB).state is State.WARNING
    assert doctor.check_shared_memory(tmp_path / "none").state is State.OK
    assert doctor.check_python("3.9.18").state is State.BROKEN
    assert doctor.check_python("3.12.1").state is State.OK
    assert doctor.check_chromium(lambda name: None).state is State.OK


# --- The command ---


def test_the_command_prints_a_row_for_each_check_and_json_for_programs():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.output)
    assert (result.exit_code, report["ok"]) == (0, True)
    checks = [Check(**each) for each in report["checks"]]
    assert {"Python", "torch family", "ltx-video", "encoders of av", "memory"} <= {check.name for check in checks}
    console = Console(width=150)
    with console.capture() as captured:
        console.print(doctor_table([Check(**{**each, "state": State(each["state"])}) for each in report["checks"]]))
    assert all(check.name in captured.get() for check in checks)


def test_the_exit_status_is_1_only_where_a_run_would_fail(monkeypatch):
    for state, status, text in [
        (State.BROKEN, 1, "A run would fail. broken: av; warning: disk."),
        (State.WARNING, 0, "A run has everything that it needs; warning: av, disk."),
        (State.OK, 0, "A run has everything that it needs; warning: disk."),
    ]:
        checks = [Check("av", state, "18"), Check("disk", State.WARNING, "[full]", "free [some]")]
        monkeypatch.setattr(doctor, "examine", lambda checks=checks: checks)
        result = CliRunner().invoke(app, ["doctor"])
        assert (result.exit_code, verdict(checks)) == (status, text)
        assert text in result.output
        assert "[full]" in result.output


def test_importing_the_checks_does_not_import_torch():
    code = "import sys, i2v_lab.doctor.checks, i2v_lab.cli.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
