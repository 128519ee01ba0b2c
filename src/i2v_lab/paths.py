"""Paths of the package, its data, its notebooks and its cache."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "I2V_LAB_CACHE"


def package_dir() -> Path:
    """Return the folder of the package."""
    return Path(__file__).parent


def data_dir() -> Path:
    """Return the ``data`` folder: inside an installed package, at the top of a checkout otherwise."""
    return _packaged("data")


def checkout_dir() -> Path | None:
    """Return the top of the checkout that the package runs from; ``None`` for an installed package."""
    top = Path(__file__).parents[2]
    return top if (top / "pyproject.toml").is_file() and (top / "src" / "i2v_lab").is_dir() else None


def notebooks_dir() -> Path:
    """Return the folder of notebooks: inside an installed package, at the top of a checkout otherwise."""
    return _packaged("notebooks")


def _packaged(name: str) -> Path:
    installed = package_dir() / name
    return installed if installed.is_dir() else package_dir().parents[1] / name


def cache_dir() -> Path:
    """Return the folder of synthetic weights, forecasts and verification stamps, which ``I2V_LAB_CACHE`` sets.

    It is safe to delete.
    """
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("i2v-lab", appauthor=False))


def find_still(image: str | Path) -> Path:
    """Return an image file by its path, or by its path below ``data``, such as ``stills/lighthouse.png``."""
    path = Path(image)
    below = data_dir() / path
    return below if not _exists(path) and _exists(below) else path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, or a null character: whoever opens it says so
        return False
