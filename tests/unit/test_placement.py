"""Placements: what stays on the device, and that a generation is the same whatever does."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import NEEDS, TECHNIQUES, MemoryPolicy, Technique
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx2 import RUNNER
from i2v_lab.pipeline.ltx2.memory import chunked_transformer
from i2v_lab.pipeline.ltx2.memory.blocks import BlockOrder, block_counts
from i2v_lab.pipeline.ltx2.memory.streaming import WeightStream
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.placement import STREAMED_COMPONENTS, Placement, placement_of
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import HostMemoryRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import SMALL_MODEL, RunSpec, make_request

STREAMED = TECHNIQUES[MemoryPolicy.STREAMED]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def always_chunked(monkeypatch):
    monkeypatch.setattr(chunked_transformer, "SMALL_TOKENS", 0)
    monkeypatch.setattr(chunked_transformer, "MODULATION_ROWS", 20)


@pytest.fixture
def request_64(still) -> I2VRequest:
    return make_request(SMALL_MODEL, image=str(still), prompt="waves", width=64, height=64, frames=9, fps=120, seed=3)


def random_placement(seed: int, counts: dict[str, int]) -> Placement:
    """Any techniques, as many blocks resident as there are or fewer, and any numbers."""
    rng = random.Random(seed)
    techniques = {technique for technique in sorted(RUNNER.techniques) if rng.random() < 0.75}
    techniques |= {NEEDS[technique] for technique in techniques if technique in NEEDS}
    resident = {
        component: rng.choice([0, rng.randint(0, counts[component]), counts[component]])
        for technique, components in STREAMED_COMPONENTS.items()
        if technique in techniques
        for component in components
    }
    numbers = {}
    if techniques & {Technique.STREAMED_TRANSFORMER, Technique.STREAMED_VAE}:
        numbers["prefetch"] = rng.choice([0, 1, 2, 5])
    choices = {
        Technique.TOKEN_CHUNKS: ("chunk_tokens", [7, 20, 500]),
        Technique.FEATURE_CHUNKS: ("feature_tokens", [96, 1024]),
        Technique.ROW_BANDS: ("band_bytes", [2**14, 2**17]),
    }
    numbers |= {name: rng.choice(values) for one, (name, values) in choices.items() if one in techniques}
    return Placement(techniques=frozenset(techniques), resident_blocks=resident, **numbers)


def generated(weights, request: I2VRequest) -> tuple[torch.Tensor, dict[str, int]]:
    """Frames of a generation, and the peak of each phase on the CPU."""
    frames = []
    with PhaseProfiler("cpu") as profiler:
        generation = TwoStagePipeline(weights, sinks=[profiler])(request)
        for chunk in generation.video:
            frames.append(chunk.numpy().copy())  # outside what is metered
            del chunk
    return torch.cat([torch.from_numpy(one) for one in frames]), {p.phase: p.peak_bytes for p in profiler.phases}


@pytest.mark.parametrize("seed", range(4))
def test_any_placement_gives_the_same_frames_in_the_bytes_of_its_forecast(tiny, request_64, seed, made):
    counts = block_counts(tiny.architecture)
    request = replace(request_64, placement=random_placement(seed, counts))
    frames, peaks = generated(tiny, request)
    assert torch.equal(frames, made)
    forecast = forecast_request(request, SMALL_MODEL, "cpu")
    assert {phase.phase: phase.peak_bytes for phase in forecast.phases} == peaks


@pytest.fixture(scope="module")
def made(tiny, still) -> torch.Tensor:
    request = make_request(
        SMALL_MODEL, image=str(still), prompt="waves", width=64, height=64, frames=9, fps=120, seed=3
    )
    return generated(tiny, request)[0]


def test_a_policy_is_a_placement_that_keeps_no_block_and_all_blocks_are_the_resident_component(request_64):
    """With a forecast for a card: the bytes of each phase."""

    def peaks(**changes) -> dict[str, int]:
        forecast = forecast_request(replace(request_64, **changes), SMALL_MODEL)
        return {phase.phase: phase.peak_bytes for phase in forecast.phases}

    counts = block_counts(load_architecture(SMALL_MODEL))
    for policy in (MemoryPolicy.RESIDENT, MemoryPolicy.LEAN, MemoryPolicy.STREAMED):
        assert placement_of(policy).policy is policy
    assert peaks(memory="streamed") == peaks(placement=placement_of(MemoryPolicy.STREAMED))
    everything = Placement(techniques=STREAMED, resident_blocks=counts)
    assert peaks(placement=everything) == peaks(memory="lean")
    assert everything.policy is None


def test_resident_blocks_add_their_own_bytes_to_the_phases_of_their_component(request_64):
    streamed = forecast_request(replace(request_64, memory="streamed"), SMALL_MODEL)
    own = {r.component: r.resident_bytes for r in streamed.records if isinstance(r, HostMemoryRecord)}
    counts = block_counts(load_architecture(SMALL_MODEL))
    assert {name: len(found) - 1 for name, found in own.items()} == counts
    assert all(list(found) == sorted(found) and found[0] == 0 for found in own.values())
    before = {phase.phase: phase for phase in streamed.phases}
    kept = Placement(techniques=STREAMED, resident_blocks={"transformer": 8})  # of 10, and no transformer block
    after = {phase.phase: phase for phase in forecast_request(replace(request_64, placement=kept), SMALL_MODEL).phases}
    added = after["upsample_latent"].start_bytes - before["upsample_latent"].start_bytes
    assert own["transformer"][8] <= added <= own["transformer"][8] + 8 * 12 * 512  # an allocation is rounded up
    assert after["encode_prompt"].peak_bytes == before["encode_prompt"].peak_bytes
    assert after["decode_video"].peak_bytes == before["decode_video"].peak_bytes


def test_blocks_that_stay_are_those_without_cover_and_then_evenly_spaced():
    order = BlockOrder(("a0", *(f"b{i}" for i in range(8)), "e"), ("a0",), ("e",))
    assert order.streamed(0) == list(order.names)
    assert order.resident(1) == {"a0"}
    assert order.resident(3) == {"a0", "b3", "b7"}
    assert order.resident(5) == {"a0", "b1", "b3", "b5", "b7"}
    assert order.resident(9) == set(order.names) - {"e"}
    assert order.streamed(10) == order.streamed(99) == []
    for count in range(11):
        assert len(order.resident(count)) == count


@pytest.mark.parametrize(("prefetch", "most"), [(0, 1), (1, 2), (3, 4)])
def test_streamed_blocks_on_the_device_are_the_one_that_runs_and_those_that_are_prefetched(prefetch, most):
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(6)))
    loads = {str(i): partial(lambda i: {f"{i}.weight": torch.eye(8) * (i + 1)}, i) for i in range(6) if i != 2}
    stream = WeightStream(model, loads, CPU, host_budget_bytes=2**20, prefetch=prefetch)
    seen, copies = [], []
    copy_to_device = stream._copy_to_device
    stream._copy_to_device = lambda name, copy: (copies.append(name), copy_to_device(name, copy))[1]
    model[2].weight = torch.nn.Parameter(torch.eye(8) * 3)
    for block in model:
        block.register_forward_pre_hook(lambda *_: seen.append(len(stream._in_flight)))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(torch.ones(1, 8)), torch.full((1, 8), 720.0))
    second = seen[6:]
    assert 1 + max(second) == most
    assert copies.count("0") == 1  # the first pass loads
    assert not stream._in_flight
    stream.close()


BAD = {
    "technique": ({"techniques": ["magic"]}, {"technique": "magic"}),
    "component": ({"techniques": STREAMED, "resident_blocks": {"vocoder": 1}}, {"component": "vocoder"}),
    "not streamed": ({"techniques": [], "resident_blocks": {"transformer": 1}}, {"component": "transformer"}),
    "negative": ({"techniques": STREAMED, "resident_blocks": {"transformer": -1}}, {"transformer": -1}),
    "bool": ({"techniques": STREAMED, "resident_blocks": {"transformer": True}}, {"transformer": True}),
    "no mapping": ({"techniques": STREAMED, "resident_blocks": 3}, {"resident_blocks": 3}),
    "prefetch alone": ({"techniques": [], "prefetch": 2}, {"prefetch": 2}),
    "prefetch": ({"techniques": STREAMED, "prefetch": 65}, {"prefetch": 65}),
    "prefetch bool": ({"techniques": STREAMED, "prefetch": True}, {"prefetch": True}),
    "chunk alone": ({"techniques": [], "chunk_tokens": 64}, {"chunk_tokens": 64}),
    "feature alone": ({"techniques": [], "feature_tokens": 64}, {"feature_tokens": 64}),
    "bands alone": ({"techniques": [], "band_bytes": 64}, {"band_bytes": 64}),
    "chunk": ({"techniques": STREAMED, "chunk_tokens": 0}, {"chunk_tokens": 0}),
    "feature": ({"techniques": STREAMED, "feature_tokens": 100}, {"feature_tokens": 100}),
    "chunk text": ({"techniques": STREAMED, "chunk_tokens": "8"}, {"chunk_tokens": "8"}),
    "unknown": ({"blocks": 1}, {"placement": {"blocks": 1}}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_placement_that_cannot_be_is_refused_with_its_value(name):
    values, fields = BAD[name]
    with pytest.raises(InvalidRequest) as caught:
        Placement.from_json(values)
    assert caught.value.fields == fields
    assert pickle.loads(pickle.dumps(caught.value)).fields == fields
    assert "\n" not in str(caught.value)


def test_a_placement_survives_json_in_a_request_and_in_a_run(request_64):
    placement = Placement(
        techniques=STREAMED, resident_blocks={"transformer": 3, "video_decoder": 0}, prefetch=2, chunk_tokens=64
    )
    request = replace(request_64, placement=placement)
    assert I2VRequest.from_json(request.to_json()) == request
    spec = RunSpec(request=request, model=SMALL_MODEL)
    assert RunSpec.from_json(spec.to_json()) == spec
    assert spec.techniques == STREAMED
    assert spec.name.endswith("streamed_transformer3_prefetch2_chunk-tokens64")
    assert spec.policy is None
    assert spec.memory_key() != RunSpec(request=replace(request_64, memory="streamed"), model=SMALL_MODEL).memory_key()
    assert spec.with_request(placement=None).techniques == frozenset()


def test_a_placement_that_a_run_cannot_honour_is_refused(request_64):
    kept = Placement(techniques=STREAMED, resident_blocks={"transformer": 11})
    with pytest.raises(InvalidRequest) as caught:
        RunSpec(request=replace(request_64, placement=kept), model=SMALL_MODEL)
    assert caught.value.fields == {"transformer": 11}
    for model, runner in (("ltxv-tiny", ""), (SMALL_MODEL, "ltx-pipelines")):
        request = make_request(model, image=request_64.image, frames=9, placement=Placement())
        with pytest.raises(InvalidRequest) as caught:
            RunSpec(request=request, model=model, runner=runner)
        assert caught.value.fields == {"placement": Placement().to_json()}
    with pytest.raises(InvalidRequest) as caught:
        replace(request_64, placement=kept, memory="lean")
    assert caught.value.fields["memory"] == "lean"
    with pytest.raises(InvalidRequest) as caught:
        RunSpec(request=replace(request_64, placement=Placement()), model=SMALL_MODEL, techniques=["text_only"])
    assert caught.value.fields["techniques"] == ["text_only"]
