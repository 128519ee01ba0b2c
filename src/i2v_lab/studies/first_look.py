"""One generation, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from i2v_lab.events import Phase
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import VIDEO
from i2v_lab.runs.measure import measure, run_folder
from i2v_lab.runs.sources import Observation, Source, phases_frame
from i2v_lab.runs.spec import SMALL_MODEL, RunSpec
from i2v_lab.studies.published import study_request
from i2v_lab.studies.verdicts import CONFIRMED, REFINED, REFUTED, conclude, no_data
from i2v_lab.units import format_bytes

LITTLE = 0.05  # of the peak: what may be left between phases
BETWEEN_STAGES = (Phase.UPSAMPLE_LATENT.value, Phase.DENOISE_STAGE_2.value)  # which may find the transformer there


def first_look_specs(request: I2VRequest, model: str) -> list[RunSpec]:
    """The request as it is."""
    return [RunSpec(request=request, model=model)]


def video_run(observation: Observation, runs_dir: Path, device: str = "auto") -> Path:
    """A video of the request: of the run itself if it was made here, of the tiny model at its own size otherwise."""
    if observation.source is Source.MEASURE and observation.run is not None:
        return observation.run.folder / VIDEO
    asked = observation.spec.request
    small = study_request(SMALL_MODEL, image=asked.image, prompt=asked.prompt, seed=asked.seed, fps=asked.fps)
    spec = RunSpec(request=small, model=SMALL_MODEL)
    return measure(spec, run_folder(runs_dir, spec), device).folder / VIDEO


def first_look_verdict(observations: Sequence[Observation]) -> dict[str, Any]:
    """The claim that the peak is that of the hungriest phase, since each frees what it loaded.

    ``confirmed``: between phases never more than a twentieth of the peak is left. ``refined``: more is, but only from
    one denoising stage to the other, where the distilled transformer stays. ``refuted``: more is elsewhere.
    """
    table = phases_frame(observations)
    if table.empty:
        return no_data(observations)
    peak, between = int(table["peak_bytes"].max()), int(table["start_bytes"].max())
    elsewhere = int(table.loc[~table["phase"].isin(BETWEEN_STAGES), "start_bytes"].max())
    top = table.loc[table["peak_bytes"] == peak, "phase"].iloc[0]
    verdict, exception = CONFIRMED, ""
    if elsewhere > LITTLE * peak:
        verdict = REFUTED
    elif between > LITTLE * peak:
        verdict = REFINED
        exception = f", and {format_bytes(elsewhere)} if the transformer is left out, which stays between the stages"
    finding = (
        f"The peak is {format_bytes(peak)}, in {top}; all phases' peaks together would be "
        f"{format_bytes(int(table['peak_bytes'].sum()))}, and between phases at most {format_bytes(between)} are "
        f"left{exception}."
    )
    return conclude(
        observations,
        verdict,
        finding,
        peak_bytes=peak,
        peak_phase=str(top),
        largest_between_bytes=between,
        largest_elsewhere_bytes=elsewhere,
    )
