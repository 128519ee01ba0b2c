"""``i2v-lab calibrate``: fit the model of library workspaces to measurements, or measure the rates of a card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from i2v_lab.cli.output import say
from i2v_lab.errors import OutputError
from i2v_lab.files import check_file

EXAMPLES = """
**Examples**

Fit the measurements that come with the package, without replacing the model in use:

    i2v-lab calibrate --out workspaces.json

Fit your own, made on a GPU by benchmarks/measure_libraries.py:

    i2v-lab calibrate measurements.json --out workspaces.json

Measure the card that is here, in one to two minutes; its seconds are then predicted by what was measured:

    i2v-lab calibrate --time

Fit the rates of a card to measurements of it:

    i2v-lab calibrate data/measured/rates-h200.jsonl --time --out nvidia-h200.json
"""


def calibrate(
    measurements: Annotated[
        Path | None,
        typer.Argument(
            help="JSON file of benchmarks/measure_libraries.py; with --time JSON lines that it wrote before. [default: "
            "that of the package; with --time the card that is here is measured]"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of the model. [default: the package's own, which is replaced; with --time in the user's "
            "data folder]"
        ),
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Measure the rates of the card that is here, which nothing else uses.")
    ] = False,
) -> None:
    """Fit the model of cuDNN and cuBLAS workspaces to measurements, or measure how fast this card and its host are."""
    from i2v_lab.capacity.calibration import calibrate as fit_workspaces
    from i2v_lab.capacity.time_calibration import calibrate_time

    run = calibrate_time if time else fit_workspaces
    try:
        if out is not None:
            check_file(out, "out", "nvidia-h100.json" if time else "workspaces.json")
        for line in run(measurements, out):
            say(line)
    except OutputError as error:
        raise OutputError(str(error), out=out) from error
    except OSError as error:
        raise OutputError(
            f"'{error.filename}' cannot be written ({error.strerror}); use --out FILE", out=out
        ) from error
