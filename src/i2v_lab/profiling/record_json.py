"""Records as JSON values: ``record_to_json`` adds a record's kind, ``record_from_json`` reads it back and checks it."""

from __future__ import annotations

import reprlib
from dataclasses import MISSING, asdict, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from i2v_lab.errors import RecordError
from i2v_lab.profiling.records import (
    AssumptionRecord,
    CostRecord,
    DeviceRecord,
    GenerationRecord,
    GraphRecord,
    HolderRecord,
    HostMemoryRecord,
    ModuleRecord,
    NoteRecord,
    OperatorRecord,
    OutOfMemoryRecord,
    PhaseRecord,
    Record,
    StepRecord,
    TimelineRecord,
)

KINDS: dict[str, type[Any]] = {
    "phase": PhaseRecord,
    "step": StepRecord,
    "holder": HolderRecord,
    "module": ModuleRecord,
    "operator": OperatorRecord,
    "timeline": TimelineRecord,
    "graph": GraphRecord,
    "out_of_memory": OutOfMemoryRecord,
    "generation": GenerationRecord,
    "device": DeviceRecord,
    "note": NoteRecord,
    "host_memory": HostMemoryRecord,
    "assumption": AssumptionRecord,
    "cost": CostRecord,
}
_NAMES = {kind: name for name, kind in KINDS.items()}
HINTS = {kind: get_type_hints(kind) for kind in KINDS.values()}
"""Types of the fields of each kind."""
CATEGORIES = ("weight", "saved", "activation", "other")
WHOLE_BELOW = 2**54  # bytes, and every other whole number: sums of many are whole 64-bit numbers still
SECONDS_BELOW = 1e9


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
        RecordError: An unknown kind, fields that are missing or unknown, or a value of the wrong type or beyond what
            can be measured; its field ``problem`` is then that value and what is wrong with it.
    """
    name = values.get("kind")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise RecordError(f"kind={reprlib.repr(name)} is not a known record; use one of: {', '.join(KINDS)}")
    given = {key: _tuples(value) for key, value in values.items() if key != "kind"}
    names = {field.name for field in fields(kind)}
    optional = {field.name for field in fields(kind) if field.default is not MISSING}  # of older records
    strange = (names - optional - given.keys()) | (given.keys() - names)
    if strange:
        wrong = reprlib.repr(", ".join(sorted(strange))).strip("'\"")
        raise RecordError(f"a {values['kind']} record has missing or unknown fields: {wrong}; was the file edited?")
    for field, value in given.items():
        wrong = _wrong(field, value, HINTS[kind][field])
        if wrong:
            problem = f"{field}={reprlib.repr(given[field])}, which {wrong}"
            raise RecordError(f"a {name} record has {problem}; was the file edited?", problem=problem)
    record: Record = kind(**given)
    return record


def _wrong(field: str, value: Any, hint: Any) -> str:
    """What is wrong with a field's value, in words; empty if nothing is."""
    if not _fits(value, hint):
        return "is of the wrong type"
    if field == "category" and value not in CATEGORIES:
        return f"is none of {', '.join(CATEGORIES)}"
    if field == "time_s" and value < 0:  # between the clock of the records and that of the profiler
        value = -value
    return "" if _is_measurable(value) else "nothing measures"


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return type(value) in (int, float) if hint is float else type(value) is hint


def _is_measurable(value: Any) -> bool:
    match value:
        case bool():
            return True
        case int():
            return 0 <= value < WHOLE_BELOW
        case float():
            return 0 <= value < SECONDS_BELOW  # false for NaN
        case tuple():
            return all(map(_is_measurable, value))
    return True


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
