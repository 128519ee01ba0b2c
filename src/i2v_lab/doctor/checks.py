"""Checks of the machine and its packages, each with its finding and advice.

Only :func:`check_cuda` and :func:`check_torch_family` import torch. Version ranges come from the metadata of the
installed packages, of i2v-lab itself above all.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from i2v_lab.doctor.packages import PROJECT, Packages, Unmet, release
from i2v_lab.paths import CACHE_VARIABLE, cache_dir
from i2v_lab.profiling.meters.nvml import NO_ANSWER, NO_PACKAGE, NvmlUnavailable, driver_cuda_major, read_driver
from i2v_lab.units import GIB, MIB, format_bytes

SHOWN = (
    "ltx-core",
    "ltx-pipelines",
    "ltx-video",
    "transformers",
    "diffusers",
    "huggingface-hub",
    "tokenizers",
    "av",
    "jupyterlab",
)
OPTIONAL = {  # not needed for a generation with LTX-2.3, but for this
    "ltx-video": "the ltx-video runner",
    "diffusers": "pipelines of diffusers",
    "jupyterlab": "`i2v-lab lab`",
}
BY_EXTRA = {
    **dict.fromkeys(("ltx-core", "ltx-pipelines"), "ltx"),
    **dict.fromkeys(("transformers", "diffusers", "huggingface-hub", "tokenizers", "av"), "diffusers"),
    "jupyterlab": "jupyter",
}
"""The extra of a package that nothing requires where it is not installed."""
LTX_VIDEO = "pip install --no-deps ltx-video==0.1.2"
FAMILY = ("torch", "torchaudio", "torchvision")
# Requirements that are unmet on purpose: declared by ltx-video, for these.
EXPECTED = {("ltx-video", "transformers"), ("ltx-video", "huggingface-hub")}
WHY_EXPECTED = (
    "`pip check` reports this as expected: {unmet}. ltx-core needs transformers>=4.52, so nothing meets both; "
    "ltx-video works with this one and is installed last, without its own pins: `{command}`. Nothing to do."
)
ENCODERS = ("libx264", "aac")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# Measured: a generation with the tiny model and a forecast of the 22B take about 1.0 GB of memory each, the tiny
# weights and a full reproduction less than 0.5 GB of disk; of /dev/shm, only semaphores are used.
LEAST_MEMORY, GOOD_MEMORY = 1 * GIB, 2 * GIB
LEAST_DISK, GOOD_DISK = 256 * MIB, 2 * GIB
GOOD_SHARED = 64 * MIB


class State(StrEnum):
    """``broken``: a run would fail; ``warning``: something optional is missing or scarce; ``ok``."""

    OK = "ok"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        state: The result.
        found: What was found: versions, sizes, paths.
        advice: What to do; empty if there is nothing to do.
    """

    name: str
    state: State
    found: str
    advice: str = ""


def examine(packages: Packages | None = None) -> list[Check]:
    """Run all checks.

    Args:
        packages: Those to check; by default of this environment.

    Example:
        >>> [check.name for check in examine()][:2]
        ['Python', 'NVIDIA driver']
    """
    packages = packages or Packages()
    return [
        check_python(),
        check_driver(),
        check_cuda(),
        check_torch_family(packages),
        *check_packages(packages, SHOWN),
        check_other_requirements(packages),
        check_encoders(),
        check_chromium(),
        check_disk("cache folder", cache_dir(), f"set {CACHE_VARIABLE} to a folder"),
        check_disk("temporary folder", Path(tempfile.gettempdir()), "set TMPDIR to a folder"),
        check_memory(),
        check_shared_memory(),
    ]


def check_python(version: str = platform.python_version()) -> Check:
    """Check that this interpreter is new enough."""
    found = f"{version}, {platform.system()} {platform.machine()}"
    if (release(version) or (0, 0)) < (3, 11):
        return Check("Python", State.BROKEN, found, "Use Python 3.11 or newer: make PYTHON=python3.12 setup")
    return Check("Python", State.OK, found)


# --- The GPU ---


def check_driver() -> Check:
    """What NVML says; a machine without a GPU is no failure."""
    name = "NVIDIA driver"
    try:
        driver = read_driver()
    except NvmlUnavailable as error:
        if error.cause == NO_PACKAGE:
            return Check(name, State.BROKEN, "nvidia-ml-py is not installed", "pip install nvidia-ml-py")
        if error.cause == NO_ANSWER:
            found = f"does not answer ({error.reason})"
            return Check(name, State.WARNING, found, "Try nvidia-smi; restart the driver.")
        advice = (
            "No GPU is needed: the tiny model runs on the CPU, and forecasts of the 22B as well. "
            "If there is a card, install its driver; in a container, start that with --gpus all."
        )
        return Check(name, State.OK, "none", advice)
    cards = [
        f"{card.name} ({format_bytes(card.free_bytes)} of {format_bytes(card.total_bytes)} free)"
        for card in driver.cards
    ]
    major, minor = driver.cuda
    return Check(name, State.OK, f"{driver.version}, up to CUDA {major}.{minor}: {', '.join(cards) or 'no card'}")


