"""How long a command takes, said before it starts: of forecasts that are not cached, by what they were measured to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from i2v_lab.cli.output import log
from i2v_lab.units import format_seconds

if TYPE_CHECKING:
    from i2v_lab.profiling.records import Forecast
    from i2v_lab.request import I2VRequest
    from i2v_lab.runs.spec import RunSpec

# Of a model at full size on two cores: alone, and after another one in the same process, whose calls are memoized
# (docs/log/forecast.md, docs/log/scale.md).
FIRST_S, LATER_S = 20.0, 9.0
TINY_S = 3.0
"""Of a tiny model, likewise, first or not."""
QUIET_S = 5.0
"""What takes less is not announced."""


def forecasts_s(models: Sequence[str], processes: int = 1) -> float:
    """Seconds of forecasts of which none is cached.

    Args:
        models: The architecture's name of each.
        processes: Side by side.

    Example:
        >>> forecasts_s(["ltx-2.3-22b"]), forecasts_s(["ltx-2.3-22b"] * 5), forecasts_s(["ltx-2.3-tiny"] * 4, 2)
        (20.0, 56.0, 6.0)
    """
    if not models:
        return 0.0
    total_s = sum(TINY_S if "tiny" in model else LATER_S for model in models)
    start_s = 0.0 if all("tiny" in model for model in models) else FIRST_S - LATER_S
    return start_s + total_s / min(processes, len(models))


def uncached(specs: Sequence[RunSpec], device: str = "cuda") -> list[RunSpec]:
    """Those of which no forecast is cached, equal ones once."""
    from i2v_lab.runs.forecast import cache_path, is_cached

    different = {cache_path(spec, device): spec for spec in specs}
    return [spec for spec in different.values() if not is_cached(spec, device)]


def announce_forecasts(specs: Sequence[RunSpec], processes: int = 1, device: str = "cuda") -> bool:
    """Say how many forecasts are to be computed, and how long that takes, if there is something to wait for.

    Args:
        specs: Of all that is needed.
        processes: Side by side.
        device: As of the forecasts.

    Returns:
        Whether it was said.
    """
    todo = uncached(specs, device)
    return announce(f"{_count(len(todo))} to compute", forecasts_s([spec.model for spec in todo], processes))


def announce(what: str, seconds: float, *, at_most: bool = False) -> bool:
    """Say how long something takes, or takes at most, on stderr, unless it is short; return whether it was said."""
    if seconds < QUIET_S:
        return False
    log(f"i2v-lab: {what}, in {'at most ' if at_most else ''}about {format_seconds(seconds, rough=True)}")
    return True


def _count(number: int) -> str:
    return f"{number} forecast{'s' if number > 1 else ''}"


class AnnouncedSearch:
    """Forecasts for a search, whose length is said with the first that is not cached.

    Args:
        most: How many forecasts the search takes at most.
    """

    def __init__(self, most: int) -> None:
        self._left, self.said = most, False

    def before(self, spec: RunSpec) -> None:
        """Announce what is left, if the next forecast is not cached and nothing was announced."""
        if not self.said and uncached([spec]):
            words = f"a search: up to {_count(self._left)} to compute"
            self.said = announce(words, forecasts_s([spec.model] * self._left), at_most=True)
        self._left = max(1, self._left - 1)


def announce_generation(
    request: I2VRequest, model: str, device: str, card: str, forecast: Forecast | None = None
) -> None:
    """Say how long a generation is predicted to take on the card that is here, where that is known.

    Args:
        request: With its settings or placement.
        model: An architecture's name.
        device: ``cuda`` or ``cpu``; nothing is predicted for a CPU.
        card: Its name.
        forecast: Of that request; a cached one by default.
    """
    from i2v_lab.capacity.time_model import time_in_words
    from i2v_lab.runs.forecast import cached_forecast
    from i2v_lab.runs.spec import RunSpec

    if device != "cuda" or "tiny" in model:
        return
    forecast = forecast or cached_forecast(RunSpec(request=request, model=model))
    if forecast is not None:
        log(f"i2v-lab: {time_in_words(forecast, card)}, without reading weights from a disk")
        return
    log(
        f"i2v-lab: how long it takes was not forecast; `i2v-lab forecast` predicts it in about "
        f"{format_seconds(FIRST_S, rough=True)}"
    )
