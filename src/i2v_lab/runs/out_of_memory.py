"""Torch's error for a device that is full, in one line of ours that holds no tensor of the run."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from i2v_lab.errors import OutOfDeviceMemory, VramCapExceeded
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.profiling.records import OutOfMemoryRecord, Record
from i2v_lab.runs.spec import RunSpec
from i2v_lab.units import format_bytes

T = TypeVar("T")


def out_of_memory_in_a_line(spec: RunSpec, records: Sequence[Record], act: Callable[[], T]) -> T:
    """What ``act`` returns; torch's error becomes ours, without the frames it was raised in and so their tensors.

    Args:
        spec: What is carried out.
        records: What the profiler wrote, in which the failed allocation is.
        act: Carries it out.

    Raises:
        VramCapExceeded: Likewise on a CPU; its field ``phase`` is filled in.
        OutOfDeviceMemory: Torch raised its error. Fields: ``phase``, ``cap_bytes``, ``asked_bytes`` and
            ``alive_bytes``, each ``None`` where it is not known, and ``reason``, the first line of torch's message.
    """
    import torch

    reason, exceeded = "", None
    try:
        return act()
    except Exception as error:
        found = _root(error, (torch.OutOfMemoryError, VramCapExceeded))
        if found is None:
            raise
        reason = next(iter(str(found).splitlines()), "")
        exceeded = dict(found.fields) if isinstance(found, VramCapExceeded) else None
        traceback.clear_frames(error.__traceback__)
    if exceeded is not None:
        phase = _phase(records)
        if phase and not exceeded.get("phase"):
            reason, exceeded["phase"] = f"{phase}: {reason}", phase
        raise VramCapExceeded(reason, **exceeded)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise _error(spec, records, reason)  # here, where the other one is not its context


def _root(error: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The error of these kinds that led to another one: transformers replaces what it did not expect."""
    seen: list[BaseException] = []
    while error not in seen:
        if isinstance(error, kinds):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__ or error
    return None


def _phase(records: Sequence[Record]) -> str:
    return next((record.phase for record in records if isinstance(record, OutOfMemoryRecord)), "")


def _error(spec: RunSpec, records: Sequence[Record], reason: str) -> OutOfDeviceMemory:
    found = next((record for record in records if isinstance(record, OutOfMemoryRecord)), None)
    fields: dict[str, Any] = {
        "phase": found.phase if found else None,
        "asked_bytes": found.asked_bytes if found else None,
        "alive_bytes": found.alive_bytes if found else None,
        "cap_bytes": spec.vram_cap_bytes,
        "reason": reason,
    }
    where = f" in {fields['phase']}" if found else ""
    asked = f" allocating {format_bytes(fields['asked_bytes'])}" if fields["asked_bytes"] is not None else ""
    cap = "" if spec.vram_cap_bytes is None else f", of which it may take {format_bytes(spec.vram_cap_bytes)}"
    if spec.vram_cap_bytes is not None:
        remedy = "raise --vram-cap-gib or --vram-budget, or use fewer pixels or frames"
    elif spec.runner_spec.techniques and spec.policy is not MemoryPolicy.STREAMED:
        remedy = "use --vram-budget auto, or --memory streamed, or fewer pixels or frames"
    else:
        remedy = "use smaller tiles, or fewer pixels or frames, or free the device of other processes"
    return OutOfDeviceMemory(f"the device is out of memory{where}{asked}{cap}; {remedy}", **fields)
