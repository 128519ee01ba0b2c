"""``--memory auto``: the fastest placement within what a card has free, or the largest request that fits."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i2v_lab.capacity import placement
from i2v_lab.capacity.candidates import UNSPLIT
from i2v_lab.capacity.cards import context_bytes
from i2v_lab.capacity.device_profile import device_profile
from i2v_lab.capacity.placement import Budgets, Resolution, needed_bytes, resolve_memory
from i2v_lab.capacity.solver import Fixed
from i2v_lab.capacity.this_machine import available_memory, memory_budget_bytes, room_bytes
from i2v_lab.capacity.time_model import predicted_seconds
from i2v_lab.errors import DeviceUnavailable
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy, Technique
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx2.memory.blocks import block_counts
from i2v_lab.placement import STREAMED_COMPONENTS, Placement
from i2v_lab.profiling.meters import nvml
from i2v_lab.profiling.records import CostRecord, DeviceRecord, Forecast, HostMemoryRecord, PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import SMALL_MODEL, make_request


@pytest.fixture(scope="module")
def asked(still):
    return make_request(SMALL_MODEL, image=str(still), width=64, height=64, frames=9, fps=120, memory="auto")


@pytest.fixture(scope="module")
def tried() -> list[str]:
    return []


@pytest.fixture(scope="module")
def budgets(asked, tried):
    return Budgets(asked, SMALL_MODEL, on_forecast=lambda request, *_: tried.append(request.placed.policy))


def peaks_of(forecast: Forecast) -> dict[str, int]:
    return {phase.phase: phase.peak_bytes for phase in forecast.phases}


def test_every_budget_is_solved_from_three_forecasts_and_time_does_not_rise_with_it(budgets, tried, asked):
    """The seconds of what was chosen are those of the fastest that fits, and so of all smaller budgets at most."""
    refused = budgets.resolve(2**20)
    least = refused.fields["needed_bytes"]
    assert isinstance(budgets.resolve(least - 1), DeviceUnavailable)
    most = needed_bytes(forecast_request(replace(asked, memory="resident"), SMALL_MODEL).peak.peak_bytes, 800 * 2**20)
    seconds = float("inf")
    for budget in range(least, most, (most - least) // 40):
        found = budgets.resolve(budget)
        assert needed_bytes(found.forecast.peak.peak_bytes, found.forecast.context_bytes) <= budget
        assert found.seconds <= seconds
        assert found.cheaper is None or found.cheaper.peak_bytes < found.forecast.peak.peak_bytes
        assert found.cheaper is None or found.cheaper.seconds >= found.seconds
        assert found.faster is None or (found.faster.memory_bytes > budget and found.faster.seconds < found.seconds)
        seconds = found.seconds
    assert tried == [MemoryPolicy.STREAMED, MemoryPolicy.RESIDENT, MemoryPolicy.LEAN]
    largest = budgets.resolve(2**45)
    assert largest.faster is None
    assert largest.seconds == seconds
    assert not largest.components
    with pytest.raises(DeviceUnavailable) as caught:
        resolve_memory(asked, least - 1, SMALL_MODEL)
    assert caught.value.fields == {"needed_bytes": least, "memory_bytes": least - 1, "nearest": None}


@pytest.mark.parametrize(("device", "seeds"), [("cpu", [2]), ("cuda", [1, 3])])
def test_peaks_that_are_computed_are_those_of_a_forecast(device, seeds, asked):
    """Of placements at random: not below, but for ends of small segments, and above by a block of text at most."""
    counts = block_counts(load_architecture(SMALL_MODEL))
    for seed in seeds:
        rng = random.Random(seed)
        kept = {name: rng.choice([0, rng.randint(0, count - 1), count - 1]) for name, count in counts.items()}
        fixed = Fixed(techniques=TECHNIQUES[MemoryPolicy.STREAMED], resident_blocks=kept)
        found = Budgets(asked, SMALL_MODEL, device, fixed=fixed).resolve(2**45, explain=False)
        assert dict(found.request.placement.resident_blocks) == {name: count for name, count in kept.items() if count}
        forecast = forecast_request(found.request, SMALL_MODEL, device)
        for phase, peak in peaks_of(forecast).items():
            computed = peaks_of(found.forecast)[phase]
            assert peak * (0.999 if device == "cuda" else 1) <= computed <= 1.025 * peak, (seed, phase)
        assert found.computed_from
        device_rates = device_profile(found.gpu)
        seconds = [predicted_seconds(each, device_rates) for each in (forecast, found.forecast)]
        assert seconds[0] == pytest.approx(seconds[1], rel=0.03)
        assert found.seconds == pytest.approx(seconds[1], abs=0.35)


def test_a_card_whose_rates_are_not_known_is_replaced_and_another_is_named(asked):
    assert Budgets(asked, SMALL_MODEL, gpu="this CPU").resolve(2**45).gpu == "H100 80GB"
    assert Budgets(asked, SMALL_MODEL, gpu="NVIDIA GeForce RTX 4090").resolve(2**45).gpu == "NVIDIA GeForce RTX 4090"


def test_a_refusal_names_the_nearest_request_that_fits_and_means_the_same_by_it(asked, budgets):
    need = budgets.resolve(2**20).fields["needed_bytes"]
    larger = replace(asked, width=256, height=256)
    with pytest.raises(DeviceUnavailable) as refused:
        resolve_memory(larger, need, SMALL_MODEL, fixed=Fixed(tiling=True, chunk_tokens=8192))
    assert "\n" not in str(refused.value)
    assert refused.value.fields["needed_bytes"] > need
    nearest = I2VRequest.from_json(refused.value.fields["nearest"])
    assert (nearest.width, nearest.height) == (64, 64)
    assert isinstance(budgets.resolve(need), Resolution)


# --- The arithmetic of placements, over forecasts that are made up ---

BLOCK, CONTEXT = 400, 700
SIZES = {
    name: tuple(range(0, (count + 1) * BLOCK, BLOCK))
    for name, count in {
        "text_encoder": 49,
        "embeddings_processor": 18,
        "transformer": 56,
        "video_encoder": 2,
        "video_decoder": 2,
    }.items()
}


def made_up(request, model, device="cuda"):
    """Peaks as of a model whose activations and blocks have round numbers of bytes."""
    placed = request.placed
    streamed = {name for one in placed.techniques for name in STREAMED_COMPONENTS.get(one, ())}

    def held(name: str) -> int:  # the block that runs and those ahead, and what stays
        if name not in streamed:
            return SIZES[name][-1]
        running = BLOCK * (1 + placed.prefetch * (name in ("transformer", "video_decoder")))
        return min(SIZES[name][-1], SIZES[name][placed.resident(name)] + running)

    stays = SIZES["transformer"][placed.resident("transformer") if "transformer" in streamed else -1]
    chunk = (placed.chunk_tokens or 8192) if Technique.TOKEN_CHUNKS in placed.techniques else 40_000
    decode = request.tiling.tile_px * (2 if Technique.ROW_BANDS in placed.techniques else 5)
    peaks = {
        "encode_prompt": 900 + max(held("text_encoder"), held("embeddings_processor")),
        "encode_image": 100 + held("video_encoder"),
        "denoise_stage_1": chunk // 20 + held("transformer"),
        "upsample_latent": 300 + stays + held("video_encoder"),
        "denoise_stage_2": chunk // 8 + held("transformer"),
        "decode_audio": 100,
        "decode_video": decode + held("video_decoder"),
    }
    copies = [("copy to device, page-locked", "", 56, 0, 2**28)] if "transformer" in streamed else []
    costs = [CostRecord("denoise_stage_1", 1, (("pointwise", "bfloat16", 1000, 0, 2**30), *copies))]
    records = [
        PhaseRecord(n, None, stays * (n == "upsample_latent"), peak, 0, peak, 0, 0, 0.0, 0.1, True)
        for n, peak in peaks.items()
    ]
    hosts = [HostMemoryRecord("", name, 0, BLOCK, SIZES[name], 900 + held(name)) for name in streamed]
    return Forecast((*costs, *records, *hosts), context_bytes=CONTEXT, seconds=0.0)


def test_a_placement_stays_within_its_budget_and_holds_more_in_a_larger_one(monkeypatch):
    """Where all copies are hidden, what streams the least is taken."""
    monkeypatch.setattr(placement, "forecast_request", made_up)
    budgets = Budgets(I2VRequest(image="still.png"))
    least = budgets.resolve(1000).fields["needed_bytes"]
    assert isinstance(budgets.resolve(least - 1), DeviceUnavailable)
    before = None
    for budget in range(least, least + 32_000, 911):
        found = budgets.resolve(budget)
        assert needed_bytes(found.forecast.peak.peak_bytes, CONTEXT) <= budget
        real, computed = peaks_of(made_up(found.request, "", "cuda")), peaks_of(found.forecast)
        assert all(computed[phase] >= peak for phase, peak in real.items())
        own = computed["denoise_stage_2"] - real["denoise_stage_2"]
        assert 0 <= own <= UNSPLIT * SIZES["transformer"][found.request.placed.resident("transformer")]
        for one in found.components:  # nothing more would have stayed within it, but of the last, which are in flight
            last = one.component == "video_encoder" or one.blocks - one.resident_blocks <= 2
            assert last or one.next_bytes is None or one.next_bytes * (1 + UNSPLIT) >= one.free_bytes
        streamed = sum(one.streamed_bytes for one in found.components)
        assert before is None or streamed <= before
        before = streamed
    assert before == 0
    assert budgets.resolve(2**40).request.memory is MemoryPolicy.RESIDENT


def test_smaller_chunks_and_tiles_come_only_where_nothing_stays_and_what_is_fixed_is_kept(monkeypatch):
    monkeypatch.setattr(placement, "forecast_request", made_up)
    asked = I2VRequest(image="still.png")

    def solved(peak: int, **fixed) -> Placement:
        return resolve_memory(asked, needed_bytes(peak, CONTEXT), fixed=Fixed(**fixed)).request.placed

    assert (solved(1860).prefetch, solved(1860).chunk_tokens) == (1, None)
    assert (solved(1500).prefetch, solved(1500).chunk_tokens) == (1, 4096)  # faster than without any copy ahead
    assert (solved(1300).prefetch, solved(1300).chunk_tokens) == (1, 2048)
    assert (solved(1500, chunk_tokens=8192).prefetch, solved(1500, prefetch=1).chunk_tokens) == (0, 4096)
    tiles = resolve_memory(asked, needed_bytes(1500, CONTEXT)).request.tiling
    assert tiles.tile_px < 768
    kept = {"resident_blocks": {"transformer": 3}, "prefetch": 2, "chunk_tokens": 4096}
    chosen = solved(6000, **kept)
    assert (chosen.resident("transformer"), chosen.prefetch, chosen.chunk_tokens) == (3, 2, 4096)
    assert chosen.resident("text_encoder") > 0
    only = frozenset({Technique.TEXT_ONLY, Technique.STREAMED_TEXT})
    assert solved(10**5, techniques=only).techniques == only
    for fixed in ({"resident_blocks": {"transformer": 50}}, {"tiling": True}, {"techniques": only}):
        with pytest.raises(DeviceUnavailable):
            solved(1500, **fixed)


# --- The room on a card ---

SIZE = st.integers(0, 200 * 2**30)


@given(total=SIZE, free=SIZE, reserved=SIZE, allocated=SIZE, own=st.none() | SIZE, context=SIZE, limit=SIZE)
def test_the_room_is_never_more_than_is_free_or_held_nor_than_the_device_and_its_cap(
    total, free, reserved, allocated, own, context, limit
):
    held = {"reserved_bytes": reserved, "allocated_bytes": allocated, "own_bytes": own}
    room = room_bytes(total_bytes=total, free_bytes=free, context_bytes=context, limit_bytes=limit, **held)
    assert 0 <= room <= min(total, limit, free + max(reserved, own or 0))
    # What the allocator gets, after a run's context: never more than is free and what it has cached.
    assert room - context <= free + max(0, reserved - allocated)


def _record(total: int | None, used: int | None, own: int | None) -> DeviceRecord:
    return DeviceRecord(0.0, total, used, own, None, None, None, "")


GIB = 2**30


@pytest.mark.parametrize(
    ("free", "own", "reserved", "fraction", "room"),
    [
        (79, None, 0, 1.0, 79 * GIB),  # WSL: NVML lists nobody
        (9, None, 0, 1.0, 9 * GIB),  # a container: 70 GiB of processes in another PID namespace
        (9, 0, 0, 1.0, 9 * GIB),
        (9, 90, 0, 1.0, 9 * GIB + context_bytes()),  # a process elsewhere that has our number
        (40, 3, 3, 1.0, 43 * GIB),  # its own cached blocks, once
        (40, 3, 3, 0.25, 20 * GIB),
        (80, 3, 3, 1.0, 80 * GIB),
    ],
)
def test_the_room_is_what_the_driver_says_is_free_and_what_this_process_holds(
    monkeypatch, free, own, reserved, fraction, room
):
    record = _record(80 * GIB, (80 - free) * GIB, None if own is None else own * GIB)
    _fake_card(monkeypatch, record, lambda _: (free * GIB, 80 * GIB), reserved * GIB, fraction)
    assert available_memory("cuda") == ("this a card", room, "cuda")
    assert memory_budget_bytes("cuda", 2 * GIB) == min(room, 2 * GIB)


def test_where_cuda_does_not_say_what_is_free_nvml_does_and_else_the_device_is_refused(monkeypatch):
    def fails(_):
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    _fake_card(monkeypatch, _record(80 * GIB, 75 * GIB, None), fails)
    assert available_memory("cuda")[1] == 5 * GIB
    _fake_card(monkeypatch, _record(None, None, None), fails)
    with pytest.raises(DeviceUnavailable) as refused:
        available_memory("cuda")
    assert refused.value.fields == {"device": "cuda:0"}
    assert "\n" not in str(refused.value)


def _fake_card(monkeypatch, record, mem_get_info, reserved=0, fraction=1.0):
    parts = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda _: "a card",
        "get_device_properties": lambda _: SimpleNamespace(total_memory=80 * GIB),
        "mem_get_info": mem_get_info,
        "memory_reserved": lambda _: reserved,
        "memory_allocated": lambda _: 0,
        "get_per_process_memory_fraction": lambda _: fraction,
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(nvml, "card_index", lambda _: 0)
    monkeypatch.setattr(nvml, "read_device", lambda _: record)
