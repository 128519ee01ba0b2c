"""The stream that every runner's pipeline returns, consumed in other modes and threads than it was made in."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from i2v_lab import PhaseProfiler, guard_stream
from i2v_lab.events import Phase, PhaseEnded
from i2v_lab.pipeline.contract.generation import GRAD_SCOPES, VideoStream, decode_chunks
from i2v_lab.profiling.escape import GradEscapeWarning
from i2v_lab.request import DecodeScope, VideoShape
from i2v_lab.thread_modes import Autocast


class Scope:
    """Takes the steps that a phase would report."""

    def step(self, step: int, steps: int) -> None:
        pass


def _stream(scope: DecodeScope, decoder_scope=nullcontext) -> VideoStream:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4, device="cpu")

    def decode():
        with decoder_scope():
            for _ in range(2):
                yield layer(torch.ones(2, 4, device="cpu")), torch.empty(1).device.type

    return VideoStream(decode_chunks(decode(), 2, GRAD_SCOPES[scope], Scope()), VideoShape(2, 64, 64), 2)


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(("scope", "recorded"), [(DecodeScope.NO_GRAD, False), (DecodeScope.ESCAPED, True)])
def test_it_decodes_in_the_autocast_and_on_the_device_it_was_made_in(scope, recorded, threaded):
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        stream = _stream(scope)
    with ThreadPoolExecutor(1) as pool:
        chunks = pool.submit(list, stream).result() if threaded else list(stream)
    assert [(chunk.dtype, device, chunk.requires_grad) for chunk, device in chunks] == [
        (torch.bfloat16, "meta", recorded)
    ] * 2


@pytest.mark.parametrize(
    "decoder_scope", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad]
)
def test_modes_that_a_decoder_leaves_set_are_not_its_consumers(decoder_scope):
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), Autocast.current()
    stream = _stream(DecodeScope.ESCAPED, decoder_scope)
    for _ in stream:
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), Autocast.current()) == before
        assert torch.nn.Linear(4, 4)(torch.ones(2, 4)).requires_grad
    stream = _stream(DecodeScope.ESCAPED, decoder_scope)
    next(stream)
    stream.close()
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), Autocast.current()) == before


@pytest.mark.parametrize("each_item", [False, True])
@pytest.mark.parametrize("guard", [lambda stream: stream, lambda stream: guard_stream(stream, "warn")])
def test_the_profiler_of_the_run_meters_every_chunk_in_any_thread(each_item, guard):
    def elsewhere(function, *args):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *args).result()

    def profile(consume) -> tuple:
        with PhaseProfiler() as profiler, warnings.catch_warnings():
            warnings.simplefilter("ignore", GradEscapeWarning)
            stream = guard(_stream(DecodeScope.ESCAPED))
            profiler.start("decode_video")
            chunks = consume(stream)
            profiler(PhaseEnded(Phase.DECODE_VIDEO, 0.0, True, None))
            assert len(chunks) == 2
            (phase,) = profiler.phases
            return phase.peak_bytes, phase.end_bytes, phase.saved_for_backward_bytes

    def one_by_one(stream) -> list:
        chunks = []
        while (chunk := elsewhere(next, stream, None)) is not None:
            chunks.append(chunk)
        return chunks

    expected = profile(list)
    assert expected[2] == 2 * 2 * 4 * 4
    assert profile(one_by_one if each_item else lambda stream: elsewhere(list, stream)) == expected
