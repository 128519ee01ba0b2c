"""The verdict follows from the measurements, and a child's failure becomes the parent's error."""

from __future__ import annotations

import subprocess
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest

from i2v_lab.errors import GradScopeError, I2VLabError
from i2v_lab.request import DecodeScope, I2VRequest
from i2v_lab.studies.no_grad import Comparison, frames_digest, run_generate


def _comparison(escaped: tuple[int, int], no_grad: tuple[int, int], identical: bool = True) -> Comparison:
    rows = [
        {"decode_scope": scope, "phase": phase, "seconds": 1.0, "peak_bytes": peak}
        for scope, peaks in (("escaped", escaped), ("no_grad", no_grad))
        for phase, peak in zip(("encode_image", "decode_video"), peaks, strict=True)
    ]
    return Comparison(pd.DataFrame(rows), {}, identical)


@pytest.mark.parametrize(
    ("comparison", "verdict"),
    [
        (_comparison((100, 240), (100, 120)), "confirmed"),
        (_comparison((100, 239), (100, 120)), "refined"),  # not halved
        (_comparison((150, 240), (100, 120)), "refined"),  # another phase changed too
        (_comparison((300, 240), (300, 120)), "refined"),  # the run's peak is elsewhere
        (_comparison((100, 120), (100, 120)), "refuted"),
        (_comparison((100, 240), (100, 120), identical=False), "refuted"),
    ],
)
def test_the_verdict_follows_from_the_peaks_and_the_frames(comparison, verdict):
    assert comparison.verdict()["verdict"] == verdict


def test_the_named_results_are_exact():
    assert _comparison((100, 300), (101, 120)).verdict() == {
        "escaped_peak_bytes": 300,
        "no_grad_peak_bytes": 120,
        "peak_ratio": 2.5,
        "decode_peak_ratio": 2.5,
        "excess_bytes": 180,
        "excess_phase": "decode_video",
        "largest_difference_elsewhere_bytes": 1,
        "frames_identical": True,
        "verdict": "refined",
    }


def _video(path: Path, last: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for value in (0, 100, last):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_the_digest_of_a_video_is_of_every_frame(tmp_path):
    one, same, other = (_video(tmp_path / f"{i}.mp4", last) for i, last in enumerate((200, 200, 210)))
    assert frames_digest(one) == frames_digest(same) != frames_digest(other)


@pytest.mark.parametrize(
    ("stderr", "kind", "message"),
    [
        (
            "bar\ni2v-lab: Inference tensors cannot be saved. Use x\n",
            GradScopeError,
            "Inference tensors cannot be saved. ",
        ),
        ("i2v-lab: image='x' does not exist\n", I2VLabError, "image='x' does not exist"),
        ("", I2VLabError, "no message"),
    ],
)
def test_what_a_child_says_last_is_the_error(monkeypatch, tmp_path, stderr, kind, message):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(kind) as caught:
        run_generate(I2VRequest(image="x"), "ltx-2.3-tiny", DecodeScope.NO_GRAD, tmp_path / "v.mp4")
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)
