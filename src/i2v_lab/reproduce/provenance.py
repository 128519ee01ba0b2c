"""Machine, versions and commit of a build, for the footer of its pages."""

from __future__ import annotations

import psutil

from i2v_lab.runs.provenance import run_metadata
from i2v_lab.units import format_bytes


def site_provenance() -> dict[str, str]:
    """Machine, versions, commit and time of this build, for the footer of every page; by name."""
    found = run_metadata("cuda:0")
    versions = {name: text for name, text in found["versions"].items() if text}
    commit = found["git_commit"]
    changed = ", with changes that are not committed" if found["git_modified"] else ""
    card = found["device_name"]
    memory = format_bytes(psutil.virtual_memory().total)
    return {
        "Made": found["started_at"].replace("T", " ").replace("+00:00", " UTC"),
        "Machine": f"{found['processor'] or 'unknown processor'}, {found['cores']} cores, {memory} of memory, "
        + (f"{card}, driver {found['driver_version']}" if card else "no NVIDIA GPU"),
        "System": found["platform"],
        "Versions": ", ".join(f"{name} {text}" for name, text in versions.items()),
        "Commit": f"{commit[:12]}{changed}" if commit else "not a checkout",
    }
