"""A memory budget as a user writes it, in bytes."""

from __future__ import annotations

import math
import re

from i2v_lab.errors import InvalidRequest, shown
from i2v_lab.units import GIB

AUTO = "auto"
MAX_GIB = 2**20


def budget_bytes(text: str) -> int:
    """A budget in bytes: ``12GiB``, ``12``, ``12GB``, in GiB as makers name sizes, or ``900MiB``.

    Raises:
        InvalidRequest: It is no such size.

    Example:
        >>> budget_bytes("1.5 GiB")
        1610612736
    """
    size = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(?:(m)(?:ib|b)?|g(?:ib|b)?)?\s*", text, re.IGNORECASE | re.ASCII)
    unit = GIB // 1024 if size is not None and size[2] else GIB
    if size is None or not 0 < float(size[1]) * unit <= MAX_GIB * GIB:
        raise InvalidRequest(
            f"vram_budget={shown(text)} is no size; use one such as 12GiB, or auto for what the card has free",
            vram_budget=text,
        )
    return int(float(size[1]) * unit)


def budget_or_free_bytes(text: str) -> int:
    """A budget in bytes; for ``auto`` what the card of this machine has free.

    Raises:
        InvalidRequest: It is no size.
        DeviceUnavailable: There is no card.
    """
    from i2v_lab.capacity.this_machine import available_memory

    return available_memory("cuda")[1] if text == AUTO else budget_bytes(text)


def as_budget(nbytes: int) -> str:
    """The smallest budget in hundredths of a GiB that has so many bytes, as :func:`budget_bytes` reads it.

    Example:
        >>> as_budget(3 * 2**30), as_budget(3 * 2**30 + 1)
        ('3GiB', '3.01GiB')
    """
    return f"{math.ceil(nbytes * 100 / GIB) / 100:g}GiB"
