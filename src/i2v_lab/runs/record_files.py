"""Reading the files of a run directory: strict JSON, and records that a profiler can have written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from i2v_lab.errors import RecordError
from i2v_lab.profiling.record_json import record_from_json
from i2v_lab.profiling.records import Record


def file_content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        RecordError: It is a pipe or a device, which need not have an end.
        OSError: It cannot be read.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise RecordError(f"'{path}' is not a file; restore it or run again", path=path)
    return path.read_bytes()


def strict_json(text: bytes) -> Any:
    """JSON values, with lone surrogates escaped: those are in no UTF-8.

    Raises:
        ValueError: It is not JSON, or has NaN or an infinity, which JSON does not have.
        RecursionError: It is nested too deeply.
    """
    return _encodable(json.loads(text, parse_constant=_refuse_constant, parse_float=_finite))


def _refuse_constant(name: str) -> float:
    raise json.JSONDecodeError(f"{name} is no number", name, 0)


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse_constant(digits[:20])


def _encodable(value: Any) -> Any:
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case list():
            return [_encodable(item) for item in value]
        case dict():
            return {_encodable(key): _encodable(item) for key, item in value.items()}
    return value


def json_fault(error: Exception) -> str:
    """An error of :func:`strict_json` in a few words."""
    return error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__


def read_record(path: Path, number: int, line: bytes) -> Record:
    """The record of one line.

    Args:
        path: The file, for errors.
        number: The line's, 1 for the first.
        line: Its bytes.

    Raises:
        RecordError: It is damaged; with the file and the line.
    """
    try:
        values = strict_json(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"'{path}' line {number} is not JSON ({json_fault(error)}); restore it or run again", path=path, line=number
        ) from error
    if not isinstance(values, dict):
        raise RecordError(
            f"'{path}' line {number} is not a JSON object; restore it or run again", path=path, line=number
        )
    try:
        record = record_from_json(values)
    except RecordError as error:
        problem = error.fields.get("problem")
        words = f": {error}" if problem is None else f" has {problem}; restore it or run again"
        raise RecordError(f"'{path}' line {number}{words}", path=path, line=number) from error
    return record
