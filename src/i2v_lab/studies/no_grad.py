"""Before and after: the same request decoded in the consumer's grad mode, and inside ``no_grad``.

Each run is a process of its own, started through the command line, so that it measures what a user would.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import pandas as pd

from i2v_lab.errors import GradScopeError, I2VLabError
from i2v_lab.request import DecodeScope, I2VRequest


@dataclass(frozen=True)
class Comparison:
    """What the runs showed.

    Attributes:
        phases: One row for each scope and phase: ``decode_scope, phase, seconds, peak_bytes, peak_so_far_bytes``.
        videos: The MP4 of each scope.
        frames_identical: Whether both videos decode to the same pixels in every frame.
    """

    phases: pd.DataFrame
    videos: dict[str, Path]
    frames_identical: bool

    def verdict(self) -> dict[str, Any]:
        """Named results: peaks in bytes, their ratio, the excess and where it is, and what that says of the claim.

        ``confirmed``: the change of grad mode at least halves the peak of the whole run, the excess is all in
        ``decode_video``, and no frame changes. ``refined``: decoding alone takes less, but the whole run is not halved,
        or something else changes too. ``refuted``: decoding takes no less, or the video changes.
        """
        peaks = self.phases.groupby("decode_scope")["peak_bytes"].max()
        by_phase = self.phases.pivot_table(index="phase", columns="decode_scope", values="peak_bytes", sort=False)
        excess = by_phase["escaped"] - by_phase["no_grad"]
        escaped, no_grad = int(peaks["escaped"]), int(peaks["no_grad"])
        elsewhere = int(excess.drop("decode_video").abs().max())
        decode_ratio = float(by_phase["escaped"]["decode_video"] / by_phase["no_grad"]["decode_video"])
        if decode_ratio <= 1 or not self.frames_identical:
            verdict = "refuted"
        elif escaped >= 2 * no_grad and elsewhere == 0:
            verdict = "confirmed"
        else:
            verdict = "refined"
        return {
            "escaped_peak_bytes": escaped,
            "no_grad_peak_bytes": no_grad,
            "peak_ratio": escaped / no_grad,
            "decode_peak_ratio": decode_ratio,
            "excess_bytes": int(excess.max()),
            "excess_phase": str(excess.idxmax()),
            "largest_difference_elsewhere_bytes": elsewhere,
            "frames_identical": self.frames_identical,
            "verdict": verdict,
        }


def compare_scopes(
    request: I2VRequest, model: str, out_dir: Path, device: str = "auto", scopes: Sequence[str] = ("escaped", "no_grad")
) -> Comparison:
    """Run the same request once in each scope.

    Args:
        request: What to generate; its own ``decode_scope`` does not matter.
        model: An architecture's name.
        out_dir: Gets one MP4 for each scope; made if it does not exist.
        device: ``auto``, ``cpu`` or ``cuda``.
        scopes: Which, of :class:`~i2v_lab.request.DecodeScope`.

    Raises:
        I2VLabError: A run failed; with its own message.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    videos = {scope: out_dir / f"{scope}.mp4" for scope in scopes}
    tables = []
    for scope, video in videos.items():
        report = run_generate(request, model, DecodeScope(scope), video, device)
        phases = pd.DataFrame(report["phases"])
        phases.insert(0, "decode_scope", scope)
        phases["peak_so_far_bytes"] = phases["peak_bytes"].cummax()
        tables.append(phases)
    digests = {frames_digest(video) for video in videos.values()}
    return Comparison(pd.concat(tables, ignore_index=True), videos, len(digests) == 1)


def inference_mode_message(request: I2VRequest, model: str, out_dir: Path, device: str = "auto") -> str:
    """What a run says whose pipeline is inside ``inference_mode`` and whose consumer is not: torch's refusal.

    Raises:
        AssertionError: It did not fail, so the claim that it does is wrong.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        run_generate(request, model, DecodeScope.INFERENCE_MODE, out_dir / "inference_mode.mp4", device)
    except GradScopeError as error:
        return str(error)
    raise AssertionError("the pipeline ran inside inference_mode, was consumed outside, and did not fail")


def run_generate(
    request: I2VRequest, model: str, scope: DecodeScope, video: Path, device: str = "auto"
) -> dict[str, Any]:
    """One ``i2v-lab generate --json`` in a process of its own.

    Returns:
        Its report.

    Raises:
        GradScopeError: It ended with status 1 because of its grad mode.
        I2VLabError: It failed otherwise.
    """
    options: dict[str, Any] = {
        "image": request.image,
        "prompt": request.prompt,
        "negative-prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "frames": request.frames,
        "fps": request.fps,
        "seed": request.seed,
        "variant": request.variant.value,
        "quantization": request.quantization.value,
        "model": model,
        "decode-scope": scope.value,
        "device": device,
        "out": video,
    }
    if request.tiling is not None:
        tiling = request.tiling
        options |= {"tile-px": tiling.tile_px, "tile-overlap-px": tiling.tile_overlap_px}
        options |= {"tile-frames": tiling.tile_frames, "tile-overlap-frames": tiling.tile_overlap_frames}
    command = [sys.executable, "-m", "i2v_lab.cli", "generate", "--json"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command += ["--no-tiling"] if request.tiling is None else []
    child = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if child.returncode == 0:
        report: dict[str, Any] = json.loads(child.stdout)
        return report
    lines = child.stderr.strip().splitlines() or ["no message"]
    kind = GradScopeError if "Inference tensors" in lines[-1] else I2VLabError
    raise kind(lines[-1].removeprefix("i2v-lab: "), decode_scope=scope.value, status=child.returncode)


def frames_digest(video: Path) -> str:
    """A hash over the pixels of every frame of a video file."""
    digest = hashlib.sha256()
    with av.open(str(video)) as container:
        for frame in container.decode(video=0):
            digest.update(frame.to_ndarray(format="rgb24").tobytes())
    return digest.hexdigest()
