"""The command line: one module a command."""

from i2v_lab.cli.app import main

__all__ = ["main"]
