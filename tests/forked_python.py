"""Python processes that need not import torch and transformers again: forked from one that has.

The fixture ``forked_python`` stands in for ``[sys.executable]`` in a command such as ``python -m i2v_lab.cli``. It is a
small program that passes its arguments, environment, folder and standard streams to a server, which forks; it forwards
signals, ends with the status of the forked process, and if it is killed, so is that one. The server imports nothing of
this package. A test of what is imported, or of how a process starts, needs ``[sys.executable]`` itself.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable

FORWARDED = (signal.SIGINT, signal.SIGTERM)
LIBRARIES = (
    "torch",
    "torchaudio",
    "transformers.models.gemma3.modeling_gemma3",
    "av",
    "ltx_core.loader",
    "ltx_core.model.transformer",
    "ltx_core.model.video_vae",
    "ltx_core.model.audio_vae",
    "ltx_core.text_encoders.gemma",
    "pandas",
    "ipykernel.kernelapp",
)


# --- The stand-in ---


def ask(path: str, arguments: list[str]) -> int:
    """Have the server run a command; returns the status of its process, negative where a signal ended it.

    ``--inherit 7,9`` in front of it names descriptors that the process has too, besides the standard streams.
    """
    inherited: list[int] = []
    if arguments[0] == "--inherit":
        inherited, arguments = [int(each) for each in arguments[1].split(",")], arguments[2:]
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)

    def forward(number: int, _: object) -> None:
        try:
            server.send(bytes([number]))
        except OSError:  # the process has just ended
            pass

    for number in FORWARDED:
        signal.signal(number, forward)
    streams = [0, 1, 2, *inherited]
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "numbers": streams}
    socket.send_fds(server, [b"\0"], streams)
    server.sendall(json.dumps(request).encode() + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        received = server.recv(100)
        if not received:
            raise RuntimeError("the server of forked processes has ended")
        answer += received
    return int(answer)


def forked_python(path: str) -> list[str]:
    """What stands in for ``[sys.executable]``, in front of ``-m MODULE`` or ``-c CODE``."""
    return [sys.executable, "-I", "-S", __file__, path]


def fork_the_fork_server(path: Callable[[], str]) -> Callable[[], None]:
    """From here on multiprocessing's fork server, which imports these libraries for itself, is forked too.

    Args:
        path: Gives the server's socket, when it is needed.

    Returns:
        To undo it.
    """
    from multiprocessing import util

    start = util.spawnv_passfds

    def start_forked(executable: str, arguments: list[str], descriptors: list[int]) -> int:
        if not str(arguments[-1]).startswith("from multiprocessing.forkserver import main"):
            return start(executable, arguments, descriptors)
        inherit = ["--inherit", ",".join(map(str, descriptors))]
        return start(executable, [*forked_python(path()), *inherit, "-c", arguments[-1]], descriptors)

    util.spawnv_passfds = start_forked
    return lambda: setattr(util, "spawnv_passfds", start)


def start_server(until: int, log: str) -> str:
    """Start the server, unless it is there, and wait until it has imported everything; returns its socket's path.

    Args:
        until: The process with which it ends; one server for each.
        log: What it has to say goes here.
    """
    path = os.path.join(tempfile.gettempdir(), f"i2v-lab-tests-{until}.sock")
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.posix_spawn(
                sys.executable,
                [sys.executable, __file__, "--serve", path, str(until)],
                os.environ,
                setsid=True,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, log, write, 0o600),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
            )
            for _ in range(1200):
                if os.path.exists(path):
                    break
                time.sleep(0.1)
            else:
                raise TimeoutError(f"no server of forked processes after two minutes; see {log}")
    return path


# --- The server ---


class Command:
    """What a forked process is to do."""

    def __init__(self, connection: socket.socket) -> None:
        _, self._streams, _, _ = socket.recv_fds(connection, 1, 20)
        with connection.makefile("rb", buffering=0) as lines:
            values = json.loads(lines.readline())
        self._arguments, self._environment, self._folder = (values[n] for n in ("arguments", "environment", "folder"))
        self._numbers: list[int] = values["numbers"]

    def close_streams(self) -> None:
        for stream in self._streams:
            os.close(stream)

    def run(self, own_path: list[str], path: str) -> None:
        """In the forked process: as ``python ARGUMENTS`` would. Ends the process, without tearing the modules down."""
        status: object = 0
        try:
            self._run(own_path, path)
        except SystemExit as error:
            status = error.code
            if status is not None and not isinstance(status, int):
                print(status, file=sys.stderr)
                status = 1
        except BaseException as error:
            traceback.print_exc()
            status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        _end(status or 0)

    def _run(self, own_path: list[str], path: str) -> None:
        os.setsid()
        aside = [fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, 100) for stream in self._streams]
        self.close_streams()
        for number, stream in zip(self._numbers, aside, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", closefd=False, buffering=1 if os.isatty(1) else -1)
        sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)  # blocked where a fork server started this server
        sys.path[:] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *own_path]
        _read_environment_again()
        fork_the_fork_server(lambda: path)
        kind, what, *rest = self._arguments
        if kind == "-m":
            import runpy

            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest]
            exec(what, sys.modules["__main__"].__dict__)
        else:
            raise ValueError(f"{kind} is neither -m nor -c")


def _end(status: int) -> None:
    """With this status; negative: by this signal."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def _read_environment_again() -> None:
    """What libraries read from the environment when they are imported."""
    if level := os.environ.get("TRANSFORMERS_VERBOSITY"):
        from transformers.utils import logging

        logging.set_verbosity(logging.log_levels[level])
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        from functools import partialmethod

        from tqdm.std import tqdm

        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def serve(path: str, until: int) -> None:
    """Fork a process for every command that comes, for as long as the process ``until`` is there."""
    python_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own_path = [each for each in sys.path[1:] if each not in python_path]
    for library in LIBRARIES:
        __import__(library)
    gc.collect()
    gc.freeze()  # a forked process looks through what it makes itself
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.part")
    listening.listen()
    os.rename(f"{path}.part", path)
    parent = os.pidfd_open(until)
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of a process: its number, who waits
    while True:
        connections = {connection: process for process, connection in running.values()}
        ready, _, _ = select.select([listening, parent, *running, *connections], [], [])
        if parent in ready:
            for process, _ in running.values():
                os.kill(process, signal.SIGKILL)
            os.unlink(path)
            os.unlink(f"{path}.lock")
            return
        for connection in connections.keys() & set(ready):
            received = connection.recv(1)
            os.kill(connections[connection], received[0] if received else signal.SIGKILL)
        for ended in running.keys() & set(ready):
            process, connection = running.pop(ended)
            os.close(ended)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with connection:
                try:
                    connection.sendall(f"{status}\n".encode())
                except OSError:  # who waited was killed
                    pass
        if listening in ready:
            connection, _ = listening.accept()
            command = Command(connection)
            process = os.fork()
            if process == 0:
                for each in (listening, connection, *connections):
                    each.close()
                for each in (parent, *running):
                    os.close(each)
                command.run(own_path, path)
            command.close_streams()
            running[os.pidfd_open(process)] = (process, connection)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        _end(ask(sys.argv[1], sys.argv[2:]))
