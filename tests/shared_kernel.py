"""One kernel for many notebooks, one after another: what they import is imported once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.manager import KernelManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from i2v_lab.reproduce.kernel import InterpreterKernelSpecs

ENGINE = "i2v-lab-tests"
# Names that a notebook defined. `%reset` would drop `__spec__` too, which multiprocessing needs.
DROP_NAMES = """
for _name in list(globals()):
    if not _name.startswith("_") and _name not in get_ipython().user_ns_hidden:
        del globals()[_name]
"""


class SharedKernel:
    """A running kernel. Every notebook starts without the names of the one before, but with its imported modules."""

    def __init__(self, manager: KernelManager) -> None:
        self._manager = manager

    def execute(self, notebook: Path, executed: Path, parameters: Mapping[str, Any]) -> None:
        """Execute a notebook into another file.

        Raises:
            papermill.PapermillExecutionError: A cell failed; the file has its traceback.
        """
        try:
            self._drop_names()
            papermill.execute_notebook(
                str(notebook), str(executed), dict(parameters), ENGINE, progress_bar=False, manager=self._manager
            )
        except BaseException:
            self._manager.restart_kernel(now=True)  # whatever it was, the next notebook has a new kernel
            raise

    def _drop_names(self) -> None:
        client = self._manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            client.execute(DROP_NAMES, silent=True, reply=True, timeout=60)
        finally:
            client.stop_channels()


class _Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, *, manager: KernelManager, **_: Any) -> None:
        client = PapermillNotebookClient(nb_man, km=manager)
        try:
            client.execute()
        finally:
            if client.kc is not None:
                client.kc.stop_channels()


papermill_engines.register(ENGINE, _Engine)


@contextmanager
def shared_kernel() -> Iterator[SharedKernel]:
    """A kernel of this interpreter for as long as the scope."""
    manager = KernelManager(kernel_spec_manager=InterpreterKernelSpecs())
    manager.start_kernel()
    try:
        yield SharedKernel(manager)
    finally:
        manager.shutdown_kernel(now=True)
