"""``python -m i2v_lab``: the command line."""

from i2v_lab.cli import main

main()
