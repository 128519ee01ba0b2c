"""The committed summary says what the records say, and the workflow publishes what `make reproduce` makes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import yaml

from i2v_lab.paths import data_dir
from i2v_lab.profiling.records import PhaseRecord, peak_phase
from i2v_lab.runs.store import read_run
from i2v_lab.units import format_bytes

TOP = Path(__file__).parents[2]
SUMMARY = TOP / "docs" / "summary.md"


def test_the_summary_is_what_the_script_writes(tmp_path):
    written = runpy.run_path(str(TOP / "docs" / "write_summary.py"))["summary"](tmp_path)
    assert written == SUMMARY.read_text(), "docs/summary.md is out of date: make figures"
    assert len(written) < 60_000


def test_its_numbers_are_those_of_the_records():
    text = SUMMARY.read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+ GiB) \| (\w+) \|", text, re.MULTILINE)
    assert len(rows) == 16
    h200 = data_dir() / "measured" / "nvidia-h200"
    of = {"outside no_grad": "1024x768x97_escaped", "inside no_grad": "1024x768x97"}
    shown = {of.get(name, f"{name}x97"): (peak, phase) for name, peak, phase in rows[:6]}
    for name, (peak, phase) in shown.items():
        runs = [folder for folder in h200.iterdir() if re.fullmatch(rf"{name}(_\d+)?", folder.name)]
        assert runs, name
        for folder in runs:
            record = peak_phase(read_run(folder).of(PhaseRecord))
            assert (format_bytes(record.peak_bytes), record.phase) == (peak, phase), folder.name
    assert len(shown) == 5
    for picture in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (TOP / "docs" / picture).is_file()


def test_the_workflow_publishes_the_site_with_the_files_that_its_pages_offer():
    workflow = yaml.safe_load((TOP / ".github" / "workflows" / "pages.yml").read_text())
    steps = workflow["jobs"]["reproduce"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands[0] == "make reproduce"
    assert "build/site build/figures build/tables build/pages/" in commands[1]
    upload = next(step for step in steps if "upload-pages-artifact" in step.get("uses", ""))
    assert upload["with"]["path"] == "build/pages"
    assert workflow["jobs"]["deploy"]["needs"] == "reproduce"
    assert "Not tested" in (TOP / ".github" / "workflows" / "pages.yml").read_text()
