"""What each release of diffusers takes for the same generation: ``data/published/releases.csv``, made and read.

One environment has one release: ``python -m i2v_lab.studies.releases`` in it forecasts every model of diffusers at its
defaults and puts the release's rows into the file. ``nox -s releases`` does so for all releases.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from i2v_lab.errors import I2VLabError, RecordError, shown
from i2v_lab.files import write_atomically
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import TINY, load_architecture, model_names
from i2v_lab.runs.forecast import forecast_spec
from i2v_lab.runs.provenance import code_digest, installed_version
from i2v_lab.runs.spec import RunSpec, make_request

SAME = 0.005  # of the peak with the release before
FIRST, ALIKE, BETTER, WORSE, NONE = "first", "same", "better", "worse", "none"


@dataclass(frozen=True, kw_only=True)
class ReleasePeak:
    """The forecast peak of a model at its defaults with one release of diffusers: a row of the file.

    Attributes:
        model: An architecture's name.
        release: Of diffusers.
        run: The spec's name: size, frames, settings.
        peak_bytes: The most that the caching allocator has allocated; ``None`` where this release cannot run the model.
        phase: Where.
        verdict: ``same`` within half a percent of the release before, ``better``, ``worse``; ``first`` if no earlier
            release has a peak, ``none`` if this one has none.
        note: Why there is no peak.
        torch: Its version.
        transformers: Its version.
        date: The day on which it was computed.
        code: :func:`~i2v_lab.runs.provenance.code_digest` of this package, its first twelve digits.
    """

    model: str
    release: str
    run: str
    peak_bytes: int | None
    phase: str
    verdict: str
    note: str
    torch: str
    transformers: str
    date: str
    code: str


COLUMNS = tuple(field.name for field in fields(ReleasePeak))


def releases_path() -> Path:
    """The committed file."""
    return data_dir() / "published" / "releases.csv"


def released_models() -> list[str]:
    """Models of diffusers at full size, those of published peaks alone included."""
    names = [name for name in model_names() if TINY not in name]
    return [name for name in names if load_architecture(name).runner == "diffusers"]


def release_order(release: str) -> tuple[int, ...]:
    """A release as numbers, to sort by.

    Example:
        >>> sorted(["0.40.0", "0.9.1", "0.39.0"], key=release_order)
        ['0.9.1', '0.39.0', '0.40.0']
    """
    return tuple(int(part) for part in release.split("."))


def release_verdict(before: int | None, now: int | None) -> str:
    """How a peak compares with that of the release before.

    Args:
        before: Bytes; ``None`` if no earlier release has a peak.
        now: Bytes; ``None`` if this release has none.

    Example:
        >>> release_verdict(1000, 1004), release_verdict(1000, 990), release_verdict(None, 990)
        ('same', 'better', 'first')
    """
    if now is None:
        return NONE
    if before is None:
        return FIRST
    return ALIKE if abs(now - before) <= SAME * before else BETTER if now < before else WORSE


def forecast_release(model: str) -> dict[str, str]:
    """The row of a model with the release that is installed, without its verdict.

    Args:
        model: An architecture's name.
    """
    spec = RunSpec(request=make_request(model), model=model)
    row = {"model": model, "release": installed_version("diffusers") or "", "run": spec.name}
    row |= {name: installed_version(name) or "" for name in ("torch", "transformers")}
    row |= {"date": datetime.now(UTC).date().isoformat(), "code": code_digest(spec.runner)[:12]}
    try:
        peak = forecast_spec(spec).peak
    except Exception as error:  # whatever a release raises is its row's note
        words = str(error) if isinstance(error, I2VLabError) else f"{type(error).__name__}: {shown(str(error))}"
        return {**row, "peak_bytes": "", "phase": "", "note": " ".join(words.split())}
    return {**row, "peak_bytes": str(peak.peak_bytes), "phase": peak.phase, "note": ""}


def merged_rows(old: Iterable[Mapping[str, str]], new: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Rows of the file with some of them replaced, sorted by model and release, every verdict anew.

    Args:
        old: As text, by column.
        new: Replace those of the same model and release.
    """
    rows = {(row["model"], row["release"]): dict(row) for row in (*old, *new)}
    before: dict[str, int] = {}
    ordered = sorted(rows.values(), key=lambda row: (row["model"], release_order(row["release"])))
    for row in ordered:
        model, now = row["model"], int(row["peak_bytes"]) if row["peak_bytes"] else None
        row["verdict"] = release_verdict(before.get(model), now)
        if now is not None:
            before[model] = now
    return ordered


