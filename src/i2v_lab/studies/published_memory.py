"""Peaks of memory that others published for diffusion pipelines: ``data/published/memory.csv``, read and checked."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from i2v_lab.errors import RecordError, shown
from i2v_lab.paths import data_dir
from i2v_lab.units import GIB

# What was counted. ``not stated``: the source says "memory", "VRAM" or "peak" and no more.
QUANTITIES = ("allocated", "reserved", "nvidia-smi", "minimum card", "not stated")
OFFLOADS = ("", "none", "model", "sequential", "group-leaf", "group-block")
SWITCHES = ("", "yes", "no")
DTYPES = ("", "bfloat16", "float16", "float32")
# Bytes of one, as the number was printed: torch's counters are divided by 1024**3 and called GB as often as not.
UNITS = {"GiB": (2**30,), "GB": (2**30, 10**9), "MiB": (2**20,), "MB": (2**20, 10**6)}
CHOICES = {
    "offload": OFFLOADS,
    "vae_tiling": SWITCHES,
    "vae_slicing": SWITCHES,
    "dtype": DTYPES,
    "unit": tuple(UNITS),
    "quantity": QUANTITIES,
}
WHOLE = ("width", "height", "frames", "batch", "steps")
NEEDED = ("id", "model", "pipeline", "batch", "source")
PATTERNS = {
    "id": (r"[a-z0-9][a-z0-9.-]*", "lower-case letters, digits, points and hyphens", "such as blog-hunyuanvideo"),
    "date": (r"|\d{4}-(0[1-9]|1[0-2])", "a month", "such as 2025-01, or leave it empty"),
    "source": (r"https://\S+", "an address", "such as https://github.com/huggingface/diffusers/pull/10503"),
}
MOST = 2**20  # of a whole number
MOST_GIB = 2**20


@dataclass(frozen=True, kw_only=True)
class PublishedPeak:
    """One published peak: a row of the file, whose columns these are.

    What the source does not say is ``None`` for a number and empty for a text.

    Attributes:
        id: Its name; no two are equal.
        model: An architecture's name, or any other where this project has none.
        pipeline: diffusers' class, or the repository whose code ran.
        width: In pixels.
        height: In pixels.
        frames: 1 for an image.
        batch: Videos or images at once.
        steps: Of denoising.
        dtype: Of the weights, and of the computation where they are quantized.
        offload: As :class:`~i2v_lab.memory_settings.Offload` names it.
        vae_tiling: ``yes`` or ``no``.
        vae_slicing: Likewise.
        quantization: ``layerwise-fp8`` for diffusers' layerwise casting, or the library and its kind, such as
            ``bnb-4bit``; empty for none.
        other: Further settings, separated by semicolons: ``offload_stream=true``, ``offload_blocks=4``,
            ``dtypes.vae=float32``, or words for what a request of this project has no field for.
        peak_gib: The peak in GiB.
        printed: The number as it is printed in the source.
        unit: Its unit as it is printed there.
        quantity: What was counted, one of :data:`QUANTITIES`.
        card: Where.
        versions: Of diffusers and torch.
        date: Year and month.
        source: The address.
        note: What else matters.
        reason: Why a forecast differs from it by more than a twentieth, or ``not explained; `` and what was tried; what
            else a row that is not compared lacks. Empty where there is nothing to say.
        line: Of the file.
    """

    id: str
    model: str
    pipeline: str
    width: int | None
    height: int | None
    frames: int | None
    batch: int
    steps: int | None
    dtype: str
    offload: str
    vae_tiling: str
    vae_slicing: str
    quantization: str
    other: str
    peak_gib: float
    printed: float
    unit: str
    quantity: str
    card: str
    versions: str
    date: str
    source: str
    note: str
    reason: str
    line: int

    @property
    def peak_bytes(self) -> int:
        """The peak in bytes, as exact as it was printed."""
        return round(self.peak_gib * GIB)


COLUMNS = tuple(field.name for field in fields(PublishedPeak) if field.name != "line")


def read_lines(path: Path, what: str, remedy: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a CSV file, and its other rows, each with the number of its last line.

    Args:
        path: In UTF-8.
        what: The rows, for the message.
        remedy: What to do about a file that cannot be read.

    Raises:
        RecordError: It cannot be read.
    """
    try:
        lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        return next(lines, []), [(lines.line_num, row) for row in lines]
    except (OSError, ValueError, csv.Error) as error:
        words = f"{what} '{path}' cannot be read ({' '.join(str(error).split())}); {remedy}"
        raise RecordError(words, path=path) from error


