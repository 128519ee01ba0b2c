"""Before and after the fix: the same request decoded in the consumer's grad mode, and inside ``no_grad``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pandas as pd

from i2v_lab.profiling.records import GraphRecord
from i2v_lab.request import DecodeScope, I2VRequest
from i2v_lab.runs.execute import VIDEO
from i2v_lab.runs.sources import Observation, Source, observe, phases_frame, runs_frame
from i2v_lab.runs.spec import Consumer, RunSpec
from i2v_lab.runs.store import FAILED
from i2v_lab.studies.localization import AFTER_RETURN, late_phases, scope_specs
from i2v_lab.studies.published import beside_published
from i2v_lab.studies.verdicts import CONFIRMED, REFINED, REFUTED, conclude, no_data
from i2v_lab.units import format_bytes

DEPTH = 3  # of module paths in the table of the graph


def fix_specs(request: I2VRequest, model: str) -> list[RunSpec]:
    """With the defect, with the fix, and, of a stream, with the defect where ``guard_stream`` is around it."""
    before, after = scope_specs(request, model)
    return [before, after, *([replace(before, consumer=Consumer.GUARDED)] if before.runner_spec.lazy_decode else [])]


def fix_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """Peak, time and bytes saved for backward of each run, and the published figures.

    Returns:
        The columns of :func:`~i2v_lab.studies.published.beside_published`, one row for each run.
    """
    return beside_published(runs_frame(observations))


def peaks_by_phase(observations: Sequence[Observation]) -> pd.DataFrame:
    """Peaks and seconds of every phase, a column of either for each run.

    Returns:
        ``phase``; for each run a peak, ``escaped_bytes``, ``no_grad_bytes``, and ``guarded_bytes`` if that was asked
        for; and ``escaped_seconds`` and so on. Missing values where there is no run.
    """
    table = phases_frame(observations)
    table["mode"] = table["decode_scope"].where(table["consumer"] == "plain", table["consumer"])
    modes = ["escaped", "no_grad", "guarded"][: len(observations)]
    grouped, order = table.groupby(["phase", "mode"]), table["phase"].unique()
    peaks = grouped["peak_bytes"].max().unstack().reindex(index=order, columns=modes).astype("Int64")
    seconds = grouped["seconds"].sum(min_count=1).unstack().reindex(index=order, columns=modes).astype("Float64")
    both = peaks.add_suffix("_bytes").join(seconds.add_suffix("_seconds"))
    return both.rename_axis(index="phase", columns=None).reset_index()


def graph_table(observations: Sequence[Observation]) -> pd.DataFrame:
    """Bytes that autograd saved for backward, by module, of the run with the defect.

    Returns:
        ``module, saved_bytes, share``, the largest first; empty for a run without graph records.
    """
    first = observations[0]
    totals: dict[str, int] = {}
    for record in first.run.of(GraphRecord) if first.run else []:
        module = ".".join(record.module.split(".")[:DEPTH])
        totals[module] = totals.get(module, 0) + record.nbytes
    rows = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    table = pd.DataFrame(rows, columns=["module", "saved_bytes"]).astype({"saved_bytes": "int64"})
    return table.assign(share=table["saved_bytes"] / max(1, int(table["saved_bytes"].sum())))


# --- Measured at a size that any machine runs ---


def small_runs(request: I2VRequest, model: str, runs_dir: Path, device: str = "auto") -> list[Observation]:
    """Runs on this machine for what no forecast has: pixel values, and torch's refusal of ``inference_mode``.

    Returns:
        With the defect, with the fix, and with the pipeline inside ``inference_mode`` and the decoding outside.
    """
    refused = RunSpec(request=replace(request, decode_scope=DecodeScope.INFERENCE_MODE), model=model)
    return observe([*scope_specs(request, model), refused], Source.MEASURE, runs_dir, device)


def video_of(observation: Observation) -> Path:
    """The MP4 of a measured run."""
    assert observation.run is not None
    return observation.run.folder / VIDEO


def frames_identical(observations: Sequence[Observation]) -> bool:
    """Whether the videos of the first two runs are bit-identical in every decoded frame."""
    first, second = (frames_digest(video_of(each)) for each in observations[:2])
    return first == second


def refusal(observation: Observation) -> str:
    """Torch's error for a stream consumed outside of its pipeline's ``inference_mode``; empty if there is none."""
    assert observation.run is not None
    if observation.run.status != FAILED:
        return ""
    return str(observation.run.metadata["error"]).partition(": ")[2]


def frames_digest(video: Path) -> str:
    """The SHA-256 of the RGB pixels of all frames of a video file, in hex."""
    digest = hashlib.sha256()
    with av.open(str(video.absolute())) as container:
        for frame in container.decode(video=0):
            digest.update(frame.to_ndarray(format="rgb24").tobytes())
    return digest.hexdigest()


def fix_verdict(observations: Sequence[Observation], identical: bool, refused: str) -> dict[str, Any]:
    """Claims 3 and 4: one call moved inside ``no_grad`` removes the excess, and ``inference_mode`` is no substitute.

    ``confirmed``: the run's peak is at least halved, all of the excess is in decoding, no frame changes, and
    torch refuses ``inference_mode``. ``refined``: the decoding's peak is lower, but the run's is not halved, or another
    phase changes too. ``refuted``: the decoding's peak is no lower, or the video changes.

    Args:
        observations: Of :func:`fix_specs`; the third may have no run, or be left out.
        identical: Of :func:`frames_identical`.
        refused: Of :func:`refusal`.
    """
    named: dict[str, Any] = {"frames_identical": identical, "inference_mode_refused": bool(refused)}
    headline = ("escaped_peak_bytes", "no_grad_peak_bytes", "peak_ratio", "excess_phase")
    if any(each.run is None for each in observations[:2]):
        return no_data(observations[:2], **dict.fromkeys(headline), **named)
    by_phase = peaks_by_phase(observations).set_index("phase")
    excess = by_phase["escaped_bytes"] - by_phase["no_grad_bytes"]
    escaped, no_grad = int(by_phase["escaped_bytes"].max()), int(by_phase["no_grad_bytes"].max())
    elsewhere = int(excess.drop(late_phases(phases_frame(observations))).abs().max())
    decode_ratio = float(by_phase["escaped_bytes"][AFTER_RETURN] / by_phase["no_grad_bytes"][AFTER_RETURN])
    if decode_ratio <= 1 or not identical:
        verdict = REFUTED
    elif escaped >= 2 * no_grad and elsewhere == 0 and refused:
        verdict = CONFIRMED
    else:
        verdict = REFINED
    finding = (
        f"With the video decoded inside no_grad, the same request peaks at {format_bytes(no_grad)} instead of "
        f"{format_bytes(escaped)}, {escaped / no_grad:.2f} times less; the peak of {AFTER_RETURN} alone is "
        f"{decode_ratio:.1f} times lower, and {'every frame is identical' if identical else 'the frames differ'}."
    )
    if len(observations) > 2 and observations[2].run is not None:
        guarded = int(by_phase["guarded_bytes"].max())
        named["guarded_peak_bytes"] = guarded
        named["guarded_saved_bytes"] = int(runs_frame(observations)["saved_for_backward_bytes"].iloc[2])
    return conclude(
        observations,
        verdict,
        finding,
        escaped_peak_bytes=escaped,
        no_grad_peak_bytes=no_grad,
        peak_ratio=escaped / no_grad,
        decode_peak_ratio=decode_ratio,
        excess_bytes=int(excess.max()),
        excess_phase=str(excess.idxmax()),
        largest_difference_elsewhere_bytes=elsewhere,
        **named,
    )
