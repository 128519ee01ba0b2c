"""Requests: every rule that needs no model, with its message; the shapes that follow are in ``test_sizes``."""

from __future__ import annotations

import json
import math
import pickle
import re
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ltx_core.model.video_vae import SpatialTilingConfig, TemporalTilingConfig

from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.memory_settings import MemorySettings
from i2v_lab.placement import Placement
from i2v_lab.request import DecodeScope, I2VRequest, Quantization, Tiling, Variant

VALID = I2VRequest(image="still.png")

SIZES = st.integers(1, 6)
TILINGS = st.builds(
    lambda px, overlap_px, frames, overlap: Tiling(
        32 * (px + 1), 32 * min(overlap_px, px), 8 * (frames + 1), 8 * min(overlap, frames)
    ),
    *[SIZES] * 4,
)
REQUESTS = st.builds(
    I2VRequest,
    image=st.sampled_from(["still.png", "other.png"]),
    prompt=st.text(max_size=5),
    negative_prompt=st.text(max_size=5),
    width=st.integers(1, 40).map(lambda n: n * 64),
    height=st.integers(1, 40).map(lambda n: n * 64),
    frames=st.integers(0, 40).map(lambda k: 8 * k + 1),
    fps=st.floats(1, 240),
    seed=st.integers(0, 2**63 - 1),
    variant=st.sampled_from(Variant),
    quantization=st.sampled_from(Quantization),
    decode_scope=st.sampled_from(DecodeScope),
    tiling=st.none() | TILINGS,
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 0, "width=0 is not above 0; use 1 or more"),
        ("height", -64, "height=-64 is not above 0; use 1 or more"),
        ("width", 64.0, "width=64.0 is not a whole number; use one"),
        ("height", "64", "height='64' is not a whole number; use one"),
        ("frames", 0, "frames=0 is not above 0; use 1 or more"),
        ("frames", -7, "frames=-7 is not above 0; use 1 or more"),
        ("frames", None, "frames=None is not a whole number; use one"),
        ("fps", 0.0, "fps=0.0 is not between 1 and 240; use 24 or 25"),
        ("fps", 0.999, "fps=0.999 is not between 1 and 240; use 24 or 25"),
        ("fps", 241, "fps=241.0 is not between 1 and 240; use 24 or 25"),
        ("fps", float("nan"), "fps=nan is not between 1 and 240; use 24 or 25"),
        ("fps", float("inf"), "fps=inf is not between 1 and 240; use 24 or 25"),
        ("fps", "fast", "fps='fast' is not a number; use 24 or 25"),
        ("fps", 10**400, f"fps={10**400} is not a number; use 24 or 25"),
        ("prompt", 5, "prompt=5 is not a text; put it in quotes"),
        ("negative_prompt", None, "negative_prompt=None is not a text; put it in quotes"),
        ("tiling", [], "tiling=[] is not a Tiling; use one, or None"),
        ("tiling", {"tile_px": 64}, "tiling={'tile_px': 64} is not a Tiling; use one, or None"),
        ("seed", -1, "seed=-1 is not between 0 and 2**63-1; use a number such as 10"),
        ("seed", 2**63, f"seed={2**63} is not between 0 and 2**63-1; use a number such as 10"),
        ("seed", 1.5, "seed=1.5 is not a whole number; use one"),
        ("variant", "fast", "variant='fast' is unknown; use distilled or dev"),
        ("quantization", "int4", "quantization='int4' is unknown; use fp8-cast or bf16"),
        ("decode_scope", None, "decode_scope=None is unknown; use no_grad or escaped or inference_mode"),
    ],
)
def test_a_broken_rule_gives_value_rule_and_remedy(field, value, message):
    with pytest.raises(InvalidRequest) as caught:
        replace(VALID, **{field: value})
    assert str(caught.value) == message
    assert list(caught.value.fields) == [field]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tile_px": 32}, "tile_px=32 is below the smallest tile; use 64 or more"),
        ({"tile_px": 100}, "tile_px=100 is not a multiple of 32; use 96 or 128"),
        ({"tile_px": 64.0}, "tile_px=64.0 is not a whole number; use one"),
        ({"tile_overlap_px": 50}, "tile_overlap_px=50 is not a multiple of 32; use 32 or 64"),
        ({"tile_overlap_px": -32}, "tile_overlap_px=-32 is negative; use 0 or more"),
        ({"tile_px": 64, "tile_overlap_px": 50}, "tile_overlap_px=50 is not a multiple of 32; use 32"),
        ({"tile_px": 64, "tile_overlap_px": 64}, "tile_overlap_px=64 is not smaller than tile_px=64; use 32 or less"),
        ({"tile_px": 64, "tile_overlap_px": 70}, "tile_overlap_px=70 is not smaller than tile_px=64; use 32 or less"),
        ({"tile_frames": 8}, "tile_frames=8 is below the smallest tile; use 16 or more"),
        ({"tile_frames": 20}, "tile_frames=20 is not a multiple of 8; use 16 or 24"),
        ({"tile_overlap_frames": 5}, "tile_overlap_frames=5 is not a multiple of 8; use 0 or 8"),
        ({"tile_overlap_frames": -8}, "tile_overlap_frames=-8 is negative; use 0 or more"),
        (
            {"tile_frames": 24, "tile_overlap_frames": 24},
            "tile_overlap_frames=24 is not smaller than tile_frames=24; use 16 or less",
        ),
    ],
)
def test_a_tile_that_ltx_core_refuses_is_refused_first(values, message):
    with pytest.raises(InvalidRequest) as caught:
        Tiling(**values)
    assert str(caught.value) == message
    assert set(caught.value.fields) <= set(values)