def check_cuda() -> Check:
    """Check that torch sees a GPU if the driver has one."""
    name = "CUDA in torch"
    try:
        import torch
    except (ImportError, OSError) as error:  # not installed, or a shared library does not load
        return Check(name, State.BROKEN, f"torch cannot be loaded ({error})", "make setup, in a fresh .venv")
    built = f"torch {torch.__version__}, built for " + (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    )
    driver = driver_cuda_major()
    if driver is None:
        return Check(name, State.OK, f"{built}; no card to use")
    if torch.cuda.is_available():
        cards = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Check(name, State.OK, f"{built}; {cards}")
    if torch.version.cuda is None:
        wanted = f"torch=={torch.__version__.partition('+')[0]}"
        advice = (
            f"Install torch with CUDA: pip install --force-reinstall {wanted} (for Windows, from PyTorch's own index)"
        )
    elif driver < int(torch.version.cuda.partition(".")[0]):
        advice = f"The driver supports CUDA {driver} at most: install a newer one, or a torch built for CUDA {driver}"
    else:
        advice = f"Look at CUDA_VISIBLE_DEVICES (now {os.environ.get('CUDA_VISIBLE_DEVICES')!r}) and nvidia-smi"
    return Check(
        name, State.WARNING, f"{built}; it sees no GPU, although there is a driver", f"{advice}. Runs use the CPU."
    )


# --- Packages ---


def check_torch_family(packages: Packages) -> Check:
    """Check that torch, torchaudio and torchvision are in the ranges that are declared for them, and can be loaded."""
    name = "torch family"
    found = ", ".join(f"{each} {packages.version(each) or 'missing'}" for each in FAMILY)
    ranges = [f"'{each}{packages.declared_range(PROJECT, each)}'" for each in FAMILY]
    remedy = f"pip install --force-reinstall {' '.join(ranges)}, all from one index"
    wrong = [each for each in _unmet(packages) if each.name in FAMILY]
    if wrong:
        return Check(name, State.BROKEN, found, f"{'; '.join(map(str, wrong))}: {remedy}")
    for module in ("torchaudio", "torchvision"):
        if packages.version(module) is None:
            continue  # of the extras, which the checks of their packages speak of
        if reason := _cannot_load(module):
            return Check(name, State.BROKEN, found, f"{module} cannot be loaded ({reason}): {remedy}")
    return Check(name, State.OK, found)


def _cannot_load(module: str) -> str:
    """Return why a module cannot be imported, in one line; empty if it can."""
    try:
        importlib.import_module(module)
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: built for another CUDA, or without an operator
        return next(iter(str(error).splitlines()), type(error).__name__)
    return ""


def check_packages(packages: Packages, names: tuple[str, ...]) -> Iterator[Check]:
    """Check that each package is installed, in a version that every package that requires it accepts."""
    for name in names:
        version = packages.version(name)
        declared = packages.declared_range(PROJECT, name)
        found = f"{version} (range {declared})" if declared else str(version)
        optional = OPTIONAL.get(name)
        bad = State.WARNING if optional else State.BROKEN
        effect = f" Until then, {optional} cannot be used; everything else works." if optional else ""
        unmet = [each for each in _unmet(packages) if each.name == name]
        if version is None:
            remedy = LTX_VIDEO if name == "ltx-video" else f"pip install '{_wanted(unmet) or name}'"
            if not unmet and name in BY_EXTRA:
                bad, remedy = State.WARNING, f"pip install 'i2v-lab[{BY_EXTRA[name]}]'"
                effect = effect or " Until then, models that need it cannot run; everything else works."
            yield Check(name, bad, "missing", f"{remedy}.{effect}")
        elif unmet:
            remedy = f"pip install '{_wanted(unmet)}'"
            yield Check(name, bad, found, f"{'; '.join(map(str, unmet))}: {remedy}.{effect}")
        else:
            expected = [each for each in packages.unmet if each.package == name and (name, each.name) in EXPECTED]
            why = WHY_EXPECTED.format(unmet="; ".join(map(str, expected)), command=LTX_VIDEO)
            yield Check(name, State.OK, found, why if expected else "")


