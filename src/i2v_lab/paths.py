"""Paths of the package, its data, its notebooks, its cache and what it keeps for a user."""

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


def glossary_file() -> Path:
    """Return the glossary of the documentation, whose words the site's pages use: in both places too."""
    return _packaged("docs") / "glossary.md"


def _packaged(name: str) -> Path:
    installed = package_dir() / name
    return installed if installed.is_dir() else package_dir().parents[1] / name


def cache_dir() -> Path:
    """Return the folder of synthetic weights, forecasts and verification stamps, which ``I2V_LAB_CACHE`` sets.

    It is safe to delete.
    """
    return cache_dirs()[0]


def cache_dirs() -> list[Path]:
    """Return :func:`cache_dir`, and the user's own cache, which serves where that may not be written."""
    own = platformdirs.user_cache_dir("i2v-lab", appauthor=False)
    return [Path(path) for path in dict.fromkeys([os.environ.get(CACHE_VARIABLE) or own, own])]


def user_devices_dir() -> Path:
    """Return the folder of the user's data that ``i2v-lab calibrate --time`` writes a card's profile into."""
    return Path(platformdirs.user_data_dir("i2v-lab", appauthor=False)) / "devices"


def user_state_dir() -> Path:
    """Return the folder of what the views keep from one time to the next, such as the last choice."""
    return Path(platformdirs.user_state_dir("i2v-lab", appauthor=False))


def find_still(image: str | Path) -> Path:
    """Return an image file by its path, or by its path below ``data``, such as ``stills/lighthouse.png``."""
    path = Path(image)
    below = data_dir() / path
    # Unlike Path.exists, these do not raise on a name that is too long or that nobody may look up.
    return below if not os.path.exists(path) and os.path.exists(below) else path  # noqa: PTH110
