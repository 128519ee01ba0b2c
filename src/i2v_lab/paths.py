"""Where the package finds its data and keeps what it may throw away."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "I2V_LAB_CACHE"


def package_dir() -> Path:
    """The package's own folder."""
    return Path(__file__).parent


def data_dir() -> Path:
    """The ``data`` folder: inside an installed package, at the top of a checkout otherwise."""
    installed = Path(__file__).parent / "data"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "data"


def checkout_dir() -> Path | None:
    """The top of the checkout that the package runs from; ``None`` for an installed copy."""
    top = Path(__file__).parents[2]
    return top if (top / "pyproject.toml").is_file() and (top / "src" / "i2v_lab").is_dir() else None


def notebooks_dir() -> Path:
    """The folder of notebooks: inside an installed package, at the top of a checkout otherwise."""
    installed = Path(__file__).parent / "notebooks"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "notebooks"


def cache_dir() -> Path:
    """Where synthetic weights and verification stamps are kept; ``I2V_LAB_CACHE`` moves it. Safe to delete."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("i2v-lab", appauthor=False))


def find_still(image: str | Path) -> Path:
    """A still by its path, or by its path below the package's ``data`` folder, such as ``stills/lighthouse.png``."""
    path = Path(image)
    below = data_dir() / path
    return below if not path.exists() and below.exists() else path
