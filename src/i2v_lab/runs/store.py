"""A run on disk: a folder with ``metadata.json`` and ``records.jsonl``, safe to kill at any moment.

``metadata.json`` is replaced whole, never edited: it says ``running`` from before the first record until the run ends,
then ``complete`` or ``failed``, how many records there are, and the SHA-256 of ``records.jsonl``. A record is one line,
appended by one write. A folder that still says ``running`` is unfinished, and holds every record up to the kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from i2v_lab.display import HtmlFields
from i2v_lab.errors import OutputError, RecordError
from i2v_lab.files import write_text
from i2v_lab.profiling.phase_html import phases_html
from i2v_lab.profiling.record_frames import record_frame
from i2v_lab.profiling.record_json import KINDS, record_to_json
from i2v_lab.profiling.records import PhaseRecord, Record
from i2v_lab.runs.record_files import file_content, json_fault, read_record, strict_json
from i2v_lab.stopping import on_stop

if TYPE_CHECKING:
    import pandas as pd

R = TypeVar("R")

FORMAT = "i2v-lab run"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 was written by i2v-lab 0.1; see i2v_lab.runs.recorded.spec_of
METADATA = "metadata.json"
RECORDS = "records.jsonl"
PART = f"{METADATA}.part"
RUNNING, COMPLETE, FAILED = "running", "complete", "failed"
FORECAST = "forecast"  # in the place of a device
WRITER = "`i2v-lab generate --profile DIR`"
METADATA_TYPES: dict[str, Any] = {
    **dict.fromkeys(("model", "runner", "pipeline", "device", "device_name", "driver_version"), str),
    **dict.fromkeys(("error", "started_at", "git_commit", "host", "platform", "processor", "profiler", "code"), str),
    **dict.fromkeys(("spec", "request", "versions", "experiment"), dict),
    "argv": list,
    "seed": int,
}
"""Of what a run may say of itself; what is not known is ``None``, or left out."""


class RunWriter:
    """Writes a run directory while the run goes on.

    Leaving the ``with`` block marks it complete, or failed with the error's one line. Several threads may append.

    Args:
        folder: Made with its parents; may exist if it is empty.
        metadata: JSON values, such as :func:`i2v_lab.runs.provenance.run_metadata` collects. The format, the status,
            the number of records and their hash are added.

    Raises:
        OutputError: The folder is not empty or cannot be written.
        RecordError: The metadata are not JSON values.

    Example:
        >>> from i2v_lab.profiling.records import GraphRecord
        >>> with RunWriter("runs/first", {"model": "ltx-2.3-tiny"}) as writer:
        ...     writer.append(GraphRecord("decode_video", "video_decoder.conv_in", 1024))
        >>> read_run("runs/first").status
        'complete'
    """

    def __init__(self, folder: str | Path, metadata: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._metadata = dict(metadata)
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        self._scopes = ExitStack()

    def append(self, record: Record) -> None:
        """Add one record; once this returns, a kill of the process cannot lose it.

        Raises:
            OutputError: Outside of the ``with`` block, or the disk is full.
            RecordError: A value that JSON cannot hold, such as a NaN.
        """
        values = record_to_json(record)
        try:
            line = json.dumps(values, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise RecordError(
                f"a {values['kind']} record is not made of JSON values ({error}); use None for what is not known"
            ) from error
        with self._lock:
            if self._descriptor is None:
                raise OutputError(f"run '{self.folder}' is not open; append inside its with block", folder=self.folder)
            try:
                written = os.write(self._descriptor, line)
            except OSError as error:
                raise self._unwritable(error) from error
            if written < len(line):  # the next line must not be glued to this half
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
                raise OutputError(f"run '{self.folder}' has no room for a record; free some space", folder=self.folder)

    def __enter__(self) -> Self:
        text = self._metadata_text(RUNNING)
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"run '{self.folder}' is a file; give a new folder", folder=self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise self._not_empty()
            # The records first: a folder that says "running" has them, so that their loss can be told from a kill.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL
            self._descriptor = os.open(self.folder / RECORDS, flags, 0o666)
        except FileExistsError as error:
            raise self._not_empty() from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._replace_metadata(text)
        except OSError as error:
            self._close()
            raise self._unwritable(error) from error
        self._scopes.enter_context(on_stop(self._stopped))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scopes.close()
        with self._lock:
            try:
                self._finish(error)
            except OSError as problem:  # the folder stays "running", which is true
                if error is None:
                    raise self._unwritable(problem) from problem
            finally:
                self._close()

    def _stopped(self) -> None:
        """The command was stopped by a signal; its main thread may stand still within an append."""
        if self._lock.acquire(timeout=0.2):  # for good: who appends now waits for the end
            self._finish(KeyboardInterrupt())

    def _finish(self, error: BaseException | None) -> None:
        """Count and hash what is on disk, not what was meant to be: an interrupt may have fallen between the two."""
        if self._descriptor is None:
            return
        digest, count, whole = _digest_lines(self._descriptor)
        os.ftruncate(self._descriptor, whole)
        os.fsync(self._descriptor)
        ending: dict[str, Any] = {"records": count, "sha256": digest}
        if error is not None:
            ending["error"] = _one_line(error)
        self._replace_metadata(self._metadata_text(COMPLETE if error is None else FAILED, **ending))

    def _metadata_text(self, status: str, **ending: Any) -> str:
        ours = {"format": FORMAT, "format_version": FORMAT_VERSION, "status": status}
        reserved = {*ours, "records", "sha256", "error"}
        theirs = {key: value for key, value in self._metadata.items() if key not in reserved}
        try:
            return json.dumps({**ours, **theirs, **ending}, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise RecordError(f"the metadata are not made of JSON values ({error}); convert them first") from error

    def _replace_metadata(self, text: str) -> None:
        write_text(self.folder / METADATA, text)

    def _close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _not_empty(self) -> OutputError:
        return OutputError(f"run '{self.folder}' is not empty; give a new folder or empty it", folder=self.folder)

    def _unwritable(self, error: OSError) -> OutputError:
        reason = error.strerror or str(error)
        return OutputError(f"run '{self.folder}' cannot be written ({reason}); give another folder", folder=self.folder)


@dataclass(frozen=True, repr=False)
class Run(HtmlFields):
    """A run directory, read and verified.

    Attributes:
        folder: Where it was read from.
        metadata: All of ``metadata.json``.
        records: In the order in which they came about.
        status: ``complete``, ``failed`` (the error is in ``metadata["error"]``) or ``running``.

    Example:
        >>> read_run("runs/no_grad").status  # doctest: +SKIP
        'complete'
    """

    folder: Path
    metadata: dict[str, Any]
    records: tuple[Record, ...]
    status: str

    @property
    def finished(self) -> bool:
        """False if the run still goes on, or was killed before it could say how it ended."""
        return self.status != RUNNING

    @property
    def is_forecast(self) -> bool:
        """Whether nothing ran: its seconds are then those of the forecast."""
        return bool(self.metadata.get("device") == FORECAST)

    def _repr_html_(self) -> str:
        device = self.metadata.get("device_name") or self.metadata.get("device")
        words = f"Run {self.folder.name}: {self.status}, on {device}."
        return phases_html(self.of(PhaseRecord), words, times=not self.is_forecast)

    def of(self, kind: type[R]) -> list[R]:
        """The records of one type."""
        return [record for record in self.records if isinstance(record, kind)]

    def frame(self, kind: str) -> pd.DataFrame:
        """The records of one kind as a table.

        Args:
            kind: A key of :data:`i2v_lab.profiling.records.KINDS`, such as ``phase``.

        Returns:
            One row a record and one column a field, in the order of the record type, with the same column types
            whether there are rows or not: whole bytes are integers, and those that may be unknown are nullable.

        Raises:
            RecordError: There is no such kind.
        """
        if kind not in KINDS:
            raise RecordError(f"kind={kind!r} is not a known record; use one of: {', '.join(KINDS)}", kind=kind)
        return record_frame(KINDS[kind], self.of(KINDS[kind]))

    def to_frame(self) -> pd.DataFrame:
        """The phases as a table: :meth:`frame` of ``phase``."""
        return self.frame("phase")


def read_run(folder: str | Path) -> Run:
    """Read a run directory, and verify it.

    A line that a kill cut short is left out if the run is unfinished; any other damage is refused.

    Raises:
        RecordError: The folder is missing, foreign, damaged, or of a newer format.

    Example:
        >>> len(read_run("runs/no_grad").records)  # doctest: +SKIP
        148
    """
    try:
        return _read(Path(folder))
    except OSError as error:
        raise RecordError(
            f"run '{folder}' cannot be read ({error.strerror}: '{error.filename}'); check its permissions",
            folder=folder,
        ) from error


def run_folders(folder: Path) -> list[Path]:
    """All run directories below a folder, itself included, in the order of their paths.

    Raises:
        RecordError: The folder is missing, or one in it cannot be looked into.
    """
    found = []
    try:
        for root, folders, files in os.walk(folder, onerror=_raise):
            if METADATA in files or METADATA in folders:
                found.append(Path(root))
    except OSError as error:
        raise RecordError(
            f"'{error.filename}' cannot be searched for runs ({error.strerror}); give a folder of runs",
            folder=folder,
        ) from error
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _read(folder: Path) -> Run:
    if not folder.exists():
        raise RecordError(f"run '{folder}' does not exist; check the path", folder=folder)
    if not folder.is_dir():
        raise RecordError(f"run '{folder}' is a file; give the folder of a run", folder=folder)
    metadata = _read_metadata(folder)
    status = str(metadata["status"])
    path = folder / RECORDS
    if not path.exists():
        raise RecordError(f"run '{folder}' has lost its {RECORDS}; restore it or run again", folder=folder)
    content = file_content(path)
    if status == RUNNING:
        content = content[: content.rfind(b"\n") + 1]
    else:
        _verify(path, content, metadata)
    lines = content.split(b"\n")[:-1]
    records = tuple(read_record(path, number, line) for number, line in enumerate(lines, start=1))
    return Run(folder, metadata, records, status)


# --- Reading ---


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA
    if not path.exists():
        left = {entry.name: entry.stat().st_size for entry in folder.iterdir() if not entry.match(".*.part*")}
        if left and left.keys() <= {RECORDS, PART} and left.get(RECORDS) == 0:
            raise RecordError(f"run '{folder}' was stopped before it began; delete it and run again", folder=folder)
        raise RecordError(f"run '{folder}' has no {METADATA}; give a folder that {WRITER} wrote", folder=folder)
    try:
        metadata = strict_json(file_content(path))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"'{path}' is not JSON ({json_fault(error)}); restore it or run again", path=path) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise RecordError(f"'{path}' is not of an i2v-lab run; give a folder that {WRITER} wrote", path=path)
    number = metadata.get("format_version")
    if type(number) is int and number > FORMAT_VERSION:
        raise RecordError(
            f"'{path}' has format_version={number}, newer than {FORMAT_VERSION}; upgrade i2v-lab to read it",
            path=path,
            format_version=number,
        )
    expected: dict[str, Any] = {"format_version": type(number) is int and number in READABLE_VERSIONS}
    expected["status"] = metadata.get("status") in (RUNNING, COMPLETE, FAILED)
    if expected["status"] and metadata["status"] != RUNNING:
        expected["records"] = type(metadata.get("records")) is int
        expected["sha256"] = isinstance(metadata.get("sha256"), str)
    known = {key: kind for key, kind in METADATA_TYPES.items() if metadata.get(key) is not None}
    expected |= {key: type(metadata[key]) is kind for key, kind in known.items()}
    for key, right in expected.items():
        if not right:
            value = reprlib.repr(metadata.get(key))
            raise RecordError(
                f"'{path}' has {key}={value}, which no run has; restore it or run again", path=path, key=key
            )
    return metadata


def _verify(path: Path, content: bytes, metadata: dict[str, Any]) -> None:
    count = content.count(b"\n")
    if count != metadata["records"]:
        raise RecordError(
            f"'{path}' has {count} records where {METADATA} says {metadata['records']}; restore it or run again",
            path=path,
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != metadata["sha256"]:
        raise RecordError(
            f"'{path}' has SHA-256 {digest[:12]} where {METADATA} says {metadata['sha256'][:12]}; "
            "restore it or run again",
            path=path,
        )


# --- Writing ---


def _digest_lines(descriptor: int) -> tuple[str, int, int]:
    """SHA-256 and number of the whole lines of a file, and where the last of them ends."""
    digest, count, position, whole = hashlib.sha256(), 0, 0, 0
    tail = b""
    while chunk := os.pread(descriptor, 2**20, position):
        position += len(chunk)
        end = chunk.rfind(b"\n") + 1
        if end:
            digest.update(tail + chunk[:end])
            tail = b""
            count += chunk.count(b"\n")
            whole = position - len(chunk) + end
        tail += chunk[end:]
    return digest.hexdigest(), count, whole


def _one_line(error: BaseException) -> str:
    words = str(error).splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
