"""One call of anybody's pipeline under the same lens as ours: the same phases, the same records."""

from __future__ import annotations

import functools
import inspect
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from i2v_lab.errors import ProfilerError
from i2v_lab.events import Phase
from i2v_lab.profiling.call_phases import CallPhases
from i2v_lab.profiling.components import find_modules
from i2v_lab.profiling.containers import map_leaves
from i2v_lab.profiling.decoded import decoded_phase
from i2v_lab.profiling.named_phases import NO_NAMES, NamedPhases
from i2v_lab.profiling.phase_html import phases_html
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.record_frames import record_frame
from i2v_lab.profiling.records import PhaseRecord, Record
from i2v_lab.runs.execute import metered
from i2v_lab.runs.provenance import installed_version, run_metadata, runner_packages
from i2v_lab.units import format_bytes

if TYPE_CHECKING:
    import pandas as pd


def profile_call(
    pipeline: Callable[..., Any],
    *args: Any,
    run_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    attribute: bool = True,
    vram_cap_bytes: int | None = None,
    profiler: PhaseProfiler | None = None,
    phases: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> ProfiledCall:
    """Call a pipeline that knows nothing of this package, and charge its time and memory to phases.

    Phases are found from the calls of its components by what these are named (see
    :func:`~i2v_lab.profiling.components.role_of`), whether the pipeline holds them or builds them when called, and
    follow one another without a gap (see :mod:`~i2v_lab.profiling.call_phases`). A component whose names say nothing is
    a phase of its own name; a pipeline that holds none is one phase, ``call``. ``phases`` overrules all of that. A call
    of the transformer is a step: with guidance there are several for one of the scheduler's. What the pipeline has
    other threads do is metered too.

    What is lazy in the result, also in a tuple, list, dictionary or dataclass, is followed when it is consumed and
    charged to ``decode_video``, what the consumer does between two items included. Its items may be produced in any
    thread; what the consumer allocates between two of them on the CPU is metered in the thread of the call only. The
    profile ends with the call or with the last such stream; use it as a context manager where one may be left unread.

    Args:
        pipeline: Anything that can be called. Its grad mode is the caller's.
        *args: Its arguments.
        run_dir: Write a run directory there; ``i2v-lab show`` reads it.
        device: Whose memory is metered; by default the pipeline's own, or that of its first parameter, else the CPU.
        attribute: Follow modules and autograd graphs.
        vram_cap_bytes: Pretend to a smaller card.
        profiler: One that is active already, such as that of
            :func:`~i2v_lab.profiling.fake.forecast.forecasting`; then the four options before do not apply.
        phases: Parts of the pipeline by the name of their phase, for what the names do not tell: modules, methods,
            functions, their dotted names in the pipeline, or lists of these, such as
            ``{"denoise": pipeline.dit, "decode_video": "vae.model.decoder"}``.
        **kwargs: Its other arguments; bind one that has an option's name with ``functools.partial``.

    Raises:
        ProfilerError: Another profiler is active, the pipeline is asynchronous, or something in ``phases`` is not part
            of the pipeline.
        OutputError: ``run_dir`` is not empty or cannot be written.

    Example:
        >>> class Pipeline:
        ...     def __init__(self):
        ...         self.vae = torch.nn.ModuleDict({"decoder": torch.nn.Conv2d(4, 3, 3)})
        ...
        ...     def __call__(self, latents):
        ...         return (self.vae["decoder"](latent) for latent in latents)
        >>> call = profile_call(Pipeline(), torch.zeros(2, 1, 4, 8, 8))
        >>> [frame.requires_grad for frame in call.result], call.peak.phase
        ([True, True], 'decode_video')
    """
    _refuse_coroutines(pipeline)
    components = find_modules(pipeline, args, kwargs)
    named = NamedPhases(phases, pipeline, components) if phases is not None else NO_NAMES
    scopes = ExitStack()
    is_own = profiler is None
    with scopes:
        if profiler is None:
            target = torch.device(device) if device is not None else device_of(pipeline, components)
            metadata = _metadata(pipeline, args, kwargs, target)
            folder = None if run_dir is None else Path(run_dir)
            profiler = scopes.enter_context(
                metered(target, folder, metadata, attribute=attribute, vram_cap_bytes=vram_cap_bytes)
            )
        own = {name: module for name, module in components.items() if module is not pipeline}
        call = ProfiledCall(profiler, CallPhases(profiler, own, pipeline, named))
        call._phases.decoded = decoded_phase(pipeline)
        call._is_own = is_own
        call._run(pipeline, args, kwargs)
        if call._streams and is_own:
            profiler.threads.leave()  # they may be consumed in another thread, and this one cannot be left from there
        call._scopes = scopes.pop_all()
    if not call._streams:
        call.close()
    return call


class ProfiledCall:
    """A call and its profile, made by :func:`profile_call`.

    Attributes:
        result: What the pipeline returned; what is lazy in it is followed.
        profiler: Has the records.
        seconds: Of the call, and of its streams from their first item to their end.

    Example:
        >>> call = profile_call(torch.nn.Linear(2, 2), torch.ones(1, 2))
        >>> call.result.shape, [record.phase for record in call.phases]
        (torch.Size([1, 2]), ['call'])
    """

    def __init__(self, profiler: PhaseProfiler, phases: CallPhases) -> None:
        self.profiler = profiler
        self.result: Any = None
        self.seconds = 0.0
        self._phases = phases
        self._scopes = ExitStack()
        self._streams: list[FollowedStream] = []
        self._is_own = False
        self._thread = threading.get_ident()

    @property
    def records(self) -> list[Record]:
        """All records so far."""
        return self.profiler.records

    @property
    def phases(self) -> list[PhaseRecord]:
        """The phases that have ended, in that order."""
        return self.profiler.phases

    @property
    def peak(self) -> PhaseRecord:
        """The phase with the highest peak."""
        return self.profiler.peak

    def to_frame(self) -> pd.DataFrame:
        """The phases that have ended as a table: one row a phase, one column a field of its record."""
        return record_frame(PhaseRecord, self.phases)

    def _run(self, pipeline: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> None:
        start_s = time.perf_counter()
        with self._phases.track():
            result = pipeline(*args, **kwargs)
        self._phases.finish()
        self.seconds = time.perf_counter() - start_s
        self.result = self._follow(result)
        self._phases.decoded = Phase.DECODE_VIDEO.value if self._streams else decoded_phase(pipeline, result)
        self._phases.write()

    def _follow(self, value: Any) -> Any:
        """The same value, with what is lazy in it followed."""

        def followed(leaf: Any) -> Any:
            if not isinstance(leaf, Iterator) or isinstance(leaf, io.IOBase):
                return leaf
            self._streams.append(FollowedStream(leaf, self))
            return self._streams[-1]

        return map_leaves(followed, value)

    def _ended(self, stream: FollowedStream, error: BaseException | None) -> None:
        self._streams.remove(stream)
        if not self._streams:
            kind = type(error) if error is not None else None
            scopes, self._scopes = self._scopes, ExitStack()
            scopes.__exit__(kind, error, error.__traceback__ if error is not None else None)

    def close(self) -> None:
        """End the profile; streams that have not been read to their end are closed."""
        for stream in list(self._streams):
            stream.close()
        self._scopes.close()
        if self._is_own:
            self.profiler.threads.leave()  # where it ended in another thread

    @contextmanager
    def _metered(self) -> Iterator[None]:
        """Meter what produces an item, in its thread; and from then on all that the thread of the call does."""
        if threading.get_ident() == self._thread:
            self.profiler.threads.enter()
            yield
        else:
            with self.profiler.threads.metered():
                yield

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        if not self.phases:
            return phases_html([], "ProfiledCall: no phase has ended yet.")
        words = f"ProfiledCall: the peak is {format_bytes(self.peak.peak_bytes)} in {self.peak.phase}."
        return phases_html(self.phases, words)


class FollowedStream(Iterator[Any]):
    """A lazy part of a call's result: what producing an item takes is charged to the call; else it is as it was."""

    def __init__(self, source: Iterator[Any], call: ProfiledCall) -> None:
        self._source: Any = source
        self._call = call
        self._start_s: float | None = None
        self._is_over = False

    def __next__(self) -> Any:
        return self._advance("__next__")

    def send(self, value: Any) -> Any:
        """As a generator's."""
        return self._advance("send", value)

    def throw(self, *error: Any) -> Any:
        """As a generator's."""
        return self._advance("throw", *error)

    def _advance(self, method: str, *args: Any) -> Any:
        if self._is_over:
            raise StopIteration
        if self._start_s is None:
            self._start_s = time.perf_counter()
        item: Any = None
        returned: tuple[Any, ...] = ()
        try:
            with self._call._metered(), self._call._phases.track(Phase.DECODE_VIDEO.value):
                try:
                    item = getattr(self._source, method)(*args)
                except StopIteration as stop:  # the end is no failure
                    returned = (stop.value,)
        except BaseException as error:
            self._end(completed=False, error=error)
            raise
        if returned:
            self._end(completed=True)
            raise StopIteration(*returned)
        self._call._phases.step()
        return item

    def close(self) -> None:
        """Stop early."""
        if self._is_over:
            return
        try:
            close = getattr(self._source, "close", None)
            if close is not None:
                with self._call._metered():
                    close()
        finally:
            self._end(completed=False)

    def _end(self, *, completed: bool, error: BaseException | None = None) -> None:
        self._is_over = True
        self._source = iter(())  # what a generator holds goes with it
        self._call._phases.finish(completed=completed)
        if self._start_s is not None:
            self._call.seconds += time.perf_counter() - self._start_s
        self._call._phases.write()
        self._call._ended(self, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def _refuse_coroutines(pipeline: Any) -> None:
    function = pipeline
    while isinstance(function, functools.partial):
        function = function.func
    for each in (function, type(function).__call__):
        if inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each):
            name = getattr(function, "__qualname__", type(function).__name__)
            raise ProfilerError(
                f"{name} is asynchronous, so calling it runs nothing; profile lambda: asyncio.run(...)", pipeline=name
            )


def device_of(pipeline: Any, components: Mapping[str, torch.nn.Module]) -> torch.device:
    """Where a pipeline computes: as it says itself, or where its first parameter is; the CPU if nothing says."""
    for name in ("_execution_device", "device"):  # the first is diffusers', true of offloaded pipelines too
        said = getattr(pipeline, name, None)
        if isinstance(said, str | torch.device):
            return torch.device(said)
    parameters = (parameter for module in components.values() for parameter in module.parameters())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _metadata(pipeline: Any, args: Any, kwargs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What can be written of a call: who was called, and those of its arguments that are plain values."""
    try:
        arguments = dict(inspect.signature(pipeline).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # it says nothing of its arguments, or they are wrong, which it will say itself
        arguments = dict(kwargs)
    while isinstance(pipeline, functools.partial):
        arguments = {**pipeline.keywords, **arguments}
        pipeline = pipeline.func
    name = getattr(pipeline, "__qualname__", None) or type(pipeline).__name__
    plain = {key: each for key, each in arguments.items() if isinstance(each, str | int | float | None)}
    owner = getattr(pipeline, "__self__", pipeline)  # of a bound method
    named = owner if inspect.isroutine(owner) or inspect.isclass(owner) else type(owner)
    package = named.__module__.partition(".")[0]
    distribution = package.replace("_", "-")
    seed = int(plain.get("seed") or 0)
    return run_metadata(
        str(device),
        model=name,
        request=plain,
        seed=seed,
        argv=sys.argv,
        packages=[*runner_packages(), distribution],
        package=package,
        package_version=installed_version(distribution),
    )
