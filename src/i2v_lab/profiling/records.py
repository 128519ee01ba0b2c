"""What profilers write down: frozen, torch-free, with the unit in every name.

Every record is a flat dataclass of JSON values. ``record_to_json`` adds its kind, ``record_from_json`` reads it back.
Bytes are whole bytes, seconds count from the start of the profiler; what could not be measured is ``None``, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from i2v_lab.display import HtmlFields, phases_html
from i2v_lab.errors import RecordError
from i2v_lab.units import format_bytes


@dataclass(frozen=True)
class PhaseRecord(HtmlFields):
    """Memory and time of one phase.

    Attributes:
        phase: Its name.
        parent: The phase it ran inside of; ``None`` at the top.
        start_bytes: Allocated when it began.
        peak_bytes: The most that was allocated at any time in it.
        end_bytes: Allocated when it ended.
        peak_reserved_bytes: The most the caching allocator held; ``None`` where there is none.
        peak_so_far_bytes: The most allocated since the profiler started, at the end of this phase.
        saved_for_backward_bytes: The most that an autograd graph held at any time in it, parameters excluded; ``None``
            where nobody looked.
        start_s: When it began.
        seconds: Its duration, on a monotonic clock.
        completed: False if it ended by an error or was cut short.
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
        steps: How many there are.
        peak_bytes: The most allocated at any time in it.
        seconds: Its duration.
    """

    phase: str
    step: int
    steps: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class HolderRecord(HtmlFields):
    """One storage that was alive at the moment of a phase's peak.

    Attributes:
        phase: The phase.
        nbytes: Its size.
        shape: Of the first tensor seen on it.
        dtype: Of that tensor, such as ``bfloat16``.
        category: ``weight``, ``saved`` (for backward), ``activation`` (made inside a module) or ``other``.
        module: Path of the module that made it, or that it is a weight of; empty outside any module.
    """

    phase: str
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    category: str
    module: str


@dataclass(frozen=True)
class ModuleRecord(HtmlFields):
    """What one module held at the moment of a phase's peak, in one category.

    Attributes:
        phase: The phase.
        module: As in :class:`HolderRecord`.
        category: As in :class:`HolderRecord`.
        nbytes: All its storages of that category together.
    """

    phase: str
    module: str
    category: str
    nbytes: int


@dataclass(frozen=True)
class TimelineRecord(HtmlFields):
    """Live bytes by category at one moment.

    Attributes:
        phase: The innermost phase at that moment; empty between phases.
        time_s: The moment.
        weight_bytes: Parameters and buffers of modules.
        saved_bytes: Held by an autograd graph, parameters excluded.
        activation_bytes: Made inside a module and not saved.
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
    """What an autograd graph held on behalf of one module, at the moment it held most in a phase.

    Attributes:
        phase: The phase.
        module: Path of the module whose operators saved it.
        nbytes: Each storage once, parameters excluded.
    """

    phase: str
    module: str
    nbytes: int


@dataclass(frozen=True)
class OutOfMemoryRecord(HtmlFields):
    """An allocation that did not fit, on a real card or below a cap set on purpose.

    Attributes:
        phase: Where it happened; empty between phases.
        module: Path of the module that ran; empty outside any.
        asked_bytes: What was asked for; ``None`` if torch's message does not say.
        alive_bytes: What was allocated already.
        cap_bytes: The cap; ``None`` without one.
        message: The error's own words.
    """

    phase: str
    module: str
    asked_bytes: int | None
    alive_bytes: int
    cap_bytes: int | None
    message: str


@dataclass(frozen=True)
class GenerationRecord(HtmlFields):
    """What one of several generations in a process left behind.

    Attributes:
        generation: 1 for the first.
        allocated_bytes: Still allocated once its video was consumed and everything dropped that its consumer does not
            keep.
    """

    generation: int
    allocated_bytes: int


@dataclass(frozen=True)
class DeviceRecord(HtmlFields):
    """What NVML says of a whole card at one moment.

    Attributes:
        time_s: The moment.
        total_bytes: Of the card.
        used_bytes: By everybody.
        own_bytes: By this process.
        others_bytes: By other processes together.
        budget_bytes: ``total_bytes - others_bytes``.
        others: ``(pid, name, bytes)`` of each other process.
        reason: Why values are ``None``, in one plain sentence; empty when they are not.
    """

    time_s: float
    total_bytes: int | None
    used_bytes: int | None
    own_bytes: int | None
    others_bytes: int | None
    budget_bytes: int | None
    others: tuple[tuple[int, str, int | None], ...] | None
    reason: str


Record = (
    PhaseRecord
    | StepRecord
    | HolderRecord
    | ModuleRecord
    | TimelineRecord
    | GraphRecord
    | OutOfMemoryRecord
    | GenerationRecord
    | DeviceRecord
)


def peak_phase(phases: Iterable[PhaseRecord]) -> PhaseRecord | None:
    """The phase with the highest peak, the first of equals; ``None`` if there is no phase.

    Example:
        >>> peak_phase([]) is None
        True
    """
    return max(phases, key=lambda record: record.peak_bytes, default=None)


@dataclass(frozen=True)
class Forecast:
    """What a run would record, on a device that is not here.

    Attributes:
        records: As a profiler writes them down in a real run; their seconds are those of the forecast, not of a run.
        context_bytes: What the CUDA context and the libraries take from the card besides; in no record. 0 where no
            model of them was asked for.
        seconds: What the forecast took.

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
    def peak_reserved_bytes(self) -> int:
        """The most that the caching allocator would hold; the peak itself where it was not modelled."""
        return max(record.peak_reserved_bytes or record.peak_bytes for record in self.phases)

    def _repr_html_(self) -> str:
        needed = format_bytes(self.peak_reserved_bytes + self.context_bytes)
        words = f"Forecast: the peak is {format_bytes(self.peak.peak_bytes)} in {self.peak.phase}; "
        return phases_html(self.phases, f"{words}a process takes {needed} from the card.", times=False)


KINDS: dict[str, type[Any]] = {
    "phase": PhaseRecord,
    "step": StepRecord,
    "holder": HolderRecord,
    "module": ModuleRecord,
    "timeline": TimelineRecord,
    "graph": GraphRecord,
    "out_of_memory": OutOfMemoryRecord,
    "generation": GenerationRecord,
    "device": DeviceRecord,
}
_NAMES = {kind: name for name, kind in KINDS.items()}


def record_to_json(record: Record) -> dict[str, Any]:
    """A record as JSON values, with its ``kind``.

    Example:
        >>> record_to_json(GraphRecord("decode_video", "video_decoder.conv_in", 1024))
        {'kind': 'graph', 'phase': 'decode_video', 'module': 'video_decoder.conv_in', 'nbytes': 1024}
    """
    return {"kind": _NAMES[type(record)], **asdict(record)}


def record_from_json(values: dict[str, Any]) -> Record:
    """The record that :func:`record_to_json` made these values from.

    Raises:
        RecordError: An unknown kind, or fields that are missing or unknown.
    """
    kind = KINDS.get(str(values.get("kind")))
    if kind is None:
        raise RecordError(f"kind={values.get('kind')!r} is not a known record; use one of: {', '.join(KINDS)}")
    given = {key: _tuples(value) for key, value in values.items() if key != "kind"}
    names = {field.name for field in fields(kind)}
    if given.keys() != names:
        wrong = ", ".join(sorted(given.keys() ^ names))
        raise RecordError(f"a {values['kind']} record has missing or unknown fields: {wrong}; was the file edited?")
    record: Record = kind(**given)
    return record


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
