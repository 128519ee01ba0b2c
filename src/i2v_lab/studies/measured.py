"""Real runs: one process each, profiled, left as a run directory, and not made twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2v_lab.errors import I2VLabError, RecordError
from i2v_lab.paths import find_still
from i2v_lab.profiling.records import OutOfMemoryRecord
from i2v_lab.store import COMPLETE, FAILED, METADATA, Run, RunWriter, read_run, run_metadata
from i2v_lab.studies.experiments import Experiment, perform
from i2v_lab.studies.forecasts import code_digest

if TYPE_CHECKING:
    import torch

    from i2v_lab.pipeline.two_stage import Generation
    from i2v_lab.profiling.phase_profiler import PhaseProfiler

VIDEO = "video.mp4"
GRAD_ERROR = "GradScopeError"
OURS = {".json", ".jsonl", ".mp4", ".part"}  # suffixes in a folder that may be replaced


def measure(experiment: Experiment, folder: Path, device: str = "auto") -> Run:
    """Generate for real, in a process of its own, with synthetic weights.

    What is in ``folder`` already is taken if the same experiment ran there to its end with the same code; else it is
    replaced. Videos lie beside the records, as ``video.mp4`` and, for later generations, ``video_2.mp4``.

    Args:
        experiment: What to do.
        folder: A folder of its own; made if it does not exist.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        The run. One that ran out of memory, or whose grad mode torch refused, is a result like any other: its status is
        ``failed``.

    Raises:
        I2VLabError: It failed in any other way; with its own message.
        RecordError: ``folder`` holds something else.
    """
    settings = {"experiment": experiment.to_json(), "code": code_digest(), "asked_device": device}
    kept = _kept(folder, settings)
    if kept is not None:
        return kept
    asked = json.dumps({"settings": settings, "folder": str(folder)})
    command = [sys.executable, "-m", __name__]
    child = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)  # noqa: S603
    if (folder / METADATA).exists():
        run = read_run(folder)
        if is_result(run):
            return run
    lines = child.stderr.strip().splitlines() or [f"its process ended with status {child.returncode}"]
    raise I2VLabError(f"{experiment.name}: {lines[-1].removeprefix('i2v-lab: ')}", status=child.returncode)


def run_folder(runs_dir: Path, experiment: Experiment) -> Path:
    """Where a measured run is kept: the same for equal experiments, another for every other."""
    digest = hashlib.sha256(json.dumps(experiment.to_json(), sort_keys=True).encode()).hexdigest()
    return runs_dir / f"{experiment.model}_{experiment.name}_{digest[:8]}"


def is_result(run: Run) -> bool:
    """Whether a run shows something: it is complete, ran out of memory, or its grad mode was refused."""
    refused = str(run.metadata.get("error", "")).startswith(GRAD_ERROR)
    return run.status == COMPLETE or (run.status == FAILED and (refused or bool(run.of(OutOfMemoryRecord))))


@contextmanager
def profiled(
    device: torch.device, folder: Path | None, metadata: Mapping[str, Any], *, attribute: bool = True
) -> Iterator[PhaseProfiler]:
    """A profiler for a real run, whose records go to a run directory.

    Args:
        device: What to meter; on CUDA the whole card is sampled too.
        folder: The run directory; ``None`` keeps nothing.
        metadata: As :func:`i2v_lab.store.run_metadata` collects them.
        attribute: Follow modules and autograd graphs.

    Raises:
        OutputError: ``folder`` is not empty or cannot be written.
    """
    from i2v_lab.profiling.nvml import NvmlSampler
    from i2v_lab.profiling.phase_profiler import PhaseProfiler

    with ExitStack() as scopes:
        on_record = None
        if folder is not None:
            on_record = scopes.enter_context(RunWriter(folder, metadata)).append
            if device.type == "cuda":
                scopes.enter_context(NvmlSampler(device.index or 0, on_sample=on_record))
        yield scopes.enter_context(PhaseProfiler(device, attribute=attribute, on_record=on_record))


def _kept(folder: Path, settings: dict[str, Any]) -> Run | None:
    if not folder.exists():
        return None
    if any(entry.suffix not in OURS for entry in folder.iterdir()):
        raise RecordError(f"'{folder}' holds more than a run; choose another folder", folder=folder)
    with suppress(RecordError):  # damaged, or stopped before it began
        run = read_run(folder)
        if is_result(run) and settings.items() <= run.metadata.items():
            return run
    shutil.rmtree(folder)
    return None


def main() -> None:
    """Run what stdin describes; errors of ours are one line on stderr."""
    asked = json.load(sys.stdin)
    try:
        _run(asked["settings"], Path(asked["folder"]))
    except I2VLabError as error:
        print(f"i2v-lab: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


def _run(settings: dict[str, Any], folder: Path) -> None:
    from i2v_lab.pipeline import media
    from i2v_lab.pipeline.architectures import load_architecture
    from i2v_lab.pipeline.checkpoints import resolve_weights
    from i2v_lab.pipeline.two_stage import TwoStagePipeline, resolve_device
    from i2v_lab.request import Variant

    experiment = Experiment.from_json(settings["experiment"])
    request = experiment.request
    experiment = experiment.with_request(image=str(find_still(request.image)))
    device = resolve_device(settings["asked_device"])
    weights = resolve_weights(load_architecture(experiment.model), needs_lora=request.variant is Variant.DEV)
    metadata = run_metadata(request.to_json(), str(device), request.seed, [], experiment.model, **settings)
    videos = 0

    def write(generation: Generation, chunks: Iterable[torch.Tensor]) -> None:
        nonlocal videos
        videos += 1
        name = VIDEO if videos == 1 else f"video_{videos}.mp4"
        media.write_video(chunks, generation.audio, folder / name, request.frame_rate)

    with profiled(device, folder, metadata) as profiler:
        perform(experiment, TwoStagePipeline(weights, device, sinks=[profiler]), profiler, write)


if __name__ == "__main__":
    main()
