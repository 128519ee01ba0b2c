"""``i2v-lab calibrate``: fit the model of library workspaces to measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from i2v_lab.cli.output import require_file
from i2v_lab.errors import OutputError

EXAMPLES = """
**Examples**

Fit the measurements that come with the package, without replacing the model in use:

    i2v-lab calibrate --out workspaces.json

Fit your own, made on a GPU by benchmarks/measure_libraries.py:

    i2v-lab calibrate measurements.json --out workspaces.json
"""


def calibrate(
    measurements: Annotated[
        Path | None, typer.Argument(help="JSON file of benchmarks/measure_libraries.py. [default: that of the package]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file of the model. [default: the package's own, which is replaced]")
    ] = None,
) -> None:
    """Fit the model of cuDNN and cuBLAS workspaces to measurements."""
    from i2v_lab.capacity.calibration import calibrate as run

    if out is not None:
        require_file(out, "--out")
    try:
        for line in run(measurements, out):
            print(line)
    except OSError as error:
        raise OutputError(
            f"'{error.filename}' cannot be written ({error.strerror}); use --out FILE", out=out
        ) from error
