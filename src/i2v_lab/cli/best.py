"""The fastest placement, or memory settings, of every size on one card: the answer of ``i2v-lab fit``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from i2v_lab.cli import expected
from i2v_lab.cli.output import log, say
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import MemorySettings, Offload
from i2v_lab.request import I2VRequest
from i2v_lab.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from i2v_lab.capacity.fit import FitSearch
    from i2v_lab.profiling.records import Forecast
    from i2v_lab.studies.placed import Placed

PLACEMENT = "fastest that fits"
PLACED_RULE = (
    "allocated bytes, the CUDA context and 384 MiB for fragmentation and kernels, with expandable segments, "
    "which --vram-budget turns on"
)


@dataclass(frozen=True)
class Card:
    """A card, or a budget.

    Attributes:
        name: As it was given.
        memory_bytes: That the process may take.
    """

    name: str
    memory_bytes: int

    @property
    def words(self) -> str:
        """Its name and memory."""
        return f"{self.name} ({format_bytes(self.memory_bytes)})"


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        asked: The requests in the order of the rows, the largest last.
        placed: One for each.
        at_the_bound: Whether the search ended at its bound, so that a larger one may fit.
    """

    asked: tuple[I2VRequest, ...]
    placed: tuple[Placed, ...]
    at_the_bound: bool

    @property
    def fits(self) -> bool:
        """Whether anything does."""
        return self.placed[-1].request is not None


def is_free(settings: MemorySettings) -> bool:
    """Whether the memory settings leave open what waits on the CPU and whether the autoencoder tiles.

    Example:
        >>> is_free(MemorySettings(quantization="gguf-q4_k")), is_free(MemorySettings(vae_tiling=True))
        (True, False)
    """
    return replace(settings, quantization=MemorySettings().quantization, dtypes=()).is_default


def freed(request: I2VRequest) -> I2VRequest:
    """A request with a memory policy or an offload of its own, without them.

    Example:
        >>> freed(I2VRequest(image="still.png", memory="lean")).memory.value
        'resident'
    """
    settings = replace(request.settings, offload=Offload.NONE, offload_stream=False, offload_blocks=1)
    return replace(request, memory=MemoryPolicy.RESIDENT, settings=settings)


def find(
    request: I2VRequest, model: str, card: Card, sought: str, aspect: tuple[int, int], *, smaller: bool = True
) -> Found:
    """The fastest placement on a card of the sizes that are asked for.

    Args:
        request: With the size and the frames that are given, and the model's own for the others.
        model: An architecture's name.
        card: The card.
        sought: ``size``, ``frames``, or empty for the request as it is.
        aspect: Width to height of the sizes that are searched.
        smaller: Whether the model's sizes below the largest have rows too.
    """
    from i2v_lab.runs.provenance import usable_cores
    from i2v_lab.studies.answer import sizes_of
    from i2v_lab.studies.placed import best_placements, needed_specs

    asked, at_the_bound, said = [request], False, False
    if sought:
        search, lightest, announced = _search(request, model, card, sought, aspect, smaller=smaller)
        found = search.most_frames(lightest) if sought == "frames" else search.largest_size(lightest, aspect)
        at_the_bound, last, said = found.at_the_bound, found.request, announced.said
        if last is not None:
            largest = replace(request, width=last.width, height=last.height, frames=last.frames)
            sizes = sizes_of(model) if smaller and sought == "size" else []
            below = [size for size in sizes if size[0] * size[1] < last.width * last.height]
            asked = [*(replace(largest, width=width, height=height) for width, height in below), largest]
        else:  # what is needed at least is that of the smallest
            asked = [(search.by_size(request, aspect) if sought == "size" else search.by_frames(request))[0]]
    if not said:
        needed = [spec for each in asked for spec in needed_specs(each, model, card.memory_bytes)]
        expected.announce_forecasts(needed, usable_cores())
    placed = [best_placements(each, model, [(card.name, card.memory_bytes)])[0] for each in asked]
    return Found(tuple(asked), tuple(placed), at_the_bound)


def search_steps(model: str, sought: str, aspect: tuple[int, int]) -> int:
    """How many requests a search tries at most, by bisection, or one after another where only the tiles are sought.

    Args:
        model: An architecture's name.
        sought: As of :func:`find`.
        aspect: Likewise.

    Example:
        >>> [search_steps("ltx-2.3-22b", sought, (4, 3)) for sought in ("size", "frames", "")]
        [7, 7, 7]
    """
    from i2v_lab.capacity.fit import MAX_FRAMES, MAX_HEIGHT, TILINGS
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.registry import runner_of

    architecture = load_architecture(model)
    runner = runner_of(architecture)
    if not sought:
        return len(TILINGS) if runner.tiles(architecture) else 1
    rule = runner.size_rule(architecture)
    tried = list(rule.frame_counts(MAX_FRAMES) if sought == "frames" else rule.sizes(aspect, MAX_HEIGHT))
    return 1 + (len(tried) - 1).bit_length()


