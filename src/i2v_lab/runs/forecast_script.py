"""What a script of diffusers would take on a GPU that is not here: the script itself runs, unchanged, without weights.

It is the user's own code, and runs as such: with this process's rights, and whatever it does besides, it does.
"""

from __future__ import annotations

import linecache
import multiprocessing.process
import os
import runpy
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from i2v_lab.errors import ForecastError, I2VLabError, ScriptError, shown
from i2v_lab.pipeline.registry import find_runner
from i2v_lab.profiling.call_phases import CallPhases
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.fake.garbage import no_collection
from i2v_lab.profiling.fake.memoization import active_memo
from i2v_lab.profiling.fake.workspaces import Workspaces, load_workspaces
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import AssumptionRecord, Forecast
from i2v_lab.thread_patches import patched_here

SCRIPT = "script"  # the phase of a script that calls no component


def forecast_script(script: str | Path, arguments: Sequence[str] = ()) -> Forecast:
    """Run a script under fake tensors, as if it had a card, and the weights of what it loads.

    ``from_pretrained`` of diffusers and transformers builds by configuration alone, from folders, from the user's cache
    of the Hugging Face hub, or from this package's architectures. Nothing is downloaded, and no video or picture is
    written. What the script prints goes to stderr.

    Args:
        script: A Python file.
        arguments: Its own, as after its name on a command line.

    Returns:
        The records, with phases found by the calls of components (see
        :mod:`~i2v_lab.profiling.call_phases`), and what was assumed.

    Raises:
        ScriptError: It cannot be read or compiled, raises an error, or exits with a status that is not 0.
        ForecastError: It needs what a forecast does not know, or puts nothing on the card; ``fields`` has the ``line``.
        RunnerUnavailable: diffusers is not installed.
        CheckpointError: A folder that it names holds code, or damaged files.

    Example:
        >>> forecast_script("my_pipeline.py", ["--frames", "81"]).peak.phase  # doctest: +SKIP
        'decode_video'
    """
    path = Path(script)
    _compile(path)
    find_runner("diffusers").require_package()
    start_s = time.perf_counter()
    workspaces = load_workspaces()
    try:
        profiler = _profiled(path, arguments, workspaces)
    except I2VLabError as error:
        error.message += f" ({_place(path, error)})"
        error.fields |= {"script": str(path), "line": _line(path, error)}
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ForecastError(
            f"{_place(path, error)}: a file is not in the cache of the Hugging Face hub, and a forecast downloads "
            "nothing; fetch it before, or name a local one",
            cause="no network",
            script=str(path),
            line=_line(path, error),
        ) from error
    except Exception as error:
        words = " ".join(traceback.format_exception_only(error)[-1].split())
        raise ScriptError(
            f"{_place(path, error)}: {words}{_raised_in(path, error)}",
            script=str(path),
            line=_line(path, error),
            error=type(error).__name__,
        ) from error
    if not profiler.peak.peak_bytes:
        raise ForecastError(
            f"{path.name} put nothing on the card; move its pipeline there, with .to('cuda') or "
            "enable_model_cpu_offload(), and call it",
            cause="nothing allocated",
            script=str(path),
        )
    return Forecast(tuple(profiler.records), workspaces.context_bytes, time.perf_counter() - start_s)


def _profiled(path: Path, arguments: Sequence[str], workspaces: Workspaces) -> PhaseProfiler:
    from i2v_lab.pipeline.diffusers.script_scope import script_scope

    with no_collection(), forecasting("cuda", workspaces=workspaces) as profiler, ExitStack() as scopes:
        memo, assumed = active_memo(), _Assumed(path, profiler)
        assert memo is not None
        phases = CallPhases(profiler, {})
        scopes.callback(assumed.write)
        scopes.enter_context(script_scope(assumed, memo.add))
        scopes.enter_context(_one_process())
        scopes.enter_context(_program(path, arguments))
        with phases.track(SCRIPT):
            _run(path)
        phases.finish()
        phases.write()
    return profiler


def _compile(path: Path) -> None:
    """Refuse what is no Python file before anything is loaded."""
    try:
        compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except OSError as error:
        raise ScriptError(
            f"script={shown(str(path))} cannot be read ({error.strerror}); give a Python file", script=str(path)
        ) from error
    except SyntaxError as error:
        raise ScriptError(
            f"{path.name}, line {error.lineno or 0}: {type(error).__name__}: {error.msg}: "
            f"{shown((error.text or '').strip())}; give a script that Python can run",
            script=str(path),
            line=error.lineno,
        ) from error
    except ValueError as error:  # a NUL
        raise ScriptError(f"script={shown(str(path))} is no text; give a Python file", script=str(path)) from error


def _run(path: Path) -> None:
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            status = stop.code if isinstance(stop.code, int) else 1
            raise ScriptError(
                f"the script ended with {shown(stop.code)}; its own arguments follow --", status=status
            ) from stop


def _line(path: Path, error: BaseException | None) -> int | None:
    """The innermost line of a script that an error, or what it was raised from, came through."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        for frame in reversed(frames):
            if frame.filename == str(path):
                return frame.lineno
        error = error.__cause__
    return None


def _place(path: Path, error: BaseException) -> str:
    """That line in words: file, number and text."""
    line = _line(path, error)
    if line is None:
        return path.name
    return f"{path.name}, line {line}: {' '.join(linecache.getline(str(path), line).split())}"


def _raised_in(path: Path, error: BaseException) -> str:
    """The end of a traceback, where it is not in the script."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != str(path)]
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not frames or last.filename == str(path):
        return ""
    words = [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} in {frame.name}" for frame in frames[-2:]]
    return f" ({', '.join(words)})"


class _Assumed:
    """What was assumed while a script ran, by its lines."""

    def __init__(self, path: Path, profiler: PhaseProfiler) -> None:
        self._path = path
        self._profiler = profiler
        self._counts: Counter[tuple[str, str, str, str, str]] = Counter()

    def __call__(self, what: str, answer: str) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != str(self._path):
            frame = frame.f_back
        place = f"{self._path.name}:{frame.f_lineno}" if frame is not None else ""
        phase = self._profiler.paths.phase if self._profiler.paths is not None else ""
        self._counts[phase, what, "", place, answer] += 1

    def write(self) -> None:
        """Write the records."""
        for key, count in self._counts.items():
            self._profiler.write(AssumptionRecord(*key, count=count))


@contextmanager
def _program(path: Path, arguments: Sequence[str]) -> Iterator[None]:
    """The state of an interpreter that runs a script: its arguments, and its folder to import from."""
    argv, search, threads = sys.argv, list(sys.path), torch.get_num_threads()
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.argv, sys.path[:] = argv, search
        torch.set_num_threads(threads)


@contextmanager
def _one_process() -> Iterator[None]:
    """Refuse processes and connections."""

    def refuse(cause: str, what: str, remedy: str) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            raise ForecastError(f"the script would {what}; {remedy}", cause=cause)

        return call

    process = refuse(
        "another process", "start a process, in which a forecast counts nothing", "do the work in the script itself"
    )
    network = refuse(
        "no network", "use the network, which a forecast does not", "name a local file, or leave the call out"
    )
    with ExitStack() as scopes:
        if hasattr(os, "fork"):
            scopes.enter_context(patched_here(os, "fork", process))
        scopes.enter_context(patched_here(multiprocessing.process.BaseProcess, "start", process))
        scopes.enter_context(patched_here(socket, "getaddrinfo", network))
        scopes.enter_context(patched_here(socket, "create_connection", network))
        yield