def read_published(path: Path | None = None) -> tuple[PublishedPeak, ...]:
    """All published peaks, in the order of the file.

    Args:
        path: A CSV file in UTF-8 with the columns of :class:`PublishedPeak` in their order; by default
            ``data/published/memory.csv``.

    Raises:
        RecordError: The file cannot be read, or a row breaks a rule: with its line, its ``id``, the column, the value
            and what to write.

    Example:
        >>> peaks = {peak.id: peak for peak in read_published()}
        >>> peaks["blog-hunyuanvideo"].peak_gib, peaks["blog-hunyuanvideo"].quantity
        (60.09, 'not stated')
    """
    source = path or data_dir() / "published" / "memory.csv"
    header, rows = read_lines(source, "published peaks", "give a CSV file in UTF-8")
    if tuple(header) != COLUMNS:
        raise RecordError(
            f"published peaks '{source}' have the columns {shown(header)}; use {','.join(COLUMNS)}", path=source
        )
    peaks: dict[str, PublishedPeak] = {}
    for line, row in rows:
        if len(row) != len(COLUMNS):
            raise RecordError(
                f"line {line} of '{source}' has {len(row)} values; use {len(COLUMNS)}, and quotes around a comma",
                path=source,
                line=line,
            )
        peak = _Row(source, line, dict(zip(COLUMNS, row, strict=True))).peak()
        if peak.id in peaks:
            earlier = peaks[peak.id].line
            raise RecordError(
                f"line {line} of '{source}': id={peak.id!r} is that of line {earlier} too; use another",
                path=source,
                line=line,
                id=peak.id,
            )
        peaks[peak.id] = peak
    return tuple(peaks.values())


@dataclass(frozen=True)
class _Row:
    """A row as text, on its way to a peak."""

    path: Path
    line: int
    values: dict[str, str]

    def peak(self) -> PublishedPeak:
        for column, value in self.values.items():
            if value != value.strip() or not value.isprintable():
                self.refuse(column, "has spaces around it, or a control character", "the text alone")
            if column in NEEDED and not value:
                self.refuse(column, "is empty", "what the source says")
        for column, choices in CHOICES.items():
            if self.values[column] not in choices:
                self.refuse(column, "is unknown", " or ".join(choice or "nothing" for choice in choices))
        for column, (pattern, kind, example) in PATTERNS.items():
            if not re.fullmatch(pattern, self.values[column], re.ASCII):
                self.refuse(column, f"is not {kind}", example)
        numbers: dict[str, Any] = {column: self.whole(column) for column in WHOLE}
        numbers |= {column: self.decimal(column) for column in ("peak_gib", "printed")}
        self.check_unit(numbers["peak_gib"], numbers["printed"])
        return PublishedPeak(**{**self.values, **numbers, "line": self.line})

    def whole(self, column: str) -> int | None:
        text = self.values[column]
        if text and not (re.fullmatch(r"[1-9]\d{0,6}", text, re.ASCII) and int(text) <= MOST):
            self.refuse(column, "is not a whole number above 0", f"one up to {MOST}, or leave it empty")
        return int(text) if text else None

    def decimal(self, column: str) -> float:
        text = self.values[column]
        if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII) or not float(text):
            self.refuse(column, "is not a number above 0", "one such as 60.09")
        return float(text)

    def check_unit(self, peak_gib: float, printed: float) -> None:
        """The peak is what is printed, in one of the meanings of its unit."""
        meant = sorted({printed * scale / GIB for scale in UNITS[self.values["unit"]]}, reverse=True)
        if peak_gib > MOST_GIB or not any(abs(peak_gib - gib) <= 0.001 + 0.0005 * gib for gib in meant):
            what = f"is not {self.values['printed']} {self.values['unit']}"
            self.refuse("peak_gib", what, " or ".join(f"{gib:.3f}" for gib in meant))

    def refuse(self, column: str, rule: str, remedy: str) -> NoReturn:
        value = self.values[column]
        raise RecordError(
            f"line {self.line} of '{self.path}', id={shown(self.values['id'])}: {column}={shown(value)} {rule}; "
            f"use {remedy}",
            path=self.path,
            line=self.line,
            id=self.values["id"],
            column=column,
            value=value,
        )
