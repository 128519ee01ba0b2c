"""The answer page: which placement, memory settings and seconds each model has on each card, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from i2v_lab.capacity.cards import RESERVED_MARGIN_PERCENT
from i2v_lab.files import write_text
from i2v_lab.reporting.site.render import FIT, NO_PROVENANCE, TEMPLATES, content_security_policy, site_environment
from i2v_lab.units import format_bytes, format_seconds

FACTS = {
    "fragmentation": "384 MiB",  # beside a solved placement: docs/memory-policies.md
    "margin": f"{RESERVED_MARGIN_PERCENT} %",
    "most_needed": "5.7 %",  # of the runs of data/accuracy.csv
    "error": "0.2 %",  # of whole runs of LTX-2.3 there
}
"""Numbers in the explanations, each with its source."""


def render_answer(answer: Mapping[str, Any], folder: Path, provenance: Mapping[str, str] = NO_PROVENANCE) -> Path:
    """Render the answer page: it needs no other file and no network.

    Args:
        answer: Of :func:`i2v_lab.studies.answer.answer`.
        folder: Of the site.
        provenance: Facts about this build for the footer, by name.

    Returns:
        The path of the page.

    Raises:
        OSError: It cannot be written.

    Example:
        >>> render_answer(json.loads(Path("answer.json").read_text()), Path("build/site"))  # doctest: +SKIP
        PosixPath('build/site/fit.html')
    """
    environment = site_environment(provenance)
    own = (TEMPLATES / "fit.js").read_text(encoding="utf-8")
    scripts = (str(environment.globals["theme_script"]), str(environment.globals["script"]), own)
    html = environment.get_template("fit.html.j2").render(
        policy=content_security_policy(*scripts),
        fit_style=Markup((TEMPLATES / "fit.css").read_text(encoding="utf-8")),  # noqa: S704 - our own
        fit_script=Markup(own),  # noqa: S704 - our own
        facts=FACTS,
        answer=answer,
        matrix=matrix(answer),
    )
    return write_text(folder / FIT, html)


def matrix(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every point with a cell for each card, in words: what is read without JavaScript.

    Args:
        answer: As for :func:`render_answer`.

    Returns:
        Of each point ``model, size`` and ``cells``: for each card ``name``, ``needs`` and ``seconds``; an empty
        ``name`` where nothing fits.
    """
    rows = []
    for point in answer["points"]:
        cells = []
        for card in answer["cards"]:
            best = point["best"][card["name"]]
            way = None if best is None else point["ways"][best]
            seconds = None if way is None else way["seconds"].get(card["name"])
            shown = "" if seconds is None else format_seconds(seconds, rough=True)
            needs = format_bytes(point["least_bytes"] if way is None else way["needed_bytes"])
            cells.append({"name": way["name"] if way else "", "needs": needs, "seconds": shown})
        size = f"{point['width']}x{point['height']}, {point['frames']} frames"
        rows.append({"model": point["model"], "size": size, "cells": cells})
    return rows
