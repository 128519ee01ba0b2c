"""An IPython extension that profiles every cell; the papermill engine loads it into the kernel."""

from __future__ import annotations

from typing import Any

from IPython.display import display

MIME = "application/vnd.i2v-lab.vram+json"


class CellMeter:
    """Starts a profiler before each cell and shows its figures under the cell.

    A profiler that the cell itself starts (``%%vram``, a study) may be active at the same time.
    """

    def __init__(self) -> None:
        self._profiler: Any = None
        self._phase: Any = None

    def before(self, _: Any = None) -> None:
        """Called before a cell runs."""
        import torch

        from i2v_lab.profiling.phase_profiler import PhaseProfiler

        self._profiler = PhaseProfiler("cuda" if torch.cuda.is_available() else "cpu", ambient=True)
        self._profiler.__enter__()
        self._phase = self._profiler.phase("cell")
        self._phase.__enter__()

    def after(self, _: Any = None) -> None:
        """Called after a cell has run."""
        if self._profiler is None:
            return
        from i2v_lab.profiling.jupyter.magics import CellMemory

        self._phase.__exit__(None, None, None)
        self._profiler.__exit__(None, None, None)
        memory = CellMemory(self._profiler.peak)
        self._profiler = None
        display({MIME: memory.to_json(), "text/html": memory._repr_html_(), "text/plain": repr(memory)}, raw=True)


def load_ipython_extension(shell: Any) -> None:
    """Profile every cell of this shell from the next one on."""
    meter = CellMeter()
    shell.events.register("pre_run_cell", meter.before)
    shell.events.register("post_run_cell", meter.after)
