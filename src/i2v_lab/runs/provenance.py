"""Where figures come from: versions by runner, a digest of the code that a run executes, commit, machine."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2v_lab import __version__
from i2v_lab.paths import checkout_dir, data_dir, package_dir
from i2v_lab.pipeline.registry import RUNNERS, find_runner
from i2v_lab.profiling.meters.nvml import describe_device

if TYPE_CHECKING:
    from i2v_lab.runs.spec import RunSpec

# What notebooks and pages are rendered with; what computes is each runner's own list.
RENDERING = ("matplotlib", "pandas", "nbconvert", "papermill")
# Ground floor and code that every run executes; the runner's own folder and contract come in besides.
EXECUTED = (
    "events.py",
    "locks.py",
    "memory_policy.py",
    "memory_settings.py",
    "metered_threads.py",
    "placement.py",
    "request.py",
    "pipeline/contract",
    "pipeline/registry.py",
    "profiling",
    "runs/execute.py",
    "runs/out_of_memory.py",
    "runs/spec.py",
    "stopping.py",
    "thread_modes.py",
    "thread_patches.py",
    "torch_compat.py",
)


# --- Versions ---------------------------------------------------------------------------------------------------------


def runner_packages(runners: Iterable[str] = ()) -> tuple[str, ...]:
    """The distributions whose versions decide what runners compute; of all runners if none are named.

    Records, forecast caches, the leak study's cache and notebook stamps all use this list.

    Example:
        >>> runner_packages(["ltx-2"])
        ('torch', 'ltx-core', 'ltx-pipelines', 'transformers')
    """
    chosen = [find_runner(name) for name in runners] or list(RUNNERS.values())
    return tuple(dict.fromkeys(package for runner in chosen for package in runner.packages))


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed versions, ``None`` for what is not installed; this package's own first."""
    return {"i2v-lab": __version__, **{name: installed_version(name) for name in packages}}


def installed_version(package: str) -> str | None:
    """The version of a distribution; ``None`` if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- Code -------------------------------------------------------------------------------------------------------------


@cache
def code_digest(runner: str) -> str:
    """A digest of the code and data of this package that a run of a runner executes, real or fake.

    Python files count by their syntax tree without docstrings, so that comments, docstrings and formatting change no
    digest; other data by their bytes. Two runs with equal digests ran the same code of this package.

    Args:
        runner: Its name.

    Returns:
        SHA-256 in hexadecimal.
    """
    folder = package_dir()
    homes = sorted({find_runner(runner).parts[part].partition(".")[0] for part in find_runner(runner).parts})
    roots = [folder / name for name in (*EXECUTED, *(f"pipeline/{home}" for home in homes))]
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*.py")))]
    parts = [f"{file.relative_to(folder).as_posix()}\0{normalized_code(file)}" for file in files]
    parts.append((data_dir() / "workspaces.json").read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def normalized_code(file: Path) -> str:
    """A Python file's syntax tree as text, without docstrings, comments and formatting."""
    return _normalized(file, file.stat().st_mtime_ns, file.stat().st_size)


@cache
def _normalized(file: Path, _mtime: int, _size: int) -> str:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return ast.dump(tree)


# --- Metadata ---------------------------------------------------------------------------------------------------------


def run_metadata(
    device: str,
    *,
    spec: RunSpec | None = None,
    model: str = "",
    request: Mapping[str, Any] | None = None,
    seed: int = 0,
    argv: Sequence[str] = (),
    packages: Iterable[str] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """What it takes to tell later where a run's figures came from.

    Nothing here fails: what cannot be found out is ``None``.

    Args:
        device: Such as ``cpu`` or ``cuda:0``.
        spec: The run; decides model, request, seed, packages and code digest.
        model: Without a spec: what ran, in a word.
        request: Without a spec: its plain arguments.
        seed: Without a spec.
        argv: The command line.
        packages: Distributions whose versions count; by default those of the spec's runner, or of all runners.
        **extra: More JSON values.
    """
    commit, modified = git_commit()
    name, driver = describe_device(device)
    described: dict[str, Any] = {"model": model, "request": dict(request or {}), "seed": seed}
    if spec is not None:
        described = {
            "model": spec.model,
            "runner": spec.runner,
            "request": spec.request.to_json(),
            "seed": spec.request.seed,
            "spec": spec.to_json(),
            "code": code_digest(spec.runner),
        }
        packages = packages or runner_packages([spec.runner])
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **described,
        "device": str(device),
        "device_name": name,
        "driver_version": driver,
        "argv": [Path(word).name if index == 0 else word for index, word in enumerate(argv)],
        "versions": {"python": platform.python_version(), **versions(packages or runner_packages())},
        "git_commit": commit,
        "git_modified": modified,
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        **extra,
    }


def usable_cores() -> int:
    """The cores that this process may use; all of them where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_commit(top: Path | None = None) -> tuple[str | None, bool | None]:
    """The commit of the checkout that this package runs from, and whether its code or data differ from that commit."""
    top = checkout_dir() if top is None else top
    git = shutil.which("git")
    if git is None or top is None or not (top / ".git").exists():
        return None, None
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def ask(*words: str) -> str:
        return subprocess.run(  # noqa: S603
            [git, "-C", str(top), *words],
            capture_output=True,
            encoding="utf-8",
            check=True,
            timeout=10,
            env=environment,
        ).stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        changed = ask("status", "--porcelain", "--untracked-files=no", "--", "src", "data/architectures", "data/*.json")
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(changed)


def _processor() -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None
