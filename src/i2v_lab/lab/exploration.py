"""The state behind the explorer: a question, and its answer from the cache or from a background forecast."""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from i2v_lab.capacity.cards import FITS
from i2v_lab.capacity.placement import Budgets
from i2v_lab.errors import I2VLabError
from i2v_lab.lab.answer import Answer
from i2v_lab.lab.background_forecast import LatestForecast
from i2v_lab.lab.held import (
    Forecaster,
    Held,
    NotCached,
    as_asked,
    chooses,
    fastest_placement,
    fastest_settings_within,
    from_cache,
    within,
)
from i2v_lab.lab.question import Question
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.profiling.records import CostRecord, Forecast, ModuleRecord, PhaseRecord, Record, TimelineRecord
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.sources import as_run
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import Run

TIMELINE_POINTS = 300  # enough for a small figure
CACHED = 64  # answers in this process, about 100 kB each
SOLVED = 4  # requests whose forecasts are kept for another budget or GPU, some MB each
MODULE_DEPTH = 2  # to which module paths are aggregated


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
        self._asked: Question | None = None
        self._known: OrderedDict[str, tuple[Held, Run]] = OrderedDict()
        self._budgets: OrderedDict[str, Budgets] = OrderedDict()
        self._lock = threading.RLock()
        self._background = LatestForecast(self._ended)

    def ask(self, question: Question, *, wait: bool = False) -> None:
        """Replace the question.

        Args:
            question: The new one; a request that its model does not support becomes a ``problem``.
            wait: Compute a forecast that is not cached in this thread, before returning.
        """
        with self._lock:
            self.question, self.problem, self._asked = question, None, None
            found = None
            try:
                assert question.spec  # refused at once, not by a process
                room_bytes = question.room_bytes()
                self._asked = question
                found = self._find(question, room_bytes)
                if found is None and wait:
                    found = self._keep(question, held_for(question, room_bytes))
                if found is not None:
                    self.answer = self._answer(question, room_bytes, *found)
            except I2VLabError as error:
                self.problem = str(error)
            self.working = found is None and self.problem is None
            if self.working:
                self._background.ask(question, partial(held_for, question, room_bytes, small=True))
            else:
                self._background.cancel()
        self.on_change()

    def _find(self, question: Question, room_bytes: int) -> tuple[Held, Run] | None:
        """What is known already, or follows from cached forecasts."""
        key = _key(question)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        try:
            return self._keep(question, held_for(question, room_bytes, from_cache, self._budgets_of(question)))
        except NotCached:
            return None

    def _keep(self, question: Question, held: Held) -> tuple[Held, Run]:
        small = _small(held)
        run = as_run(RunSpec(request=small.request, model=question.model), small.forecast)
        self._known[_key(question)] = small, run
        while len(self._known) > CACHED:
            self._known.popitem(last=False)
        return small, run

    def _budgets_of(self, question: Question) -> Budgets | None:
        """The same for every GPU and budget of a request: its forecasts are read once."""
        if not question.searches or not runner_of(load_architecture(question.model)).techniques:
            return None
        key = _key(replace(question, gpu="", budget="", memory_bytes=None))
        if key not in self._budgets:
            self._budgets[key] = _budgets(question, from_cache)
            while len(self._budgets) > SOLVED:
                self._budgets.popitem(last=False)
        self._budgets.move_to_end(key)
        return self._budgets[key].on(question.card)

    def _ended(self, asked: Question, held: Held | None, error: I2VLabError | None) -> None:
        with self._lock:
            if self._asked != asked:
                return  # replaced in the meantime
            try:
                if held is not None:
                    self.answer = self._answer(asked, asked.room_bytes(), *self._keep(asked, held))
            except I2VLabError as damaged:
                error = damaged
            if error is not None:
                self.problem = str(error)
            self.working = False  # last: readers of it expect the answer or the problem to be set
        self.on_change()

    def _answer(self, question: Question, room_bytes: int, held: Held, run: Run) -> Answer:
        if held.chosen:
            return Answer(question, run, held, room_bytes)
        held = within(held, room_bytes, question.device)
        fits = held.verdict == FITS or not chooses(question.model)
        return Answer(question, run, held, room_bytes, None if fits else self._instead(question, room_bytes))

    def _instead(self, question: Question, room_bytes: int) -> Held | None:
        searched = replace(question, request=replace(question.request, memory=MemoryPolicy.AUTO, placement=None))
        found = self._find(searched, room_bytes)
        return found[0] if found is not None and found[0].verdict == FITS else None

    def close(self) -> None:
        """Cancel a forecast in progress."""
        self.working = False
        self._background.cancel(wait_s=20.0)  # a process that has just been asked for may still be starting

    def __enter__(self) -> Exploration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def held_for(
    question: Question,
    room_bytes: int,
    forecast: Forecaster = forecast_request,
    budgets: Budgets | None = None,
    *,
    small: bool = False,
) -> Held:
    """How a question's request is held.

    Args:
        question: The question.
        room_bytes: The memory that the process may take.
        forecast: Where forecasts come from.
        budgets: Of a request that is placed; by default new ones.
        small: Leave out what no view shows, so that it is quick to send to another process.
    """
    request, model, device = question.request, question.model, question.device
    if not question.searches:
        held = as_asked(request, model, device, forecast)
    elif runner_of(load_architecture(model)).settings:
        request = replace(request, memory=MemoryPolicy.RESIDENT)
        held = fastest_settings_within(request, model, room_bytes, question.card, device, forecast)
    else:
        budgets = budgets or _budgets(question, forecast)
        held = fastest_placement(budgets, request, room_bytes, question.card, device)
    return _small(held) if small else held


def _budgets(question: Question, forecast: Forecaster) -> Budgets:
    asked = replace(question.request, memory=MemoryPolicy.RESIDENT)
    return Budgets(asked, question.model, question.device, gpu=question.card, forecast=forecast)


def _key(question: Question) -> str:
    """Equal for questions whose memory is held in the same way."""
    where = [question.gpu, question.budget, question.memory_bytes] if question.searches else []
    return json.dumps([question.spec.memory_key(), question.searches, question.request.image, question.device, *where])


def _small(held: Held) -> Held:
    return replace(held, forecast=replace(held.forecast, records=_downsampled(held.forecast)))


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
