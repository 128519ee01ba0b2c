"""A real JupyterLab on a free port of this machine, and notebooks in it as a person finds them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import psutil

from i2v_lab.cli.lab import START, lab_command, lab_environment
from i2v_lab.paths import CACHE_VARIABLE, cache_dir, notebooks_dir


@dataclass
class LabServer:
    """A running server.

    Attributes:
        url: Of its start page, with the token.
        notebooks: What it serves.
        process: It; its kernels are among its children.
        log: What it has written.
    """

    url: str
    notebooks: Path
    process: psutil.Process
    log: list[str] = field(default_factory=list)

    def page(self, notebook: str) -> str:
        """A notebook's address, in a workspace of its own: nothing else is open."""
        return self.url.replace(f"/lab/tree/{START}", f"/lab/workspaces/{Path(notebook).stem}/tree/{notebook}")


@contextmanager
def lab_server(
    folder: Path, parameters: dict[str, dict[str, Any]], *, keep_forecasts: bool = False
) -> Iterator[LabServer]:
    """JupyterLab as ``i2v-lab lab`` starts it, on copies of the notebooks with other parameters."""
    notebooks = folder / "notebooks"
    shutil.copytree(notebooks_dir(), notebooks, ignore=shutil.ignore_patterns(".*"))
    for name, values in parameters.items():
        set_parameters(notebooks / f"{name}.ipynb", values)
    environment = lab_environment(folder / "jupyter", os.environ)
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_WORKSPACES_DIR"):
        environment[name] = str(folder / name.lower())
    if not keep_forecasts:
        environment[CACHE_VARIABLE] = str(without_forecasts(folder / "cache"))
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_STATE_HOME": str(folder / "state")}
    options = ["--no-browser", f"--port={free_port()}"]
    options += ["--allow-root"] if os.geteuid() == 0 else []
    server = subprocess.Popen(
        lab_command(options, notebooks),
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(iter(server.stdout.readline, "")), daemon=True)
    reader.start()
    try:
        yield LabServer(_wait_for_url(server, log), notebooks, psutil.Process(server.pid), log)
    finally:
        if server.poll() is None:
            server.terminate()
        server.wait(timeout=30)
        reader.join(timeout=10)
        server.stdout.close()


def without_forecasts(folder: Path) -> Path:
    """A cache with everything that is in the session's, except that nothing has been forecast yet."""
    (folder / "forecasts").mkdir(parents=True)
    for entry in cache_dir().iterdir():
        if entry.name not in ("forecasts", "jupyter"):
            (folder / entry.name).symlink_to(entry)
    return folder


def _wait_for_url(server: subprocess.Popen[str], log: list[str]) -> str:
    """The address that it has written, once it listens there: it does so afterwards."""
    for _ in range(600):
        found = re.search(r"http://127\.0\.0\.1:(\d+)/lab\S*\?token=\w+", "".join(log))
        if found and _listens(int(found[1])):
            return found[0]
        assert server.poll() is None, "".join(log)
        time.sleep(0.1)
    raise AssertionError("".join(log))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def set_parameters(notebook: Path, values: dict[str, Any]) -> None:
    """Other values in the first code cell, as a person would type them."""
    node = nbformat.read(notebook, as_version=4)
    cell = next(cell for cell in node.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in values.items():
        cell.source, count = re.subn(rf"(?m)^({name}: \w+) = .*?  #", rf"\1 = {json.dumps(value)}  #", cell.source)
        assert count == 1, name
    nbformat.write(node, notebook)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
