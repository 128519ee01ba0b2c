"""Records that profilers write: frozen dataclasses of JSON values, with the unit in every name; imports no torch.

Bytes are integers, seconds count from the start of the profiler; what could not be measured is ``None``, never 0.
:mod:`i2v_lab.profiling.record_json` writes and reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from i2v_lab.display import HtmlFields
from i2v_lab.profiling.phase_html import phases_html
from i2v_lab.profiling.record_frames import record_frame
from i2v_lab.units import format_bytes

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PhaseRecord(HtmlFields):
    """Memory and time of one phase.

    Attributes:
        phase: Its name.
        parent: The phase that it is nested in; ``None`` at the top level.
        start_bytes: Bytes allocated when it began.
        peak_bytes: Maximum of the allocated bytes.
        end_bytes: Bytes allocated when it ended.
        peak_reserved_bytes: Maximum of the bytes reserved by the caching allocator; ``None`` where there is none.
        peak_so_far_bytes: Maximum of the allocated bytes since the profiler started, at the end of this phase.
        saved_for_backward_bytes: Maximum of the bytes saved by autograd graphs, parameters excluded; ``None`` without
            attribution.
        start_s: Its start.
        seconds: Its duration, on a monotonic clock.
        completed: False if it ended by an error or was stopped early.
    """

    phase: str
    parent: str | None
    start_bytes: int
    peak_bytes: int
    end_bytes: int
    peak_reserved_bytes: int | None
    peak_so_far_bytes: int
    saved_for_backward_bytes: int | None
    start_s: float
    seconds: float
    completed: bool


@dataclass(frozen=True)
class StepRecord(HtmlFields):
    """Memory and time of one denoising step, or of one decoded chunk.

    Attributes:
        phase: The phase it belongs to.
        step: 1 for the first.
        steps: Their number.
        peak_bytes: Maximum of the allocated bytes.
        seconds: Its duration.
    """

    phase: str
    step: int
    steps: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, repr=False)
class HolderRecord(HtmlFields):
    """One storage that was allocated at a phase's peak.

    Attributes:
        phase: The phase.
        nbytes: Its size.
        shape: Of the first tensor seen on it.
        dtype: Of that tensor, such as ``bfloat16``.
        category: ``weight``, ``saved`` (for backward), ``activation`` (allocated inside a module) or ``other``.
        module: Path of the module that allocated it, or that it is a weight of; empty outside any module.
        operator: What returned it first, such as ``aten.mm``; empty for weights, and where that is not known.
    """

    phase: str
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    category: str
    module: str
    operator: str = ""


@dataclass(frozen=True)
class ModuleRecord(HtmlFields):
    """Bytes of one module's storages at a phase's peak, in one category.

    Attributes:
        phase: The phase.
        module, category: As in :class:`HolderRecord`.
        nbytes: Sum over its storages of that category.
    """

    phase: str
    module: str
    category: str
    nbytes: int


@dataclass(frozen=True)
class OperatorRecord(HtmlFields):
    """Bytes at a phase's peak that one operator returned in one module, weights left out.

    Attributes:
        phase, module, operator: As in :class:`HolderRecord`.
        nbytes: Sum over the storages.
    """

    phase: str
    module: str
    operator: str
    nbytes: int


@dataclass(frozen=True)
class TimelineRecord(HtmlFields):
    """Allocated bytes by category at one moment.

    Attributes:
        phase: The innermost phase at that moment; empty between phases.
        time_s: The moment.
        weight_bytes: Parameters and buffers of modules.
        saved_bytes: Saved by autograd graphs, parameters excluded.
        activation_bytes: Allocated inside a module and not saved.
        other_bytes: Everything else.
    """

    phase: str
    time_s: float
    weight_bytes: int
    saved_bytes: int
    activation_bytes: int
    other_bytes: int


@dataclass(frozen=True)
class GraphRecord(HtmlFields):
    """Bytes saved for backward by one module, at the maximum of the saved bytes in a phase.

    Attributes:
        phase: The phase.
        module: Path of the module whose operators saved it.
        nbytes: Each storage once, parameters excluded.
    """

    phase: str
    module: str
    nbytes: int


@dataclass(frozen=True, repr=False)
class OutOfMemoryRecord(HtmlFields):
    """An allocation that failed, on a real card or by a cap.

    Attributes:
        phase: The innermost phase; empty between phases.
        module: Path of the running module; empty outside any.
        asked_bytes: Bytes requested; ``None`` if torch's message does not say.
        alive_bytes: Bytes allocated before the request.
        cap_bytes: The cap; ``None`` without one.
        message: First line of the error's message.
    """

    phase: str
    module: str
    asked_bytes: int | None
    alive_bytes: int
    cap_bytes: int | None
    message: str


@dataclass(frozen=True)
class GenerationRecord(HtmlFields):
    """Bytes that stay allocated after one of several generations in a process.

    Attributes:
        generation: 1 for the first.
        allocated_bytes: Allocated after its video was consumed, less what only the generation itself referenced.
    """

    generation: int
    allocated_bytes: int


@dataclass(frozen=True, repr=False)
class DeviceRecord(HtmlFields):
    """A whole card as NVML reports it at one moment.

    Attributes:
        time_s: The moment.
        total_bytes: Of the card.
        used_bytes: By all processes and the driver.
        own_bytes: By this process; ``None`` where NVML hides it.
        others_bytes: ``used_bytes - own_bytes``: by all other processes and the driver.
        budget_bytes: ``total_bytes - others_bytes``.
        others: ``(pid, name, bytes)`` of each other process that NVML lists.
        reason: Why nothing, or no process, is known, in one sentence; else empty.
    """

    time_s: float
    total_bytes: int | None
    used_bytes: int | None
    own_bytes: int | None
    others_bytes: int | None
    budget_bytes: int | None
    others: tuple[tuple[int, str, int | None], ...] | None
    reason: str


@dataclass(frozen=True, repr=False)
class NoteRecord(HtmlFields):
    """Something that was done to an input or to the result.

    Attributes:
        phase: In which.
        topic: ``prompt``, ``negative_prompt`` or ``sound``.
        count: Tokens that were dropped, or samples that were replaced.
        text: One line for the user.
    """

    phase: str
    topic: str
    count: int
    text: str


@dataclass(frozen=True, repr=False)
class AssumptionRecord(HtmlFields):
    """An answer that a forecast gave to a question about values that it does not know.

    Attributes:
        phase: In which; empty between phases.
        operator: Operator or function that asked.
        module: Path of the running module; empty outside any.
        place: File and line of the code that called it.
        answer: What it was answered, such as ``False`` or ``zeros of (4, 64, 64), float32``.
        count: How often.
    """

    phase: str
    operator: str
    module: str
    place: str
    answer: str
    count: int


@dataclass(frozen=True, repr=False)
class HostMemoryRecord(HtmlFields):
    """Host memory that the streamed weights of one component took.

    Attributes:
        phase: The phase that built it.
        component: Its name.
        page_locked_bytes: Page-locked, of the blocks that are kept from their first call on.
        pageable_bytes: The largest block that was read from its file at once.
        resident_bytes: What it would take on the device if 0, 1, ... of its blocks stayed there; empty where not all of
            them are streamed.
        peak_bytes: Maximum of the allocated bytes since the phase began, or since the component before it in the phase
            was released, until this one was; ``None`` in records of before it was kept, as no ``resident_bytes``.
    """

    phase: str
    component: str
    page_locked_bytes: int
    pageable_bytes: int
    resident_bytes: tuple[int, ...] = ()
    peak_bytes: int | None = None


CostRow = tuple[str, str, int, int, int]
"""Kind, dtype, number, and of each of them on average: operations, bytes read and written."""


@dataclass(frozen=True, repr=False)
class CostRecord(HtmlFields):
    """What the operators of a forecast's phase cost on any card, over one segment of it: a build, a step, the rest.

    Kinds are ``matmul``, ``flash attention 128`` (by the width of the heads), ``convolution 3d``, ``pointwise``,
    ``copy to device, pageable`` and the like; ``view`` and ``empty`` cost the host alone; ``weight`` and ``module`` are
    those of components that were built; ``segment`` is one that the caching allocator gets from the driver; ``first
    ...`` is what a process does once for a library, a kernel or a shape. The records of a phase precede its
    :class:`PhaseRecord`, without the phases nested in it.

    Attributes:
        phase: Its name.
        repeats: How many such segments there are in a row.
        rows: Operators of one segment, those alike in a row: see :data:`CostRow`.
    """

    phase: str
    repeats: int
    rows: tuple[CostRow, ...]


Record = (
    PhaseRecord
    | StepRecord
    | HolderRecord
    | ModuleRecord
    | OperatorRecord
    | TimelineRecord
    | GraphRecord
    | OutOfMemoryRecord
    | GenerationRecord
    | DeviceRecord
    | NoteRecord
    | HostMemoryRecord
    | AssumptionRecord
    | CostRecord
)


def peak_phase(phases: Iterable[PhaseRecord]) -> PhaseRecord | None:
    """The phase with the highest peak, the first of equals; ``None`` if there is no phase.

    Example:
        >>> peak_phase([]) is None
        True
    """
    return max(phases, key=lambda record: record.peak_bytes, default=None)


@dataclass(frozen=True, repr=False)
class Forecast(HtmlFields):
    """Records of a run on a device that is not here.

    Attributes:
        records: As a profiler writes them in a real run; their seconds are those of the forecast, not of a run.
        context_bytes: Of the CUDA context and the loaded libraries, in no record; 0 without a model of workspaces.
        seconds: Duration of the forecast.

    Example:
        >>> phase = PhaseRecord("decode_video", None, 0, 3 * 2**20, 0, 4 * 2**20, 3 * 2**20, 0, 0.0, 0.1, True)
        >>> forecast = Forecast((phase,), context_bytes=2**20, seconds=0.1)
        >>> forecast.peak.phase, forecast.peak_reserved_bytes
        ('decode_video', 4194304)
    """

    records: tuple[Record, ...]
    context_bytes: int
    seconds: float

    @property
    def phases(self) -> list[PhaseRecord]:
        """Every phase, in order."""
        return [record for record in self.records if isinstance(record, PhaseRecord)]

    @property
    def peak(self) -> PhaseRecord:
        """The phase with the highest peak, the first of equals."""
        peak = peak_phase(self.phases)
        assert peak is not None
        return peak

    @property
    def page_locked_bytes(self) -> int:
        """The most page-locked host memory that streamed weights take: components take theirs one after another."""
        return max((r.page_locked_bytes for r in self.records if isinstance(r, HostMemoryRecord)), default=0)

    @property
    def pageable_bytes(self) -> int:
        """The largest block of streamed weights that is read from its file at once, through pageable host memory."""
        return max((r.pageable_bytes for r in self.records if isinstance(r, HostMemoryRecord)), default=0)

    @property
    def notes(self) -> list[NoteRecord]:
        """What was done to the inputs, such as a prompt that was cut."""
        return [record for record in self.records if isinstance(record, NoteRecord)]

    @property
    def assumptions(self) -> list[AssumptionRecord]:
        """What was answered to questions about values that are not known."""
        return [record for record in self.records if isinstance(record, AssumptionRecord)]

    @property
    def peak_reserved_bytes(self) -> int:
        """Maximum of the bytes that the caching allocator would reserve; the peak where it was not modelled."""
        return max(record.peak_reserved_bytes or record.peak_bytes for record in self.phases)

    def to_frame(self) -> pd.DataFrame:
        """The phases, one a row, with a column for each field of :class:`PhaseRecord`."""
        return record_frame(PhaseRecord, self.phases)

    def _repr_html_(self) -> str:
        needed = format_bytes(self.peak_reserved_bytes + self.context_bytes)
        words = f"Forecast: the peak is {format_bytes(self.peak.peak_bytes)} in {self.peak.phase}; "
        return phases_html(self.phases, f"{words}a process takes {needed} from the card.", times=False)
