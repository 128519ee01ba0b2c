"""``%vram`` and ``%%vram``: peak, saved for backward and time of a line or a cell."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.display import display

from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.units import format_bytes, format_seconds


@dataclass(frozen=True)
class CellMemory:
    """Memory and time of a line or cell; shown as text and as HTML.

    Attributes:
        record: The record of the cell as a phase.
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

        Raises:
            UsageError: There is a syntax error, a top-level ``await``, or text behind ``%%vram``; nothing is run then.
        """
        if cell is not None and line.strip():
            raise UsageError(f"%%vram takes no arguments, so not {line.strip()!r}; put the code below it")
        code = self.shell.transform_cell(line if cell is None else cell)
        body, last = _compiled(code, self.shell.compile.cache(code))
        profiler = PhaseProfiler("cuda" if torch.cuda.is_available() else "cpu")
        try:
            with profiler, profiler.phase("cell"):
                exec(body, self.shell.user_ns)  # noqa: S102
                return None if last is None else eval(last, self.shell.user_ns)  # noqa: S307
        finally:
            display(CellMemory(profiler.peak))


def _compiled(code: str, name: str) -> tuple[CodeType, CodeType | None]:
    """The statements of a cell, and its last expression if it ends with one.

    Args:
        code: As Python.
        name: Under which tracebacks find its lines.
    """
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try:
        body = ast.parse(code, name).body
        second = None
        if body and isinstance(last := body[-1], ast.Expr):
            second = compile(ast.Expression(last.value), name, "eval", flags)
            body = body[:-1]
        first = compile(ast.Module(body, []), name, "exec", flags)
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL
        line = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UsageError(f"SyntaxError{line}: {getattr(error, 'msg', error)}; correct it, nothing was run") from error
    if any(part is not None and part.co_flags & inspect.CO_COROUTINE for part in (first, second)):
        raise UsageError(
            "a magic cannot run a top-level await; measure it with "
            "`with PhaseProfiler() as profiler, profiler.phase('cell'):` in a cell without the magic"
        )
    return first, second


def load_ipython_extension(shell: Any) -> None:
    """Add ``%vram`` and ``%%vram`` to a shell."""
    shell.register_magics(VramMagics)
