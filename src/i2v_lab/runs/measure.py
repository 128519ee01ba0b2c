"""Real runs: one process each, recorded as a run directory, and reused where nothing has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from i2v_lab.display import printable
from i2v_lab.errors import I2VLabError, RecordError
from i2v_lab.files import check_folder, remove_partial_files
from i2v_lab.locks import exclusive, lock_beside, say
from i2v_lab.profiling.records import OutOfMemoryRecord
from i2v_lab.runs.execute import VIDEO, Mode, execute
from i2v_lab.runs.provenance import code_digest, run_metadata
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import COMPLETE, FAILED, METADATA, Run, RunWriter, read_run
from i2v_lab.runs.workers import run_in_child
from i2v_lab.stopping import on_stop

GRAD_ERROR = "GradScopeError"
REPLACEABLE = {".json", ".jsonl", ".mp4", ".part"}  # suffixes of the files in a run directory


def measure(spec: RunSpec, folder: Path, device: str = "auto") -> Run:
    """Generate for real, in a process of its own, with synthetic weights.

    A run that is in ``folder`` already is reused if it ended and has the same spec, device and code; otherwise it is
    replaced. If another process measures there, this one waits, and says on which. Videos are written beside the
    records, as ``video.mp4`` and, for later generations, ``video_2.mp4``.

    Args:
        spec: What to do.
        folder: A folder of its own; made if it does not exist.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        The run. One that ran out of memory, or whose grad mode torch refused, is a result like any other: its status is
        ``failed``.

    Raises:
        I2VLabError: It failed in any other way; with its own message.
        RecordError: ``folder`` holds something else.
        OutputError: ``folder`` cannot be written.
    """
    identity = run_identity(spec, device)
    reusable = reusable_run(folder, identity)
    if reusable is not None:
        return reusable
    check_folder(folder, "folder")
    with exclusive(lock_beside(folder), folder, wait=say):
        return _measure(spec, identity, folder)


def _measure(spec: RunSpec, identity: dict[str, Any], folder: Path) -> Run:
    reusable = reusable_run(folder, identity)
    if reusable is not None:  # another process has just made it
        return reusable
    _make_room(folder)
    clean_up = partial(remove_partial_files, folder)
    with on_stop(clean_up):
        try:
            ended = run_in_child(_measure_here, identity, folder)
        finally:
            clean_up()
    if (folder / METADATA).exists():
        run = read_run(folder)
        if is_result(run):
            return run
    lines = ended.errors.strip().splitlines() or [f"its process ended with status {ended.status}"]
    raise I2VLabError(f"{spec.name}: {lines[-1].removeprefix('i2v-lab: ')}", status=ended.status)


def mark_failed(spec: RunSpec, folder: Path, device: str, error: I2VLabError) -> None:
    """Record a run that could not say itself how it ended, in place of what it left; it is no result.

    Raises:
        RecordError: ``folder`` holds something else.
        OutputError: ``folder`` cannot be written.
    """
    with exclusive(lock_beside(folder), folder, wait=say):
        _make_room(folder)
        metadata = run_metadata(device, spec=spec, asked_device=device)
        with suppress(type(error)), RunWriter(folder, metadata):
            raise error


def run_folder(runs_dir: Path, spec: RunSpec) -> Path:
    """Where a measured run is stored: the same for equal specs, another for every other."""
    digest = hashlib.sha256(json.dumps(spec.to_json(), sort_keys=True).encode()).hexdigest()
    return runs_dir / f"{spec.model}_{spec.full_name}_{digest[:8]}"


def run_identity(spec: RunSpec, device: str = "auto") -> dict[str, Any]:
    """What decides whether a stored run is the one that is asked for; part of the run's metadata."""
    return {"spec": spec.to_json(), "code": code_digest(spec.runner), "asked_device": device}


def reusable_run(folder: Path, identity: Mapping[str, Any]) -> Run | None:
    """The run in ``folder``, if it ended and has this identity."""
    with suppress(RecordError):  # there is none, or it is damaged, or was stopped before it began
        run = read_run(folder)
        if is_result(run) and identity.items() <= run.metadata.items():
            return run
    return None


def is_result(run: Run) -> bool:
    """Whether a run shows something: it is complete, ran out of memory, or its grad mode was refused."""
    refused = str(run.metadata.get("error", "")).startswith(GRAD_ERROR)
    return run.status == COMPLETE or (run.status == FAILED and (refused or bool(run.of(OutOfMemoryRecord))))


def _make_room(folder: Path) -> None:
    if not folder.exists():
        return
    if any(entry.suffix not in REPLACEABLE for entry in folder.iterdir()):
        raise RecordError(f"'{folder}' holds more than a run; choose another folder", folder=folder)
    shutil.rmtree(folder)


def _measure_here(identity: dict[str, Any], folder: Path) -> None:
    """In the child process: an error of ours is one line on stderr."""
    spec = RunSpec.from_json(identity["spec"])
    try:
        execute(
            spec,
            Mode.REAL,
            identity["asked_device"],
            run_dir=folder,
            metadata={"asked_device": identity["asked_device"]},
            video_path=lambda number: folder / (VIDEO if number == 1 else f"video_{number}.mp4"),
        )
    except I2VLabError as error:
        print(f"i2v-lab: {printable(str(error), lines=False)}", file=sys.stderr)
        sys.exit(error.exit_status)
