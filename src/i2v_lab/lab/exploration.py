"""The state behind the explorer: a question, its answer from the cache or from a background forecast, and its code."""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from i2v_lab.capacity.cards import FITS, NO, TIGHT, Fit, fitting_bytes, gpu_memory_bytes, judge, judge_all
from i2v_lab.capacity.time_model import time_in_words
from i2v_lab.errors import I2VLabError
from i2v_lab.lab.background_forecast import LatestForecast
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import NO_SETTINGS
from i2v_lab.profiling.records import CostRecord, Forecast, ModuleRecord, PhaseRecord, Record, TimelineRecord
from i2v_lab.reporting.tables import as_sentence
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import cached_forecast, forecast_spec
from i2v_lab.runs.sources import as_run
from i2v_lab.runs.spec import FULL_SIZE_MODEL, RunSpec
from i2v_lab.runs.store import Run
from i2v_lab.studies.placed import NONE, PUBLISHED, Placed, base_specs, best_placements, rates_of
from i2v_lab.units import format_bytes, format_seconds

DEFAULT_GPU = "RTX 4090"
TIMELINE_POINTS = 300  # enough for a small figure
CACHED = 64  # forecasts in this process, about 100 kB each
UNSET = NO_SETTINGS.to_json()
MODULE_DEPTH = 2  # to which module paths are aggregated


@dataclass(frozen=True, kw_only=True)
class Question:
    """Whether a request fits a GPU.

    Attributes:
        request: What would be generated.
        model: An architecture's name.
        gpu: A GPU in ``data/gpus.csv``, or any name together with ``memory_bytes``.
        memory_bytes: The GPU's memory; by default that in ``data/gpus.csv``.
        device: ``cuda``, or ``cpu`` for live storages against host memory.

    Example:
        >>> question = Question(request=I2VRequest(image="stills/lighthouse.png", frames=25), gpu="L4")
        >>> question.spec.name
        '1024x768x25'
    """

    request: I2VRequest
    model: str = FULL_SIZE_MODEL
    gpu: str = DEFAULT_GPU
    memory_bytes: int | None = None
    device: str = "cuda"

    @property
    def spec(self) -> RunSpec:
        """The run to forecast.

        Raises:
            InvalidRequest: The model does not support the request.
        """
        return RunSpec(request=self.request, model=self.model)

    def code(self) -> str:
        """The source of a notebook cell that gives the same answer without widgets.

        Example:
            >>> request = I2VRequest(image="stills/lighthouse.png", width=512, height=384, frames=25, tiling=None)
            >>> print(Question(request=request, model="ltx-2.3-tiny", gpu="L4").code())
            from i2v_lab import I2VRequest, Tiling, forecast_request
            from i2v_lab.capacity.cards import gpu_memory_bytes, judge
            <BLANKLINE>
            request = I2VRequest(
                image="stills/lighthouse.png",
                width=512,
                height=384,
                frames=25,
                quantization="fp8-cast",
                tiling=None,
                decode_scope="no_grad",
            )
            forecast = forecast_request(request, model="ltx-2.3-tiny")
            judge(forecast, "L4", gpu_memory_bytes("L4"))
        """
        request, tiling = self.request, self.request.tiling
        tiles = "None"
        if tiling is not None:
            sizes = (tiling.tile_px, tiling.tile_overlap_px, tiling.tile_frames, tiling.tile_overlap_frames)
            tiles = f"Tiling({', '.join(map(str, sizes))})"
        lines = [f"    image={_quoted(request.image)},"]
        lines += [f"    {name}={getattr(request, name)}," for name in ("width", "height", "frames")]
        lines += [f"    quantization={_quoted(request.quantization.value)},", f"    tiling={tiles},"]
        lines += [f"    decode_scope={_quoted(request.decode_scope.value)},"]
        if request.memory is not MemoryPolicy.RESIDENT:
            lines.append(f"    memory={_quoted(request.memory.value)},")
        if request.placement is not None:
            lines.append(f"    placement={request.placement.to_json()!r},")
        names = "I2VRequest, Tiling, forecast_request"
        if not request.settings.is_default:
            given = {name: value for name, value in request.settings.to_json().items() if value != UNSET[name]}
            lines.append(
                f"    settings=MemorySettings({', '.join(f'{name}={value!r}' for name, value in given.items())}),"
            )
            names = "I2VRequest, MemorySettings, Tiling, forecast_request"
        gpu = _quoted(self.gpu)
        return "\n".join(
            [
                f"from i2v_lab import {names}",
                "from i2v_lab.capacity.cards import gpu_memory_bytes, judge",
                "",
                "request = I2VRequest(",
                *lines,
                ")",
                f"forecast = forecast_request(request, model={_quoted(self.model)})",
                f"judge(forecast, {gpu}, gpu_memory_bytes({gpu}))",
            ]
        )


