"""``python -m i2v_lab.cli``."""

from i2v_lab.cli import main

main()
