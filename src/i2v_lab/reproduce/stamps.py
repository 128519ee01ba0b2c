"""Digests of the inputs and outputs of a notebook, which decide whether it is up to date; times of files do not."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from i2v_lab.files import write_text
from i2v_lab.paths import data_dir, package_dir
from i2v_lab.runs.provenance import RENDERING, installed_version, normalized_code, runner_packages


@dataclass(frozen=True)
class Stamp:
    """The provenance of an executed notebook, or of the site.

    Attributes:
        inputs: Digest, version or value of everything that it depends on, by name.
        files: SHA-256 of every output file, by path below the build folder.
        error: The error in one line, if it failed; it is not up to date then.
    """

    inputs: dict[str, str]
    files: dict[str, str]
    error: str | None = None

    def why_stale(self, inputs: Mapping[str, str], out: Path) -> str | None:
        """Return the first difference to these inputs or to the output files; ``None`` if it is up to date."""
        if self.error is not None:
            return "it failed"
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
    """Return the path of a stamp below a build folder."""
    return out / "stamps" / f"{name}.json"


def read_stamp(path: Path) -> Stamp | None:
    """Return a stamp; ``None`` if it does not exist or cannot be read, as after a change of its format."""
    try:
        return Stamp(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(path: Path, stamp: Stamp) -> None:
    """Write a stamp atomically."""
    write_text(path, json.dumps(asdict(stamp), indent=1))


def input_digests(notebook: Path, parameters: Mapping[str, Any], code: Mapping[str, str]) -> dict[str, str]:
    """Return the inputs of a notebook by name: digests, versions and values.

    Args:
        notebook: The source.
        parameters: Value of every parameter, including defaults. For the path of a file, the content counts as well.
        code: From :func:`code_digests`.
    """
    inputs = {"the notebook": file_digest(notebook), **code}
    for name, value in parameters.items():
        inputs[f"parameter {name}"] = repr(value)
        if isinstance(value, str):
            with suppress(OSError, ValueError):  # too long for a path, or with a null: a text
                if Path(value).is_file():
                    inputs[f"the file of parameter {name}"] = file_digest(Path(value))
    return inputs


def code_digests() -> dict[str, str]:
    """Return digests of the package and its data, and the versions of what runs and renders notebooks.

    Python files count by :func:`~i2v_lab.runs.provenance.normalized_code`: comments, docstrings and formatting do not.
    """
    digests = {
        "the code of i2v_lab": _tree_digest(package_dir()),
        "the data of i2v_lab": _tree_digest(data_dir()),
        "Python": platform.python_version(),
    }
    for package in (*runner_packages(), *RENDERING):
        digests[package] = installed_version(package) or "not installed"
    return digests


def made_files(out: Path, stem: str, stems: Sequence[str]) -> dict[str, str]:
    """Return the digests of a notebook's outputs: all below ``out`` prefixed with its name, as ``figures/NAME_a.svg``.

    Args:
        out: The build folder.
        stem: Name of the notebook.
        stems: Names of all notebooks: a file belongs to the longest one that is a prefix of its name.
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


def is_notebook(path: Path) -> bool:
    """Return whether a file is there and holds a notebook, rather than what a full disk left of one."""
    try:
        return "cells" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tree_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(folder):
        content = normalized_code(path) if path.suffix == ".py" else file_digest(path)
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
            yield path