@dataclass(frozen=True)
class Answer:
    """A forecast's answer to a question.

    Attributes:
        question: The question.
        run: The forecast as a run, with modules aggregated and the timeline downsampled.
        needed_bytes: Device memory of the process: peak reserved memory, its margin and the CUDA context.
        context_bytes: The CUDA context alone.
        fit: The verdict for the question's GPU.
        smallest: The smallest GPU in ``data/gpus.csv`` that it fits; ``None`` if there is none.
        duration: How long it takes on the question's GPU, in a sentence; empty for a CPU, and where it does not fit.
        placed: Where it does not fit: the fastest placement that does; ``None`` if the forecasts that say so are not
            cached.
    """

    question: Question
    run: Run
    needed_bytes: int
    context_bytes: int
    fit: Fit
    smallest: Fit | None
    duration: str
    placed: Placed | None = None

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        has = f"{self.fit.gpu} has {format_bytes(self.fit.memory_bytes)}"
        needs = f"this needs {format_bytes(self.needed_bytes)}"
        if self.fit.verdict == FITS:
            left = format_bytes(self.fit.memory_bytes - self.needed_bytes)
            return f"It fits: {has}, {needs}; {left} remain free."
        if self.fit.verdict == TIGHT:
            reserve = "unless the allocator releases cached blocks during the run"
            return f"It is tight: {has}, {needs} {reserve}. {self._alternative()}"
        over = format_bytes(self.needed_bytes - self.fit.memory_bytes)
        return f"It does not fit as it is: {has}, {needs}, {over} too much. {self._alternative()}"

    def _alternative(self) -> str:
        if self.placed is not None and self.placed.placement != NONE:
            seconds = self.placed.predicted_seconds
            caveat = " by published rates, not measured" if rates_of(self.fit.gpu) == PUBLISHED else ""
            takes = "" if seconds is None else f", in {format_seconds(seconds, rough=True)}{caveat}"
            return f"With a memory budget of {format_bytes(self.fit.memory_bytes)} it runs, {self.placed.name}{takes}."
        if self.placed is None and self.question.spec.runner_spec.techniques and self.question.device == "cuda":
            return "A memory budget of that size may have a placement: i2v-lab forecast --vram-budget solves for it."
        if self.question.memory_bytes is not None:
            return "A smaller size, fewer frames or smaller tiles need less."
        if self.smallest is None:
            return "It fits no GPU in the list."
        return f"The smallest GPU that it fits is the {self.smallest.gpu}."


