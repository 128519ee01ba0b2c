"""The command line: one module a command."""

import sys

from i2v_lab.stopping import stop_on_signals


def main() -> None:
    """Run the command line, which a signal can stop from here on: what it imports takes a while.

    What the machine refuses, during the imports too, ends in one line.
    """
    from i2v_lab.cli.starvation import refusal
    from i2v_lab.extras import missing_extra

    try:
        stop_on_signals()
        from i2v_lab.cli.app import main as run

        run()
    except BaseException as error:  # a panic of Rust is no Exception
        line = None if isinstance(error, SystemExit | KeyboardInterrupt) else missing_extra(error) or refusal(error)
        if line is None:
            raise
        sys.stdout = None  # what it has left would be written, and perhaps fail again
        print(f"i2v-lab: {line}", file=sys.stderr)
        sys.exit(2)