def _refusal(make, *values):
    try:
        make(*values)
    except InvalidRequest as error:
        return error
    except ValueError as error:
        return error
    return None


@given(st.integers(-100, 400), st.integers(-100, 400), st.integers(-30, 120), st.integers(-30, 120))
def test_tiling_refuses_exactly_what_ltx_core_refuses(px, overlap_px, frames, overlap_frames):
    # ltx-core lets a negative overlap pass, with which tiles leave gaps that nothing decodes; we do not.
    theirs = _refusal(SpatialTilingConfig, px, overlap_px) or _refusal(TemporalTilingConfig, frames, overlap_frames)
    refused = theirs is not None or overlap_px < 0 or overlap_frames < 0
    assert (_refusal(Tiling, px, overlap_px, frames, overlap_frames) is not None) == refused


@given(st.integers(2, 12), st.integers(0, 11), st.integers(2, 15), st.integers(0, 14))
def test_tiling_takes_all_that_ltx_core_takes(px, overlap_px, frames, overlap_frames):
    """The half of the rule that random numbers hardly ever meet."""
    values = (32 * px, 32 * overlap_px, 8 * frames, 8 * overlap_frames)
    assert (_refusal(Tiling, *values) is None) == (overlap_px < px and overlap_frames < frames)
    assert (_refusal(SpatialTilingConfig, *values[:2]) is None) == (overlap_px < px)
    assert (_refusal(TemporalTilingConfig, *values[2:]) is None) == (overlap_frames < frames)


def _remedies(error: InvalidRequest) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(error).split("; use ")[1])]


@given(st.integers(-100, 400), st.integers(-100, 400), st.sampled_from(["px", "frames"]))
def test_what_a_refused_tiling_is_told_to_use_is_valid(size, overlap, axis):
    names = (f"tile_{axis}", f"tile_overlap_{axis}")
    error = _refusal(lambda: Tiling(**dict(zip(names, (size, overlap), strict=True))))
    assume(error is not None)
    broken = str(error).split("=")[0]
    for remedy in _remedies(error):
        # The overlap is looked at when the tile is right, so a tile's remedy stands for itself.
        Tiling(**({names[0]: remedy, names[1]: 0} if broken == names[0] else {names[0]: size, names[1]: remedy}))


