"""State of a phase that has no record yet: its maxima over the segments so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

from i2v_lab.profiling.records import CostRecord, CostRow, PhaseRecord


@dataclass
class OpenPhase:
    """A phase before its record is written; fields as in :class:`~i2v_lab.profiling.records.PhaseRecord`.

    Attributes:
        component_peak_bytes: Since it began, or a component was released.
        steps: Peak and seconds of each step, where their number is unknown until the phase ends.
        costs: Of its segments in a forecast, those of nested phases left out.
        end_bytes: Set when the phase ends, as are ``end_tick``, ``peak_so_far_bytes`` and ``seconds``.
    """

    name: str
    parent: str | None
    start_bytes: int
    start_s: float
    start_tick: int
    peak_bytes: int = 0
    peak_tick: int = 0
    component_peak_bytes: int = 0
    reserved_bytes: int | None = None
    saved_bytes: int = 0
    saved_by_module: dict[str, int] = field(default_factory=dict)
    step_start_s: float = 0.0
    step_peak_bytes: int = 0
    steps: list[tuple[int, float]] = field(default_factory=list)
    costs: list[tuple[CostRow, ...]] = field(default_factory=list)
    end_bytes: int = 0
    end_tick: int = 0
    peak_so_far_bytes: int = 0
    seconds: float = 0.0

    def merge(self, later: OpenPhase) -> None:
        """Take over the maxima of a phase that ran after this one was suspended and belongs to it."""
        self.costs += later.costs
        self.step_peak_bytes = max(self.step_peak_bytes, later.step_peak_bytes)
        if later.peak_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_tick = later.peak_bytes, later.peak_tick
        if later.reserved_bytes is not None:
            self.reserved_bytes = max(self.reserved_bytes or 0, later.reserved_bytes)
        if later.saved_bytes > self.saved_bytes:
            self.saved_bytes, self.saved_by_module = later.saved_bytes, later.saved_by_module

    def take_component_peak(self) -> int:
        """The peak since it began, or since this was asked last."""
        peak_bytes, self.component_peak_bytes = self.component_peak_bytes, 0
        return peak_bytes

    def record(self, completed: bool, *, with_saved: bool) -> PhaseRecord:
        """The record of the phase, which has ended.

        Args:
            completed: Whether it ended without an error.
            with_saved: Whether what is saved for backward was counted.
        """
        return PhaseRecord(
            phase=self.name,
            parent=self.parent,
            start_bytes=self.start_bytes,
            peak_bytes=self.peak_bytes,
            end_bytes=self.end_bytes,
            peak_reserved_bytes=self.reserved_bytes,
            peak_so_far_bytes=self.peak_so_far_bytes,
            saved_for_backward_bytes=self.saved_bytes if with_saved else None,
            start_s=self.start_s,
            seconds=self.seconds,
            completed=completed,
        )

    def cost_records(self) -> list[CostRecord]:
        """A record for each run of equal segments, such as steps."""
        return [CostRecord(self.name, len(list(equal)), rows) for rows, equal in groupby(self.costs)]
