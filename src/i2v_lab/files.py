"""Files written beside their target and renamed, so that a reader never sees a partial one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from i2v_lab.errors import OutputError
from i2v_lab.paths import cache_dirs
from i2v_lab.stopping import on_stop

NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
MOST_NAME_BYTES = 255
MOST_PATH_BYTES = 4000
MOST_STEM_BYTES = 180  # of the target's name in that of its temporary file, which is longer


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, which takes its name at the end of the scope.

    It is removed if the scope ends by an error, or the command by a signal; ``path`` is then as it was before. What a
    process of this machine that was killed has left of ``path`` is removed too.

    Args:
        path: The target, in a folder that exists.

    Yields:
        The file to write, with the target's suffix.

    Raises:
        OSError: The folder cannot be written, or the disk is full.

    Example:
        >>> with partial_file(Path("table.csv")) as part:
        ...     written = part.write_text("peak_bytes")
    """
    stem = _stem(path)
    with suppress(OSError):  # a folder that cannot be listed may be written
        _remove_abandoned(part for part in path.parent.iterdir() if part.name.startswith(f".{stem}."))
    with ExitStack() as scopes:
        for part in _part_paths(path):
            scopes.enter_context(on_stop(partial(part.unlink, missing_ok=True)))
            try:
                os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except FileExistsError:  # another thread's
                scopes.close()
                continue
            break
        try:
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _part_paths(path: Path) -> Iterator[Path]:
    for number in count(1):
        again = "" if number == 1 else f"-{number}"
        yield path.with_name(f".{_stem(path)}.{os.getpid()}{again}@{_host()}.part{path.suffix[:16]}")


@cache
def _host() -> str:
    """This machine, in a few characters: a folder may be shared by several, on which processes have equal numbers."""
    return hashlib.sha256(os.fsencode(platform.node())).hexdigest()[:8]


