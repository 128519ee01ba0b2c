"""The contents of the site's index: each notebook in a few lines, and the peak before and after the fix as bars."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbformat

from i2v_lab.capacity.cards import gpu_memory_bytes
from i2v_lab.paths import data_dir
from i2v_lab.reporting.results import read_results
from i2v_lab.reporting.tables import WORDS
from i2v_lab.units import GIB, format_bytes

FAILED, DONE = "failed", "done"
SCOPES = ("escaped", "no_grad")
MAX_CLAIM = 180  # characters of a claim on the index


@dataclass(frozen=True)
class Page:
    """One executed notebook.

    Attributes:
        stem: Its file's name without a suffix.
        title: Its first heading, Markdown.
        claim: The first sentences of its claim, Markdown; empty if it states none.
        verdict: One or two words: that of its results, ``failed``, or ``done`` where there is none.
        finding: One sentence, plain; empty if there is none.
        origin: How its numbers were obtained; empty if its results do not say.
        error: The first line of the error that ended it; empty if it ran to the end.
        results: As :func:`i2v_lab.reporting.results.record` saved them.
    """

    stem: str
    title: str
    claim: str
    verdict: str
    finding: str
    origin: str
    error: str
    results: Mapping[str, Any]

    @property
    def href(self) -> str:
        """The file's name of its page."""
        return f"{self.stem}.html"


