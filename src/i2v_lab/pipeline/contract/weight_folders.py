"""Verification of a folder of weights, before anything in it is read: which files it holds, and that none brings code.

transformers and diffusers run Python files of a folder, or import modules, that its JSON files name. Nothing here does:
such a folder is refused, and is never asked about.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from i2v_lab.pipeline.contract.file_kinds import kind_of
from i2v_lab.pipeline.contract.weight_headers import reason, weights_refused

MAX_FILES = 10_000  # a folder of weights has some dozens
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_pipeline", "custom_generate", "trust_remote_code")
MODEL_INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")  # from which a model index may name a class
READ = {".json", ".model", ".txt", ".jinja"}  # endings of the small files that tokenizers and processors read
POINTER = "Git LFS pointer"


def require_files(folder: Path, patterns: Sequence[str], option: str, what: str) -> dict[Path, Any]:
    """Check that a folder holds the files that its reader will open, that they can be read, and that none brings code.

    Args:
        folder: Searched recursively, without hidden folders.
        patterns: File names, with wildcards.
        option: The command-line option that named the folder.
        what: The component whose files they are, for the messages.

    Returns:
        The values of all its JSON files, which need not be read again.

    Raises:
        CheckpointError: The folder or a file does not exist, a file is no regular one or a Git LFS pointer, or a JSON
            file is damaged or names code; ``fields`` has the ``option``, the ``path``, the ``fault``, the pattern of a
            missing file as ``missing``, and what names code as ``key``.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 - which takes too long a name for none
        raise weights_refused(option, folder, "not-a-folder", f"is not a folder; give the folder of {what}'s files")
    files = list(_files(folder, option))
    for pattern in patterns:
        if not any(path.match(pattern) for path in files):
            words = f"holds no {pattern}; give a complete {what} folder"
            raise weights_refused(option, folder, "incomplete", words, missing=pattern)
    found = {}
    for path in files:
        wanted = any(path.match(pattern) for pattern in patterns)
        if wanted or path.suffix in READ:
            _require_readable(path, option)
        if path.suffix == ".json":
            found[path] = _read_json(path, option)
            _require_no_code(path, found[path], option)
    return found


@contextmanager
def reading_folder(option: str, folder: str, what: str) -> Iterator[None]:
    """Within this scope whatever transformers raises about a folder of weights is an error about that folder.

    Args:
        option: The command-line option that named it.
        folder: Its path.
        what: What is read.

    Raises:
        CheckpointError: In place of any error; ``fault`` is ``format``.
    """
    try:
        yield
    except Exception as error:  # of JSON values of wrong types almost anything
        words = f"has a {what} that cannot be read ({reason(error)}); download it again"
        raise weights_refused(option, Path(folder), "format", words) from error


def _files(folder: Path, option: str) -> Iterator[Path]:
    count = 0
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            count += 1
            if count > MAX_FILES:
                words = f"holds more than {MAX_FILES} files; give the folder of the model alone"
                raise weights_refused(option, folder, "not-a-folder", words)
            yield Path(root, name)


def _require_readable(path: Path, option: str) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for a writer
            raise weights_refused(option, path, "not-a-file", "is no regular file; download it again")
        kind = kind_of(path)
    except OSError as error:
        raise weights_refused(option, path, "unreadable", f"cannot be read ({reason(error)}); check it") from error
    if kind is not None and kind[0] == POINTER:
        raise weights_refused(option, path, "format", f"is {kind[1]}", kind=kind[0])


def _read_json(path: Path, option: str) -> Any:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        words = f"is not readable as JSON ({reason(error)}); download it again"
        raise weights_refused(option, path, "format", words) from error
    if path.stem.endswith("config") and not isinstance(values, dict):
        words = f"is no JSON object but {type(values).__name__}; download it again"
        raise weights_refused(option, path, "format", words)
    return values


def _require_no_code(path: Path, values: Any, option: str) -> None:
    found = _code_key(values)
    if found is None and path.name == MODEL_INDEX and isinstance(values, dict):
        found = next((name for name, value in values.items() if _names_code(name, value, path)), None)
    if found is not None:
        words = f"names code of its own ({found}), which is never run; use files for the classes of the library itself"
        raise weights_refused(option, path, "code", words, key=found)


def _code_key(values: Any) -> str | None:
    """The first key, at any depth, by which transformers or diffusers would run code of the folder."""
    pending = [values]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            for key, value in each.items():
                # A word of a vocabulary has a number for its value.
                if key in CODE_KEYS and (isinstance(value, str | dict | list) or value is True) and value:
                    return str(key)
            pending += each.values()
        elif isinstance(each, list):
            pending += each
    return None


def _names_code(name: str, value: Any, path: Path) -> bool:
    """Whether an entry of a model index, ``[library, class]``, is of a module that diffusers would have to look for."""
    if name == "_class_name":
        return not isinstance(value, str)
    if name.startswith("_") or not isinstance(value, list) or len(value) != 2:
        return False
    library = value[0]
    if library is None or library in LIBRARIES:
        return False
    spec = find_spec("diffusers")
    home = Path(spec.origin).parent / "pipelines" if spec is not None and spec.origin else None
    own = isinstance(library, str) and library.isidentifier() and home is not None and (home / library).is_dir()
    return not own or any(path.parent.rglob(f"{library}.py"))
