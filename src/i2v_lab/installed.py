"""The installed distributions, of which some may be damaged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution

from packaging.utils import canonicalize_name


def named(found: Iterable[Distribution]) -> Iterator[tuple[str, Distribution]]:
    """Yield distributions with their canonical names; not the folder that a broken installation left behind.

    Example:
        >>> from importlib.metadata import distributions
        >>> "i2v-lab" in dict(named(distributions()))
        True
    """
    for each in found:
        try:
            name = each.metadata["Name"]
        except (FileNotFoundError, KeyError):  # of importlib_metadata, which takes over once anything imports it
            continue
        if name:
            yield canonicalize_name(name), each
