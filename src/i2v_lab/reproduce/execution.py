"""Execute notebooks, several at a time if need be, in kernels of this interpreter that never outlive the run."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import papermill
import psutil
from jupyter_core.utils import ensure_event_loop
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from i2v_lab.reproduce.kernel import write_kernel_spec

ENGINE = "i2v-lab-executor"
KERNEL = "i2v-lab-run"

_log = logging.getLogger(__name__)  # what kernels and clients have to say; a death is in the notebook's own error
_log.addHandler(logging.NullHandler())
_log.propagate = False


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(("Passed unknown parameter", "Unable to parse line"))


# Papermill looks for parameters line by line, and says of `x: int | None = None` that nobody declares x. What is passed
# from here has been checked against the cell itself.
for _name in ("papermill", "papermill.translators"):
    logging.getLogger(_name).addFilter(_is_news)


class Stopped(Exception):
    """The run was stopped before this notebook had ended."""


class Executor:
    """Executes notebooks, in any number of threads, until it is stopped.

    In the main thread, nbclient would take signals for itself, end the kernel, and let the next notebook begin. So
    notebooks belong into other threads, and the main one calls :meth:`interrupt` and later :meth:`kill`.

    Example:
        >>> with own_kernel() as kernel:
        ...     Executor(kernel).execute(Path("in.ipynb"), {"seed": 3}, Path("out.ipynb"))  # doctest: +SKIP
    """

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel
        self._lock = threading.Lock()
        self._in_a_cell: dict[PapermillNotebookClient, bool] = {}
        self._stopped = False

    def execute(
        self,
        notebook: Path,
        parameters: Mapping[str, Any],
        executed: Path,
        on_cell: Callable[[int, int], None] = lambda index, cells: None,
    ) -> str | None:
        """Execute one notebook; its working folder is the current one.

        Args:
            notebook: The source.
            parameters: Values that the notebook declares.
            executed: The copy with outputs, partial if a cell fails; appears when the notebook has ended.
            on_cell: Called before each cell, with its index and how many there are.

        Returns:
            One line on what failed, or ``None``.

        Raises:
            Stopped: There is no new copy then.
        """
        executed.parent.mkdir(parents=True, exist_ok=True)
        part = executed.with_name(f".{executed.name}.part.ipynb").resolve()
        error: str | None = None
        try:
            papermill.execute_notebook(
                str(notebook.resolve()),
                str(part),
                dict(parameters),
                ENGINE,
                kernel_name=self._kernel,
                progress_bar=False,
                executor=self,
                on_cell=on_cell,
            )
        except papermill.PapermillExecutionError as failure:
            error = f"{failure.ename}: {str(failure.evalue).strip().splitlines()[0] if failure.evalue else ''}"
        except Exception as failure:  # not the notebook's own error: its kernel died, or did not start
            error = f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
        finally:
            ensure_event_loop().close()  # nbclient leaves each thread's open
            if self._stopped:
                part.unlink(missing_ok=True)
        if self._stopped:
            raise Stopped
        part.replace(executed)
        return error

    @contextmanager
    def follow(self, client: PapermillNotebookClient) -> Iterator[Callable[[], None]]:
        """Within this scope a client's kernel is one to interrupt or to kill.

        Yields:
            To be called before every cell.
        """

        def cell_starts() -> None:
            with self._lock:
                if self._stopped:
                    raise Stopped
                self._in_a_cell[client] = True

        with self._lock:
            self._in_a_cell[client] = False
        try:
            yield cell_starts
        finally:
            with self._lock:
                del self._in_a_cell[client]

    def interrupt(self) -> None:
        """Start no cell any more, and interrupt those that run, with the programs that they have started.

        They get the chance to remove their half-written files. A kernel that only starts is not interrupted: it would
        die with a traceback on stderr, and its first cell is refused anyway.
        """
        with self._lock:
            self._stopped = True
            kernels = [_process_id(client) for client, in_a_cell in self._in_a_cell.items() if in_a_cell]
        for process_id in kernels:
            if process_id is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process_id, signal.SIGINT)  # a kernel leads a group of its own

    def kill(self) -> None:
        """Kill every kernel that is left, with all that it has started."""
        with self._lock:
            kernels = [_process_id(client) for client in self._in_a_cell]
        for process_id in kernels:
            if process_id is not None:
                with suppress(psutil.NoSuchProcess):
                    kernel = psutil.Process(process_id)
                    for process in [*kernel.children(recursive=True), kernel]:
                        with suppress(psutil.NoSuchProcess):
                            process.kill()


def _process_id(client: PapermillNotebookClient) -> int | None:
    provisioner = getattr(client.km, "provisioner", None)  # neither is there before the start and after the end
    return getattr(provisioner, "pid", None)


class _Engine(NBClientEngine):
    """The stock engine with a client that the executor knows of."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, executor: Executor, on_cell: Callable[[int, int], None], **_: Any
    ) -> None:
        client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, startup_timeout=60, log=_log)
        with executor.follow(client) as cell_starts:

            def on_cell_start(cell: Any, cell_index: int) -> None:
                cell_starts()
                on_cell(cell_index, len(nb_man.nb.cells))

            client.on_cell_start = on_cell_start
            client.execute()


papermill_engines.register(ENGINE, _Engine)


@contextmanager
def own_kernel() -> Iterator[str]:
    """Within this scope Jupyter knows a kernel of this very interpreter: one named python3 may be another's.

    The scope changes the environment of the process, so enter it once, around all that runs at the same time.

    Yields:
        Its name.
    """
    previous = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory(prefix="i2v-lab-kernel-") as folder:
        env = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # nobody watches; bars would fill the pages
        write_kernel_spec(Path(folder), KERNEL, env, ("--log-level=CRITICAL",))
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, previous]))
        try:
            yield KERNEL
        finally:
            if previous is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = previous