def _stem(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.stem)[:MOST_STEM_BYTES])


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` write a file beside ``path``, then rename it to ``path``.

    Args:
        path: The target; its folder is made if it does not exist.
        write: Given the path to write to, which has the target's suffix.

    Returns:
        ``path``.

    Raises:
        OSError: The folder or the file cannot be written; ``path`` is as it was before.

    Example:
        >>> write_atomically(Path("table.csv"), lambda part: part.write_text("peak_bytes"))
        PosixPath('table.csv')
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial_file(path) as part:
            write(part)
    except OSError as error:
        if error.filename is None or ".part" in Path(error.filename).name:  # a name that says nothing to a reader
            error.filename = str(path)
        raise
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8 as :func:`write_atomically` does, and return ``path``."""
    return write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON value with its digest, for :func:`read_json`, and return ``path``."""
    text = json.dumps(value)
    return write_text(path, json.dumps({"sha256": _digest(text), "value": value}))


def read_json(path: Path) -> Any:
    """The value that :func:`write_json` wrote; ``None`` if there is none, or a character of it has changed.

    Example:
        >>> read_json(write_json(Path("cache.json"), [1, 2.5]))
        [1, 2.5]
    """
    try:
        stored = json.loads(path.read_bytes())
        value, digest = stored["value"], stored["sha256"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return value if _digest(json.dumps(value)) == digest else None


def read_cached(file: Path) -> Any:
    """What :func:`write_cached` wrote, whole; ``None`` if there is no such file in the cache.

    Args:
        file: Its path below the cache folder.
    """
    values = (read_json(cache / file) for cache in cache_dirs())
    return next((value for value in values if value is not None), None)


def write_cached(file: Path, value: Any) -> None:
    """Write a JSON value into the cache, or into the user's own where that may not be written.

    Args:
        file: Its path below the cache folder.
        value: Not ``None``.

    Raises:
        OSError: Neither can be written.
    """
    shared, *own = cache_dirs()
    try:
        write_json(shared / file, value)
    except OSError as error:
        if error.errno not in NOT_ALLOWED or not own:
            raise
        write_json(own[0] / file, value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def remove_partial_files(folder: Path) -> None:
    """Remove what processes of this machine that were killed left of :func:`partial_file`, in a folder and below it."""
    _remove_abandoned(folder.rglob(".*.part*"))


def _remove_abandoned(parts: Iterable[Path]) -> None:
    for part in parts:
        named = re.search(r"\.(\d+)(-\d+)?(@(\w+))?\.part", part.name)
        if named is not None and named[4] in (None, _host()) and not _is_running(int(named[1])):
            with suppress(OSError):
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def _is_running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def private_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder that only this user can read, removed at the end of the scope, or if the command is stopped by a signal.

    One that a killed process of this machine left there is removed first.

    Args:
        parent: Where; made if it does not exist.
        name: For what, such as ``keys``.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent.glob(f".{name}.*.part"))
    for folder in _part_paths(parent.absolute() / name):
        with suppress(FileExistsError):  # another thread's
            folder.mkdir(mode=0o700)
            break
    with on_stop(partial(shutil.rmtree, folder, ignore_errors=True)):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder, removed at the end of the scope, or if the command is stopped by a signal."""
    with private_folder(Path(tempfile.gettempdir()), "i2v-lab") as folder:
        yield folder


def check_file(path: Path, option: str, example: str, *, make_folder: bool = True) -> None:
    """Make sure that a file can be written to ``path``; leaves nothing behind.

    Args:
        path: What the caller will write at the end.
        option: Its name, for the message.
        example: A file's name, for the message.
        make_folder: Whether the caller makes the folder if there is none.

    Raises:
        OutputError: It is a folder, its name is too long, its folder is missing, or not writable.
    """
    _check_name(path, option, path=path)
    if _is_folder(path):
        raise OutputError(f"{option}='{path}' is a folder; name a file in it, such as '{path / example}'", path=path)
    with suppress(OSError):
        if path.exists() and not path.is_file():
            raise OutputError(f"{option}='{path}' is a device or a pipe; name a file", path=path)
    if not make_folder and not _is_folder(path.parent):
        raise OutputError(f"{option}='{path}': the folder '{path.parent}' does not exist; create it first", path=path)
    _check_place(path.parent, path, option, path=path)


def check_folder(path: Path, option: str) -> None:
    """Make sure that files can be written into the folder ``path``, which need not exist; leaves nothing behind.

    Args:
        path: The folder.
        option: Its name, for the message.

    Raises:
        OutputError: It is a file, its name is too long, or the place is not writable.
    """
    _check_name(path, option, folder=path)
    with suppress(OSError):
        if path.exists() and not path.is_dir():
            raise OutputError(f"{option}='{path}' is a file; name a folder", folder=path)
    _check_place(path, path, option, folder=path)


def check_new_folder(path: Path, option: str) -> None:
    """:func:`check_folder` for a folder that must be empty, if it exists.

    Raises:
        OutputError: It is not, or cannot be written.
    """
    check_folder(path, option)
    if _is_folder(path) and any(path.iterdir()):
        raise OutputError(f"{option}='{path}' is not empty; give a new folder or empty it", folder=path)


def _is_folder(path: Path) -> bool:
    with suppress(OSError):  # below a folder that may not be entered, which _check_place says
        return path.is_dir()
    return False


def _check_name(name: Path, option: str, **fields: Path) -> None:
    if "\0" in str(name):
        raise OutputError(f"{option}={str(name)!r} has a null character; use another name", **fields)
    if any(len(os.fsencode(part)) > MOST_NAME_BYTES for part in name.parts) or len(os.fsencode(name)) > MOST_PATH_BYTES:
        raise OutputError(f"{option}='{name}' is too long a name; use a shorter one", **fields)


def _check_place(place: Path, name: Path, option: str, **fields: Path) -> None:
    there = place.absolute()
    try:
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise OutputError(f"{option}='{name}': '{there}' is a file; choose another folder", **fields)
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OutputError(
            f"{option}='{name}': the folder '{there}' is not writable ({error.strerror}); choose another",
            **fields,
        ) from error
