"""``i2v-lab lab``: JupyterLab on the notebooks, with the kernel of this interpreter, for this machine only."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import typer

from i2v_lab.cli.output import log
from i2v_lab.errors import InvalidRequest, OutputError
from i2v_lab.files import write_atomically, write_text
from i2v_lab.paths import cache_dir, checkout_dir, notebooks_dir

LOCAL = {
    "ServerApp.ip": "127.0.0.1",
    "ServerApp.sock": "",
    "ServerApp.allow_origin": "",
    "ServerApp.allow_origin_pat": "",
    "ServerApp.allow_credentials": "False",
    "ServerApp.allow_remote_access": "False",
    "ServerApp.disable_check_xsrf": "False",
    "ServerApp.identity_provider_class": "i2v_lab.cli.lab_server.RequiredToken",
}
"""What makes the server one for this machine; on its command line, which no configuration file overrides."""
START = "README.md"
"""The notebook folder's page that JupyterLab opens first."""
COPY = "i2v-lab-notebooks"
"""Folder below the current one that gets the notebooks of an installed package."""
CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
EXAMPLES = """
**Examples**

On this machine, in a browser that it opens:

    i2v-lab lab

Over SSH: forward the port, then open the printed address on your own machine:

    ssh -L 8899:127.0.0.1:8899 gpu-host

    i2v-lab lab --no-browser --port 8899
"""


def lab(context: typer.Context) -> None:
    """Open JupyterLab on the notebooks; every other option is one of JupyterLab, such as --no-browser or --port.

    It listens on this machine only and requires its token, whatever is configured for Jupyter, and fetches neither news
    nor updates. The notebooks of an installed package are copied to ./i2v-lab-notebooks first; files that are there
    already stay as they are.
    """
    check_options(context.args)
    notebooks = editable_notebooks(Path.cwd())
    remote = "SSH_CONNECTION" in os.environ  # the browser would open on the wrong machine
    options = [*(["--no-browser"] if remote and "--no-browser" not in context.args else []), *context.args]
    environment = lab_environment(cache_dir() / "jupyter", os.environ)
    command = lab_command(options, notebooks)
    os.execve(command[0], command, environment)  # noqa: S606 - replaces this process: JupyterLab gets the signals


def check_options(options: Sequence[str]) -> None:
    """Check that no option of JupyterLab opens the server to others.

    Raises:
        InvalidRequest: One sets something of ``LOCAL``.
    """
    reserved = {name.partition(".")[2] for name in LOCAL}
    for option in options:
        name = option.lstrip("-").partition("=")[0].rpartition(".")[2].replace("-", "_")
        if option.startswith("-") and name in reserved:
            raise InvalidRequest(
                f"option {option.partition('=')[0]} is not for a server of this machine only; to reach it from another "
                "machine, forward its port with ssh -L",
                option=option,
            )


def editable_notebooks(folder: Path) -> Path:
    """Return the notebooks where changes to them can be saved and survive an upgrade.

    Args:
        folder: Gets the copy, ``COPY``, if the package is installed rather than run from a checkout.

    Returns:
        The folder of the checkout, or the copy.

    Raises:
        OutputError: There are no notebooks, or they cannot be copied.
    """
    source = notebooks_dir()
    if not source.is_dir():
        raise OutputError(f"the notebook folder '{source}' does not exist; reinstall i2v-lab", folder=source)
    if checkout_dir() is not None:
        return source
    copy = folder / COPY
    try:
        for path in sorted(source.glob("[!.]*")):
            target = copy / path.name
            if path.is_file() and not target.exists():
                copy.mkdir(exist_ok=True)
                write_atomically(target, partial(shutil.copyfile, path))
    except OSError as error:
        raise OutputError(
            f"the notebooks cannot be copied to '{copy}' ({error.strerror}); start in a folder that is writable",
            folder=copy,
        ) from error
    log(f"i2v-lab: the notebooks are in {copy}; changes are saved there")
    return copy


def lab_command(options: Sequence[str] = (), notebooks: Path | None = None) -> list[str]:
    """Return the command line of JupyterLab.

    Args:
        options: Further options of JupyterLab.
        notebooks: Folder to serve; that of the package by default.
    """
    return [
        sys.executable,
        "-m",
        "jupyterlab",
        *(f"--{name}={value}" for name, value in LOCAL.items()),
        f"--ServerApp.root_dir={notebooks or notebooks_dir()}",
        "--ServerApp.kernel_spec_manager_class=i2v_lab.reproduce.kernel.InterpreterKernelSpecs",
        f"--LabApp.default_url=/lab/tree/{START}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
        *options,
    ]


def lab_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of JupyterLab: with progress bars, and without a question about news.

    Args:
        folder: Gets the settings of JupyterLab.
        environment: Environment of the caller, which is not changed.

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
        for name, values in settings.items():
            write_text(folder / "labconfig" / name, json.dumps(values))
    except OSError as error:
        raise OutputError(f"the cache folder '{folder}' cannot be written ({error.strerror})", folder=folder) from error
    config_path = os.pathsep.join(filter(None, [str(folder), environment.get("JUPYTER_CONFIG_PATH")]))
    return {
        **environment,
        "JUPYTER_CONFIG_PATH": config_path,
        "TQDM_DISABLE": "0",
        "TRANSFORMERS_VERBOSITY": "error",
    }
