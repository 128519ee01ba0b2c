"""The same plan under two versions of a library, each installed by uv in a folder before everything else."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from i2v_lab.errors import I2VLabError, InvalidRequest, MeasureError, RunnerUnavailable, shown
from i2v_lab.installed import named
from i2v_lab.paths import CACHE_VARIABLE, cache_dir
from i2v_lab.runs.plans import load_plan
from i2v_lab.runs.store import FORECAST, RunWriter

MOST_ROUNDS = 4  # of requirements of requirements
FORECAST_PLAN = "import sys; from i2v_lab.runs.versions import main; sys.exit(main(*sys.argv[1:]))"


def installed_beside(requirements: Sequence[str]) -> Path:
    """Install distributions in a folder of the cache, to be imported before those of this environment.

    What they require and this environment does not meet is installed there too; all else is this environment's.

    Args:
        requirements: Such as ``diffusers==0.41.0``.

    Returns:
        The folder; equal requirements in an equal environment have the same one.

    Raises:
        InvalidRequest: A requirement is none, or requires what does not come to an end.
        RunnerUnavailable: There is no uv, or it cannot install one of them.

    Example:
        >>> installed_beside(["einops==0.8.0"])  # doctest: +SKIP
        PosixPath('/home/me/.cache/i2v-lab/versions/einops==0.8.0-1c9f03aa52b1')
    """
    for each in requirements:
        try:
            Requirement(each)
        except InvalidRequirement as error:
            raise InvalidRequest(
                f"versions={shown(each)} is no requirement; write it as NAME==VERSION", versions=each
            ) from error
    if not requirements:
        raise InvalidRequest("versions='' names no distribution; write it as NAME==VERSION", versions="")
    uv = _uv()
    asked = [*requirements, sys.version, *sorted(f"{name}=={each.version}" for name, each in named(distributions()))]
    key = hashlib.sha256("\n".join(asked).encode()).hexdigest()[:12]
    folder = cache_dir() / "versions" / f"{'+'.join(requirements)[:80].replace('/', '_')}-{key}"
    if folder.is_dir():
        return folder
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    needed = list(requirements)
    try:
        for _ in range(MOST_ROUNDS):
            shutil.rmtree(part, ignore_errors=True)
            _install(uv, needed, part)
            unmet = unmet_requirements(part)
            if not unmet:
                part.rename(folder)
                return folder
            needed += [each for each in unmet if each not in needed]
    finally:
        shutil.rmtree(part, ignore_errors=True)
    raise InvalidRequest(
        f"versions={shown(' '.join(requirements))} requires {', '.join(unmet[:3])} in turn; name these too",
        versions=" ".join(requirements),
        unmet=unmet,
    )


def unmet_requirements(folder: Path) -> list[str]:
    """What the distributions in a folder require, and neither it nor this environment has."""
    there = dict(named(distributions(path=[str(folder)])))
    have = {name: each.version for name, each in [*named(distributions()), *there.items()]}
    return sorted({str(need) for each in there.values() for need in _needs(each) if not _is_met(need, have)})


def _needs(distribution: Distribution) -> list[Requirement]:
    needs = [Requirement(words) for words in distribution.requires or ()]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def _is_met(need: Requirement, have: dict[str, str]) -> bool:
    version = have.get(canonicalize_name(need.name))
    return version is not None and need.specifier.contains(version, prereleases=True)


def forecast_plan_under(plan: Path, folder: Path) -> Path:
    """Forecast every run of a plan with the distributions in a folder, in a process of its own.

    Args:
        plan: The plan.
        folder: Of :func:`installed_beside`. Its forecasts are cached in it.

    Returns:
        A folder of run directories.

    Raises:
        MeasureError: A forecast failed.
    """
    out = folder / "runs" / hashlib.sha256(plan.read_bytes()).hexdigest()[:12]
    if out.is_dir():
        shutil.rmtree(out)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *(path for path in sys.path if path)]),
        CACHE_VARIABLE: str(folder / "cache"),
    }
    process = subprocess.run(  # noqa: S603
        [sys.executable, "-c", FORECAST_PLAN, str(plan), str(out), str(folder)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if process.returncode:
        line = next((line for line in reversed(process.stderr.splitlines()) if line.strip()), "no reason given")
        raise MeasureError(f"plan '{plan}' with {folder.name} failed: {line}", plan=plan, status=process.returncode)
    return out


def main(plan: str, out: str, folder: str) -> int:
    """Forecast a plan in this process: the runs go below ``out``, and name the versions that ``folder`` has."""
    from i2v_lab.runs.forecast import forecast_spec
    from i2v_lab.runs.provenance import run_metadata, runner_packages

    own = [name for name, _ in named(distributions(path=[folder]))]
    try:
        for each in load_plan(plan):
            result = forecast_spec(each.spec)
            packages = [*runner_packages([each.spec.runner]), *own]
            metadata = run_metadata(FORECAST, spec=each.spec, packages=packages)
            with RunWriter(Path(out) / each.name, metadata) as writer:
                for record in result.records:
                    writer.append(record)
    except I2VLabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _uv() -> str:
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise RunnerUnavailable(
            "--versions needs uv, which is not on PATH; install it (`pip install uv`)", package="uv"
        )
    return uv


def _install(uv: str, requirements: Sequence[str], folder: Path) -> None:
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(folder)]
    process = subprocess.run(  # noqa: S603
        [*command, *requirements], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if process.returncode:
        words = " ".join(process.stderr.split())[-300:]
        raise RunnerUnavailable(f"uv cannot install {shown(' '.join(requirements))}: {words}", versions=[*requirements])
