"""The write-up: every executed notebook as one self-contained page, and an index that tells the story."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from nbconvert import HTMLExporter

from i2v_lab.paths import data_dir
from i2v_lab.reporting.files import write_text
from i2v_lab.reporting.results import read_results
from i2v_lab.units import format_bytes

TEMPLATES = Path(__file__).parent / "templates"


def render_site(executed: Sequence[Path], failed: Sequence[Path], folder: Path) -> Path:
    """Render executed notebooks and their index.

    Args:
        executed: Notebooks with outputs.
        failed: Those among them that did not run to the end.
        folder: Gets ``index.html`` and one page a notebook.

    Returns:
        The index.
    """
    css, provenance = (TEMPLATES / "style.css").read_text(), provenance_line()
    exporter: Any = HTMLExporter(
        template_name="article", extra_template_basedirs=[str(TEMPLATES)], exclude_anchor_links=True
    )
    pages = []
    for notebook in executed:
        title = notebook_title(notebook)
        html, _ = exporter.from_filename(
            str(notebook), resources={"title": title, "css": css, "provenance": provenance}
        )
        write_text(folder / f"{notebook.stem}.html", html)
        verdict = "failed" if notebook in failed else str(read_results(notebook).get("verdict", "done"))
        pages.append({"title": title, "href": f"{notebook.stem}.html", "verdict": verdict})
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    index = environment.get_template("site_index.html.j2").render(
        css=css, pages=pages, headline=headline(executed), provenance=provenance
    )
    return write_text(folder / "index.html", index)


def headline(executed: Sequence[Path]) -> dict[str, str] | None:
    """The before and after of the index, from the named results of the notebook that measured them."""
    for notebook in executed:
        results = read_results(notebook)
        if "escaped_peak_bytes" in results:
            published = json.loads((data_dir() / "published" / "no_grad_study.json").read_text())["before_after"]
            theirs = {row["decode_scope"]: f"{row['peak_gib']:.1f} GiB" for row in published}
            return {
                "before": format_bytes(results["escaped_peak_bytes"]),
                "after": format_bytes(results["no_grad_peak_bytes"]),
                "ratio": f"{results['peak_ratio']:.2f}",
                "phase": results["excess_phase"],
                "model": results["model"],
                "published_before": theirs["escaped"],
                "published_after": theirs["no_grad"],
            }
    return None


def notebook_title(notebook: Path) -> str:
    """Its first heading."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        for line in cell.source.splitlines():
            if cell.cell_type == "markdown" and line.startswith("# "):
                return str(line.removeprefix("# "))
    return notebook.stem


def provenance_line() -> str:
    """On which machine, with which versions, from which commit."""
    versions = []
    for package in ("i2v-lab", "torch", "ltx-core", "ltx-pipelines"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    cores = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"Made {made} on {cores}; {', '.join(versions)}; commit {git_commit() or 'unknown'}."


def git_commit() -> str | None:
    """The checkout's commit, shortened; ``None`` outside a checkout."""
    top = Path(__file__).parents[3]
    if not (top / ".git").exists():
        return None
    command = ["git", "-C", str(top), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return found.stdout.strip() or None if found.returncode == 0 else None
