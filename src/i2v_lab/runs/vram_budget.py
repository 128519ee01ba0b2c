"""A plugin of pytest: the fixture ``vram_budget`` fails a test whose phase takes more memory than it may."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from i2v_lab.profiling.phase_profiler import PhaseProfiler
    from i2v_lab.profiling.records import PhaseRecord, Record

HOLDERS = 5  # named when a test fails


class VramBudget:
    """Budgets of phases; the value of the fixture ``vram_budget``.

    Example:
        >>> def test_decoding(vram_budget):
        ...     with vram_budget("decode_video", "2GiB"):
        ...         decode(latents)
    """

    def __init__(self) -> None:
        self._profiler: PhaseProfiler | None = None

    @contextmanager
    def __call__(self, phase: str, budget: str | int, *, device: str | None = None) -> Iterator[PhaseProfiler]:
        """Measure what runs in a ``with`` block as a phase, and fail the test if its peak is above the budget.

        On a card the peak is that of the caching allocator, with all that was allocated before; on the CPU it is that
        of the storages which the block's operators touch. Budgets may be nested.

        Args:
            phase: Its name.
            budget: Such as ``2GiB``; an integer is bytes.
            device: ``cpu`` or ``cuda``; by default ``cuda`` where there is a card.

        Yields:
            The profiler, which more phases can be measured with.

        Raises:
            InvalidRequest: The budget is no size.
            ProfilerError: Another profiler is active.
        """
        budget_bytes = _bytes(budget, phase)
        with ExitStack() as scopes:
            if self._profiler is None:
                self._profiler = scopes.enter_context(_profiler(device))
                scopes.callback(setattr, self, "_profiler", None)
            profiler = self._profiler
            before = len(profiler.records)
            with profiler.phase(phase):
                yield profiler
            records = profiler.records[before:]
        _check(records, phase, budget_bytes)

    def check(self, run: Any, **budgets: str | int) -> None:
        """Fail the test if a phase of a run that was profiled took more than its budget.

        Args:
            run: A :class:`~i2v_lab.runs.profile_call.ProfiledCall`, a profiler, a forecast, a run, or its directory.
            **budgets: By the name of a phase.

        Raises:
            InvalidRequest: A budget is no size, or the run has no such phase.

        Example:
            >>> def test_the_whole_pipeline(vram_budget):
            ...     vram_budget.check(profile_call(pipeline, prompt), decode_video="2GiB", denoise="10GiB")
        """
        from i2v_lab.errors import InvalidRequest
        from i2v_lab.profiling.records import PhaseRecord
        from i2v_lab.runs.store import read_run

        records = list((read_run(run) if isinstance(run, str | Path) else run).records)
        limits = {phase: _bytes(budget, phase) for phase, budget in budgets.items()}
        known = [record.phase for record in records if isinstance(record, PhaseRecord)]
        for phase in limits:
            if phase not in known:
                words = f"phase={phase!r} is none of this run; use one of: {', '.join(dict.fromkeys(known))}"
                raise InvalidRequest(words, phase=phase)
        for phase, budget_bytes in limits.items():
            _check(records, phase, budget_bytes)


@pytest.fixture
def vram_budget() -> VramBudget:
    """Fails the test whose phase takes more memory than it may: see :class:`VramBudget`."""
    return VramBudget()


def _profiler(device: str | None) -> PhaseProfiler:
    import torch

    from i2v_lab.profiling.phase_profiler import PhaseProfiler

    return PhaseProfiler(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _bytes(budget: str | int, phase: str) -> int:
    from i2v_lab.errors import InvalidRequest, shown
    from i2v_lab.units import parse_bytes

    try:
        if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0:
            return budget
        if isinstance(budget, str):
            return parse_bytes(budget)
    except ValueError:
        pass
    raise InvalidRequest(f"budget={shown(budget)} of {phase} is no size; use one such as 2GiB", budget=budget)


def _check(records: Sequence[Record], phase: str, budget_bytes: int) -> None:
    from i2v_lab.profiling.records import PhaseRecord, peak_phase
    from i2v_lab.units import format_bytes

    peak = peak_phase(each for each in records if isinstance(each, PhaseRecord) and each.phase == phase)
    if peak is None or peak.peak_bytes <= budget_bytes:
        return
    words = (
        f"{phase} took {format_bytes(peak.peak_bytes)} ({peak.peak_bytes:,} bytes), over its budget of "
        f"{format_bytes(budget_bytes)} by {format_bytes(peak.peak_bytes - budget_bytes)}"
    )
    pytest.fail("\n".join([words, *_holders(records, peak)]), pytrace=False)


def _holders(records: Sequence[Record], peak: PhaseRecord) -> list[str]:
    """The largest storages at a phase's peak, a line each; they follow its record."""
    from i2v_lab.profiling.records import HolderRecord, PhaseRecord
    from i2v_lab.units import format_bytes, format_value

    lines: list[str] = []
    start = next(index for index, record in enumerate(records) if record is peak) + 1
    for record in records[start:]:
        if isinstance(record, PhaseRecord) or len(lines) == HOLDERS:
            break
        if isinstance(record, HolderRecord):
            what = f"{record.category} {format_value('shape', record.shape)} {record.dtype}"
            by = f" by {record.operator}" if record.operator else ""
            lines.append(f"  {format_bytes(record.nbytes)} {what} in {record.module or 'no module'}{by}")
    return lines or ["  what holds it is not known: a caching allocator does not tell"]
