"""The ``i2v-lab`` command: assembles the subcommands and maps errors to exit statuses."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from i2v_lab.cli import accuracy, calibrate, doctor, fit, forecast, generate, lab, measure, reproduce, show
from i2v_lab.errors import I2VLabError, InvalidRequest
from i2v_lab.runs.workers import enable_mkl_cnr

USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]  # click's, or that of the click within typer


class OneLineErrors(TyperGroup):
    """The group of commands, whose options that do not parse are an error of this package: one line, not a box."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command of a context.

        Raises:
            InvalidRequest: An option or a command is unknown, or its value is of another type.
        """
        try:
            return super().invoke(ctx)
        except USAGE_ERROR as error:
            words = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
            raise InvalidRequest(f"{words}; see --help") from error


app = typer.Typer(
    cls=OneLineErrors,
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
