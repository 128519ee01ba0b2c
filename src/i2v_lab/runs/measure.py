"""Real runs: one process each, profiled, left as a run directory, and not made twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2v_lab.errors import I2VLabError, RecordError
from i2v_lab.paths import find_still
from i2v_lab.profiling.records import OutOfMemoryRecord
from i2v_lab.runs.forecast import code_digest
from i2v_lab.runs.implementations import Implementation, call_diffusers
from i2v_lab.runs.spec import Experiment, perform
from i2v_lab.runs.store import COMPLETE, FAILED, METADATA, Run, RunWriter, read_run, run_metadata
from i2v_lab.runs.workers import run_apart

if TYPE_CHECKING:
    import torch

    from i2v_lab.pipeline.contract.generation import Generation
    from i2v_lab.profiling.phase_profiler import PhaseProfiler

VIDEO = "video.mp4"
GRAD_ERROR = "GradScopeError"
OURS = {".json", ".jsonl", ".mp4", ".part"}  # suffixes in a folder that may be replaced
SAMPLE_INTERVAL_S = 0.5  # of the whole card; with the pipeline's steps some ten seconds long a file stays small
WHOLE = "generation"  # the phase around everything in runs whose time is compared


class Attribution(StrEnum):
    """How closely a run is followed.

    ``full``: modules and autograd graphs, and NVML's view of the card. ``boundaries``: the phases alone, as
    ``i2v-lab generate`` does it. ``off``: no phase. With the last two there is one phase around everything, so that
    times can be compared.
    """

    FULL = "full"
    BOUNDARIES = "boundaries"
    OFF = "off"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a measured run has besides its experiment.

    Attributes:
        pipeline: Whose.
        profiler: How closely it is followed.
        vram_cap_bytes: The most the allocator may take; ``None`` leaves it the whole card.
        video: Whether the video is written, which takes time while it is decoded.
    """

    pipeline: Implementation = Implementation.OURS
    profiler: Attribution = Attribution.FULL
    vram_cap_bytes: int | None = None
    video: bool = True

    @property
    def apart(self) -> bool:
        """Whether a run under these conditions is no answer to the question what its experiment takes."""
        return self != Conditions(video=self.video)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, and ``apart``, which :func:`~i2v_lab.runs.recorded.find_recorded` goes by."""
        return {**asdict(self), "apart": self.apart}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Conditions:
        """Read what :meth:`to_json` returned, among other values; what is missing has its default."""
        return cls(
            pipeline=Implementation(values.get("pipeline", Implementation.OURS)),
            profiler=Attribution(values.get("profiler", Attribution.FULL)),
            vram_cap_bytes=values.get("vram_cap_bytes"),
            video=values.get("video", True),
        )


NORMAL = Conditions()


def measure(experiment: Experiment, folder: Path, device: str = "auto", conditions: Conditions = NORMAL) -> Run:
    """Generate for real, in a process of its own, with synthetic weights.

    What is in ``folder`` already is taken if the same experiment ran there to its end with the same code; else it is
    replaced. Videos lie beside the records, as ``video.mp4`` and, for later generations, ``video_2.mp4``.

    Args:
        experiment: What to do.
        folder: A folder of its own; made if it does not exist.
        device: ``auto``, ``cpu`` or ``cuda``.
        conditions: Whose pipeline, how closely followed, and below which cap.

    Returns:
        The run. One that ran out of memory, or whose grad mode torch refused, is a result like any other: its status is
        ``failed``.

    Raises:
        I2VLabError: It failed in any other way; with its own message.
        RecordError: ``folder`` holds something else.
    """
    settings = settings_of(experiment, device, conditions)
    kept = kept_run(folder, settings)
    if kept is not None:
        return kept
    _make_room(folder)
    ended = run_apart(_answer, settings, folder)
    if (folder / METADATA).exists():
        run = read_run(folder)
        if is_result(run):
            return run
    lines = ended.errors.strip().splitlines() or [f"its process ended with status {ended.status}"]
    raise I2VLabError(f"{experiment.name}: {lines[-1].removeprefix('i2v-lab: ')}", status=ended.status)


def run_folder(runs_dir: Path, experiment: Experiment) -> Path:
    """Where a measured run is kept: the same for equal experiments, another for every other."""
    digest = hashlib.sha256(json.dumps(experiment.to_json(), sort_keys=True).encode()).hexdigest()
    return runs_dir / f"{experiment.model}_{experiment.name}_{digest[:8]}"


def settings_of(experiment: Experiment, device: str = "auto", conditions: Conditions = NORMAL) -> dict[str, Any]:
    """What makes a run the one that is asked for; it stands in the run's metadata."""
    settings = {"experiment": experiment.to_json(), "code": code_digest(), "asked_device": device}
    return {**settings, **conditions.to_json()}


