"""A generation that nobody waits for: in a thread of its own, followed step by step, stopped at the next step."""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2v_lab.errors import GenerationStopped, I2VLabError
from i2v_lab.events import ComponentBuilt, Event, Phase, PhaseEnded, PhaseStarted, StepEnded
from i2v_lab.paths import find_still
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import VIDEO, Hooks, Mode, execute
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import Run, read_run
from i2v_lab.units import format_seconds

if TYPE_CHECKING:
    from i2v_lab.profiling.monitor import MemoryMonitor

ONE_AT_A_TIME = "a generation is under way; stop it first, or wait for its end"


class State(StrEnum):
    """Where a generation is."""

    IDLE = "idle"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class PhaseProgress:
    """How far a phase is.

    Attributes:
        phase: Its name.
        step: Steps that are done.
        steps: How many there will be; 0 while nobody knows.
        seconds: Its duration; ``None`` while it goes on.
    """

    phase: str
    step: int = 0
    steps: int = 0
    seconds: float | None = None


class Generating:
    """One generation after another, each in the background, each left as a run directory with its video.

    Nothing is kept between generations but the directories. A stop takes effect at the next step, built component or
    written frame: the run ends as any failed one does, so that everything is released and no part of a video is left.

    Args:
        runs_dir: Gets a folder for each generation, ``0001_64x64x9`` and so on.
        device: ``auto``, ``cpu`` or ``cuda``.
        monitor: Follows each generation; told of its phases.
        on_change: Called in the generation's thread after every event.

    Attributes:
        state: Where the generation is.
        progress: Its phases so far.
        message: How it ended, in one line.
        folder: Its run directory.

    Example:
        >>> generating = Generating(Path("runs"))
        >>> generating.start(request, "ltx-2.3-tiny")  # doctest: +SKIP
        >>> generating.wait()  # doctest: +SKIP
        >>> generating.video  # doctest: +SKIP
        PosixPath('runs/0001_192x128x25/video.mp4')
    """

    def __init__(
        self,
        runs_dir: Path,
        device: str = "auto",
        monitor: MemoryMonitor | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.runs_dir = runs_dir
        self.device = device
        self.monitor = monitor
        self.on_change = on_change
        self.state = State.IDLE
        self.progress: list[PhaseProgress] = []
        self.message = ""
        self.folder: Path | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def video(self) -> Path | None:
        """The finished video; ``None`` if there is none."""
        path = self.folder / VIDEO if self.folder else None
        return path if self.state is State.DONE and path is not None and path.exists() else None

    @property
    def run(self) -> Run | None:
        """The records of the generation so far."""
        with suppress(I2VLabError):
            return read_run(self.folder) if self.folder else None
        return None

    def start(self, request: I2VRequest, model: str) -> None:
        """Begin, and return at once.

        Raises:
            I2VLabError: Another generation is under way.
            InvalidImage: The still cannot be read.
            UnknownModel: There is no such architecture.
            InvalidRequest: The model has not what is asked for.
        """
        from i2v_lab.pipeline.contract.media import load_still

        if self.state is State.RUNNING:
            raise I2VLabError(ONE_AT_A_TIME)
        request = replace(request, image=str(find_still(request.image)))
        spec = RunSpec(request=request, model=model)
        spec.runner_spec.require_package()
        load_still(request.image)
        self.wait()
        self.folder = self._next_folder(request)
        self.state, self.progress, self.message = State.RUNNING, [], ""
        self._stop.clear()
        self._thread = threading.Thread(
            target=self._serve, args=(spec, self.folder), name="i2v-lab-generation", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Ask the generation to end at its next step; returns at once."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; whether it has come."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    # --- In the generation's thread ---

    def _serve(self, spec: RunSpec, folder: Path) -> None:
        start_s = time.perf_counter()
        try:
            self._generate(spec, folder)
            state, message = State.DONE, f"Done in {format_seconds(time.perf_counter() - start_s)}."
        except GenerationStopped as error:
            state, message = State.STOPPED, str(error)
        except I2VLabError as error:
            state, message = State.FAILED, str(error)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)  # not foreseen: whoever reads the log should see where
            state, message = State.FAILED, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        gc.collect()  # an error's traceback holds frames, and those hold tensors
        _empty_cuda_cache()
        self.message = message
        self.state = state
        self.on_change()

    def _generate(self, spec: RunSpec, folder: Path) -> None:
        self._check_stop()
        weights = spec.runner_spec.resolve_weights(
            spec.architecture, spec.request.variant, lambda *_: self._check_stop()
        )
        execute(
            spec,
            Mode.REAL,
            self.device,
            weights=weights,
            run_dir=folder,
            video_path=lambda _: folder / VIDEO,
            hooks=Hooks(sinks=[self._follow], on_frame=self._check_stop, monitor=self.monitor),
        )

    def _follow(self, event: Event) -> None:
        """The last of the sinks: what it raises reaches no other one."""
        match event:
            case PhaseStarted(phase=phase):
                self.progress.append(PhaseProgress(phase.value))
            case StepEnded(phase=phase, step=step, steps=steps):
                self._note(phase, step=step, steps=steps)
            case PhaseEnded(phase=phase, seconds=seconds):
                self._note(phase, seconds=seconds)
        self.on_change()
        # Not where a phase starts, which would stay open, nor where one has failed, which would hide why.
        if isinstance(event, StepEnded | ComponentBuilt) or (isinstance(event, PhaseEnded) and event.completed):
            self._check_stop()

    def _note(self, phase: Phase, **values: Any) -> None:
        if self.progress and self.progress[-1].phase == phase.value:
            self.progress[-1] = replace(self.progress[-1], **values)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            where = f" in {self.progress[-1].phase}" if self.progress else ""
            raise GenerationStopped(f"Stopped by hand{where}; everything it held is released.")

    def _next_folder(self, request: I2VRequest) -> Path:
        taken = [int(folder.name[:4]) for folder in self.runs_dir.glob("[0-9][0-9][0-9][0-9]_*")]
        return self.runs_dir / f"{max(taken, default=0) + 1:04d}_{request.width}x{request.height}x{request.frames}"


def _empty_cuda_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
