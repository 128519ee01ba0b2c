"""The ``i2v-lab`` command: assembles the subcommands and maps errors to exit statuses."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import NoReturn

import typer

from i2v_lab.cli import accuracy, calibrate, doctor, fit, forecast, generate, lab, measure, reproduce, show
from i2v_lab.errors import I2VLabError
from i2v_lab.runs.workers import enable_mkl_cnr
from i2v_lab.stopping import stop_on_signals

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

app = typer.Typer(
    name="i2v-lab",
    help="Run image-to-video models, and profile and forecast their GPU memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=show.EXAMPLES)(show.show)
app.command(epilog=forecast.EXAMPLES)(forecast.forecast)
app.command(epilog=fit.EXAMPLES)(fit.fit)
app.command(epilog=measure.EXAMPLES)(measure.measure)
app.command(epilog=accuracy.EXAMPLES)(accuracy.accuracy)
app.command(epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.command(epilog=reproduce.EXAMPLES, cls=reproduce.ReproduceCommand)(reproduce.reproduce)
app.command(epilog=lab.EXAMPLES, context_settings=lab.CONTEXT_SETTINGS)(lab.lab)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)


@app.callback()
def _root() -> None:
    pass


def main() -> None:
    """Run the command line: an I2VLabError becomes one line on stderr and an exit status, without a traceback."""
    stop_on_signals()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    enable_mkl_cnr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path is printed in the bytes that it was given in
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except I2VLabError as error:
        print(f"i2v-lab: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _end_without_room(error)


def _end_without_room(error: OSError) -> NoReturn:
    where = f" for '{error.filename}'" if error.filename else ""
    print(f"i2v-lab: {error.strerror}{where}; free some space or choose another place, and run again", file=sys.stderr)
    if error.filename is None:  # perhaps stdout, which Python would write to once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(1)


if __name__ == "__main__":
    main()