def write_releases(rows: Iterable[Mapping[str, str]], path: Path) -> None:
    """Write rows as CSV.

    Args:
        rows: As :func:`merged_rows` returns them.
        path: Replaced in one step.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda part: part.write_text(out.getvalue(), encoding="utf-8", newline=""))


def read_releases(path: Path | None = None) -> tuple[ReleasePeak, ...]:
    """All rows, in the order of the file: by model, then by release.

    Args:
        path: By default ``data/published/releases.csv``.

    Raises:
        RecordError: The file cannot be read, or a row is not what its bytes say: with its line, column and value.

    Example:
        >>> {peak.verdict for peak in read_releases()} <= {"first", "same", "better", "worse", "none"}
        True
    """
    source = path or releases_path()
    try:
        lines = list(csv.reader(io.StringIO(source.read_text(encoding="utf-8"), newline=""), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        words = f"releases '{source}' cannot be read ({' '.join(str(error).split())}); run `nox -s releases`"
        raise RecordError(words, path=source) from error
    if not lines or tuple(lines[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in lines):
        words = f"releases '{source}' are no table of {','.join(COLUMNS)}; run `nox -s releases`"
        raise RecordError(words, path=source)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in lines[1:]]
    for line, row in enumerate(rows, 2):
        for column, pattern in {"peak_bytes": r"|[1-9]\d{0,15}", "release": r"\d+(\.\d+)+"}.items():
            if not re.fullmatch(pattern, row[column], re.ASCII):
                raise _refusal(source, line, column, row)
        if bool(row["peak_bytes"]) == bool(row["note"]):
            raise _refusal(source, line, "note", row)
    for line, (row, wanted) in enumerate(zip(rows, merged_rows((), rows), strict=False), 2):
        for column in ("model", "release", "verdict"):
            if row[column] != wanted[column]:
                raise _refusal(source, line, column, row)
    if len({(row["model"], row["release"]) for row in rows}) < len(rows):
        raise RecordError(f"releases '{source}' have a row twice; run `nox -s releases`", path=source)
    return tuple(
        ReleasePeak(**{**row, "peak_bytes": int(row["peak_bytes"]) if row["peak_bytes"] else None})  # type: ignore[arg-type]
        for row in rows
    )


def _refusal(path: Path, line: int, column: str, row: Mapping[str, str]) -> RecordError:
    return RecordError(
        f"line {line} of '{path}': {column}={shown(row[column])} is not what the rows say; run `nox -s releases`",
        path=path,
        line=line,
        column=column,
        value=row[column],
    )


def releases_table(path: Path | None = None) -> pd.DataFrame:
    """One row for each model and release: the columns of :class:`ReleasePeak`.

    Args:
        path: As in :func:`read_releases`.
    """
    table = pd.DataFrame([vars(peak) for peak in read_releases(path)], columns=list(COLUMNS))
    return table.astype({"peak_bytes": "Int64"})


def main(models: Sequence[str] = ()) -> None:
    """Forecast models with the release that is installed, and put its rows into the committed file.

    Args:
        models: All of them if empty.
    """
    old = [{**vars(peak), "peak_bytes": str(peak.peak_bytes or "")} for peak in _known()]
    new = [forecast_release(model) for model in models or released_models()]
    write_releases(merged_rows(old, new), releases_path())


def _known() -> tuple[ReleasePeak, ...]:
    return read_releases() if releases_path().is_file() else ()


if __name__ == "__main__":
    main(sys.argv[1:])
