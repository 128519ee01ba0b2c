"""The results of a study: the verdict on its claim, a finding with the figures, and named values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from i2v_lab.runs.sources import Observation, device_of

CONFIRMED, REFINED, REFUTED, NO_DATA = "confirmed", "refined", "refuted", "no data"


def conclude(observations: Sequence[Observation], verdict: str, finding: str, **named: Any) -> dict[str, Any]:
    """The results of a notebook.

    Args:
        observations: The runs that they are computed from.
        verdict: ``confirmed``, ``refined``, ``refuted`` or ``no data``.
        finding: One or two sentences with the figures that decide the verdict.
        **named: More JSON values.
    """
    first = observations[0]
    return {
        "verdict": verdict,
        "finding": finding,
        "source": first.source.value,
        "model": first.spec.model,
        "device": device_of(observations),
        **named,
    }


def no_data(observations: Sequence[Observation], **named: Any) -> dict[str, Any]:
    """The results where a run that the claim needs is not recorded."""
    absent = ", ".join(each.spec.name for each in observations if each.run is None)
    return conclude(observations, NO_DATA, f"data/measured has no record of {absent}.", **named)