@given(REQUESTS)
def test_requests_survive_json_and_pickle(request_):
    again = I2VRequest.from_json(json.loads(json.dumps(request_.to_json())))
    assert again == request_ == pickle.loads(pickle.dumps(request_))
    assert again.digest() == request_.digest()
    assert [type(getattr(again, f.name)) for f in fields(again)] == [
        type(getattr(request_, f.name)) for f in fields(again)
    ]


@given(REQUESTS, REQUESTS)
def test_digests_are_equal_exactly_for_equal_requests(one, other):
    assert one.digest() == replace(one).digest()
    assert (one.digest() == other.digest()) == (one == other)


def test_every_field_counts_in_the_digest():
    changed = {
        "image": "other.png",
        "prompt": "waves",
        "negative_prompt": "blurry",
        "width": 512,
        "height": 512,
        "frames": 9,
        "fps": 25.0,
        "seed": 11,
        "variant": Variant.DEV,
        "quantization": Quantization.BF16,
        "tiling": None,
        "decode_scope": DecodeScope.ESCAPED,
        "memory": MemoryPolicy.LEAN,
        "settings": MemorySettings(offload="model"),
        "steps": 4,
        "placement": Placement(),
    }
    assert changed.keys() == {f.name for f in fields(I2VRequest)}
    tilings = [Tiling(**{f.name: getattr(Tiling(), f.name) - 32}) for f in fields(Tiling) if "overlap" not in f.name]
    tilings += [Tiling(**{f.name: 0}) for f in fields(Tiling) if "overlap" in f.name]
    variations = [replace(VALID, **{name: value}) for name, value in changed.items()]
    variations += [replace(VALID, tiling=tiling) for tiling in tilings]
    assert len({VALID.digest(), *(request_.digest() for request_ in variations)}) == len(changed) + 4 + 1


def test_the_digest_is_the_same_on_every_machine():
    assert VALID.digest() == "e100773db3794316"
    assert replace(VALID, image="/somewhere/else/still.png").digest() == VALID.digest()  # no such file: its name counts


def test_other_spellings_of_a_value_are_the_same_request():
    spelt = replace(
        VALID, width=np.int64(1024), fps=24, seed=np.uint8(10), variant="distilled", quantization="fp8-cast"
    )
    assert spelt == VALID
    assert spelt.digest() == VALID.digest()
    assert spelt.variant is Variant.DISTILLED  # the pipeline asks by identity
    assert type(spelt.width) is int


def test_json_of_a_later_version_is_read_and_bad_json_is_refused():
    assert I2VRequest.from_json({**VALID.to_json(), "colour": "red"}) == VALID
    for name, value in (("variant", "turbo"), ("height", -500)):
        with pytest.raises(InvalidRequest) as caught:
            I2VRequest.from_json({**VALID.to_json(), name: value})
        assert caught.value.fields == {name: value}


def test_the_still_counts_by_its_content(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (replace(VALID, image=str(tmp_path / name)).digest() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (24.0, "24"),
        (25.0, "25"),
        (30.0, "30"),
        (60.0, "60"),
        (240.0, "240"),
        (23.976, "24000/1001"),
        (23.98, "24000/1001"),
        (29.97, "30000/1001"),
        (59.94, "60000/1001"),
        (12.5, "25/2"),
        *((float(n), str(n)) for n in range(1, 13)),  # an integer is never a broadcast rate, however near
    ],
)
def test_frame_rates_are_exact(fps, rate):
    assert str(replace(VALID, fps=fps).frame_rate) == rate


@given(REQUESTS)
def test_the_frame_rate_is_what_was_asked_for(request_):
    assert math.isclose(request_.frame_rate, request_.fps, abs_tol=5e-3)
    assert request_.frame_rate.denominator <= 1001
