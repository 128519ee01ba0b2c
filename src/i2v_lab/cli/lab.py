"""``i2v-lab lab``: JupyterLab with this package's kernel and a start page, for this machine alone."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from i2v_lab.errors import OutputError
from i2v_lab.files import write_text
from i2v_lab.paths import cache_dir, notebooks_dir
from i2v_lab.reproduce.kernel import write_kernel_spec

NOTEBOOKS = notebooks_dir()
START = "README.md"
LAB_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
LAB_EXAMPLES = """
**Examples**

On this machine, in a browser that it opens:

    i2v-lab lab

Over SSH: forward the port, then open the printed address on your own machine:

    ssh -L 8899:127.0.0.1:8899 gpu-host

    i2v-lab lab --no-browser --port 8899
"""


def lab(context: typer.Context) -> None:
    """Open JupyterLab on the notebooks; every other option is JupyterLab's own, such as --no-browser or --port.

    It listens on this machine only, asks for its token, and looks for neither news nor updates.
    """
    remote = "SSH_CONNECTION" in os.environ  # the browser would be on the wrong machine
    options = [*(["--no-browser"] if remote and "--no-browser" not in context.args else []), *context.args]
    environment = lab_environment(cache_dir() / "jupyter", os.environ)
    command = lab_command(options)
    os.execve(command[0], command, environment)  # noqa: S606 - so that signals and Ctrl-C are JupyterLab's


def lab_command(options: Sequence[str] = (), notebooks: Path = NOTEBOOKS) -> list[str]:
    """The command line of JupyterLab on a folder of notebooks, with more of its own options."""
    return [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ip=127.0.0.1",
        f"--ServerApp.root_dir={notebooks}",
        f"--LabApp.default_url=/lab/tree/{START}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
        *options,
    ]


def lab_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of JupyterLab: ``python3`` is this interpreter, and nobody is asked about news.

    Args:
        folder: Gets the kernel's spec and JupyterLab's settings.
        environment: The caller's, which is left as it is.

    Raises:
        OutputError: ``folder`` cannot be written.
    """
    settings = {
        "page_config.json": {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}},
        "default_setting_overrides.json": {
            "@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}}
        },
    }
    try:
        write_kernel_spec(folder, "python3", {"TQDM_DISABLE": "0", "TRANSFORMERS_VERBOSITY": "error"})
        for name, values in settings.items():
            write_text(folder / "labconfig" / name, json.dumps(values))
    except OSError as error:
        raise OutputError(f"the cache folder '{folder}' cannot be written ({error.strerror})") from error
    found = dict(environment)
    for name in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH"):
        found[name] = os.pathsep.join(filter(None, [str(folder), environment.get(name)]))
    return found
