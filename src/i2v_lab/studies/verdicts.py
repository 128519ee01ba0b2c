"""How a study ends: a verdict on its claim, the sentence that says why, and named results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from i2v_lab.runs.sources import Observation, device_of

CONFIRMED, REFINED, REFUTED, NO_DATA = "confirmed", "refined", "refuted", "no data"


def conclude(observations: Sequence[Observation], verdict: str, finding: str, **named: Any) -> dict[str, Any]:
    """The results of a notebook.

    Args:
        observations: What they rest on.
        verdict: ``confirmed``, ``refined``, ``refuted`` or ``no data``.
        finding: One sentence with the figures that say so.
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
    """The results where a run that the claim is about is not recorded."""
    absent = ", ".join(each.spec.name for each in observations if each.run is None)
    return conclude(observations, NO_DATA, f"data/measured has no record of {absent}.", **named)
