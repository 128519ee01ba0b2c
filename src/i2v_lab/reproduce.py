"""Run the notebooks headlessly, one after another, and render what they show."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from rich.console import Console

from i2v_lab.errors import InvalidRequest, ReproduceError
from i2v_lab.reporting.site import render_site

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook.

    Attributes:
        notebook: The executed copy, with whatever outputs it got.
        error: One line, if it failed.
    """

    notebook: Path
    error: str | None


def reproduce(
    names: Sequence[str] = (), parameters: Mapping[str, Any] | None = None, out: Path = Path("build")
) -> list[Outcome]:
    """Execute notebooks into ``out/notebooks`` and render them into ``out/site``.

    A notebook that fails keeps its partial output and does not stop the others. Figures, tables and videos go where the
    notebooks put them: below ``out``.

    Args:
        names: Which notebooks, with or without ``.ipynb``; all if empty.
        parameters: Passed to every notebook that is run.
        out: The build folder.

    Raises:
        InvalidRequest: There is no such notebook, or it does not declare a parameter.
        ReproduceError: At least one notebook failed; raised after everything else is done.
    """
    console = Console(stderr=True)
    notebooks = find_notebooks(names)
    values = {**(parameters or {})}
    for notebook in notebooks:
        check_parameters(notebook, values)
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for index, notebook in enumerate(notebooks, start=1):
        console.print(f"[{index}/{len(notebooks)}] {notebook.name}", markup=False)
        start_s = time.monotonic()
        outcome = execute(notebook, {"out_dir": str(out.resolve()), **values}, out / "notebooks" / notebook.name)
        outcomes.append(outcome)
        how = f"failed: {outcome.error}" if outcome.error else "done"
        console.print(f"      {how} ({time.monotonic() - start_s:.0f} s)", markup=False, soft_wrap=True)
    failed = [outcome for outcome in outcomes if outcome.error]
    executed = [outcome.notebook for outcome in outcomes]
    site = render_site(executed, [outcome.notebook for outcome in failed], out / "site")
    console.print(f"{site}", markup=False)
    if failed:
        raise ReproduceError(
            f"{len(failed)} of {len(outcomes)} notebooks failed: "
            + "; ".join(f"{outcome.notebook.name}: {outcome.error}" for outcome in failed),
            failed=[outcome.notebook.name for outcome in failed],
        )
    return outcomes


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The notebooks of these names, in their own order; all of them if there are none.

    Raises:
        InvalidRequest: There is no notebook of that name, or none at all.
    """
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    if not known:
        raise InvalidRequest(f"there are no notebooks in {NOTEBOOKS}; they come with a checkout of the repository")
    for name in names:
        if name.removesuffix(".ipynb") not in known:
            raise InvalidRequest(f"notebook={name!r} does not exist; use one of: {', '.join(known)}", notebook=name)
    wanted = {name.removesuffix(".ipynb") for name in names} or set(known)
    return [path for stem, path in known.items() if stem in wanted]


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Refuse a parameter that a notebook does not declare; papermill alone would only warn.

    Raises:
        InvalidRequest: With the parameter and those that there are; or the file is not a notebook of a known kernel.
    """
    declared = declared_parameters(notebook)
    for name in parameters:
        if name not in declared:
            raise InvalidRequest(
                f"{notebook.name} declares no parameter {name!r}; use one of: {', '.join(declared)}", parameter=name
            )


def declared_parameters(notebook: Path) -> list[str]:
    """The names that a notebook's ``parameters`` cell assigns.

    Raises:
        InvalidRequest: The file cannot be read as a notebook.
    """
    try:
        return list(papermill.inspect_notebook(str(notebook)))
    except (ValueError, nbformat.ValidationError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidRequest(f"{notebook.name} cannot be read as a notebook ({reason}); restore it") from error


def execute(notebook: Path, parameters: Mapping[str, Any], executed: Path) -> Outcome:
    """Execute one notebook with this interpreter's own kernel; its working folder is the current one."""
    executed.parent.mkdir(parents=True, exist_ok=True)
    part = executed.with_name(f".{executed.name}.part.ipynb")
    declared = declared_parameters(notebook)
    given = {name: value for name, value in parameters.items() if name in declared}
    error: str | None = None
    with own_kernel() as kernel:
        try:
            papermill.execute_notebook(
                str(notebook), str(part), given, kernel_name=kernel, progress_bar=sys.stderr.isatty(), log_output=False
            )
        except papermill.PapermillExecutionError as failure:
            error = f"{failure.ename}: {str(failure.evalue).strip().splitlines()[0] if failure.evalue else ''}"
        except Exception as failure:  # not the notebook's own error: its kernel died, or did not start
            error = f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    part.replace(executed)
    return Outcome(executed, error)


@contextmanager
def own_kernel() -> Iterator[str]:
    """Within this scope Jupyter knows a kernel of this very interpreter: one named python3 may be another's.

    Yields:
        Its name.
    """
    name = "i2v-lab-run"
    previous = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory(prefix="i2v-lab-kernel-") as folder:
        spec = Path(folder) / "kernels" / name
        spec.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "i2v-lab", "language": "python"}))
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, previous]))
        try:
            yield name
        finally:
            if previous is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = previous
