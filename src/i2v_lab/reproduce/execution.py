"""Execute notebooks, several at a time if asked, in kernels of this interpreter that never outlive the run."""

from __future__ import annotations

import logging
import os
import signal
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

from i2v_lab.errors import OutputError
from i2v_lab.files import partial_file, scratch_folder
from i2v_lab.reproduce.kernel import InterpreterKernelManager
from i2v_lab.reproduce.stamps import is_notebook

ENGINE = "i2v-lab-executor"
KERNEL_ENVIRONMENT = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Of a kernel whose output goes into a page, where progress bars would fill it."""

_log = logging.getLogger(__name__)  # messages of kernels and clients; a dead kernel is in the notebook's own error
_log.addHandler(logging.NullHandler())
_log.propagate = False


def _is_not_about_parameters(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(("Passed unknown parameter", "Unable to parse line"))


# Papermill parses the parameters cell line by line, and reports `x: int | None = None` as a parameter that does not
# exist. Parameters that are passed from here have been checked against the parsed cell.
for _name in ("papermill", "papermill.translators"):
    logging.getLogger(_name).addFilter(_is_not_about_parameters)


class Stopped(Exception):
    """The run was stopped before this notebook had ended."""


class Executor:
    """Executes notebooks, in any number of threads, until it is stopped.

    In the main thread, nbclient handles signals itself: it shuts the kernel down, and the next notebook starts.
    Therefore notebooks are executed in other threads, and the main thread calls :meth:`interrupt`, then :meth:`kill`.

    Example:
        >>> Executor().execute(Path("in.ipynb"), {"seed": 3}, Path("out.ipynb"))  # doctest: +SKIP
    """

    def __init__(self) -> None:
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
        """Execute one notebook in the current folder.

        Args:
            notebook: The source.
            parameters: Values by name, for parameters that the notebook declares.
            executed: The copy with outputs, partial if a cell fails; replaced when the notebook has ended.
            on_cell: Called before each cell, with its index and the number of cells.

        Returns:
            The error in one line; ``None`` if there was none. If the copy could not be written, that is the error, and
            ``executed`` is as it was.

        Raises:
            Stopped: The executor was stopped; ``executed`` is not replaced.
        """
        try:
            executed.parent.mkdir(parents=True, exist_ok=True)
            with partial_file(executed.resolve()) as part:
                error = self._execute_into(part, notebook, parameters, on_cell)
                if self._stopped:
                    raise Stopped
                if not is_notebook(part):  # papermill could not write it: the disk is full, or a text is not UTF-8
                    raise OutputError(str(error), path=executed)
        except OutputError as failure:
            return str(failure)
        except OSError as failure:
            return f"'{executed}' could not be written ({failure.strerror})"
        return error

    def _execute_into(
        self, part: Path, notebook: Path, parameters: Mapping[str, Any], on_cell: Callable[[int, int], None]
    ) -> str | None:
        try:
            papermill.execute_notebook(
                str(notebook.resolve()),
                str(part),
                dict(parameters),
                ENGINE,
                kernel_name="python3",
                progress_bar=False,
                executor=self,
                on_cell=on_cell,
            )
        except papermill.PapermillExecutionError as failure:
            return f"{failure.ename}: {str(failure.evalue).strip().splitlines()[0] if failure.evalue else ''}"
        except OSError as failure:
            return f"{failure.strerror or failure}; free some space, and run again"
        except Exception as failure:  # not raised by a cell: the kernel died, or did not start
            return f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
        finally:
            ensure_event_loop().close()  # nbclient leaves one open in every thread
        return None

    @contextmanager
    def track(self, client: PapermillNotebookClient) -> Iterator[Callable[[], None]]:
        """Interrupt or kill the kernel of this client when the executor is stopped within this scope.

        Yields:
            A function to call before every cell.
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
        """Start no further cell, and interrupt the running ones together with the processes that they started.

        The cells can then remove partial files. A kernel that is still starting is not interrupted: it would die with a
        traceback on stderr, and its first cell is refused in any case.
        """
        with self._lock:
            self._stopped = True
            kernels = [_process_id(client) for client, in_a_cell in self._in_a_cell.items() if in_a_cell]
        for process_id in kernels:
            if process_id is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process_id, signal.SIGINT)  # each kernel leads its own process group

    def kill(self) -> None:
        """Kill the remaining kernels and all their descendants, and remove the files that name their ports."""
        with self._lock:
            clients = list(self._in_a_cell)
        for client in clients:
            process_id = _process_id(client)
            if process_id is not None:
                with suppress(psutil.NoSuchProcess):
                    kernel = psutil.Process(process_id)
                    for process in [*kernel.children(recursive=True), kernel]:
                        with suppress(psutil.NoSuchProcess):
                            process.kill()
            with suppress(Exception):
                client.km.cleanup_connection_file()


def _process_id(client: PapermillNotebookClient) -> int | None:
    provisioner = getattr(client.km, "provisioner", None)  # neither exists before the start and after the end
    return getattr(provisioner, "pid", None)


class _Engine(NBClientEngine):
    """Papermill's engine with a client that the executor tracks, as papermill returns no client or kernel."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, executor: Executor, on_cell: Callable[[int, int], None], **_: Any
    ) -> None:
        client = PapermillNotebookClient(
            nb_man,
            kernel_name=kernel_name,
            kernel_manager_class=InterpreterKernelManager,
            extra_arguments=["--log-level=CRITICAL"],
            startup_timeout=60,
            log=_log,
        )
        with scratch_folder() as temporary, executor.track(client) as cell_starts:

            def on_cell_start(cell: Any, cell_index: int) -> None:
                cell_starts()
                on_cell(cell_index, len(nb_man.nb.cells))

            client.on_cell_start = on_cell_start
            # With a folder for temporary files of its own: a kernel that is killed leaves them.
            client.execute(env={**os.environ, **KERNEL_ENVIRONMENT, "TMPDIR": str(temporary)})


papermill_engines.register(ENGINE, _Engine)