def kept_run(folder: Path, settings: Mapping[str, Any]) -> Run | None:
    """The run in ``folder``, if it ended and has these settings."""
    with suppress(RecordError):  # there is none, or it is damaged, or was stopped before it began
        run = read_run(folder)
        if is_result(run) and settings.items() <= run.metadata.items():
            return run
    return None


def is_result(run: Run) -> bool:
    """Whether a run shows something: it is complete, ran out of memory, or its grad mode was refused."""
    refused = str(run.metadata.get("error", "")).startswith(GRAD_ERROR)
    return run.status == COMPLETE or (run.status == FAILED and (refused or bool(run.of(OutOfMemoryRecord))))


@contextmanager
def profiled(
    device: torch.device,
    folder: Path | None,
    metadata: Mapping[str, Any],
    *,
    attribute: bool = True,
    vram_cap_bytes: int | None = None,
) -> Iterator[PhaseProfiler]:
    """A profiler for a real run, whose records go to a run directory.

    Args:
        device: What to meter.
        folder: The run directory; ``None`` keeps nothing.
        metadata: As :func:`i2v_lab.runs.store.run_metadata` collects them.
        attribute: Follow modules and autograd graphs, and on CUDA sample the whole card.
        vram_cap_bytes: Refuse allocations beyond it.

    Raises:
        OutputError: ``folder`` is not empty or cannot be written.
    """
    from i2v_lab.profiling.meters.nvml import NvmlSampler, card_index
    from i2v_lab.profiling.phase_profiler import PhaseProfiler

    with ExitStack() as scopes:
        on_record = None
        if folder is not None:
            on_record = scopes.enter_context(RunWriter(folder, metadata)).append
            if device.type == "cuda" and attribute:
                scopes.enter_context(NvmlSampler(card_index(device), SAMPLE_INTERVAL_S, on_sample=on_record))
        yield scopes.enter_context(
            PhaseProfiler(device, attribute=attribute, vram_cap_bytes=vram_cap_bytes, on_record=on_record)
        )


def _make_room(folder: Path) -> None:
    if not folder.exists():
        return
    if any(entry.suffix not in OURS for entry in folder.iterdir()):
        raise RecordError(f"'{folder}' holds more than a run; choose another folder", folder=folder)
    shutil.rmtree(folder)


def _answer(settings: dict[str, Any], folder: Path) -> None:
    """In a process of its own: errors of ours are one line on stderr."""
    try:
        _run(settings, folder)
    except I2VLabError as error:
        print(f"i2v-lab: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


def _run(settings: dict[str, Any], folder: Path) -> None:
    from i2v_lab.pipeline.contract import media
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.contract.generation import resolve_device
    from i2v_lab.pipeline.contract.runner import backend_of, check_request

    experiment = Experiment.from_json(settings["experiment"])
    conditions = Conditions.from_json(settings)
    request = experiment.request
    experiment = experiment.with_request(image=str(find_still(request.image)))
    device = resolve_device(settings["asked_device"])
    architecture = load_architecture(experiment.model)
    backend = backend_of(architecture)
    check_request(architecture, request)
    weights = backend.resolve_weights(architecture, request.variant)
    metadata = run_metadata(request.to_json(), str(device), request.seed, [], experiment.model, **settings)
    videos = 0

    def consume(generation: Generation, chunks: Iterable[torch.Tensor]) -> None:
        nonlocal videos
        if not conditions.video:
            for chunk in chunks:
                del chunk  # not to be held while the next one is decoded
            return
        videos += 1
        name = VIDEO if videos == 1 else f"video_{videos}.mp4"
        media.write_video(chunks, generation.audio, folder / name, request.frame_rate)

    attribute, cap = conditions.profiler is Attribution.FULL, conditions.vram_cap_bytes
    with profiled(device, folder, metadata, attribute=attribute, vram_cap_bytes=cap) as profiler, ExitStack() as scopes:
        if conditions.pipeline.is_diffusers:
            call_diffusers(conditions.pipeline, weights, experiment.model, device, experiment.request, profiler)
            return
        if not attribute:
            scopes.enter_context(profiler.phase(WHOLE))
        sinks = [] if conditions.profiler is Attribution.OFF else [profiler]
        if conditions.pipeline is Implementation.UPSTREAM:
            pipeline = backend.upstream(weights, device, sinks)
        else:
            pipeline = backend.pipeline(weights, device, sinks, experiment.techniques)
        perform(experiment, pipeline, profiler, consume)
