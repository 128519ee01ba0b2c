"""Files written beside their target and renamed, so that a reader never sees a partial one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


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
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8 as :func:`write_atomically` does, and return ``path``."""
    return write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