def check_other_requirements(packages: Packages) -> Check:
    """Check all other requirements, as ``pip check`` does."""
    name = "other requirements"
    if packages.version(PROJECT) is None:
        found = f"{PROJECT} itself is not installed"
        return Check(name, State.BROKEN, found, "make setup, or `pip install -e .`, so that its requirements are known")
    checked = {*FAMILY, *SHOWN}
    needed = packages.needed_by(PROJECT)
    others = [each for each in _unmet(packages) if each.name not in checked or each.package not in needed]
    if not others:
        return Check(name, State.OK, "all met")
    required = [each for each in others if each.package in needed]
    remedy = " ".join(f"'{each.requirement.name}{each.requirement.specifier}'" for each in required or others)
    state = State.BROKEN if required else State.WARNING
    effect = "" if required else " LTX-2.3 does not need the package that declares it."
    return Check(name, state, "; ".join(map(str, others)), f"pip install {remedy}.{effect}")


def _unmet(packages: Packages) -> list[Unmet]:
    return [each for each in packages.unmet if (each.package, each.name) not in EXPECTED]


def _wanted(unmet: list[Unmet]) -> str:
    """Return one requirement that combines all of these, such as ``tokenizers<0.23,>=0.22``."""
    if not unmet:
        return ""
    specifier = unmet[0].requirement.specifier
    for each in unmet[1:]:
        specifier &= each.requirement.specifier
    return f"{unmet[0].requirement.name}{specifier}"


def check_encoders() -> Check:
    """Check that PyAV can encode H.264 and AAC."""
    name = "encoders of av"
    try:
        import av.codec
    except ModuleNotFoundError:
        return Check(name, State.WARNING, "av is not installed", "pip install 'i2v-lab[diffusers]', to write videos")
    except (ImportError, OSError) as error:
        return Check(name, State.BROKEN, f"av cannot be loaded ({error})", "pip install --force-reinstall av")
    missing = []
    for encoder in ENCODERS:
        try:
            av.codec.Codec(encoder, "w")
        except (av.codec.codec.UnknownCodecError, av.FFmpegError):
            missing.append(encoder)
    if missing:
        advice = "pip install --force-reinstall --only-binary=:all: av, whose wheels contain FFmpeg with both"
        return Check(name, State.BROKEN, f"without {' and '.join(missing)}: no MP4 can be written", advice)
    return Check(name, State.OK, " and ".join(ENCODERS))


# --- The machine ---


def check_chromium(which: Callable[[str], str | None] = shutil.which) -> Check:
    """Check for a browser, which only tests need."""
    found = next(filter(None, map(which, CHROMIUM)), None)
    if found is None:
        return Check("Chromium", State.OK, "none", "Only tests of pages need it: apt-get install chromium")
    return Check("Chromium", State.OK, found)


def check_disk(name: str, folder: Path, elsewhere: str) -> Check:
    """Check that a folder, or its nearest existing parent, is writable and has free space."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        advice = f"It is not writable: change its permissions, or {elsewhere} that is"
        return Check(name, State.BROKEN, str(folder), advice)
    free = shutil.disk_usage(existing).free
    found = f"{folder}: {format_bytes(free)} free"
    advice = f"Free some space, or {elsewhere} with at least {format_bytes(GOOD_DISK)}"
    return Check(name, _enough(free, LEAST_DISK, GOOD_DISK), found, "" if free >= GOOD_DISK else advice)


def check_memory(free: int | None = None) -> Check:
    """Check the memory of the host: a generation with the tiny model or a forecast takes about 1 GB."""
    import psutil

    from i2v_lab.pipeline.contract.host_memory import available_bytes

    memory = psutil.virtual_memory()
    free = available_bytes() if free is None else free
    found = f"{format_bytes(free)} of {format_bytes(memory.total)} free"
    advice = "A generation with the tiny model or a forecast takes 1 GB: end other programs, and run one job at a time"
    return Check("memory", _enough(free, LEAST_MEMORY, GOOD_MEMORY), found, "" if free >= GOOD_MEMORY else advice)


def check_shared_memory(folder: Path = Path("/dev/shm"), free: int | None = None) -> Check:  # noqa: S108
    """Check ``/dev/shm``, used for semaphores and by Chromium; containers have little of it."""
    if not folder.is_dir():
        return Check("shared memory", State.OK, f"no {folder} on this system, which does not need it")
    free = shutil.disk_usage(folder).free if free is None else free
    found = f"{folder}: {format_bytes(free)} free"
    if free >= GOOD_SHARED:
        return Check("shared memory", State.OK, found)
    advice = "Several processes at a time, and Chromium, may fail: start the container with --shm-size=1g"
    return Check("shared memory", State.WARNING, found, advice)


def _enough(free: int, least: int, good: int) -> State:
    return State.BROKEN if free < least else State.WARNING if free < good else State.OK
