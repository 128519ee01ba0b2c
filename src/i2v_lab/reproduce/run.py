"""Execute the notebooks that are not up to date headlessly, and render the site."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2v_lab.errors import InvalidRequest, ReproduceError, did_you_mean
from i2v_lab.files import check_folder, remove_partial_files
from i2v_lab.locks import exclusive
from i2v_lab.paths import notebooks_dir
from i2v_lab.reproduce.parameters import OUT_DIR, declared_parameters, plan_parameters
from i2v_lab.reproduce.report import Outcome, RunReport
from i2v_lab.reproduce.stamps import (
    Stamp,
    code_digests,
    file_digest,
    input_digests,
    is_notebook,
    made_files,
    read_stamp,
    stamp_path,
    write_stamp,
)
from i2v_lab.stopping import on_stop

if TYPE_CHECKING:
    from i2v_lab.reproduce.execution import Executor  # imports papermill: not needed if all notebooks are up to date
    from i2v_lab.scale.workers import Workers

NOTEBOOKS = notebooks_dir()
GRACE_S = 1.3
"""Seconds that interrupted cells have to clean up before their kernels are killed."""
ANSWER = "tables/06_will_it_fit_answer.json"
"""Of the build folder: what the answer page is made of."""
SITE = "index"
"""Name of the stamp of the site; no notebook has it, since its page would replace the index."""


@dataclass(frozen=True)
class _Job:
    """A notebook, its parameters, its input digests, whether it has to run, and why its last run is stale."""

    notebook: Path
    parameters: dict[str, Any]
    inputs: dict[str, str]
    stale: bool
    why: str | None


def reproduce(
    names: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    out: Path = Path("build"),
    *,
    files: Sequence[Path] = (),
    jobs: int = 1,
    workers: Workers | None = None,
    force: bool = False,
) -> list[Outcome]:
    """Execute notebooks into ``out/notebooks`` and render them into ``out/site``.

    Figures, tables and videos go where the notebooks write them: below ``out``, prefixed with the notebook's name. A
    notebook that ran with the same code, data, parameters and versions, and whose output files are unchanged, is up to
    date and is not executed. A notebook that fails keeps its partial output and does not stop the others. The site
    shows every notebook that has been executed into ``out``, in this run or an earlier one.

    Args:
        names: Names of the notebooks, with or without ``.ipynb``, or their numbers; all if empty.
        parameters: Values by name, each for all selected notebooks that declare it; if ``names`` are given, all of them
            must declare it.
        out: The build folder.
        files: YAML files of parameters, which ``parameters`` overrides; see
            :func:`~i2v_lab.reproduce.parameters.plan_parameters`.
        jobs: Number of notebooks to execute at a time.
        workers: Execute them on these instead, each on a card of its own where there are cards.
        force: Execute also the notebooks that are up to date.

    Returns:
        The outcome of each notebook, in their order.

    Raises:
        InvalidRequest: There is no such notebook, no notebook declares a parameter, or a value has the wrong type;
            raised before anything is executed.
        OutputError: ``out`` cannot be written, or another process writes it; also before anything is executed.
        ReproduceError: At least one notebook failed; raised after all the others have ended.

    Example:
        >>> reproduce(["03_no_grad_fix"], {"frames": 49, "seed": 3})  # doctest: +SKIP
    """
    known, notebooks = find_notebooks(), find_notebooks(names)
    plans = plan_parameters(notebooks, known, parameters or {}, files, named=bool(names))
    check_folder(out, "out")
    with exclusive(out / ".lock", out):
        try:
            return _reproduce(known, notebooks, plans, out, workers or jobs, force)
        finally:
            remove_partial_files(out)  # of kernels that were killed, whoever did it


def _reproduce(
    known: Sequence[Path],
    notebooks: Sequence[Path],
    plans: Sequence[dict[str, Any]],
    out: Path,
    on: Workers | int,
    force: bool,
) -> list[Outcome]:
    code = code_digests()
    planned = [_job(notebook, plan, code, out, force) for notebook, plan in zip(notebooks, plans, strict=True)]
    stems = [notebook.stem for notebook in known]
    with RunReport([notebook.stem for notebook in notebooks]) as report:
        report.estimated(sum(job.stale for job in planned), out)
        outcomes = _run_all(planned, out, stems, on, report)
    _render(out, known, code)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        raise ReproduceError(
            f"{len(failed)} of {len(outcomes)} notebooks failed: "
            + "; ".join(f"{outcome.notebook.name}: {outcome.error}" for outcome in failed),
            failed=[outcome.notebook.name for outcome in failed],
            outcomes=outcomes,
        )
    return outcomes


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Return the notebooks of these names, or numbers such as ``03``, in their own order; all if none is given.

    Raises:
        InvalidRequest: There is no notebook of that name, or no notebook at all.
    """
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    if not known:
        raise InvalidRequest(f"there are no notebooks in '{NOTEBOOKS}'; reinstall i2v-lab", folder=NOTEBOOKS)
    wanted = set()
    for name in names:
        stem = name.removesuffix(".ipynb")
        matching = {each for each in known if stem in (each, each.partition("_")[0])}
        if not matching:
            raise InvalidRequest(f"notebook={name!r} does not exist; {did_you_mean(name, known)}", notebook=name)
        wanted |= matching
    return [path for stem, path in known.items() if not names or stem in wanted]


