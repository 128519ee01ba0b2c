"""The cache folder of weights: synthetic weight files, and the tensor layouts of weight files."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from i2v_lab.errors import OutputError
from i2v_lab.files import write_text
from i2v_lab.paths import CACHE_VARIABLE, cache_dir
from i2v_lab.pipeline.contract.weight_headers import reason


def cached_folder(model: str, recipe: str, fill: Callable[[Path], None], suffix: str = "") -> Path:
    """A folder of the cache, created on the first call: written to a temporary folder beside it, then renamed.

    Args:
        model: The architecture's name; the folder's name begins with it.
        recipe: Everything that determines the content; its hash is part of the folder's name.
        fill: Writes the content into the folder that it is given.
        suffix: Appended to the folder's name.

    Raises:
        OutputError: The cache cannot be written; ``fields`` has its ``path``.
    """
    folder = cache_dir() / "synthetic" / f"{model}-{_digest(recipe)}{suffix}"
    try:
        if not folder.is_dir():
            _fill(folder, fill)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"the cache folder '{cache_dir()}' cannot be written ({reason(error)}); free some space, or name another "
            f"folder in {CACHE_VARIABLE}",
            path=cache_dir(),
        ) from error
    return folder


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
    path = cache_dir() / "layouts" / f"{name}-{_digest(recipe)}.json"
    with suppress(OSError, ValueError, AttributeError):
        return {key: tuple(shape) for key, shape in json.loads(path.read_text(encoding="utf-8")).items()}
    layout = compute()
    with suppress(OSError):  # reported by cached_folder, for files that cannot be done without
        write_text(path, json.dumps(layout))
    return layout


def _digest(recipe: str) -> str:
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first; its copy is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
