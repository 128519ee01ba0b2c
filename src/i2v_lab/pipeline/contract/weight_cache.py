"""The cache folder of weights: synthetic weight files, and the tensor layouts of weight files.

Several processes, and several users, may share it. What a user may only read is read; what is damaged there, or missing
where nothing may be written, is in the user's own cache instead.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from i2v_lab.errors import OutputError
from i2v_lab.files import NOT_ALLOWED, read_cached, read_json, write_cached, write_json
from i2v_lab.locks import exclusive, lock_beside, say
from i2v_lab.paths import CACHE_VARIABLE, cache_dir, cache_dirs
from i2v_lab.pipeline.contract.weight_headers import reason
from i2v_lab.stopping import on_stop

CONTENTS = ".contents"
"""File of a cached folder with the size and the time of each other one: whether they are what was written."""


def cached_folder(model: str, recipe: str, fill: Callable[[Path], None], suffix: str = "") -> Path:
    """A folder of the cache, created on the first call, and again if a file in it has changed.

    It is written to a temporary folder beside it, then renamed. If another process writes it, this one waits, and says
    on which. What a killed process left is removed.

    Args:
        model: The architecture's name; the folder's name begins with it.
        recipe: Everything that determines the content; its hash is part of the folder's name.
        fill: Writes the content into the folder that it is given.
        suffix: Appended to the folder's name.

    Raises:
        OutputError: The cache cannot be written; ``fields`` has its ``path``.
    """
    failure: Exception | None = None
    for cache in cache_dirs():
        folder = cache / "synthetic" / f"{model}-{_digest(recipe)}{suffix}"
        try:
            if not _is_whole(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                with exclusive(lock_beside(folder), folder, wait=say):
                    if not _is_whole(folder):
                        _fill(folder, fill)
        except (OSError, SafetensorError) as error:
            failure = failure or error
            if isinstance(error, OSError) and error.errno in NOT_ALLOWED:
                continue
            break
        return folder
    assert failure is not None
    raise OutputError(
        f"the cache folder '{cache_dir()}' cannot be written ({reason(failure)}); free some space, or name another "
        f"folder in {CACHE_VARIABLE}",
        path=cache_dir(),
    ) from failure


def cached_layout(
    name: str, recipe: str, compute: Callable[[], dict[str, tuple[int, ...]]]
) -> dict[str, tuple[int, ...]]:
    """The layout of a weight file, computed once and cached: computing it takes seconds for a large model.

    A cache that cannot be read or written is no error: the layout is computed again.

    Args:
        name: Of the weight file.
        recipe: Everything that determines the layout.
        compute: Returns the shape of each tensor by its name in the file.
    """
    file = Path("layouts", f"{name}-{_digest(recipe)}.json")
    cached = read_cached(file)
    if cached is not None:
        return {key: tuple(shape) for key, shape in cached.items()}
    layout = compute()
    with suppress(OSError):  # reported by cached_folder, for files that cannot be done without
        write_cached(file, layout)
    return layout


def _digest(recipe: str) -> str:
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def _is_whole(folder: Path) -> bool:
    contents = read_json(folder / CONTENTS)
    return contents is not None and contents == _contents(folder)


def _contents(folder: Path) -> dict[str, list[int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CONTENTS]
    statuses = {path.relative_to(folder).as_posix(): path.stat() for path in files}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in statuses.items()}


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    """With the lock of the folder held, and so of its temporary folder."""
    _remove_left_behind(folder.parent)
    scratch = folder.with_name(f".{folder.name}.part")
    remove = partial(shutil.rmtree, scratch, ignore_errors=True)
    with on_stop(remove):
        try:
            remove()
            scratch.mkdir()  # as readable to others as any new folder, which tempfile's are not
            fill(scratch)
            write_json(scratch / CONTENTS, _contents(scratch))
            if folder.exists():  # damaged
                shutil.rmtree(folder)
            scratch.rename(folder)
        finally:
            remove()


def _remove_left_behind(cache: Path) -> None:
    """Temporary folders whose lock is free: the process that made them was killed."""
    for scratch in cache.glob(".*.part"):
        folder = cache / scratch.name.removeprefix(".").removesuffix(".part")
        with suppress(OSError, OutputError), exclusive(lock_beside(folder), folder):
            shutil.rmtree(scratch, ignore_errors=True)
