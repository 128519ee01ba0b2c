"""The ``i2v-lab`` command: assembles the subcommands and maps errors to exit statuses."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from i2v_lab.cli import accuracy, calibrate, doctor, fit, forecast, generate, lab, measure, reproduce, show
from i2v_lab.errors import I2VLabError
from i2v_lab.runs.workers import enable_mkl_cnr

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
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    enable_mkl_cnr()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except I2VLabError as error:
        print(f"i2v-lab: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("i2v-lab: interrupted", file=sys.stderr)
        sys.exit(130)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # raised as an exception, so that partial files are removed


if __name__ == "__main__":
    main()