def _search(
    request: I2VRequest, model: str, card: Card, sought: str, aspect: tuple[int, int], *, smaller: bool
) -> tuple[FitSearch, I2VRequest, expected.AnnouncedSearch]:
    """The search for the largest, the request under what takes the least, and what says how long it takes."""
    from i2v_lab.capacity.cards import context_bytes
    from i2v_lab.capacity.fit import FitSearch
    from i2v_lab.capacity.placement import Budgets, Resolution, allocatable_bytes
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.registry import runner_of
    from i2v_lab.studies.answer import sizes_of
    from i2v_lab.studies.placed import least_forecast, needed_specs

    steps, rows = search_steps(model, sought, aspect), 1 + (len(sizes_of(model)) if smaller and sought == "size" else 0)
    # One with the least memory at each step, of placed models one more where that does not fit, and those of each row.
    places = bool(runner_of(load_architecture(model)).techniques)
    announced = expected.AnnouncedSearch((2 * steps if places else steps) + rows * len(needed_specs(request, model)))

    def before(tried: I2VRequest) -> None:
        announced.before(needed_specs(tried, model)[-1])

    def report(tried: I2VRequest, result: Forecast, verdict: str) -> None:
        peak = f"{format_bytes(result.peak.peak_bytes)} in {result.peak.phase}"
        log(f"i2v-lab: {tried.width}x{tried.height}, {tried.frames} frames, with the least memory: {peak}, {verdict}")

    if places:

        def placed(tried: I2VRequest) -> bool:  # with smaller chunks and tiles
            resolved = Budgets(tried, model).resolve(card.memory_bytes, explain=False)
            return isinstance(resolved, Resolution)

        context = context_bytes()
        room_bytes = allocatable_bytes(card.memory_bytes, context) + context
        search = FitSearch(room_bytes, model, report, tightly=True, otherwise=placed, before=before)
        return search, replace(request, memory=MemoryPolicy.STREAMED), announced
    return FitSearch(card.memory_bytes, model, report, forecast=least_forecast, before=before), request, announced


def command(request: I2VRequest, model: str, card: Card) -> str:
    """The command that generates with a placement, or with memory settings.

    Args:
        request: With them.
        model: An architecture's name.
        card: For whose memory a placement is solved.
    """
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.registry import runner_of

    memory = request.settings.options
    if runner_of(load_architecture(model)).techniques:
        memory = f"--vram-budget {card.memory_bytes * 100 // GIB / 100:g}GiB"
    shape = f"--width {request.width} --height {request.height} --frames {request.frames}"
    return f"i2v-lab generate --device cuda --model {model} {shape} {memory}".rstrip()


def as_json(found: Found, model: str, card: Card) -> dict[str, Any]:
    """What was found as JSON values.

    Args:
        found: Of :func:`find`.
        model: An architecture's name.
        card: The card.
    """
    rows = [_row(asked, placed, model, card) for asked, placed in zip(found.asked, found.placed, strict=True)]
    last = found.placed[-1]
    return {
        "request": last.request.to_json() if last.request else None,
        "at_the_bound": found.at_the_bound,
        "peak_bytes": last.peak_bytes,
        "needed_bytes": last.needed_bytes,
        "host_bytes": last.host_bytes,
        "predicted_seconds": last.predicted_seconds,
        "instead": None,
        "sizes": rows,
    }


def _row(asked: I2VRequest, placed: Placed, model: str, card: Card) -> dict[str, Any]:
    return {
        "width": asked.width,
        "height": asked.height,
        "frames": asked.frames,
        "placement": placed.name,
        "needed_bytes": placed.needed_bytes,
        "peak_bytes": placed.peak_bytes,
        "peak_phase": placed.peak_phase or None,
        "host_bytes": placed.host_bytes,
        "predicted_seconds": placed.predicted_seconds,
        "warm_seconds": placed.warm_seconds,
        "command": command(placed.request, model, card) if placed.request else None,
    }


def show(found: Found, model: str, card: Card) -> None:
    """Print what was found: a row for each size, what "fits" means, and the command for the last.

    Args:
        found: Of :func:`find`.
        model: An architecture's name.
        card: The card.
    """
    from i2v_lab.capacity.cards import RESERVED_MARGIN_PERCENT, is_size
    from i2v_lab.capacity.device_profile import device_profile, has_profile
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.registry import runner_of
    from i2v_lab.reporting.console import TerminalTable, wide_console

    last = found.placed[-1]
    if last.request is None:
        asked = found.asked[-1]
        say(
            f"nothing fits {card.words}: {asked.width}x{asked.height} with {asked.frames} frames takes "
            f"{format_bytes(last.needed_bytes)} at least, the CUDA context and margins included; use a larger card, or "
            "ask for less"
        )
        return
    table = TerminalTable(box=None, header_style="bold", pad_edge=False)
    for name in ("size", "frames", PLACEMENT, "needs", "most in", "host memory", "predicted"):
        table.add_column(name, no_wrap=name != PLACEMENT)
    for asked, placed in zip(found.asked, found.placed, strict=True):
        host = "" if placed.host_bytes is None else format_bytes(placed.host_bytes)
        seconds = (
            "not known" if placed.predicted_seconds is None else format_seconds(placed.predicted_seconds, rough=True)
        )
        cells = [placed.name, format_bytes(placed.needed_bytes), placed.peak_phase, host, seconds]
        table.add_row(f"{asked.width}x{asked.height}", str(asked.frames), *cells)
    console = wide_console()
    console.print(f"{model} on {card.words}: the fastest that fits", soft_wrap=True)
    console.print(table)
    rates = "a size of memory has none; name a card" if is_size(card.name) else "the card has no published rates here"
    if has_profile(card.name):
        device = device_profile(card.name)
        rates = f"the first generation of a process on {device.name}, {device.caveat or 'by measured rates'}"
    margin = f"reserved bytes, {RESERVED_MARGIN_PERCENT} % above, and the CUDA context"
    placed_here = bool(runner_of(load_architecture(model)).techniques)
    console.print(f"needs: {PLACED_RULE if placed_here else margin}", soft_wrap=True)
    console.print(f"host memory: of the weights that wait there; predicted: {rates}", soft_wrap=True)
    if found.at_the_bound:
        console.print("the search ends there, more may fit", soft_wrap=True)
    console.print(f"run it: {command(last.request, model, card)}", soft_wrap=True)
