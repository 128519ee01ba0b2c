"""The one place where a run is carried out: for real, or under fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2v_lab.errors import DeviceUnavailable, ForecastError, I2VLabError, InvalidRequest
from i2v_lab.events import EventSink, Note, Phase, broadcast
from i2v_lab.paths import find_still
from i2v_lab.runs.out_of_memory import out_of_memory_in_a_line
from i2v_lab.runs.provenance import run_metadata
from i2v_lab.runs.spec import Consumer, ProfilerMode, RunSpec
from i2v_lab.runs.store import RunWriter

if TYPE_CHECKING:
    import torch

    from i2v_lab.pipeline.contract.generation import Generation
    from i2v_lab.pipeline.contract.runner import KeptWeights
    from i2v_lab.profiling.monitor import MemoryMonitor
    from i2v_lab.profiling.phase_profiler import PhaseProfiler
    from i2v_lab.profiling.records import Record
    from i2v_lab.request import I2VRequest

VIDEO = "video.mp4"
SAMPLE_INTERVAL_S = 0.5  # of the whole card; with the pipeline's steps some ten seconds long a file stays small
FAILS_ON_A_CARD = "fails on a card"  # cause of a ForecastError: the settings, not the forecast
WHOLE = "generation"  # the phase around everything in runs whose time is compared


class Mode(StrEnum):
    """``real`` computes; ``fake`` runs the same code under fake tensors, on a device that need not exist."""

    REAL = "real"
    FAKE = "fake"


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a caller attaches to a real run.

    Attributes:
        sinks: Called with every event of the pipeline, after the profiler.
        on_frame: Called after each frame is written.
        monitor: Follows the run's memory live; it receives every event before the profiler.
        wrap_profiler: Given the profiler as an event sink, returns what is called in its place.
    """

    sinks: Sequence[EventSink] = ()
    on_frame: Callable[[], None] = lambda: None
    monitor: MemoryMonitor | None = None
    wrap_profiler: Callable[[EventSink], EventSink] = lambda sink: sink


NO_HOOKS = Hooks()


def execute(
    spec: RunSpec,
    mode: Mode = Mode.REAL,
    device: str = "auto",
    *,
    weights: Any = None,
    run_dir: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    video_path: Callable[[int], Path] | None = None,
    hooks: Hooks = NO_HOOKS,
    kept: KeptWeights | None = None,
) -> PhaseProfiler | None:
    """Carry out a run.

    The spec is checked when it is made, so nothing that its runner lacks reaches this function. Fake runs write no file
    and are metered fully, with the library workspaces and the caching allocator modelled on ``cuda``.

    Args:
        spec: What to do.
        mode: Real or fake.
        device: ``auto``, ``cpu`` or ``cuda``; a fake ``cuda`` needs no card.
        weights: As the runner resolved them; by default synthetic ones (real), or tensors without values (fake).
        run_dir: Gets the records, with metadata of what really ran; real runs only.
        metadata: More of it.
        video_path: The MP4 of a generation, numbered from 1; without it, or where the spec writes no video, frames are
            dropped as they are decoded.
        hooks: What else is attached.
        kept: Weights in host memory that real runs of one runner share, from its ``kept_weights``. Generations of one
            run share them anyway.

    Returns:
        The profiler, with the records; ``None`` for ``profiler=none``.

    Raises:
        RunnerUnavailable: The runner's package is not installed.
        InvalidImage: The still cannot be read.
        DeviceUnavailable: The device does not exist, or is too small.
        OutputError: ``run_dir`` is not empty or cannot be written.
        InvalidRequest: Offloading is to be forecast on a CPU.
        ForecastError: A fake run depends on values that it does not know.
        OutOfDeviceMemory: The device's memory does not do; what the run held of it is released.
        VramCapExceeded: Likewise on a CPU, beyond the spec's cap.

    Example:
        >>> from i2v_lab.runs.spec import make_request
        >>> spec = RunSpec(request=make_request("ltx-2.3-tiny", width=64, height=64, frames=9), model="ltx-2.3-tiny")
        >>> execute(spec, Mode.FAKE, "cuda").peak.phase  # doctest: +SKIP
        'encode_prompt'
    """
    spec.runner_spec.require_package(spec.architecture)
    found = spec.with_still(find_still(spec.request.image))
    if mode is Mode.FAKE:
        return _execute_fake(found, device)

    # With the still as it was given: a record names no path of a machine.
    written = replace(spec, write_video=spec.write_video and video_path is not None)

    def describe(target: str) -> dict[str, Any]:
        return run_metadata(target, spec=written, **(metadata or {}))

    records: list[Record] = []

    def act() -> PhaseProfiler | None:
        with _keeping(found, kept) as shared:
            return _execute_real(found, device, weights, run_dir, describe, video_path, hooks, shared, records)

    return out_of_memory_in_a_line(found, records, act)


