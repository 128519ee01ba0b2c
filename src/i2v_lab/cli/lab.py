"""``i2v-lab lab``: JupyterLab on the notebooks, with the kernel of this interpreter, for this machine only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import typer

from i2v_lab.cli.output import log
from i2v_lab.cli.placed import with_expandable_segments
from i2v_lab.errors import InvalidRequest, OutputError
from i2v_lab.extras import require_module
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
CHECKOUT_COPY = Path("build", "lab")
"""Folder of a checkout that gets its notebooks, whose files there git tracks."""
MESSAGE_BYTES = 64 * 2**20
"""Largest message between browser and server, such as an uploaded file; tornado's default is 10 MiB."""
OWN = {
    "ServerApp.kernel_spec_manager_class": "i2v_lab.reproduce.kernel.InterpreterKernelSpecs",
    "ServerApp.tornado_settings": f"{{'websocket_max_message_size': {MESSAGE_BYTES}}}",
    "LabApp.default_url": f"/lab/tree/{START}",
    "LabApp.news_url": "None",
    "LabApp.check_for_updates_class": "jupyterlab.handlers.announcements.NeverCheckForUpdate",
    "LabApp.extension_manager": "readonly",
}
"""What else is set, besides the folder."""
FOLDER_OPTIONS = ("root_dir", "notebook_dir")
FLAGS = {"no-browser", "allow-root", "debug", "no-mathjax", "autoreload", "core-mode", "dev-mode", "y"}
"""Options of JupyterLab without a value, after which an argument is a file or a folder."""
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
    nor updates. It opens copies of the notebooks, in build/lab of a checkout or ./i2v-lab-notebooks, so that saving
    changes nothing that git tracks; copies that were changed stay as they are. As root, as in most containers,
    JupyterLab gets --allow-root.
    """
    require_module("jupyterlab")
    check_options(context.args)
    options = complete_options(context.args, os.environ)
    notebooks = editable_notebooks(Path.cwd())
    environment = lab_environment(cache_dir() / "jupyter", os.environ)
    command = lab_command(options, notebooks)
    os.execve(command[0], command, environment)  # noqa: S606 - replaces this process: JupyterLab gets the signals


def check_options(options: Sequence[str]) -> None:
    """Refuse what would open the server to others, and what is set here already.

    Raises:
        InvalidRequest: An option sets something of ``LOCAL`` or ``OWN``, or names a file or a folder to serve.
    """
    local, own = ({name.partition(".")[2] for name in names} for names in (LOCAL, OWN))
    for before, option in zip(["", *options], options, strict=False):
        given = option.partition("=")[0]
        name = _name(option)
        if not option.startswith("-"):
            if not before.startswith("-") or "=" in before or before.lstrip("-") in FLAGS:
                raise InvalidRequest(
                    f"{option!r} is a file or a folder, and this server has one of its own, with copies of the "
                    "notebooks; leave it out, or run jupyter lab",
                    option=option,
                )
        elif name in local:
            raise InvalidRequest(
                f"option {given} is set already, to what makes this a server for this machine only; leave it out; to "
                "reach it from another machine, forward its port with ssh -L",
                option=option,
            )
        elif name in FOLDER_OPTIONS:
            raise InvalidRequest(
                f"option {given} is set already, to the folder with copies of the notebooks; leave it out, or run "
                "jupyter lab for another folder",
                option=option,
            )
        elif name in own:
            raise InvalidRequest(
                f"option {given} is set already by i2v-lab lab; leave it out, or run jupyter lab", option=option
            )


def _name(option: str) -> str:
    """The trait that an option sets, such as ``root_dir`` of ``--ServerApp.root_dir=x``."""
    return option.lstrip("-").partition("=")[0].rpartition(".")[2].replace("-", "_")


def complete_options(options: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The user's options, and what this machine needs besides: no browser over SSH, and root's permission for root.

    Args:
        options: As given.
        environment: In which ``SSH_CONNECTION`` says that the browser would open on the wrong machine.
    """
    given = {_name(option) for option in options if option.startswith("-")}
    found = list(options)
    if "SSH_CONNECTION" in environment and "no_browser" not in given:
        found.insert(0, "--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0 and "allow_root" not in given:
        log("i2v-lab: running as root, so JupyterLab gets --allow-root; whoever has its token acts as root")
        found.insert(0, "--allow-root")
    return found


def editable_notebooks(folder: Path) -> Path:
    """Return copies of the notebooks, where changes to them can be saved and survive an upgrade.

    A copy that was not changed follows its notebook; one that was changed stays, and is named if its notebook has
    changed too.

    Args:
        folder: Gets ``COPY``, if the package is installed rather than run from a checkout.

    Returns:
        The folder of the copies: ``build/lab`` of a checkout, or that.

    Raises:
        OutputError: There are no notebooks, or they cannot be copied.
    """
    source, checkout = notebooks_dir(), checkout_dir()
    if not source.is_dir():
        raise OutputError(f"the notebook folder '{source}' does not exist; reinstall i2v-lab", folder=source)
    copy = folder / COPY if checkout is None else checkout / CHECKOUT_COPY
    try:
        record = cache_dir() / "jupyter" / f"copied-{hashlib.sha256(os.fsencode(copy)).hexdigest()[:16]}.json"
        stale = copy_notebooks(source, copy, record)
    except OSError as error:
        raise OutputError(
            f"the notebooks cannot be copied to '{copy}' ({error.strerror}); start in a folder that is writable",
            folder=copy,
        ) from error
    log(f"i2v-lab: JupyterLab opens copies of the notebooks, in {copy}; changes are saved there")
    if stale:
        log(f"i2v-lab: {', '.join(stale)}: changed by you and since by i2v-lab; delete your copy to get the new one")
    return copy


def copy_notebooks(source: Path, copy: Path, record: Path) -> list[str]:
    """Copy what is new or was not changed in the copy.

    Args:
        source: Folder of the notebooks.
        copy: Folder of their copies; made if it does not exist.
        record: JSON file with the SHA-256 of each notebook as it was when it was copied.

    Returns:
        Names of copies that were changed, and whose notebooks have changed since.

    Raises:
        OSError: A file cannot be read or written.
    """
    copied: dict[str, str] = {}
    with suppress(OSError, ValueError):  # a damaged file counts as none: nothing that is there is overwritten
        copied = dict(json.loads(record.read_text(encoding="utf-8")))
    copy.mkdir(parents=True, exist_ok=True)
    stale, before = [], dict(copied)
    for path in sorted(source.glob("[!.]*")):
        if not path.is_file():
            continue
        target = copy / path.name
        digest = _digest(path)
        own = _digest(target) if target.exists() else None
        if own is None or own == copied.get(path.name):
            if own != digest:
                write_atomically(target, partial(shutil.copyfile, path))
            copied[path.name] = digest
        elif digest not in (copied.get(path.name), own):
            stale.append(path.name)
    if copied != before:
        write_text(record, json.dumps(copied, indent=1))
    return stale


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
        *(f"--{name}={value}" for name, value in OWN.items()),
        f"--ServerApp.root_dir={notebooks or notebooks_dir()}",
        *options,
    ]


def lab_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of JupyterLab: with progress bars, and without a question about news.

    On Linux torch's allocator grows its segments in the kernels, unless the environment configures it.

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
        **with_expandable_segments(environment),
        "JUPYTER_CONFIG_PATH": config_path,
        "TQDM_DISABLE": "0",
        "TRANSFORMERS_VERBOSITY": "error",
    }
