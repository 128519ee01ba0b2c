"""Background generations: one at a time in a thread, with progress by step, cancellable at the next step."""

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

from i2v_lab.display import printable
from i2v_lab.errors import GenerationStopped, I2VLabError
from i2v_lab.events import ComponentBuilt, Event, Note, Phase, PhaseEnded, PhaseStarted, StepEnded
from i2v_lab.paths import find_still
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import VIDEO, Hooks, Mode, execute
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import Run, read_run
from i2v_lab.units import format_seconds

if TYPE_CHECKING:
    from i2v_lab.pipeline.contract.runner import KeptWeights
    from i2v_lab.profiling.monitor import MemoryMonitor

ONE_AT_A_TIME = "a generation is running; stop it first, or wait for its end"


class State(StrEnum):
    """The state of a generation."""

    IDLE = "idle"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class PhaseProgress:
    """The progress of a phase.

    Attributes:
        phase: Its name.
        step: Completed steps.
        steps: Their total; 0 while it is unknown.
        seconds: Its duration; ``None`` while it runs.
    """

    phase: str
    step: int = 0
    steps: int = 0
    seconds: float | None = None


class GenerationJob:
    """Runs generations in the background, one at a time, each recorded as a run directory with its video.

    Nothing is kept on the device between generations; streamed weights are kept in host memory until :meth:`close`, or
    until a model of another runner is generated with. A stop takes effect at the next step, component build or written
    frame: the run ends like a failed one, so all device memory is released and no partial video is left.

    Args:
        runs_dir: Gets a folder for each generation, ``0001_64x64x9`` and so on.
        device: ``auto``, ``cpu`` or ``cuda``.
        monitor: Samples memory during each generation, and receives its events.
        on_change: Called in the generation's thread after every event.

    Attributes:
        state: Of the latest generation.
        progress: Its phases so far.
        notes: What was done to its inputs and its result, such as a prompt that was cut, a line each.
        message: How it ended, in one line.
        folder: Its run directory.
        model: Its architecture's name; empty before the first.

    Example:
        >>> job = GenerationJob(Path("runs"))
        >>> job.start(request, "ltx-2.3-tiny")  # doctest: +SKIP
        >>> job.wait()  # doctest: +SKIP
        >>> job.video  # doctest: +SKIP
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
        self.notes: list[str] = []
        self.message = ""
        self.folder: Path | None = None
        self.model = ""
        self._stop = threading.Event()
        self._starting = threading.Lock()  # held until a thread can be waited for
        self._thread: threading.Thread | None = None
        self._kept: dict[str, KeptWeights | None] = {}  # by the runner

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

    def start(self, request: I2VRequest, model: str, vram_cap_bytes: int | None = None) -> None:
        """Start a generation in the background; returns immediately.

        Args:
            request: What to generate.
            model: An architecture's name.
            vram_cap_bytes: The most that the allocator may take.

        Raises:
            I2VLabError: Another generation is running.
            InvalidImage: The still cannot be read.
            UnknownModel: There is no such architecture.
            InvalidRequest: The model does not support the request.
            RunnerUnavailable: The runner's package is not installed.
        """
        from i2v_lab.pipeline.contract.media import load_still

        if self.state is State.RUNNING:
            raise I2VLabError(ONE_AT_A_TIME)
        request = replace(request, image=str(find_still(request.image)))
        spec = RunSpec(request=request, model=model, vram_cap_bytes=vram_cap_bytes)
        spec.runner_spec.require_package(spec.architecture)
        load_still(request.image)
        self.wait()
        with self._starting:
            self.folder, self.model = self._next_folder(request), model
            self.state, self.progress, self.notes, self.message = State.RUNNING, [], [], ""
            self._stop.clear()
            self._thread = threading.Thread(
                target=self._run, args=(spec, self.folder), name="i2v-lab-generation", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Request a stop at the next step; returns immediately."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the generation's end; returns whether it has ended."""
        with self._starting:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def close(self) -> None:
        """Stop a generation, wait for its end, and release the weights that are kept in host memory."""
        self.stop()
        self.wait()
        self._release()

    def _release(self, but: str = "") -> None:
        for name in [name for name in self._kept if name != but]:
            kept = self._kept.pop(name)
            if kept is not None:
                kept.close()

    # --- The generation's thread ---

    def _run(self, spec: RunSpec, folder: Path) -> None:
        start_s = time.perf_counter()
        try:
            self._generate(spec, folder)
            state, message = State.DONE, f"Done in {format_seconds(time.perf_counter() - start_s)}."
        except GenerationStopped as error:
            state, message = State.STOPPED, str(error)
        except I2VLabError as error:
            state, message = State.FAILED, str(error)
        except Exception as error:
            print(printable(traceback.format_exc()), file=sys.stderr)  # unexpected: the log shows where
            state, message = State.FAILED, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        gc.collect()  # an exception's traceback references frames, and those reference tensors
        _empty_cuda_cache()
        self.message = message
        self.state = state
        self.on_change()

    def _generate(self, spec: RunSpec, folder: Path) -> None:
        self._check_stop()
        weights = spec.runner_spec.resolve_weights(
            spec.architecture, spec.request.variant, lambda *_: self._check_stop()
        )
        self._release(but=spec.runner)
        if spec.runner not in self._kept:
            self._kept[spec.runner] = spec.runner_spec.kept_weights()
        execute(
            spec,
            Mode.REAL,
            self.device,
            weights=weights,
            run_dir=folder,
            video_path=lambda _: folder / VIDEO,
            hooks=Hooks(sinks=[self._follow], on_frame=self._check_stop, monitor=self.monitor),
            kept=self._kept[spec.runner],
        )

    def _follow(self, event: Event) -> None:
        """The last of the sinks, so that the others have received an event before this one raises."""
        match event:
            case PhaseStarted(phase=phase):
                self.progress.append(PhaseProgress(phase.value))
            case StepEnded(phase=phase, step=step, steps=steps):
                self._note(phase, step=step, steps=steps)
            case PhaseEnded(phase=phase, seconds=seconds):
                self._note(phase, seconds=seconds)
            case Note(text=text):
                self.notes.append(text)
        self.on_change()
        # Not at the start of a phase, which would stay open, nor after a failed one, whose error it would replace.
        if isinstance(event, StepEnded | ComponentBuilt) or (isinstance(event, PhaseEnded) and event.completed):
            self._check_stop()

    def _note(self, phase: Phase, **values: Any) -> None:
        if self.progress and self.progress[-1].phase == phase.value:
            self.progress[-1] = replace(self.progress[-1], **values)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            where = f" in {self.progress[-1].phase}" if self.progress else ""
            raise GenerationStopped(f"Stopped by the user{where}; its memory is released.")

    def _next_folder(self, request: I2VRequest) -> Path:
        taken = [int(folder.name[:4]) for folder in self.runs_dir.glob("[0-9][0-9][0-9][0-9]_*")]
        return self.runs_dir / f"{max(taken, default=0) + 1:04d}_{request.width}x{request.height}x{request.frames}"


def _empty_cuda_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
