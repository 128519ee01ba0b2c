"""Numbers with their units, for people. Everything inside the package counts whole bytes and seconds.

The end of a field's or a column's name says its unit, everywhere in this package; :func:`format_value` is the one
place that turns such a name and its value into text.
"""

from __future__ import annotations

import re
from numbers import Real
from typing import Any

KIB = 2**10
MIB = 2**20
GIB = 2**30
UNAVAILABLE = "n/a"
UNITS = {"": 1, "k": KIB, "m": MIB, "g": GIB}


def parse_bytes(text: str) -> int:
    """A size with its unit in bytes: binary units, ``0`` alone without one.

    Raises:
        ValueError: It is no such size.

    Example:
        >>> parse_bytes("64MiB"), parse_bytes("1.5 GiB"), parse_bytes("512 B"), parse_bytes("0")
        (67108864, 1610612736, 512, 0)
    """
    found = re.fullmatch(r"\s*(?:0|(\d{1,15}(?:\.\d{1,9})?)\s*([kmg]?)i?b)\s*", text, re.IGNORECASE | re.ASCII)
    if found is None:
        raise ValueError(f"{text!r} is no size; use one such as 64MiB")
    return int(float(found[1] or 0) * UNITS[(found[2] or "").lower()])


def format_bytes(n_bytes: int | None, *, signed: bool = False) -> str:
    """Bytes with the binary unit that leaves one to four digits before the point.

    Args:
        n_bytes: Whole bytes; ``None`` is ``n/a``.
        signed: Whether a positive number, such as a difference, gets a plus sign.

    Example:
        >>> format_bytes(18_454_938), format_bytes(31_686_826_557), format_bytes(512), format_bytes(None)
        ('17.6 MiB', '29.51 GiB', '512 B', 'n/a')
        >>> format_bytes(2**20, signed=True)
        '+1.0 MiB'
    """
    if n_bytes is None:
        return UNAVAILABLE
    size = abs(n_bytes)
    sign = "+" if signed and n_bytes > 0 else ""
    if size >= GIB:
        return f"{sign}{n_bytes / GIB:.2f} GiB"
    if size >= MIB:
        return f"{sign}{n_bytes / MIB:.1f} MiB"
    if size >= KIB:
        return f"{sign}{n_bytes / KIB:.1f} KiB"
    return f"{sign}{n_bytes} B"


def format_seconds(seconds: float | None, *, signed: bool = False, rough: bool = False) -> str:
    """A duration with three significant digits, and at most two behind the point.

    In milliseconds below 0.1 s, in minutes from 1,000 s on.

    Args:
        seconds: ``None`` is ``n/a``.
        signed: Whether a positive number, such as a difference, gets a plus sign.
        rough: Whole seconds, and whole minutes from two on: for what is left, or was expected.

    Example:
        >>> [format_seconds(seconds) for seconds in (0.0132, 0.25, 4.71, 38.2, 121.6, 3000)]
        ['13.2 ms', '0.25 s', '4.71 s', '38.2 s', '122 s', '50.0 min']
        >>> format_seconds(38.2, rough=True), format_seconds(754, rough=True)
        ('38 s', '13 min')
        >>> format_seconds(0.5, signed=True)
        '+0.50 s'
    """
    if seconds is None:
        return UNAVAILABLE
    sign = "+" if signed and seconds > 0 else ""
    if rough:
        return f"{sign}{seconds:.0f} s" if abs(seconds) < 120 else f"{sign}{seconds / 60:.0f} min"
    number, unit = (seconds, "s") if seconds == 0 or abs(seconds) >= 0.1 else (1000 * seconds, "ms")
    if abs(seconds) >= 999.5:
        number, unit = seconds / 60, "min"
    size = abs(number)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{sign}{number:.{digits}f} {unit}"


def format_percent(fraction: float | None, digits: int = 0, *, signed: bool = False) -> str:
    """A fraction of one in percent.

    Args:
        fraction: 1.0 is 100 %; ``None`` is ``n/a``.
        digits: Behind the point.
        signed: Whether a positive number, such as a change, gets a plus sign.

    Example:
        >>> format_percent(0.333), format_percent(-0.0126, 2), format_percent(0.5, signed=True)
        ('33 %', '-1.26 %', '+50 %')
    """
    if fraction is None:
        return UNAVAILABLE
    return f"{100 * fraction:{'+' if signed else ''}.{digits}f} %"


def format_value(name: str, value: Any) -> str:
    """A field's value as text; the end of its name says the unit.

    ========================== ====================================================
    ``*bytes``                 :func:`format_bytes`
    ``*seconds``, ``*_s``      :func:`format_seconds`
    ``difference_*`` of either with its sign
    ``error``                  percent with its sign, relative to the true value
    ``*_error``, ``*_share``   percent, two digits behind the point
    ``share``, ``share_*``     percent, whole
    ``*ratio``                 two digits behind the point
    ``shape``                  sizes, such as ``1x128x97``; ``scalar`` where there are none
    ========================== ====================================================

    Truth values are ``yes`` and ``no``, what is unavailable (``None``, NaN) is ``n/a``, and any other value is its
    ``str``.

    Args:
        name: Of the field or column.
        value: A value of it, as Python's own type.

    Example:
        >>> format_value("peak_bytes", 3 * 2**20), format_value("seconds", 0.25), format_value("completed", True)
        ('3.0 MiB', '0.25 s', 'yes')
        >>> format_value("difference_bytes", 2**20), format_value("share", 0.61), format_value("shape", (2, 8))
        ('+1.0 MiB', '61 %', '2x8')
    """
    if value is None or (isinstance(value, Real) and value != value):
        return UNAVAILABLE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "shape":
        return "x".join(str(size) for size in value) or "scalar"
    if isinstance(value, Real):
        return _format_number(name, value)
    return str(value)


def _format_number(name: str, value: Any) -> str:
    signed = name.startswith("difference")
    if name.endswith("bytes"):
        return format_bytes(int(value), signed=signed)
    if name.endswith(("seconds", "_s")):
        return format_seconds(value, signed=signed)
    if name == "error":
        return format_percent(value, 2, signed=True)
    if name.endswith(("_error", "_share")):
        return format_percent(value, 2)
    if name == "share" or name.startswith("share_"):
        return format_percent(value)
    if name.endswith("ratio"):
        return f"{value:.2f}"
    return str(value)
