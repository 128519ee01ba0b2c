"""What the index says: each notebook in a few lines, and the peak before and after, drawn to scale."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from i2v_lab.paths import data_dir
from i2v_lab.reporting.results import read_results
from i2v_lab.reporting.tables import WORDS
from i2v_lab.units import GIB, format_bytes

CARD = "RTX PRO 6000 Blackwell"  # the published run's; how much CUDA can use of it is in data/gpus.csv
FAILED, DONE = "failed", "done"
SCOPES = ("escaped", "no_grad")
SHORT = 180  # characters of a claim that the index has room for


@dataclass(frozen=True)
class Page:
    """One executed notebook.

    Attributes:
        stem: Its file's name without a suffix.
        title: Its first heading, Markdown.
        claim: The sentences of its claim that the index has room for, Markdown; empty if it states none.
        verdict: One or two words: that of its results, ``failed``, or ``done`` where there is none.
        finding: One sentence, plain; empty if there is none.
        origin: How its figures came about; empty if they do not say.
        error: The first line of the error that ended it; empty if it ran to the end.
        results: As :func:`i2v_lab.reporting.results.record` kept them.
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
        """Its page, from any other."""
        return f"{self.stem}.html"


def read_page(notebook: Path, failed: bool) -> Page:
    """What the index and the head of its own page say of an executed notebook."""
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
    """Whole sentences of the paragraph that starts with ``**Claim.**``: the first, and more while there is room."""
    for cell in cells:
        found = re.search(r"^\*\*Claim\.\*\*\s+(.+?)(?:\n\s*\n|\Z)", cell.source, re.MULTILINE | re.DOTALL)
        if cell.cell_type == "markdown" and found:
            first, *more = re.split(r"(?<=[.?!])\s+(?=[A-Z`*])", " ".join(found[1].split()))
            for sentence in more:
                if len(first) + len(sentence) >= SHORT:
                    break
                first += f" {sentence}"
            return first
    return ""


def origin(results: Mapping[str, Any]) -> str:
    """How figures came about, in words, from ``source``, ``model`` and ``device``; empty if they do not say.

    Example:
        >>> origin({"source": "measure", "model": "ltx-2.3-tiny"})
        'measured on this machine with the tiny model (ltx-2.3-tiny)'
    """
    model = str(results.get("model") or "")
    size = "the tiny model" if model.endswith("-tiny") else "the full-size model"
    named = f"{size} ({model})" if model else size
    ways = {
        "forecast": f"forecast for {named}, without a GPU",
        "measure": f"measured on this machine with {named}",
        "recorded": f"measured on {results.get('device') or 'NVIDIA H200'} with {named}",
    }
    return ways.get(str(results.get("source")), "")


@dataclass(frozen=True)
class Bar:
    """One peak; ``percent`` of the width, ``words`` for what it is, ``scope`` for its colour."""

    scope: str
    words: str
    value: str
    percent: float


@dataclass(frozen=True)
class Bars:
    """A pair of peaks; ``card_percent`` is where the card ends, ``None`` where the scale is the pair's own."""

    label: str
    pair: Sequence[Bar]
    card_percent: float | None


@dataclass(frozen=True)
class Headline:
    """The peak before and after the fix.

    Attributes:
        before: Outside ``no_grad``, formatted.
        after: Inside it.
        ratio: How many times as high the first is.
        phase: Where the excess is; empty if only the published figures are known.
        origin: How the figures came about.
        too_much: Whether ``before`` is more than the card has.
        card: Its name.
        card_size: What CUDA can use of it, formatted.
        groups: Ours, if there are any, and the published pair.
        own_scale: How many times our larger bar the card is, where it would be off the paper; empty otherwise.
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
    own_scale: str


def headline(pages: Sequence[Page]) -> Headline:
    """The before and after of the index: from the notebook that found them, or as published where none did."""
    published = json.loads((data_dir() / "published" / "no_grad_study.json").read_text(encoding="utf-8"))
    theirs = {row["decode_scope"]: round(row["peak_gib"] * GIB) for row in published["before_after"]}
    first = published["before_after"][0]
    size = f"{first['width']}x{first['height']}, {first['frames']} frames"
    their_label = f"Published study: {published['run']}, {size}"
    cards = pd.read_csv(data_dir() / "gpus.csv").set_index("gpu")["memory_bytes"]
    card_bytes = int(cards[CARD])
    results = next((page.results for page in pages if page.results.get("escaped_peak_bytes") is not None), None)
    ours = {scope: int(results[f"{scope}_peak_bytes"]) for scope in SCOPES} if results else {}
    on_card = max(ours.values(), default=card_bytes) > card_bytes / 20  # else the bars could not be seen beside it
    whole = 1.02 * max([card_bytes, *theirs.values(), *(ours.values() if on_card else ())])
    groups = [_bars(their_label, theirs, whole, card_bytes)]
    how = origin(results) if results else ""
    if ours:
        own = whole if on_card else 1.02 * max(ours.values())
        groups.insert(0, _bars("Here", ours, own, card_bytes if on_card else None))
    shown = ours or theirs
    return Headline(
        before=format_bytes(shown["escaped"]),
        after=format_bytes(shown["no_grad"]),
        ratio=f"{shown['escaped'] / shown['no_grad']:.2f}",
        phase=str(results.get("excess_phase") or "") if results else "",
        origin=how or ("found by this run" if ours else "as published; this run has no figures of its own"),
        too_much=shown["escaped"] > card_bytes,
        card=CARD,
        card_size=format_bytes(card_bytes),
        groups=groups,
        own_scale="" if on_card else f"{card_bytes / max(ours.values()):,.0f}",
    )


def _bars(label: str, peaks: Mapping[str, int], whole: float, card_bytes: int | None) -> Bars:
    pair = [
        Bar(scope, WORDS[scope], format_bytes(peaks[scope]), round(100 * peaks[scope] / whole, 2)) for scope in SCOPES
    ]
    return Bars(label, pair, None if card_bytes is None else round(100 * card_bytes / whole, 2))