def _job(notebook: Path, given: dict[str, Any], code: dict[str, str], out: Path, force: bool) -> _Job:
    declared = declared_parameters(notebook)
    # Outputs do not depend on the path of the build folder: one that was moved stays up to date.
    defaults = {name: parameter.default for name, parameter in declared.items() if name != OUT_DIR}
    inputs = input_digests(notebook, defaults | given, code)
    stamp = read_stamp(stamp_path(out, notebook.stem))
    why = stamp.why_stale(inputs, out) if stamp else None
    parameters = {OUT_DIR: str(out.resolve()), **given} if OUT_DIR in declared else given
    return _Job(notebook, parameters, inputs, force or stamp is None or why is not None, why)


def _run_all(
    planned: Sequence[_Job], out: Path, stems: Sequence[str], on: Workers | int, report: RunReport
) -> list[Outcome]:
    outcomes = {}
    for job in planned:
        if not job.stale:
            outcomes[job.notebook] = Outcome(out / "notebooks" / job.notebook.name, None, None)
            report.ended(job.notebook.stem, outcomes[job.notebook])
    stale = [job for job in planned if job.stale]
    if stale and not isinstance(on, int):
        outcomes |= _run_on(on, stale, out, stems, report)
    elif stale and isinstance(on, int):
        from i2v_lab.reproduce.execution import Executor

        executor, pool = Executor(), ThreadPoolExecutor(on)
        futures: dict[Path, Future[Outcome]] = {}

        def stop() -> None:
            pool.shutdown(wait=False, cancel_futures=True)
            executor.interrupt()
            running = [future for future in futures.values() if not future.cancelled()]
            try:
                wait(running, timeout=GRACE_S)
            finally:
                executor.kill()
                wait(running, timeout=0.3)  # for the threads to remove what the kernels were written to
                remove_partial_files(out)

        with on_stop(stop, children_first=False):
            try:
                for job in stale:
                    futures[job.notebook] = pool.submit(_run, executor, job, out, stems, report)
                for future in as_completed(futures.values()):
                    future.result()
            except BaseException:  # in a program or a notebook, where Ctrl-C is an exception
                stop()
                raise
            finally:
                pool.shutdown()
        outcomes |= {notebook: future.result() for notebook, future in futures.items()}
    return [outcomes[job.notebook] for job in planned]


def _run_on(
    workers: Workers, stale: Sequence[_Job], out: Path, stems: Sequence[str], report: RunReport
) -> dict[Path, Outcome]:
    from i2v_lab.reproduce.on_workers import execute_on

    jobs = {job.notebook.stem: job for job in stale}
    notebooks = [(job.notebook, job.parameters) for job in stale]
    outcomes = {}
    with on_stop(partial(remove_partial_files, out)):
        for name, error, seconds in execute_on(
            workers, notebooks, out, started=lambda name: report.started(name, jobs[name].why), cell=report.cell
        ):
            outcomes[jobs[name].notebook] = _ended(jobs[name], error, seconds, out, stems, report)
    return outcomes


def _run(executor: Executor, job: _Job, out: Path, stems: Sequence[str], report: RunReport) -> Outcome:
    name, executed = job.notebook.stem, out / "notebooks" / job.notebook.name
    report.started(name, job.why)
    start_s = time.monotonic()
    error = executor.execute(job.notebook, job.parameters, executed, partial(report.cell, name))
    return _ended(job, error, time.monotonic() - start_s, out, stems, report)


def _ended(
    job: _Job, error: str | None, seconds: float | None, out: Path, stems: Sequence[str], report: RunReport
) -> Outcome:
    """Stamp and report a notebook."""
    name = job.notebook.stem
    outcome = Outcome(out / "notebooks" / job.notebook.name, error, seconds)
    try:
        write_stamp(stamp_path(out, name), Stamp(job.inputs, made_files(out, name, stems), error))
    except OSError as failure:  # without its stamp it is stale
        outcome = replace(outcome, error=error or f"its stamp could not be written ({failure.strerror})")
    report.ended(name, outcome)
    return outcome


def _render(out: Path, known: Sequence[Path], code: Mapping[str, str]) -> None:
    """Render the site unless it is up to date."""
    stamps = {out / "notebooks" / path.name: read_stamp(stamp_path(out, path.stem)) for path in known}
    executed = {copy: stamp for copy, stamp in stamps.items() if stamp is not None and is_notebook(copy)}
    failed = [copy for copy, stamp in executed.items() if stamp.error is not None]
    inputs = {**code, "failed": ", ".join(copy.name for copy in failed)}
    inputs |= {copy.name: file_digest(copy) for copy in executed}
    answer = out / ANSWER
    if answer.is_file():
        inputs[ANSWER] = file_digest(answer)
    site, rendered = out / "site", stamp_path(out, SITE)
    previous = read_stamp(rendered)
    if previous is not None and previous.why_stale(inputs, out) is None:
        return
    from i2v_lab.reporting.site.answer import render_answer
    from i2v_lab.reporting.site.render import render_site
    from i2v_lab.reproduce.provenance import site_provenance

    provenance = site_provenance()
    if answer.is_file():  # before the index, which links it
        render_answer(json.loads(answer.read_text(encoding="utf-8")), site, provenance)
    render_site(list(executed), failed, site, provenance)
    pages = {path.relative_to(out).as_posix(): file_digest(path) for path in site.rglob("*") if path.is_file()}
    write_stamp(rendered, Stamp(inputs, pages))
