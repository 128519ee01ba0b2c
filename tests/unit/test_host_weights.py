"""Streamed weights in host memory: read from files by threads, kept over generations, released after any end."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace

import pytest
import torch

from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy
from i2v_lab.pipeline.ltx2.components import Ledger
from i2v_lab.pipeline.ltx2.memory import host_weights, readers
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.request import I2VRequest, Quantization

CPU = torch.device("cpu")
STREAMED = TECHNIQUES[MemoryPolicy.STREAMED]
PLENTY = 2**30


@pytest.fixture
def request_64(still) -> I2VRequest:
    return I2VRequest(
        image=str(still), prompt="waves", width=64, height=64, frames=9, fps=120, seed=3, memory="streamed"
    )


@pytest.fixture(scope="module")
def cold_frames(tiny, still) -> dict[str, torch.Tensor]:
    base = I2VRequest(image=str(still), prompt="waves", width=64, height=64, frames=9, fps=120, seed=3)
    pipeline = TwoStagePipeline(tiny)
    return {variant: _frames(pipeline, replace(base, variant=variant)) for variant in ("distilled", "dev")}


@pytest.fixture
def own_checkpoint(tiny, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    shutil.copy(tiny.checkpoint, path)
    return replace(tiny, checkpoint=str(path))


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, str]]:
    """Path and tensor of every read from a weight file, but for headers."""
    seen = []
    original = readers._read_into

    def noting(path, offset, target, what):
        if what != "its header":
            seen.append((path, what))
        original(path, offset, target, what)

    monkeypatch.setattr(readers, "_read_into", noting)
    return seen


def _frames(pipeline, request) -> torch.Tensor:
    with pipeline(request).video as chunks:
        return torch.cat(list(chunks))


def _blocks(reads) -> list[str]:
    return [key for _, key in reads if "transformer_blocks." in key and key.startswith("model.diffusion_model.")]


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("i2v-lab-weights")]


@pytest.mark.parametrize("variant", ["distilled", "dev"])
@pytest.mark.parametrize("keep", [False, True])
def test_frames_are_those_of_a_cold_start_and_kept_blocks_are_read_once(
    tiny, request_64, cold_frames, reads, variant, keep
):
    request = replace(request_64, variant=variant)
    with HostWeights(PLENTY, keep=keep) as host:
        pipeline = TwoStagePipeline(tiny, host_weights=host)
        assert torch.equal(_frames(pipeline, request), cold_frames[variant])
        first = len(_blocks(reads))
        assert first == len(set(_blocks(reads))) * (1 if keep or variant == "distilled" else 2)
        assert (host.held_bytes > 0) is keep
        assert torch.equal(_frames(pipeline, request), cold_frames[variant])
        assert len(_blocks(reads)) == first * (1 if keep else 2)
        assert not _threads()
    assert host.held_bytes == 0


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 1.5])
@pytest.mark.parametrize("keep", [False, True])
def test_whatever_the_budget_it_is_kept_to_and_the_frames_are_the_same(
    tiny, request_64, cold_frames, monkeypatch, share, keep
):
    monkeypatch.setattr(host_weights, "AHEAD_BYTES", 2**16)
    with HostWeights(PLENTY) as host:
        module = Ledger(tiny, CPU, Quantization.FP8_CAST, STREAMED, host_weights=host).transformer()
        stream = next(m.weight_stream for m in module.modules() if "weight_stream" in vars(m))
        whole = sum(plan.nbytes for plan in stream._host._plans.values())
        stream.close()
    budget = int(share * whole)
    held = []
    with HostWeights(budget, keep=keep) as host:
        pipeline = TwoStagePipeline(tiny, host_weights=host, sinks=[lambda _: held.append(host.held_bytes)])
        for _ in range(2):
            assert torch.equal(_frames(pipeline, request_64), cold_frames["distilled"])
    assert max(held) <= budget
    assert host.held_bytes == 0
    assert not _threads()
