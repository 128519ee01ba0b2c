"""``%vram`` and ``%%vram``: peak, saved for backward and time of a line or a cell."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import torch
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.display import display

from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.units import format_bytes, format_seconds


@dataclass(frozen=True)
class CellMemory:
    """What a line or cell took; shows itself as text and as HTML.

    Attributes:
        record: Of the cell, as a phase.
    """

    record: PhaseRecord

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "peak_bytes": self.record.peak_bytes,
            "end_bytes": self.record.end_bytes,
            "saved_for_backward_bytes": self.record.saved_for_backward_bytes,
            "seconds": self.record.seconds,
        }

    def _figures(self) -> list[tuple[str, str]]:
        record = self.record
        return [
            ("peak", format_bytes(record.peak_bytes)),
            ("left", format_bytes(record.end_bytes)),
            ("saved for backward", format_bytes(record.saved_for_backward_bytes)),
            ("time", format_seconds(record.seconds)),
        ]

    def __repr__(self) -> str:
        return "[vram] " + ", ".join(f"{name} {value}" for name, value in self._figures())

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<td style="text-align:left;padding:0 .9em 0 0;border:0"><small>{name}</small> <b>{value}</b></td>'
            for name, value in self._figures()
        )
        return f'<table style="border:0;margin:0"><tr style="background:none">{cells}</tr></table>'


@magics_class
class VramMagics(Magics):
    """The magics of ``%load_ext i2v_lab``."""

    @line_cell_magic
    def vram(self, line: str, cell: str | None = None) -> Any:
        """Run a line or a cell and show its peak memory, what autograd saved for backward, and its time.

        ``%vram model(x)``, or ``%%vram`` on top of a cell. On CUDA the bytes are the caching allocator's; elsewhere
        those of all storages that the cell touches, each from the first operator that touches it. The value of the
        last expression is shown as usual; so is an error, after the figures.
        """
        code = self.shell.transform_cell(line if cell is None else cell)
        body = ast.parse(code).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        profiler = PhaseProfiler("cuda" if torch.cuda.is_available() else "cpu")
        try:
            with profiler, profiler.phase("cell"):
                exec(compile(ast.Module(body, []), "<vram>", "exec"), self.shell.user_ns)  # noqa: S102
                if last is None:
                    return None
                return eval(compile(ast.Expression(last.value), "<vram>", "eval"), self.shell.user_ns)  # noqa: S307
        finally:
            display(CellMemory(profiler.peak))


def load_ipython_extension(shell: Any) -> None:
    """Add ``%vram`` and ``%%vram`` to a shell."""
    shell.register_magics(VramMagics)