def _execute_fake(spec: RunSpec, device: str) -> PhaseProfiler:
    from i2v_lab.profiling.fake.forecast import forecasting
    from i2v_lab.profiling.fake.workspaces import load_workspaces

    if device not in ("cpu", "cuda"):
        raise DeviceUnavailable(f"device={device!r} cannot be forecast; use cpu or cuda", device=device)
    settings = spec.request.settings
    if settings.offloads and device == "cpu":
        raise InvalidRequest(
            f"offload={settings.offload.value!r} is not for a forecast on device='cpu', which has no second memory; "
            "use cuda",
            offload=settings.offload.value,
        )
    runner = spec.runner_spec
    weights = runner.skeleton_weights(spec.architecture)
    workspaces = load_workspaces() if device == "cuda" else None
    # Group offload on a stream prefetches the weights of the next layers, so that no two calls are alike.
    memoize = {} if settings.offload_stream else runner.memoizable_modules(spec.architecture)
    try:
        with (
            forecasting(device, memoize=memoize, workspaces=workspaces) as profiler,
            _keeping(spec, None) as kept,
        ):
            pipeline = runner.pipeline(weights, device, [profiler], spec.technique_set, settings, kept)
            perform(spec, pipeline, profiler, lambda _, chunks: _drop(chunks))
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, I2VLabError) or settings.is_default:
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ForecastError(
            f"model={spec.model!r} with {settings.options} fails, as it would on a card: {reason}; use other settings",
            cause=FAILS_ON_A_CARD,
            settings=settings.to_json(),
            reason=reason,
        ) from error
    return profiler


def _execute_real(
    spec: RunSpec,
    device: str,
    weights: Any,
    run_dir: Path | None,
    describe: Callable[[str], dict[str, Any]],
    video_path: Callable[[int], Path] | None,
    hooks: Hooks,
    kept: KeptWeights | None,
    records: list[Record],
) -> PhaseProfiler | None:
    from i2v_lab.pipeline.contract import media
    from i2v_lab.pipeline.contract.generation import resolve_device

    runner, request = spec.runner_spec, spec.request
    target = resolve_device(device)
    if weights is None:
        weights = runner.resolve_weights(spec.architecture, request.variant)
    videos = 0
    sinks: list[EventSink] = []

    def consume(generation: Generation, chunks: Iterable[torch.Tensor]) -> None:
        nonlocal videos
        if not spec.write_video or video_path is None:
            _drop(chunks)
            return
        videos += 1
        out, rate = video_path(videos), request.frame_rate
        media.write_video(chunks, generation.audio, out, rate, hooks.on_frame, on_note)

    def on_note(count: int, text: str) -> None:
        broadcast(sinks)(Note(Phase.DECODE_VIDEO, text.partition(":")[0], count, text))

    if spec.profiler is ProfilerMode.NONE:
        sinks = list(hooks.sinks)
        pipeline = runner.pipeline(weights, target, sinks, spec.technique_set, request.settings, kept)
        perform(spec, pipeline, None, consume)
        return None
    attribute = spec.profiler is ProfilerMode.FULL
    with ExitStack() as scopes:
        profiler = scopes.enter_context(
            metered(target, run_dir, describe(str(target)), attribute=attribute, vram_cap_bytes=spec.vram_cap_bytes)
        )
        scopes.callback(lambda: records.extend(profiler.records))
        sinks = [] if spec.profiler is ProfilerMode.OFF else [hooks.wrap_profiler(profiler)]
        sinks += hooks.sinks
        if hooks.monitor is not None:
            scopes.enter_context(hooks.monitor.following(profiler))
            sinks.insert(0, hooks.monitor)
        if not attribute:
            scopes.enter_context(profiler.phase(WHOLE))
        pipeline = runner.pipeline(weights, target, sinks, spec.technique_set, request.settings, kept)
        perform(spec, pipeline, profiler, consume)
    return profiler


