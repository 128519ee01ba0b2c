"""``papermill --engine vram``: shows peak memory and time of every cell, and writes them to its metadata."""

from __future__ import annotations

from typing import Any

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
        finally:
            for cell in nb_man.nb.cells:
                for output in cell.get("outputs", []):
                    figures = output.get("data", {}).get(MIME)
                    if figures is not None:
                        cell.metadata.setdefault("i2v_lab", {})["vram"] = figures
