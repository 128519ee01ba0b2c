"""``papermill --engine vram``: shows peak memory and time of every cell, and writes them to its metadata."""

from __future__ import annotations

import asyncio
from typing import Any

from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine

from i2v_lab.profiling.jupyter.cell_meter import MIME


class VramEngine(NBClientEngine):
    """The default engine, over a kernel that profiles its cells.

    Each code cell's metadata get ``i2v_lab.vram``: ``peak_bytes``, ``end_bytes``, ``saved_for_backward_bytes``,
    ``seconds``.
    """

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> Any:
        """Execute the notebook; the figures are written to the cells' metadata even if one of them fails."""
        arguments = [
            *kwargs.pop("extra_arguments", []),
            "--IPKernelApp.extensions=i2v_lab.profiling.jupyter.cell_meter",
            "--log-level=CRITICAL",  # else a kernel that Ctrl-C ends logs errors of its own; a cell's are in its output
        ]
        try:
            return super().execute_managed_notebook(nb_man, kernel_name, extra_arguments=arguments, **kwargs)
        except KeyboardInterrupt:
            ensure_event_loop().set_exception_handler(_report_all_but_dead_kernels)
            raise
        finally:
            for cell in nb_man.nb.cells:
                for output in cell.get("outputs", []):
                    figures = output.get("data", {}).get(MIME)
                    if figures is not None:
                        cell.metadata.setdefault("i2v_lab", {})["vram"] = figures


def _report_all_but_dead_kernels(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Ctrl-C abandons the task of a cell; it fails if it sees its kernel end, and nobody asks for its exception."""
    if not isinstance(context.get("exception"), DeadKernelError):
        loop.default_exception_handler(context)
