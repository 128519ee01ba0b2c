"""Memory policies: what they hold, and that they compute what the resident pipeline computes."""

from __future__ import annotations

import mmap
import os
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ltx_core.components.noisers import GaussianNoiser

from i2v_lab.errors import CheckpointError, InvalidRequest
from i2v_lab.events import Phase, StepEnded
from i2v_lab.memory_policy import NEEDS, TECHNIQUES, MemoryPolicy, to_techniques
from i2v_lab.pipeline.ltx2 import RUNNER, operations, sampling
from i2v_lab.pipeline.ltx2.components import Ledger
from i2v_lab.pipeline.ltx2.memory import (
    chunked_transformer,
    host_blocks,
    host_memory,
    in_place_decode,
    token_chunks,
)
from i2v_lab.pipeline.ltx2.memory.blocks import block_names
from i2v_lab.pipeline.ltx2.memory.readers import SafetensorsReader
from i2v_lab.pipeline.ltx2.memory.streaming import WeightStream
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.pipeline.ltx2.sampling import Latents
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import HostMemoryRecord
from i2v_lab.request import I2VRequest, Quantization, Tiling
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import make_request

CPU = torch.device("cpu")
TECHNIQUE_SETS = int(os.environ.get("I2V_LAB_EXAMPLES", "4"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks so small that the tiny model has many of them, some with both timesteps, some that end early."""
    monkeypatch.setattr(chunked_transformer, "CHUNK_TOKENS", 20)
    monkeypatch.setattr(chunked_transformer, "SMALL_TOKENS", 0)
    monkeypatch.setattr(chunked_transformer, "MODULATION_ROWS", 20)
    monkeypatch.setattr(in_place_decode, "SLAB_FRAMES", 3)
    monkeypatch.setattr(in_place_decode, "BAND_BYTES", 2**17)


@pytest.fixture
def request_64(still) -> I2VRequest:
    return _request_64(still)


def _request_64(still) -> I2VRequest:
    return I2VRequest(image=str(still), prompt="waves", width=64, height=64, frames=9, fps=120, seed=3)


@pytest.fixture(scope="module")
def resident_frames(tiny, still) -> torch.Tensor:
    return _frames(TwoStagePipeline(tiny), _request_64(still))


@pytest.fixture(scope="module")
def latent() -> torch.Tensor:
    return torch.randn(1, 128, 4, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16()


def _ledger(weights, memory: str, **options) -> Ledger:
    return Ledger(weights, CPU, Quantization.FP8_CAST, TECHNIQUES[MemoryPolicy(memory)], **options)


def _frames(pipeline, request) -> torch.Tensor:
    with pipeline(request).video as chunks:
        return torch.cat(list(chunks))


def _denoised(weights, memory: str, latent: torch.Tensor, *, variant: str = "distilled") -> tuple[Latents, int]:
    """Latents of a short denoise stage from fixed contexts, and its peak in bytes."""
    request = I2VRequest(image="", width=128, height=64, frames=25, fps=120, variant=variant, memory=memory)
    generator = torch.Generator().manual_seed(1)
    contexts = [
        sampling.Contexts(*(torch.randn(1, 40, width, generator=generator).bfloat16() for width in (64, 32)))
        for _ in range(2)
    ]
    with torch.no_grad(), LiveStorageMeter() as meter:
        transformer = _ledger(weights, memory, with_lora=variant == "dev").transformer()
        still = latent[:, :, :1]
        sampling.set_still_tokens(transformer, still)
        if variant == "dev":
            denoise_fn = sampling.guided_denoise_fn(transformer, weights.architecture, *contexts)
        else:
            denoise_fn = sampling.unguided_denoise_fn(transformer, contexts[0])
        stage = sampling.Stage(request.shape, request.fps, still, torch.tensor([0.9, 0.0]))
        noiser = GaussianNoiser(generator=torch.Generator().manual_seed(2))
        meter.reset_peak()
        latents = sampling.denoise_stage(stage, denoise_fn, noiser, lambda *_: None)
    return latents, meter.peak_bytes()


@pytest.mark.parametrize("variant", ["distilled", "dev"])
def test_policies_give_the_same_latents_in_less_and_less_memory(tiny, latent, variant):
    peaks = []
    first, peak = _denoised(tiny, "resident", latent, variant=variant)
    for memory in ("lean", "streamed"):  # with guidance, which switches attention off, and with the LoRA, for dev
        peaks.append(peak)
        latents, peak = _denoised(tiny, memory, latent, variant=variant)
        assert torch.equal(latents.video, first.video)
        assert torch.equal(latents.audio, first.audio)
        assert peak < peaks[-1]


@pytest.mark.parametrize("tiling", [Tiling(64, 32, 16, 8), None])
def test_policies_decode_the_same_chunks(tiny, latent, tiling):
    seen = {}
    for memory in ("resident", "lean", "streamed"):
        decoder = _ledger(tiny, memory).video_decoder()
        with torch.no_grad():
            chunks = operations.decode_video(
                latent, decoder, tiling, torch.Generator(), TECHNIQUES[MemoryPolicy(memory)]
            )
            seen[memory] = list(chunks)
    for memory in ("lean", "streamed"):
        assert [len(chunk) for chunk in seen[memory]] == [len(chunk) for chunk in seen["resident"]]
        assert torch.equal(torch.cat(seen[memory]), torch.cat(seen["resident"]))


def test_a_streamed_generation_gives_the_same_frames_and_leaves_nothing(tiny, request_64, resident_frames):
    with PhaseProfiler("cpu") as profiler:
        streamed = _frames(TwoStagePipeline(tiny, sinks=[profiler]), replace(request_64, memory="streamed"))
        left = profiler.allocated_bytes()
    assert torch.equal(resident_frames, streamed)
    assert streamed.nbytes <= left <= streamed.nbytes + 1024  # ltx-core's cached grids of frequencies


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "gemma_embeddings_processor", "video_decoder"])
def test_a_streamed_component_holds_the_weights_of_one_block_during_its_call_and_of_none_between(tiny, component):
    with LiveStorageMeter() as meter:
        module = getattr(_ledger(tiny, "streamed"), component)()
        resident = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
        blocks = {name: module.get_submodule(name) for name in block_names(module)}
        assert blocks
        own = {}
        between = meter.allocated_bytes()
        for block in blocks.values():
            stream = next(m.weight_stream for m in module.modules() if "weight_stream" in vars(m))
            name = next(n for n in stream._loads if stream._model.get_submodule(n) is block)
            meter.reset_peak()
            stream._before_call(name, block, ())
            own[name] = sum(t.nbytes for t in block.parameters())
            assert meter.allocated_bytes() == between + own[name]
            largest = max(t.nbytes for t in block.parameters())
            assert meter.peak_bytes() <= between + own[name] + 2 * largest  # one on its way, in bfloat16
            stream._after_call(name, block, (), None)
            assert meter.allocated_bytes() == between
        assert between < resident + max(own.values())


def test_a_weight_file_removed_or_truncated_during_a_run_ends_it_and_frees_everything(tiny, request_64, tmp_path):
    for damage in (Path.unlink, lambda path: os.truncate(path, 4096)):
        checkpoint = tmp_path / "checkpoint.safetensors"
        shutil.copy(tiny.checkpoint, checkpoint)

        def after_a_step(event, damage=damage, checkpoint=checkpoint):
            if isinstance(event, StepEnded) and event.phase is Phase.DENOISE_STAGE_1 and event.step == 2:
                damage(checkpoint)

        with PhaseProfiler("cpu") as profiler:
            pipeline = TwoStagePipeline(replace(tiny, checkpoint=str(checkpoint)), sinks=[profiler, after_a_step])
            with pytest.raises(CheckpointError) as seen:
                pipeline(replace(request_64, memory="streamed"))
            assert seen.value.fields["path"] == str(checkpoint)
            del seen
            assert profiler.phases[-1].completed is False
            assert profiler.phases[-1].end_bytes < 2**18  # what the prompt and the still became; no weight


@settings(max_examples=TECHNIQUE_SETS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(st.sampled_from(sorted(RUNNER.techniques))))
def test_any_set_of_techniques_gives_the_same_frames(tiny, request_64, resident_frames, names):
    names |= {needed for technique, needed in NEEDS.items() if technique in names}
    pipeline = TwoStagePipeline(tiny, techniques=to_techniques(names))
    assert torch.equal(_frames(pipeline, request_64), resident_frames)


def test_a_technique_that_is_unknown_or_lacks_another_is_refused():
    for name in ("magic", "token_chunks"):
        with pytest.raises(InvalidRequest) as caught:
            to_techniques([name])
        assert caught.value.fields == {"technique": name}


@given(tokens=st.integers(1, 300), still=st.integers(0, 300), most=st.integers(1, 320))
def test_chunks_cover_all_tokens_in_nearly_equal_sizes_with_the_timesteps_of_each(tokens, still, most):
    bounds = (0, min(still, tokens), tokens)
    chunks = token_chunks.split_tokens(bounds, most)
    sizes = [chunk.last - chunk.first for chunk in chunks]
    assert len(chunks) == -(-tokens // most)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= most
    assert [chunk.first for chunk in chunks] == [0, *(chunk.last for chunk in chunks[:-1])]
    assert chunks[-1].last == tokens
    values = torch.tensor([[[2.0], [3.0]]])
    expected = torch.tensor([2.0] * bounds[1] + [3.0] * (tokens - bounds[1])).reshape(1, -1, 1)
    assert torch.equal(torch.cat([token_chunks.expanded(values, chunk) for chunk in chunks], dim=1), expected)
    ones = torch.ones(1, tokens, 1)
    for chunk in chunks:
        token_chunks.multiply_(ones[:, chunk.span], values, chunk)
    assert torch.equal(ones, expected)
    for chunk in chunks:
        token_chunks.add_(ones[:, chunk.span], values, chunk)
    assert torch.equal(ones, 2 * expected)


@pytest.mark.parametrize("offloaded", [0, 1, 3])
def test_blocks_are_offloaded_within_the_host_budget_and_the_others_are_loaded_at_every_call(offloaded):
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(3)))
    weights = {f"{index}.weight": torch.randn(8, 8) for index in range(3)}
    loaded = []

    def load(name):
        loaded.append(name)
        return {f"{name}.weight": weights[f"{name}.weight"].clone()}

    loads = {str(index): partial(load, str(index)) for index in range(3)}
    stream = WeightStream(model, loads, CPU, host_budget_bytes=256 * offloaded)  # 256 bytes a block
    x = torch.randn(2, 8)
    expected = x @ weights["0.weight"].T @ weights["1.weight"].T @ weights["2.weight"].T
    with torch.no_grad():
        passes = [model(x) for _ in range(3)]
    assert all(torch.equal(seen, expected) for seen in passes)
    assert [loaded.count(str(index)) for index in range(3)] == [1 if index < offloaded else 3 for index in range(3)]
    stream.close()
    assert not stream._host


@given(nbytes=st.integers(1, 40_000))
def test_page_locked_buffers_have_pages_of_their_own(nbytes):
    pages = [host_memory.own_pages(nbytes) for _ in range(3)]
    spans = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in pages)
    assert all(start % mmap.PAGESIZE == end % mmap.PAGESIZE == 0 for start, end in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(nbytes <= each.nbytes < nbytes + mmap.PAGESIZE for each in pages)


def test_blocks_are_loaded_at_every_call_where_page_locking_is_refused(monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(host_blocks, "PageLocked", refused)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    loaded = []

    def load():
        loaded.append(1)
        return {"0.weight": torch.eye(8)}

    stream = WeightStream(model, {"0": load}, CPU, host_budget_bytes=2**20)
    with torch.no_grad():
        assert torch.equal(model(model(torch.ones(1, 8))), torch.ones(1, 8))
    assert len(loaded) == 2
    stream.close()


def test_streamed_from_disk_host_memory_stays_under_the_weights_of_two_blocks_and_activations(tiny, request_64):
    peaks = {}
    for memory in ("lean", "streamed"):
        with PhaseProfiler("cpu") as profiler:
            _frames(TwoStagePipeline(tiny, sinks=[profiler]), replace(request_64, memory=memory))
        peaks[memory] = {phase.phase: phase.peak_bytes for phase in profiler.phases}
    for phase, component in (
        ("denoise_stage_1", "transformer"),
        ("denoise_stage_2", "transformer"),
        ("decode_video", "video_decoder"),
    ):
        module = getattr(_ledger(tiny, "lean"), component)()
        sizes = [_weight_bytes(module.get_submodule(name)) for name in block_names(module)]
        activations = peaks["lean"][phase] - _weight_bytes(module)
        others = _weight_bytes(module) - sum(sizes)  # of no block: they are there throughout
        assert peaks["streamed"][phase] <= activations + others + 2 * max(sizes)


def _weight_bytes(module: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def test_the_reader_gives_what_safetensors_gives(tiny):
    from safetensors import safe_open

    reader = SafetensorsReader()
    with safe_open(tiny.checkpoint, framework="pt") as file:
        keys = list(file.keys())
        assert sorted(reader.keys(tiny.checkpoint)) == sorted(keys)
        for key in keys[::50]:
            assert torch.equal(reader.tensor(tiny.checkpoint, key, CPU), file.get_tensor(key))


def test_several_timesteps_within_a_range_of_tokens_are_refused():
    timesteps = torch.tensor([0.0, 0.0, 1.0, 0.5]).reshape(1, 4, 1)
    with pytest.raises(ValueError, match="tokens 2 to 4 have several timesteps"):
        chunked_transformer._check_timesteps(timesteps, (0, 2, 4))
    chunked_transformer._check_timesteps(timesteps[:, :3], (0, 2, 3))


def test_the_auto_policy_must_be_resolved_before_the_run(tiny, request_64):
    with pytest.raises(InvalidRequest) as caught:
        TwoStagePipeline(tiny)(replace(request_64, memory="auto"))
    assert caught.value.fields == {"memory": "auto"}


def test_a_forecast_says_the_host_memory_that_streaming_needs(tiny, still):
    """The blocks of the components that are called more than once, each tensor in whole units of 256 bytes."""
    request = make_request("ltx-2.3-tiny", image=str(still), width=64, height=64, frames=9, fps=120, memory="streamed")
    forecast = forecast_request(request, "ltx-2.3-tiny")
    found = {record.component: record for record in forecast.records if isinstance(record, HostMemoryRecord)}
    ledger = Ledger(tiny, CPU, request.quantization, TECHNIQUES[MemoryPolicy.STREAMED])
    builders = {"transformer": ledger.transformer, "video_decoder": ledger.video_decoder}
    for name, build in builders.items():
        module = build()
        stream = next(part.weight_stream for part in module.modules() if "weight_stream" in vars(part))
        blocks = [list(load().values()) for load in stream._loads.values()]
        aligned = sum(-(-tensor.nbytes // 256) * 256 for block in blocks for tensor in block)
        largest = max(sum(tensor.nbytes for tensor in block) for block in blocks)
        assert (found[name].page_locked_bytes, found[name].pageable_bytes) == (aligned, largest)
    assert {name for name, record in found.items() if record.page_locked_bytes} == set(builders)
    assert forecast.page_locked_bytes == max(record.page_locked_bytes for record in found.values())
    assert forecast.pageable_bytes == max(record.pageable_bytes for record in found.values())
    without = replace(forecast, records=tuple(forecast.phases))
    assert (without.page_locked_bytes, without.pageable_bytes) == (0, 0)
