"""``i2v-lab forecast --script``: a script of diffusers in the place of a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from i2v_lab.capacity.device_profile import REFERENCE
from i2v_lab.cli.forecast_report import on_card, print_forecast, report, verdicts
from i2v_lab.cli.output import print_json
from i2v_lab.errors import InvalidRequest, shown

OF_SCRIPTS = {"gpu", "script", "arguments", "vram_cap_gib", "profile", "as_json", "context"}


def check_script_options(context: Any, script: Path | None, arguments: Sequence[str] | None) -> None:
    """Refuse options of a request beside a script, and arguments without one.

    Raises:
        InvalidRequest: With the option.
    """
    if script is None:
        if arguments:
            raise InvalidRequest(
                f"argument={shown(arguments[0])} is for a script; name it with --script", argument=arguments[0]
            )
        return
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if parameter.name not in OF_SCRIPTS and source is not None and source.name != "DEFAULT":
            option = max(parameter.opts, key=len)
            raise InvalidRequest(
                f"{option} is of a request, and --script has none: it says itself what it generates; pass what the "
                "script takes after --",
                option=option,
            )


def report_script(
    script: Path,
    arguments: Sequence[str],
    vram_cap_gib: float | None,
    profile: Path | None,
    gpu: str | None,
    as_json: bool,
) -> None:
    """Forecast a script, and print it as any forecast.

    Args:
        script: A Python file.
        arguments: Its own.
        vram_cap_gib: A card of this size is judged too.
        profile: Gets the records.
        gpu: The card that is asked about, on which seconds are predicted; those of the reference by default.
        as_json: Print JSON.
    """
    from i2v_lab.capacity.clock import on_clock
    from i2v_lab.capacity.device_profile import device_profile
    from i2v_lab.runs.forecast_script import forecast_script
    from i2v_lab.runs.provenance import run_metadata
    from i2v_lab.runs.store import COMPLETE, FORECAST, Run, RunWriter

    result = forecast_script(script, arguments)
    card, gpu = on_card(result, gpu), gpu or REFERENCE
    fits = verdicts(result, vram_cap_gib)
    if profile is not None:
        request = {"arguments": list(arguments)}
        device = device_profile(gpu)
        metadata = run_metadata(FORECAST, model=script.name, request=request, argv=sys.argv)
        with RunWriter(profile, {**metadata, "clock": device.name}) as writer:
            for record in on_clock(result, device).records:
                writer.append(record)
    if as_json:
        print_json({"script": str(script), "arguments": list(arguments), **report(result, fits, gpu, card)})
        return
    metadata = {"device": FORECAST, "model": script.name, "context_bytes": result.context_bytes}
    run = Run(script, metadata, result.records, COMPLETE)
    print_forecast(" ".join([script.name, *arguments]), run, result, fits, gpu, card.in_words() if card else "")
