"""The command line: one module a command."""

from i2v_lab.stopping import stop_on_signals


def main() -> None:
    """Run the command line, which a signal can stop from here on: what it imports takes a while."""
    stop_on_signals()
    from i2v_lab.cli.app import main as run

    run()
