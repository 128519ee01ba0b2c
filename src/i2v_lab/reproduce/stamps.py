"""What a notebook was made from and what it made: whether it has to run again is read from that, not from clocks."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from i2v_lab.files import write_text
from i2v_lab.paths import data_dir, package_dir

PACKAGES = ("torch", "ltx-core", "ltx-pipelines", "transformers", "matplotlib", "pandas", "nbconvert", "papermill")


@dataclass(frozen=True)
class Stamp:
    """How a notebook, or the site, came about.

    Attributes:
        inputs: A digest, a version or a value for everything that it depends on, by name.
        files: SHA-256 of every file that it made, by path below the build folder.
        error: One line, if it failed; then it is never up to date.
    """

    inputs: dict[str, str]
    files: dict[str, str]
    error: str | None = None

    def why_stale(self, inputs: Mapping[str, str], out: Path) -> str | None:
        """Why it has to be made again, in a few words; ``None`` if it is up to date."""
        if self.error is not None:
            return "it failed before"
        for name in [*inputs, *self.inputs]:
            if inputs.get(name) != self.inputs.get(name):
                return f"{name} changed"
        for name, digest in self.files.items():
            path = out / name
            if not path.is_file():
                return f"{name} is missing"
            if file_digest(path) != digest:
                return f"{name} changed"
        return None


def stamp_path(out: Path, name: str) -> Path:
    """Where a stamp is kept below a build folder."""
    return out / "stamps" / f"{name}.json"


def read_stamp(path: Path) -> Stamp | None:
    """A stamp; ``None`` if there is none that can be read, as after a change of its format."""
    try:
        return Stamp(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(path: Path, stamp: Stamp) -> None:
    """Write a stamp atomically."""
    write_text(path, json.dumps(asdict(stamp), indent=1))


def input_digests(notebook: Path, parameters: Mapping[str, Any], code: Mapping[str, str]) -> dict[str, str]:
    """Everything that a run of a notebook depends on.

    Args:
        notebook: Its source.
        parameters: The value of every parameter, defaults included. A value that is the path of a file counts with its
            content.
        code: As :func:`code_digests` gives it.
    """
    inputs = {"the notebook": file_digest(notebook), **code}
    for name, value in parameters.items():
        inputs[f"parameter {name}"] = repr(value)
        if isinstance(value, str) and Path(value).is_file():
            inputs[f"the file of parameter {name}"] = file_digest(Path(value))
    return inputs


def code_digests() -> dict[str, str]:
    """The package's files, its data, and the versions of what it stands on."""
    digests = {
        "the code of i2v_lab": _tree_digest(package_dir()),
        "the data of i2v_lab": _tree_digest(data_dir()),
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            digests[package] = version(package)
        except PackageNotFoundError:
            digests[package] = "not installed"
    return digests


def made_files(out: Path, stem: str, stems: Sequence[str]) -> dict[str, str]:
    """Digests of what a notebook made: all below ``out`` that has its name in front, as ``figures/NAME_peaks.svg``.

    Args:
        out: The build folder.
        stem: The notebook's name.
        stems: All notebooks' names: one may begin with another, and a file belongs to the longest that fits.
    """
    made = {}
    for folder in sorted(out.iterdir()):
        if not folder.is_dir() or folder.name in ("site", "stamps"):
            continue
        for entry in sorted(folder.glob(f"{stem}*")):
            if max((each for each in stems if entry.name.startswith(each)), key=len) == stem:
                for path in [entry] if entry.is_file() else _files(entry):
                    made[path.relative_to(out).as_posix()] = file_digest(path)
    return made


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tree_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
            yield path
