"""The fastest placement of a request within the memory of each of several GPUs, without a forecast for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from i2v_lab.capacity.device_profile import device_profile, has_profile
from i2v_lab.capacity.fit import lighter
from i2v_lab.capacity.placement import allocatable_bytes, needed_bytes
from i2v_lab.capacity.time_model import predicted_seconds
from i2v_lab.errors import ForecastError
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.profiling.records import Forecast, HostMemoryRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import FAILS_ON_A_CARD
from i2v_lab.runs.forecast import forecast_request, forecast_spec
from i2v_lab.runs.spec import RunSpec

NONE, RESIDENT, PARTIAL = "none", "resident", "partial"
PUBLISHED, MEASURED = "published", "measured"  # rates
POLICIES = (MemoryPolicy.RESIDENT, MemoryPolicy.LEAN, MemoryPolicy.STREAMED)


@dataclass(frozen=True)
class Placed:
    """A request on one GPU.

    Attributes:
        placement: ``resident``, ``lean``, ``streamed``, or ``partial``: some of the transformer's blocks stay; of a
            model without these, its memory settings; ``none`` where nothing fits.
        resident_blocks: Blocks of the transformer that stay on the device.
        blocks: How many there are; 0 for a model whose blocks are not placed.
        peak_bytes: The most that is allocated; where nothing fits, of what takes the least.
        peak_phase: In which phase.
        needed_bytes: The smallest memory for that: with the CUDA context and margins.
        predicted_seconds: Of the whole generation on that GPU; ``None`` where no rates of it are known or nothing fits.
    """

    placement: str
    resident_blocks: int
    blocks: int
    peak_bytes: int
    peak_phase: str
    needed_bytes: int
    predicted_seconds: float | None

    @property
    def name(self) -> str:
        """The placement in a few words."""
        if self.placement != PARTIAL:
            return self.placement
        return f"{self.resident_blocks} of {self.blocks} blocks resident"


def base_specs(request: I2VRequest, model: str) -> list[RunSpec]:
    """The runs from whose forecasts every placement of a request is computed."""
    if not runner_of(load_architecture(model)).techniques:
        return [RunSpec(request=request, model=model)]
    return [RunSpec(request=replace(request, memory=policy, placement=None), model=model) for policy in POLICIES]


def best_placements(request: I2VRequest, model: str, budgets: Sequence[tuple[str, int]]) -> list[Placed]:
    """The fastest placement of a request on each GPU.

    For LTX-2 they are solved (:mod:`i2v_lab.capacity.placement`). For other models each GPU has the first of the memory
    settings, in descending order of speed, whose reserved memory fits.

    Args:
        request: What to generate; its memory policy and placement are replaced.
        model: An architecture's name.
        budgets: GPUs, whose rates predict the seconds, and the bytes that the process may take on each.
    """
    if runner_of(load_architecture(model)).techniques:
        base = {policy: forecast_spec(spec) for policy, spec in zip(POLICIES, base_specs(request, model), strict=True)}
        return [_solved(base, *budget) for budget in budgets]
    found: dict[int, Placed] = {}
    for name, forecast in _settings(request, model):
        for index, budget in enumerate(budgets):
            before = found.get(index)
            if before is None or before.placement == NONE:
                tried = _as_it_is(name, forecast, *budget)
                if before is None or tried.placement != NONE or tried.needed_bytes < before.needed_bytes:
                    found[index] = tried
        if all(placed.placement != NONE for placed in found.values()):
            break
    return [found[index] for index in range(len(budgets))]


def _as_it_is(name: str, forecast: Forecast, gpu: str, memory_bytes: int) -> Placed:
    need_bytes, peak = forecast.peak_reserved_bytes + forecast.context_bytes, forecast.peak
    fits = need_bytes <= memory_bytes
    seconds = seconds_on(forecast, gpu) if fits else None
    return Placed(name if fits else NONE, 0, 0, peak.peak_bytes, peak.phase, need_bytes, seconds)


def _settings(request: I2VRequest, model: str) -> Iterator[tuple[str, Forecast]]:
    for each in (request, *lighter(request, model)):
        try:
            yield each.settings.name or RESIDENT, forecast_request(each, model)
        except ForecastError as error:  # memory settings that fail on a card
            if error.fields.get("cause") != FAILS_ON_A_CARD:
                raise


def seconds_on(forecast: Forecast, gpu: str) -> float | None:
    """Predicted seconds of a whole generation; ``None`` on a GPU without published rates."""
    return predicted_seconds(forecast, device_profile(gpu)) if has_profile(gpu) else None


def rates_of(gpu: str) -> str:
    """Where the rates behind predicted seconds on a GPU are from: ``measured``, ``published``, or empty."""
    if not has_profile(gpu):
        return ""
    return MEASURED if device_profile(gpu).measured else PUBLISHED


def _solved(base: dict[MemoryPolicy, Forecast], gpu: str, memory_bytes: int) -> Placed:
    streamed, lean = base[MemoryPolicy.STREAMED], base[MemoryPolicy.LEAN]
    sizes = next(
        r.resident_bytes for r in streamed.records if isinstance(r, HostMemoryRecord) and r.component == "transformer"
    )
    room, blocks = allocatable_bytes(memory_bytes, streamed.context_bytes), len(sizes) - 1

    def placed(name: str, count: int, peak: int, phase: str, seconds: float | None) -> Placed:
        return Placed(name, count, blocks, peak, phase, needed_bytes(peak, streamed.context_bytes), seconds)

    for policy in (MemoryPolicy.RESIDENT, MemoryPolicy.LEAN):
        peak = base[policy].peak
        if peak.peak_bytes <= room:
            return placed(policy.value, blocks, peak.peak_bytes, peak.phase, seconds_on(base[policy], gpu))
    peak = streamed.peak
    if peak.peak_bytes > room:
        return placed(NONE, 0, peak.peak_bytes, peak.phase, None)
    denoise = max(
        phase.peak_bytes
        for phase in streamed.phases
        if phase.phase in ("denoise_stage_1", "upsample_latent", "denoise_stage_2")
    )
    count = sum(nbytes <= room - denoise for nbytes in sizes) - 1
    share = sizes[count] / sizes[-1]
    first, last = seconds_on(streamed, gpu), seconds_on(lean, gpu)
    seconds = None if first is None or last is None else (1 - share) * first + share * last
    name = PARTIAL if count else MemoryPolicy.STREAMED.value
    return placed(name, count, max(peak.peak_bytes, denoise + sizes[count]), peak.phase, seconds)
