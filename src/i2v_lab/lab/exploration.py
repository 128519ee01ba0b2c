"""Asking one forecast after another: a question, its answer from the cache or from the background, and its code."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from i2v_lab.capacity.cards import FITS, TIGHT, Fit, gpu_memory_bytes, judge, judge_all
from i2v_lab.errors import I2VLabError
from i2v_lab.lab.background_forecast import LatestForecast
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.profiling.records import Forecast, ModuleRecord, PhaseRecord, Record, TimelineRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import cached_forecast, forecast_spec
from i2v_lab.runs.sources import as_run
from i2v_lab.runs.spec import FULL_SIZE_MODEL, RunSpec
from i2v_lab.runs.store import Run
from i2v_lab.units import format_bytes

DEFAULT_GPU = "RTX 4090"
MOMENTS = 300  # of a timeline that is drawn small
KEPT = 64  # answers; each takes some 100 kB
MODULE_DEPTH = 2  # parts of a module's path that are told apart


@dataclass(frozen=True, kw_only=True)
class Question:
    """Does this request fit that card?

    Attributes:
        request: What would be generated.
        model: An architecture's name.
        gpu: A card of ``data/gpus.csv``, or any name where ``memory_bytes`` is given.
        memory_bytes: What that card has; by default as in ``data/gpus.csv``.
        device: ``cuda``, or ``cpu`` for live storages beside a machine's memory.

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
        """What is forecast: everything but the card.

        Raises:
            InvalidRequest: The model does not support the request.
        """
        return RunSpec(request=self.request, model=self.model)

    def code(self) -> str:
        """A cell that gives the same answer without any widget.

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
        gpu = _quoted(self.gpu)
        return "\n".join(
            [
                "from i2v_lab import I2VRequest, Tiling, forecast_request",
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
    """What a forecast says to a question.

    Attributes:
        question: The question.
        run: The forecast as a run, with modules rolled up and the timeline thinned out.
        needed_bytes: What the process would take from the card: what the allocator reserves, and the CUDA context.
        context_bytes: The context alone.
        fit: The card's verdict.
        smallest: The smallest card that it fits, ``None`` if none does.
    """

    question: Question
    run: Run
    needed_bytes: int
    context_bytes: int
    fit: Fit
    smallest: Fit | None

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        has = f"{self.fit.gpu} has {format_bytes(self.fit.memory_bytes)}"
        needs = f"this takes {format_bytes(self.needed_bytes)}"
        if self.fit.verdict == FITS:
            left = format_bytes(self.fit.memory_bytes - self.needed_bytes)
            return f"It fits: {has}, {needs}, so {left} are left."
        if self.fit.verdict == TIGHT:
            reserve = "unless the allocator gives back what it holds in reserve"
            return f"It is tight: {has}, {needs} {reserve}. {self._others()}"
        over = format_bytes(self.needed_bytes - self.fit.memory_bytes)
        return f"It does not fit: {has}, {needs}, {over} too much. {self._others()}"

    def _others(self) -> str:
        if self.question.memory_bytes is not None:
            return "A smaller size, fewer frames or smaller tiles take less."
        if self.smallest is None:
            return "No card in the list takes it."
        return f"The smallest card that takes it is the {self.smallest.gpu}."


class Exploration:
    """The question that is asked now, and what is known of it.

    What is in the cache is answered at once. Anything else is forecast in the background, which the next question ends
    if it comes sooner; the last answer stays meanwhile.

    Args:
        question: The first one.
        on_change: Called when question, answer or problem have changed: in the thread that asks, or in that of the
            background forecast. Not before :meth:`ask` is called the first time.

    Attributes:
        question: What is asked.
        answer: The last answer there was; of another question while ``working``.
        problem: Why there is no answer to the question, in one line; ``None`` otherwise.
        working: Whether a forecast is under way.

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
        self._known: OrderedDict[str, tuple[Run, Forecast]] = OrderedDict()
        self._lock = threading.RLock()
        self._background = LatestForecast(self._ended)

    def ask(self, question: Question, *, wait: bool = False) -> None:
        """Ask something else.

        Args:
            question: What to ask.
            wait: Work it out here and now, if it is not known.
        """
        with self._lock:
            self.question, self.problem = question, None
            known = self._find(question, wait)
            self.working = known is None and self.problem is None
            if known is not None:
                self.answer = _answer(question, *known)
            if self.working:
                self._background.ask(question.spec, question.device)
            else:
                self._background.drop()
        self.on_change()

    def _find(self, question: Question, wait: bool) -> tuple[Run, Forecast] | None:
        spec, device = question.spec, question.device
        key = f"{spec.memory_key()} {spec.request.image} {device}"
        known = self._known.get(key)
        if known is None:
            try:
                forecast = forecast_spec(spec, device) if wait else cached_forecast(spec, device)
            except I2VLabError as error:
                self.problem = str(error)
                return None
            if forecast is None:
                return None
            small = replace(forecast, records=_thinned(forecast))
            known = as_run(spec, small), small
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return known

    def _ended(self, spec: RunSpec, error: I2VLabError | None) -> None:
        with self._lock:
            if self.question.spec != spec:
                return  # overtaken in this very moment
            known = None if error is not None else self._find(self.question, wait=False)
            if known is not None:
                self.answer = _answer(self.question, *known)
            else:
                self.problem = str(error) if error is not None else "the forecast is not in the cache; ask again"
            self.working = False  # only now: who sees it expects what came of it
        self.on_change()

    def close(self) -> None:
        """End what is under way."""
        self.working = False
        self._background.drop(wait_s=5.0)

    def __enter__(self) -> Exploration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _answer(question: Question, run: Run, forecast: Forecast) -> Answer:
    context = forecast.context_bytes
    fits = [fit for fit in judge_all(forecast) if fit.verdict == FITS]
    memory_bytes = gpu_memory_bytes(question.gpu) if question.memory_bytes is None else question.memory_bytes
    fit = judge(forecast, question.gpu, memory_bytes)
    return Answer(question, run, forecast.peak_reserved_bytes + context, context, fit, next(iter(fits), None))


def _thinned(forecast: Forecast) -> tuple[Record, ...]:
    """The records that are shown: phases, modules rolled up, some hundred moments, no peak left out."""
    by_module: Counter[tuple[str, str, str]] = Counter()
    kept: list[Record] = []
    for record in forecast.records:
        match record:
            case PhaseRecord():
                kept.append(record)
            case ModuleRecord(phase=phase, module=module, category=category, nbytes=nbytes):
                by_module[phase, ".".join(module.split(".")[:MODULE_DEPTH]), category] += nbytes
    kept += [ModuleRecord(phase, module, category, nbytes) for (phase, module, category), nbytes in by_module.items()]
    moments = [record for record in forecast.records if isinstance(record, TimelineRecord)]
    step = -(-len(moments) // MOMENTS) or 1
    for start in range(0, len(moments), step):
        kept.append(max(moments[start : start + step], key=_alive_bytes))
    return tuple(kept)


def _alive_bytes(moment: TimelineRecord) -> int:
    return moment.weight_bytes + moment.saved_bytes + moment.activation_bytes + moment.other_bytes