def read_page(notebook: Path, failed: bool) -> Page:
    """Read what the index and the head of its own page say about an executed notebook.

    Args:
        notebook: The executed file.
        failed: Whether it ended by an error, which is then read from its outputs.

    Raises:
        OSError: The file cannot be read.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    results = read_results(notebook)
    error = ""
    for cell in cells:
        for output in cell.get("outputs", []):
            if failed and output.output_type == "error":
                error = next(iter(f"{output.ename}: {output.evalue}".splitlines()))
    return Page(
        stem=notebook.stem,
        title=_title(cells) or notebook.stem,
        claim=_claim(cells),
        verdict=FAILED if failed else str(results.get("verdict", DONE)),
        finding="" if failed else str(results.get("finding") or ""),
        origin=origin(results),
        error=error,
        results=results,
    )


def _title(cells: Sequence[Any]) -> str:
    lines = (line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    return next((str(line.removeprefix("# ")) for line in lines if line.startswith("# ")), "")


def _claim(cells: Sequence[Any]) -> str:
    """The first sentence of the paragraph that starts with ``**Claim.**``, and more up to ``MAX_CLAIM`` characters."""
    for cell in cells:
        found = re.search(r"^\*\*Claim\.\*\*\s+(.+?)(?:\n\s*\n|\Z)", cell.source, re.MULTILINE | re.DOTALL)
        if cell.cell_type == "markdown" and found:
            first, *more = re.split(r"(?<=[.?!])\s+(?=[A-Z`*])", " ".join(found[1].split()))
            for sentence in more:
                if len(first) + len(sentence) >= MAX_CLAIM:
                    break
                first += f" {sentence}"
            return first
    return ""


def origin(results: Mapping[str, Any]) -> str:
    """How a notebook's numbers were obtained, from its ``source``, ``model`` and ``device``; empty without a source.

    Example:
        >>> origin({"source": "measure", "model": "ltx-2.3-tiny"})
        'measured on this machine with the tiny model (ltx-2.3-tiny)'
    """
    model, device = str(results.get("model") or ""), str(results.get("device") or "a device that is not recorded")
    size = "the tiny model" if model.endswith("-tiny") else "the full-size model"
    named = f"{size} ({model})" if model else ""
    origins = {
        "forecast": f"forecast{' for' * bool(named)} {named}".rstrip() + ", without a GPU",
        "measure": f"measured on this machine{' with' * bool(named)} {named}".rstrip(),
        "recorded": f"measured on {device}{' with' * bool(named)} {named}".rstrip(),
    }
    return origins.get(str(results.get("source")), "")


@dataclass(frozen=True)
class Bar:
    """One peak.

    Attributes:
        scope: ``escaped`` or ``no_grad``; the bar's colour.
        words: The scope in words.
        value: The peak, formatted.
        percent: The bar's length, of the whole width.
    """

    scope: str
    words: str
    value: str
    percent: float


@dataclass(frozen=True)
class Bars:
    """The peaks of both scopes.

    Attributes:
        label: Which runs.
        pair: One bar for each scope.
        card_percent: Where the card's memory is on the scale; ``None`` if the pair has its own scale.
        note: What is to be said beside the bars; empty if there is nothing.
    """

    label: str
    pair: Sequence[Bar]
    card_percent: float | None
    note: str = ""


@dataclass(frozen=True)
class Headline:
    """The peak before and after the fix.

    Attributes:
        before: Outside ``no_grad``, formatted.
        after: Inside it.
        ratio: How many times as high the first is.
        phase: The phase with the excess; empty if only the published numbers are known.
        origin: How the numbers were obtained.
        too_much: Whether ``before`` exceeds the card's memory.
        card: The published study's GPU, as in ``data/gpus.csv``.
        card_size: Its memory as CUDA reports it, formatted.
        groups: The pair of this run, if there is one, and the published pair.
        study: The published study, its title.
        study_url: Where it is published.
        own_scale: The card's memory as a multiple of this run's larger peak, where the pair has its own scale; empty
            otherwise.
    """

    before: str
    after: str
    ratio: str
    phase: str
    origin: str
    too_much: bool
    card: str
    card_size: str
    groups: Sequence[Bars]
    study: str
    study_url: str
    own_scale: str


def headline(pages: Sequence[Page]) -> Headline:
    """The peak before and after the fix: of the first notebook with both peaks, as published if there is none.

    Args:
        pages: All notebooks; ``escaped_peak_bytes`` and ``no_grad_peak_bytes`` of their results are read.
    """
    published = json.loads((data_dir() / "published" / "no_grad_study.json").read_text(encoding="utf-8"))
    published_bytes = {row["decode_scope"]: round(row["peak_gib"] * GIB) for row in published["before_after"]}
    first = published["before_after"][0]
    size = f"{first['width']}x{first['height']}, {first['frames']} frames"
    card_bytes = gpu_memory_bytes(published["gpu"])
    results = next((page.results for page in pages if page.results.get("escaped_peak_bytes") is not None), None)
    own_bytes = {scope: int(results[f"{scope}_peak_bytes"]) for scope in SCOPES} if results else {}
    on_card = max(own_bytes.values(), default=card_bytes) > card_bytes / 20  # shorter bars are invisible on its scale
    whole_bytes = 1.02 * max([card_bytes, *published_bytes.values(), *(own_bytes.values() if on_card else ())])
    groups = [_bars(f"Published study: {published['run']}, {size}", published_bytes, whole_bytes, card_bytes)]
    groups[0] = replace(groups[0], note=f"The longer bar ends below the card's line: that run {published['beside']}.")
    if own_bytes:
        scale_bytes = whole_bytes if on_card else 1.02 * max(own_bytes.values())
        groups.insert(0, _bars("This run", own_bytes, scale_bytes, card_bytes if on_card else None))
    shown = own_bytes or published_bytes
    known = origin(results) if results else ""
    return Headline(
        before=format_bytes(shown["escaped"]),
        after=format_bytes(shown["no_grad"]),
        ratio=f"{shown['escaped'] / shown['no_grad']:.2f}",
        phase=str(results.get("excess_phase") or "") if results else "",
        origin=known or ("found by this run" if own_bytes else "as published; this run has no figures of its own"),
        too_much=shown["escaped"] > card_bytes,
        card=published["gpu"],
        card_size=format_bytes(card_bytes),
        groups=groups,
        study=f"{published['author']}, {published['source']}",
        study_url=published["url"],
        own_scale="" if on_card else f"{card_bytes / max(own_bytes.values()):,.0f}",
    )


def _bars(label: str, peaks: Mapping[str, int], whole_bytes: float, card_bytes: int | None) -> Bars:
    pair = [
        Bar(scope, WORDS[scope], format_bytes(peaks[scope]), round(100 * peaks[scope] / whole_bytes, 2))
        for scope in SCOPES
    ]
    return Bars(label, pair, None if card_bytes is None else round(100 * card_bytes / whole_bytes, 2))