@contextmanager
def _keeping(spec: RunSpec, kept: KeptWeights | None) -> Iterator[KeptWeights | None]:
    """Weights in host memory for the generations of a run: those given, or own ones if there are several."""
    own = spec.runner_spec.kept_weights() if kept is None and spec.generations > 1 else None
    try:
        yield kept or own
    finally:
        if own is not None:
            own.close()


def perform(
    spec: RunSpec,
    pipeline: Callable[[I2VRequest], Generation],
    profiler: PhaseProfiler | None,
    consume: Callable[[Generation, Iterable[Any]], None],
) -> None:
    """Generate as often as asked for, and let ``consume`` take each video as the spec's consumer does.

    Args:
        spec: What to do.
        pipeline: With ``profiler`` among its sinks, if it emits events.
        profiler: Already active.
        consume: Given each generation and the chunks it may take; must take all of them.
    """
    left_open = []
    try:
        for number in range(1, spec.generations + 1):
            generation = _generate(spec, pipeline, profiler)
            if spec.consumer is Consumer.LEFT_OPEN:
                left_open.append(generation.video)
                consume(generation, islice(generation.video, max(1, generation.video.chunks - 1)))
            else:
                with generation.video as stream:
                    consume(generation, _guarded(stream) if spec.consumer is Consumer.GUARDED else stream)
                    del stream
            del generation
            if profiler is not None:
                profiler.generation_ended(number)
    finally:
        for stream in reversed(left_open):  # the last to open a phase is the first to end it
            stream.close()


def _generate(
    spec: RunSpec, pipeline: Callable[[I2VRequest], Generation], profiler: PhaseProfiler | None
) -> Generation:
    if spec.runner_spec.emits_events or profiler is None:
        return pipeline(spec.request)
    from i2v_lab.profiling.call_phases import CallPhases
    from i2v_lab.profiling.components import find_modules

    phases = CallPhases(profiler, find_modules(pipeline))
    with phases.track():
        generation = pipeline(spec.request)
    phases.finish()
    phases.write()
    return generation


def _guarded(stream: Iterator[Any]) -> Iterator[Any]:
    from i2v_lab.profiling.guard import guard_stream

    return guard_stream(stream)


def _drop(chunks: Iterable[Any]) -> None:
    for chunk in chunks:
        del chunk  # not to be held while the next one is decoded


@contextmanager
def metered(
    device: torch.device,
    run_dir: Path | None,
    metadata: Mapping[str, Any],
    *,
    attribute: bool = True,
    vram_cap_bytes: int | None = None,
) -> Iterator[PhaseProfiler]:
    """A profiler for a real run, whose records go to a run directory.

    Args:
        device: What to meter.
        run_dir: The run directory; ``None`` writes nothing.
        metadata: As :func:`i2v_lab.runs.provenance.run_metadata` collects them.
        attribute: Follow modules and autograd graphs, and on CUDA sample the whole card.
        vram_cap_bytes: Refuse allocations beyond it.

    Raises:
        OutputError: ``run_dir`` is not empty or cannot be written.
    """
    from i2v_lab.profiling.meters.devices import device_support
    from i2v_lab.profiling.meters.nvml import NvmlSampler, card_index
    from i2v_lab.profiling.phase_profiler import PhaseProfiler

    with ExitStack() as scopes:
        on_record = None
        if run_dir is not None:
            on_record = scopes.enter_context(RunWriter(run_dir, metadata)).append
            if attribute and device_support(device).process_bytes:
                scopes.enter_context(NvmlSampler(card_index(device), SAMPLE_INTERVAL_S, on_sample=on_record))
        yield scopes.enter_context(
            PhaseProfiler(device, attribute=attribute, vram_cap_bytes=vram_cap_bytes, on_record=on_record)
        )
