"""One generation, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from i2v_lab.events import Event, Phase, PhaseStarted
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import VIDEO
from i2v_lab.runs.measure import measure, run_folder
from i2v_lab.runs.phases import run_peak
from i2v_lab.runs.sources import Observation, Source, phases_frame
from i2v_lab.runs.spec import SMALL_MODEL, RunSpec
from i2v_lab.studies.published import study_request
from i2v_lab.studies.verdicts import CONFIRMED, REFINED, REFUTED, conclude, no_data
from i2v_lab.units import format_bytes

LEFT_SHARE = 0.05  # of the peak: what may stay allocated between phases
STAIRS = ((Phase.ENCODE_PROMPT, 24), (Phase.DENOISE_STAGE_1, 64), (Phase.DECODE_VIDEO, 40))  # and the MiB held
BETWEEN_STAGES = (Phase.UPSAMPLE_LATENT.value, Phase.DENOISE_STAGE_2.value)  # the transformer may be loaded already


def first_look_specs(request: I2VRequest, model: str) -> list[RunSpec]:
    """The request as it is."""
    return [RunSpec(request=request, model=model)]


def video_run(observation: Observation, runs_dir: Path, device: str = "auto") -> Path:
    """A video file: that of the run if it was measured here, otherwise one of the tiny model at its default size.

    Args:
        observation: Of :func:`first_look_specs`.
        runs_dir: Where a measured run is stored.
        device: ``auto``, ``cpu`` or ``cuda``.
    """
    if observation.source is Source.MEASURE and observation.run is not None:
        return observation.run.folder / VIDEO
    asked = observation.spec.request
    small = study_request(SMALL_MODEL, image=asked.image, prompt=asked.prompt, seed=asked.seed, fps=asked.fps)
    spec = RunSpec(request=small, model=SMALL_MODEL)
    return measure(spec, run_folder(runs_dir, spec), device).folder / VIDEO


def first_look_verdict(observations: Sequence[Observation]) -> dict[str, Any]:
    """The claim that a run's peak is the maximum of its phases' peaks, since each phase frees its components.

    ``confirmed``: between phases at most a twentieth of the peak stays allocated. ``refined``: more does, but only from
    one denoising stage to the next, where the distilled transformer stays loaded. ``refuted``: more does elsewhere.
    """
    table, top = phases_frame(observations), run_peak(observations[0].run)
    if top is None:
        return no_data(observations)
    peak, between = top.peak_bytes, int(table["start_bytes"].max())
    elsewhere = int(table.loc[~table["phase"].isin(BETWEEN_STAGES), "start_bytes"].max())
    verdict, exception = CONFIRMED, ""
    if elsewhere > LEFT_SHARE * peak:
        verdict = REFUTED
    elif between > LEFT_SHARE * peak:
        verdict = REFINED
        exception = f" ({format_bytes(elsewhere)} without the transformer, which stays loaded between the stages)"
    finding = (
        f"The peak is {format_bytes(peak)}, in {top.phase}; the sum of the phases' peaks is "
        f"{format_bytes(int(table['peak_bytes'].sum()))}. Between phases, at most {format_bytes(between)} stay "
        f"allocated{exception}."
    )
    return conclude(
        observations,
        verdict,
        finding,
        peak_bytes=peak,
        peak_phase=top.phase,
        largest_between_bytes=between,
        largest_elsewhere_bytes=elsewhere,
    )


def staircase(monitor: Callable[[Event], None], device: str = "auto", seconds: float = 0.5) -> None:
    """Allocate and free tensors in three phases, for a monitor to show.

    Args:
        monitor: A sink, such as :class:`~i2v_lab.lab.monitor.VramMonitor`, that is sampling.
        device: ``auto``, ``cpu`` or ``cuda``.
        seconds: For which each phase holds its tensors.
    """
    import torch

    place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    for phase, size in STAIRS:
        monitor(PhaseStarted(phase))
        held = [torch.zeros(2**20, dtype=torch.uint8, device=place) for _ in range(size)]
        time.sleep(seconds)
        del held
