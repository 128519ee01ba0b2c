"""On a GPU, weights streamed straight from weight files: the frames of lean, and nothing left on the device."""

from __future__ import annotations

import gc
import os
import shutil
from dataclasses import replace

import pytest
import torch

from i2v_lab.errors import CheckpointError
from i2v_lab.events import Phase, StepEnded
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.request import I2VRequest

pytestmark = pytest.mark.gpu


@pytest.fixture
def request_on_gpu(still) -> I2VRequest:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none here")
    return I2VRequest(image=str(still), prompt="waves", width=192, height=128, frames=25, seed=3)


def test_streamed_from_files_gives_the_frames_of_lean(tiny, request_on_gpu):
    frames = []
    for policy in ("lean", "streamed"):
        with TwoStagePipeline(tiny, "cuda")(replace(request_on_gpu, memory=policy)).video as chunks:
            frames.append(torch.cat([chunk.cpu() for chunk in chunks]))
    assert torch.equal(*frames)
    assert frames[0].float().std() > 1


def test_weights_kept_in_host_memory_give_the_same_frames_and_are_released(tiny, request_on_gpu):
    request = replace(request_on_gpu, memory="streamed")
    cold = _frames(TwoStagePipeline(tiny, "cuda"), request)
    with HostWeights(keep=True) as host:
        pipeline = TwoStagePipeline(tiny, "cuda", host_weights=host)
        for _ in range(2):
            assert torch.equal(_frames(pipeline, request), cold)
            assert host.held_bytes > 2**20
    assert host.held_bytes == 0


def _frames(pipeline, request) -> torch.Tensor:
    with pipeline(request).video as chunks:
        return torch.cat([chunk.cpu() for chunk in chunks])


def test_every_bfloat16_becomes_the_same_float8_and_every_float8_the_same_bfloat16_on_both(request_on_gpu):
    """Weights are cast on the host where threads read them, and on the device where they do not."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.abs() < 448]
    float8 = every.to(torch.float8_e4m3fn)
    assert torch.equal(float8.view(torch.uint8), every.cuda().to(torch.float8_e4m3fn).cpu().view(torch.uint8))
    assert torch.equal(float8.bfloat16(), float8.cuda().bfloat16().cpu())


def test_a_file_truncated_during_a_run_leaves_nothing_on_the_device(tiny, request_on_gpu, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    shutil.copy(tiny.checkpoint, checkpoint)

    def after_a_step(event):
        if isinstance(event, StepEnded) and event.phase is Phase.DENOISE_STAGE_1:
            os.truncate(checkpoint, 4096)

    before = torch.cuda.memory_allocated()
    with pytest.raises(CheckpointError) as caught:
        pipeline = TwoStagePipeline(replace(tiny, checkpoint=str(checkpoint)), "cuda", sinks=[after_a_step])
        pipeline(replace(request_on_gpu, memory="streamed"))
    assert "component" in caught.value.fields  # the one whose weights could not be read
    del pipeline, caught
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**25  # cuBLAS's workspace
