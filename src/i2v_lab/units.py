"""Bytes as people read them. Everything inside the package counts whole bytes; GiB (2**30) appears only here."""

from __future__ import annotations

KIB = 2**10
MIB = 2**20
GIB = 2**30


def gib(n_bytes: int | None) -> float | None:
    """Bytes as GiB (2**30 bytes); ``None`` stays ``None``.

    Example:
        >>> gib(31686826557)
        29.51...
    """
    return None if n_bytes is None else n_bytes / GIB


def format_bytes(n_bytes: int | None) -> str:
    """Bytes with the binary unit that leaves one to four digits before the point; ``None`` is ``n/a``.

    Example:
        >>> format_bytes(18_454_938), format_bytes(31_686_826_557), format_bytes(512), format_bytes(None)
        ('17.6 MiB', '29.51 GiB', '512 B', 'n/a')
    """
    if n_bytes is None:
        return "n/a"
    size = abs(n_bytes)
    if size >= GIB:
        return f"{n_bytes / GIB:.2f} GiB"
    if size >= MIB:
        return f"{n_bytes / MIB:.1f} MiB"
    if size >= KIB:
        return f"{n_bytes / KIB:.1f} KiB"
    return f"{n_bytes} B"
