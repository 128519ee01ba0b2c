"""What the fork server imports before anything else: that it, and every process forked from it, end with the caller.

The server lives until every process that can ask it is gone, and takes seconds to import its libraries before it looks.
Killed or not, the process that started it therefore is watched, and who was forked is killed by the kernel (Linux) with
the server. A worker watches as well, from when it has imported this package (:mod:`i2v_lab.runs.workers`).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from types import FrameType

CALLER_VARIABLE = "I2V_LAB_FORK_SERVER_OF"
"""Process id of who started the server: the sign that this process is one."""
INTERVAL_S = 0.2
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def _watch(caller: int) -> None:
    try:
        process = os.pidfd_open(caller)
    except ProcessLookupError:
        os._exit(1)

    def look(number: int, frame: FrameType | None) -> None:
        if select.select([process], [], [], 0)[0]:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)  # no thread, since this process forks
    signal.setitimer(signal.ITIMER_REAL, INTERVAL_S, INTERVAL_S)


def _kill_forked_with(server: int) -> None:
    set_option = ctypes.CDLL(None, use_errno=True).prctl
    is_server = True

    def in_child() -> None:
        nonlocal is_server
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if is_server:
            is_server = False  # what a worker forks is its own business
            set_option(PR_SET_PDEATHSIG, int(signal.SIGKILL))
            if os.getppid() != server:
                os._exit(1)

    os.register_at_fork(after_in_child=in_child)


if CALLER_VARIABLE in os.environ and sys.platform == "linux":
    _watch(int(os.environ.pop(CALLER_VARIABLE)))
    _kill_forked_with(os.getpid())
