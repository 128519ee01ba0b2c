"""What the machine refused a command: room on a disk, host memory, open files, permission; each with its remedy."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

REFUSALS: tuple[tuple[set[int], str, str, str], ...] = (
    (
        {errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
        r"no space left|quota exceeded|file too large|no usable temporary directory",
        "there is no room on the disk",
        "free some space, or choose another disk",
    ),
    (
        {errno.ENOMEM, errno.EAGAIN},  # the latter where no thread can be started
        (
            r"cannot allocate memory|can't allocate memory|not enough memory|bad_alloc|failed to map segment"
            r"|can't start new thread|cannot create thread|failed to create thread|could not create a primitive"
            r"|resource temporarily unavailable"
        ),
        "host memory is exhausted",
        "close other programs or raise the limit, or choose a smaller model or size",
    ),
    (
        {errno.EMFILE, errno.ENFILE},
        r"too many open files",
        "too many files are open",
        "raise the limit, as with `ulimit -n 4096`",
    ),
    (
        {errno.EACCES, errno.EPERM, errno.EROFS},
        r"permission denied|operation not permitted|read-only file system",
        "there is no permission",
        "change it, or choose another place",
    ),
    (
        set(),
        r"generic error in an external library",
        "a codec failed",
        "often for want of host memory: close other programs, and run again",
    ),
    (
        {errno.ENAMETOOLONG},
        r"file name too long",
        "a name is too long",
        "use a shorter one",
    ),
    (
        {errno.EIO, errno.ESTALE},
        r"input/output error|stale file handle",
        "the disk or network failed",
        "check it",
    ),
)
"""By ``errno``, by the words of libraries that report it as text alone; what it means; the remedy."""


def refusal(error: BaseException) -> str | None:
    """Say what the machine refused, if that is what an error came from.

    Libraries wrap the error of the system, in Rust and C++ as text alone: the chain of causes is searched, first by
    ``errno``, then by text.

    Returns:
        One line; ``None`` for any other error, which is a fault of the package and keeps its traceback.

    Example:
        >>> refusal(OSError(28, "No space left on device", "video.mp4"))
        'there is no room on the disk (video.mp4); free some space, or choose another disk'
    """
    for each in _chain(error):
        for numbers, words, meaning, remedy in REFUSALS:
            number = errno.ENOMEM if isinstance(each, MemoryError) else getattr(each, "errno", None)
            if number in numbers or re.search(words, str(each), re.IGNORECASE):
                named = getattr(each, "filename", None)
                return f"{meaning}{f' ({named})' if named else ''}; {remedy}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
