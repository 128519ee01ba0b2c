"""On a GPU, weights streamed straight from weight files: the frames of lean, and nothing left on the device."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from i2v_lab.errors import CheckpointError
from i2v_lab.events import Phase, StepEnded
from i2v_lab.pipeline.ltx2.memory import host_memory
from i2v_lab.pipeline.ltx2.memory.block_reader import THREAD_NAME
from i2v_lab.pipeline.ltx2.memory.host_memory import PageLocked
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


def test_what_the_driver_refuses_to_lock_does_not_fail_the_next_kernel(request_on_gpu, monkeypatch):
    first = PageLocked(2**20, torch.device("cuda"))
    monkeypatch.setattr(host_memory, "own_pages", lambda _: first.data)
    with pytest.raises(RuntimeError, match="already mapped"):
        PageLocked(2**20, torch.device("cuda"))
    assert torch.ones(8, device="cuda").add_(1).sum().item() == 16
    first.release()


@pytest.mark.parametrize("end", ["interrupt", "no device memory"])
def test_a_generation_that_ended_early_leaves_nothing_and_the_next_one_is_as_ever(tiny, request_on_gpu, end):
    request = replace(request_on_gpu, memory="streamed")
    expected = _frames(TwoStagePipeline(tiny, "cuda"), request)

    def after_a_step(event):
        if isinstance(event, StepEnded) and event.phase is Phase.DENOISE_STAGE_1:
            if end == "interrupt":
                raise KeyboardInterrupt
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1e-6)

    gc.collect()
    before = torch.cuda.memory_allocated()
    with HostWeights() as host:
        with pytest.raises(KeyboardInterrupt if end == "interrupt" else torch.OutOfMemoryError):
            TwoStagePipeline(tiny, "cuda", sinks=[after_a_step], host_weights=host)(request)
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        assert host.held_bytes == 0
        assert torch.cuda.memory_allocated() == before
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]
        assert torch.equal(_frames(TwoStagePipeline(tiny, "cuda", host_weights=host), request), expected)
