"""Host memory that a process can take, within the limits of its container or batch job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

# Of a control group: the limit, what is used, and of that what the system gives back; of versions 2 and 1.
FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What the system has available, and no more than the control groups of the process leave it.

    A process that takes more than its group's limit is killed, whatever the machine has.

    Args:
        root: Where the groups are mounted.
        own: Says which are the process's.

    Example:
        >>> available_bytes() > 0
        True
    """
    return max(0, min([psutil.virtual_memory().available, *_left_bytes(root, own)]))


def _left_bytes(root: Path, own: Path) -> Iterator[int]:
    with suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in FILES:
                continue
            limit, used, cached = FILES[controllers]
            mounted = root / controllers
            group = mounted / path.lstrip("/")
            for folder in [group, *group.parents]:  # in a container the path may be the host's, and only the root there
                with suppress(OSError, ValueError, KeyError):
                    statistics = dict(
                        text.split() for text in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
                    )
                    taken = int((folder / used).read_text(encoding="utf-8")) - int(statistics[cached])
                    yield int((folder / limit).read_text(encoding="utf-8")) - taken  # no number: no limit
                if folder == mounted:
                    break