class Exploration:
    """The current question and its answer.

    A cached forecast is answered immediately. Any other one is computed in the background and cancelled by the next
    question; until it ends, the previous answer is kept.

    Args:
        question: The first one; call :meth:`ask` to have it answered.
        on_change: Called when the question, the answer or the problem has changed, in the thread that called
            :meth:`ask` or in that of the background forecast.

    Attributes:
        question: The current one.
        answer: The latest; of a previous question while ``working`` or after a ``problem``.
        problem: Why the question has no answer, in one line; ``None`` otherwise.
        working: Whether a forecast is in progress.

    Example:
        >>> request = I2VRequest(image="stills/lighthouse.png", width=64, height=64, frames=9)
        >>> with Exploration(Question(request=request, model="ltx-2.3-tiny")) as exploration:  # doctest: +SKIP
        ...     exploration.ask(exploration.question, wait=True)
        ...     exploration.answer.sentence
        'It fits: RTX 4090 has 23.52 GiB, ...'
    """

    def __init__(self, question: Question, on_change: Callable[[], None] = lambda: None) -> None:
        self.question = question
        self.answer: Answer | None = None
        self.problem: str | None = None
        self.working = False
        self.on_change = on_change
        self._spec: RunSpec | None = None
        self._cached: OrderedDict[str, tuple[Run, Forecast]] = OrderedDict()
        self._lock = threading.RLock()
        self._background = LatestForecast(self._ended)

    def ask(self, question: Question, *, wait: bool = False) -> None:
        """Replace the question.

        Args:
            question: The new one; a request that its model does not support becomes a ``problem``.
            wait: Compute a forecast that is not cached in this thread, before returning.
        """
        with self._lock:
            self.question, self.problem, self._spec = question, None, None
            found = None
            try:
                self._spec = question.spec
                found = self._find(self._spec, question.device, wait=wait)
            except I2VLabError as error:
                self.problem = str(error)
            self.working = found is None and self.problem is None
            if found is not None:
                self.answer = _answer(question, *found)
            if self.working and self._spec is not None:
                self._background.ask(self._spec, question.device)
            else:
                self._background.cancel()
        self.on_change()

    def _find(self, spec: RunSpec, device: str, *, wait: bool) -> tuple[Run, Forecast] | None:
        key = f"{spec.memory_key()} {spec.request.image} {device}"
        found = self._cached.get(key)
        if found is None:
            forecast = forecast_spec(spec, device) if wait else cached_forecast(spec, device)
            if forecast is None:
                return None
            small = replace(forecast, records=_downsampled(forecast))
            found = as_run(spec, small), small
        self._cached[key] = found
        self._cached.move_to_end(key)
        while len(self._cached) > CACHED:
            self._cached.popitem(last=False)
        return found

    def _ended(self, spec: RunSpec, error: I2VLabError | None) -> None:
        with self._lock:
            if self._spec != spec:
                return  # replaced in the meantime
            found = None
            try:
                found = self._find(spec, self.question.device, wait=False) if error is None else None
            except I2VLabError as damaged:
                error = damaged
            if found is not None:
                self.answer = _answer(self.question, *found)
            else:
                self.problem = str(error) if error is not None else "the forecast is not in the cache; ask again"
            self.working = False  # last: readers of it expect the answer or the problem to be set
        self.on_change()

    def close(self) -> None:
        """Cancel a forecast in progress."""
        self.working = False
        self._background.cancel(wait_s=5.0)

    def __enter__(self) -> Exploration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a Python literal too, line breaks escaped


def _answer(question: Question, run: Run, forecast: Forecast) -> Answer:
    context = forecast.context_bytes
    fits = [fit for fit in judge_all(forecast) if fit.verdict == FITS]
    memory_bytes = gpu_memory_bytes(question.gpu) if question.memory_bytes is None else question.memory_bytes
    fit = judge(forecast, question.gpu, memory_bytes)
    placed = None if fit.verdict == FITS else _placed(question, memory_bytes)
    card = question.gpu.removeprefix("this ")
    runs = question.device == "cuda" and fit.verdict != NO
    duration = as_sentence(time_in_words(forecast, card)) if runs else ""
    return Answer(question, run, fitting_bytes(forecast), context, fit, next(iter(fits), None), duration, placed)


def _placed(question: Question, memory_bytes: int) -> Placed | None:
    """The fastest placement within a GPU's memory, if the forecasts of which it is computed are cached."""
    if not question.spec.runner_spec.techniques or question.device != "cuda":
        return None
    if any(cached_forecast(spec) is None for spec in base_specs(question.request, question.model)):
        return None
    return best_placements(question.request, question.model, [(question.gpu, memory_bytes)])[0]


def _downsampled(forecast: Forecast) -> tuple[Record, ...]:
    """What the views show: phases with their costs, aggregated modules, and the maxima of intervals of the timeline."""
    by_module: Counter[tuple[str, str, str]] = Counter()
    records: list[Record] = []
    for record in forecast.records:
        match record:
            case PhaseRecord() | CostRecord():
                records.append(record)
            case ModuleRecord(phase=phase, module=module, category=category, nbytes=nbytes):
                by_module[phase, ".".join(module.split(".")[:MODULE_DEPTH]), category] += nbytes
    records += [
        ModuleRecord(phase, module, category, nbytes) for (phase, module, category), nbytes in by_module.items()
    ]
    moments = [record for record in forecast.records if isinstance(record, TimelineRecord)]
    step = -(-len(moments) // TIMELINE_POINTS) or 1
    for start in range(0, len(moments), step):
        records.append(max(moments[start : start + step], key=_live_bytes))
    return tuple(records)


def _live_bytes(moment: TimelineRecord) -> int:
    return moment.weight_bytes + moment.saved_bytes + moment.activation_bytes + moment.other_bytes
