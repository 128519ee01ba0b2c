"""Searches forecasts for the largest request that fits a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from i2v_lab.capacity.cards import FITS, TIGHT, judge
from i2v_lab.errors import InvalidRequest
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.profiling.records import Forecast
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import FULL_SIZE_MODEL

OnForecast = Callable[[I2VRequest, Forecast, str], None]

MAX_HEIGHT = 2176  # of the search, not of the model
MAX_FRAMES = 257  # likewise
# In ascending order of voxels decoded, and so of decoding time: overlaps are decoded more than once.
TILINGS: tuple[Tiling | None, ...] = (
    None,
    Tiling(1024, 64, 96, 24),
    Tiling(768, 64, 80, 24),
    Tiling(512, 64, 64, 24),
    Tiling(384, 64, 32, 8),
    Tiling(256, 64, 24, 8),
    Tiling(128, 32, 16, 8),
)


@dataclass(frozen=True)
class Largest:
    """The result of a search.

    Attributes:
        request: The largest that fits; ``None`` if not even the smallest does.
        forecast: Of that request, or of the smallest.
        at_the_bound: Whether it is the upper bound of the search, so that a larger one may fit.
    """

    request: I2VRequest | None
    forecast: Forecast
    at_the_bound: bool


class FitSearch:
    """Searches for requests that fit a GPU.

    Args:
        memory_bytes: The GPU's memory as CUDA reports it.
        model: An architecture's name.
        on_forecast: Called with every request that is tried, its forecast and its verdict.
        tightly: Accept the verdict ``tight`` as well as ``fits``.
        otherwise: Whether a request whose own forecast does not fit does so in another way.
        forecast: Forecasts a request; :func:`~i2v_lab.runs.forecast.forecast_request` by default.
        before: Called with every request that is going to be tried.

    Example:
        >>> search = FitSearch(24 * 2**30)
        >>> search.largest_size(I2VRequest(image="stills/lighthouse.png")).request.width  # doctest: +SKIP
        1024
    """

    def __init__(
        self,
        memory_bytes: int,
        model: str = FULL_SIZE_MODEL,
        on_forecast: OnForecast = lambda *_: None,
        *,
        tightly: bool = False,
        otherwise: Callable[[I2VRequest], bool] = lambda _: False,
        forecast: Callable[[I2VRequest, str], Forecast] | None = None,
        before: Callable[[I2VRequest], None] = lambda _: None,
    ) -> None:
        self._memory_bytes = memory_bytes
        self._model = model
        self._runner = runner_of(load_architecture(model))
        self._sizes = self._runner.size_rule(load_architecture(model))
        self._on_forecast = on_forecast
        self._accepted = (FITS, TIGHT) if tightly else (FITS,)
        self._otherwise = otherwise
        self._forecast = forecast or forecast_request
        self._before = before

    def largest_size(
        self, request: I2VRequest, aspect: tuple[int, int] = (4, 3), max_height: int = MAX_HEIGHT
    ) -> Largest:
        """The largest size at the request's number of frames.

        Args:
            request: Everything but the size.
            aspect: Width to height; sides are rounded to the model's multiple of pixels.
            max_height: Upper bound of the search, in pixels.
        """
        return self._last_that_fits(self.by_size(request, aspect, max_height))

    def most_frames(self, request: I2VRequest) -> Largest:
        """The largest number of frames at the request's size."""
        return self._last_that_fits(self.by_frames(request))

    def by_size(
        self, request: I2VRequest, aspect: tuple[int, int] = (4, 3), max_height: int = MAX_HEIGHT
    ) -> list[I2VRequest]:
        """The sizes of :meth:`largest_size`, ascending."""
        sizes = self._sizes.sizes(aspect, max_height)
        return self._allowed([replace(request, width=w, height=h) for w, h in sizes])

    def by_frames(self, request: I2VRequest) -> list[I2VRequest]:
        """The numbers of frames of :meth:`most_frames`, ascending."""
        return self._allowed([replace(request, frames=count) for count in self._sizes.frame_counts(MAX_FRAMES)])

    def _allowed(self, requests: Sequence[I2VRequest]) -> list[I2VRequest]:
        """Without those that the model refuses, such as one frame of the smallest size."""
        allowed = []
        for request in requests:
            with suppress(InvalidRequest):
                self._runner.check_request(load_architecture(self._model), request)
                allowed.append(request)
        return allowed or list(requests[:1])  # whose forecast says why

    def fastest_tiling(self, request: I2VRequest) -> Largest:
        """The tiling with the least redundant decoding that fits, at the request's size and number of frames."""
        tiled = self._runner.tiles(load_architecture(self._model))
        for tiling in TILINGS if tiled else (None,):
            tried = replace(request, tiling=tiling)
            forecast, fits = self._try(tried)
            if fits:
                return Largest(tried, forecast, at_the_bound=False)
        return Largest(None, forecast, at_the_bound=False)

    def _last_that_fits(self, requests: Sequence[I2VRequest]) -> Largest:
        """Bisection; memory is monotonic along ``requests``."""
        forecast, fits = self._try(requests[0])
        if not fits:
            return Largest(None, forecast, at_the_bound=False)
        good, bad = 0, len(requests)
        while bad - good > 1:
            middle = (good + bad) // 2
            tried, fits = self._try(requests[middle])
            if fits:
                good, forecast = middle, tried
            else:
                bad = middle
        return Largest(requests[good], forecast, at_the_bound=good == len(requests) - 1)

    def _try(self, request: I2VRequest) -> tuple[Forecast, bool]:
        self._before(request)
        forecast = self._forecast(request, self._model)
        verdict = judge(forecast, "", self._memory_bytes).verdict
        self._on_forecast(request, forecast, verdict)
        return forecast, verdict in self._accepted or self._otherwise(request)
