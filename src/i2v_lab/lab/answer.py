"""The answer to a question of the explorer: the verdict, its reasons, and what to do where a request does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from i2v_lab.capacity.budget import as_budget, budget_bytes
from i2v_lab.capacity.cards import FITS, NO, TIGHT, Fit, gpu_table
from i2v_lab.capacity.time_model import time_in_words
from i2v_lab.lab.held import Held, chooses
from i2v_lab.lab.question import Question
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.reporting.tables import as_sentence
from i2v_lab.runs.store import Run
from i2v_lab.units import format_bytes


@dataclass(frozen=True)
class Remedy:
    """A change of the controls after which a request fits.

    Attributes:
        label: What a button says.
        changes: Values by the control's name.
    """

    label: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A forecast's answer to a question.

    Attributes:
        question: The question.
        run: The forecast as a run, with modules aggregated and the timeline downsampled.
        held: The request as it would run, and what it takes.
        room_bytes: The memory that the process may take: the budget, or all of the GPU.
        instead: Where it does not fit as it is: the fastest way to hold it that does; ``None`` if there is none, or
            the forecasts that say so are not cached.
    """

    question: Question
    run: Run
    held: Held
    room_bytes: int
    instead: Held | None = None

    @property
    def fit(self) -> Fit:
        """The verdict for the memory that there is."""
        return Fit(self.question.gpu, self.room_bytes, self.held.verdict)

    @property
    def duration(self) -> str:
        """How long it takes on the question's GPU, in a sentence; empty for a CPU, and where it does not fit."""
        if self.question.device != "cuda" or self.held.verdict == NO:
            return ""
        return as_sentence(time_in_words(self.held.forecast, self.question.card))

    @property
    def host(self) -> str:
        """How much host memory its weights wait in, in a sentence; empty where none do, or that is not known."""
        if not self.held.host_bytes or self.question.device != "cuda":
            return ""
        kind = "" if self.held.request.settings.offloads else "page-locked "
        return as_sentence(f"weights wait in {format_bytes(self.held.host_bytes)} of {kind}host memory")

    @property
    def needed_bytes(self) -> int:
        """Device memory that it needs, the CUDA context and margins included."""
        return self.held.needed_bytes

    @property
    def context_bytes(self) -> int:
        """The CUDA context alone."""
        return self.held.forecast.context_bytes

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        question, room = self.question, format_bytes(self.fit.memory_bytes)
        has = f"{self.fit.gpu} has {room}"
        if self.fit.memory_bytes != question.gpu_bytes:
            has = f"the budget is {room} of {self.fit.gpu}"
        needs = f"this needs {format_bytes(self.needed_bytes)}"
        if self.held.chosen:
            needs = f"with {self.held.name} {needs}"
        if self.fit.verdict == FITS:
            return f"It fits: {has}, {needs}; {format_bytes(self.fit.memory_bytes - self.needed_bytes)} remain free."
        if self.fit.verdict == TIGHT:
            return f"It is tight: {has}, {needs} unless the allocator releases cached blocks during the run. {self._do}"
        over = format_bytes(self.needed_bytes - self.fit.memory_bytes)
        if self.held.chosen:
            return f"It does not fit: {has}, and even {needs}, {over} too much. {self._do}"
        return f"It does not fit as it is: {has}, {needs}, {over} too much. {self._do}"

    @property
    def _do(self) -> str:
        """What to do, in words."""
        question = self.question
        if self.instead is not None:
            took = time_in_words(self.instead.forecast, question.card) if question.device == "cuda" else ""
            return f"It runs with {self.instead.name}{f', {took}' if took else ''}."
        if not self.held.chosen and chooses(question.model) and self.fit.verdict != FITS:
            return "The fastest placement that fits is searched for with memory auto."
        if question.budget and self.needed_bytes <= question.gpu_bytes:
            return f"The smallest budget is {as_budget(self.needed_bytes)}."
        if question.memory_bytes is not None:
            return "A smaller size, fewer frames or smaller tiles need less."
        smallest = _smallest_card(self.needed_bytes)
        return (
            "It fits no GPU in the list." if smallest is None else f"The smallest GPU that it fits is the {smallest}."
        )

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """Changes after which it fits, the best first: another way to hold it, a larger budget, a larger card."""
        question, found = self.question, list[Remedy]()
        if self.held.verdict == FITS:
            return ()
        if not self.held.chosen and chooses(question.model):
            name = f"Use {self.instead.name}" if self.instead else "Search for the fastest that fits"
            found.append(Remedy(name, {"memory": MemoryPolicy.AUTO}))
        if question.budget and self.needed_bytes <= question.gpu_bytes:
            budget = as_budget(self.needed_bytes)
            if budget_bytes(budget) > question.gpu_bytes:  # which the hundredths go beyond
                budget = ""
            found.append(Remedy(f"Set the budget to {budget}" if budget else "Set no budget", {"budget": budget}))
        elif question.memory_bytes is None:
            gpu = _smallest_card(self.needed_bytes)
            if gpu is not None:
                found.append(Remedy(f"Choose {gpu}", {"gpu": gpu, "budget": ""}))
        return tuple(found)


def _smallest_card(nbytes: int) -> str | None:
    table = gpu_table().sort_values("memory_bytes", kind="stable")
    return next((gpu for gpu, size in zip(table["gpu"], table["memory_bytes"], strict=True) if size >= nbytes), None)
