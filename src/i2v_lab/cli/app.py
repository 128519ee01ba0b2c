"""The ``i2v-lab`` command: assembles the subcommands and maps errors to exit statuses."""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
from typing import Annotated, Any

import typer

from i2v_lab import __version__
from i2v_lab.cli import (
    accuracy,
    calibrate,
    compare,
    doctor,
    fit,
    forecast,
    generate,
    lab,
    measure,
    models,
    reproduce,
    show,
    sweep,
)
from i2v_lab.cli.output import log, say
from i2v_lab.errors import I2VLabError
from i2v_lab.runs.workers import enable_mkl_cnr
from i2v_lab.stopping import stop_on_signals

USAGE_ERROR: Any = typer.BadParameter.__base__
"""The base of all errors of a command line; typer exports one of its kinds only."""

app = typer.Typer(
    name="i2v-lab",
    help="Run image-to-video models, and profile and forecast their GPU memory.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=show.EXAMPLES)(show.show)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=forecast.EXAMPLES)(forecast.forecast)
app.command(epilog=sweep.EXAMPLES)(sweep.sweep)
app.command(epilog=fit.EXAMPLES)(fit.fit)
app.command(epilog=models.EXAMPLES)(models.models)
app.command(epilog=measure.EXAMPLES)(measure.measure)
app.command(epilog=accuracy.EXAMPLES)(accuracy.accuracy)
app.command(epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.command(epilog=reproduce.EXAMPLES, cls=reproduce.ReproduceCommand)(reproduce.reproduce)
app.command(epilog=lab.EXAMPLES, context_settings=lab.CONTEXT_SETTINGS)(lab.lab)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        say(f"i2v-lab {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line: an I2VLabError becomes one line on stderr and an exit status, without a traceback."""
    stop_on_signals()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    enable_mkl_cnr()
    for stream in (sys.stdout, sys.stderr):  # a terminal of Latin-1 or ASCII: what it lacks is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            status = app(prog_name="i2v-lab", standalone_mode=False) or 0
        finally:
            sys.stdout.flush()
        sys.exit(status)
    except USAGE_ERROR as error:
        if len(sys.argv) == 1:  # which is no error, but asks for help
            error.show()
        else:
            log(f"i2v-lab: {_with_suggestion(error.format_message())}; see --help")
        sys.exit(error.exit_code)
    except I2VLabError as error:
        log(f"i2v-lab: {error}")
        sys.exit(error.exit_status)
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would write there once more
        sys.exit(1)


def _with_suggestion(message: str) -> str:
    """A usage error in one line, which names what was probably meant."""
    words = " ".join(message.split()).rstrip(".").replace("Value error, ", "")
    possible = re.search(r" \W*Possible options: ([^)]+)\)\W*$", words)  # typer 0.26 shows a tuple of them
    if possible is not None:
        return f"{words[: possible.start()]}. Did you mean {possible[1].replace(', ', ' or ')}?"
    choice = re.search(r"'([^']*)' is not one of ('.+')$", words)
    near = difflib.get_close_matches(choice[1], re.findall(r"'([^']+)'", choice[2])) if choice is not None else []
    return f"{words}. Did you mean {' or '.join(near)}?" if near else words


if __name__ == "__main__":
    main()
