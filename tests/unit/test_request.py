"""Requests: every rule with its message, and the shapes that follow."""

from __future__ import annotations

import doctest
import importlib
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from ltx_core.model.video_vae import SpatialTilingConfig, TemporalTilingConfig
from ltx_core.model.video_vae.video_vae import split_temporal_latents
from ltx_core.types import VideoLatentShape, VideoPixelShape

from i2v_lab import errors
from i2v_lab.errors import I2VLabError, InvalidRequest
from i2v_lab.request import DecodeScope, I2VRequest, Quantization, Tiling, Variant

VALID = I2VRequest(image="still.png")

REQUESTS = st.builds(
    I2VRequest,
    image=st.just("still.png"),
    prompt=st.text(max_size=5),
    width=st.integers(1, 40).map(lambda n: n * 64),
    height=st.integers(1, 40).map(lambda n: n * 64),
    frames=st.integers(0, 40).map(lambda k: 8 * k + 1),
    fps=st.sampled_from([24.0, 25.0, 29.97, 30.0]),
    seed=st.integers(0, 2**63 - 1),
    variant=st.sampled_from(Variant),
    quantization=st.sampled_from(Quantization),
    decode_scope=st.sampled_from(DecodeScope),
    tiling=st.sampled_from([None, Tiling(), Tiling(64, 32, 16, 8)]),
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("height", 500, "height=500 is not a multiple of 64; use 448 or 512"),
        ("width", 1000, "width=1000 is not a multiple of 64; use 960 or 1024"),
        ("width", 32, "width=32 is not a multiple of 64; use 64"),
        ("width", 0, "width=0 is not a multiple of 64; use 64"),
        ("height", -64, "height=-64 is not a multiple of 64; use 64"),
        ("frames", 96, "frames=96 is not 8k+1; use 89 or 97"),
        ("frames", 0, "frames=0 is not 8k+1; use 1 or 9"),
        ("frames", -7, "frames=-7 is not 8k+1; use 1 or 9"),
        ("fps", 0.0, "fps=0.0 is not between 1 and 240; use 24 or 25"),
        ("fps", float("nan"), "fps=nan is not between 1 and 240; use 24 or 25"),
        ("seed", -1, "seed=-1 is not between 0 and 2**63-1; use a number such as 10"),
    ],
)
def test_a_broken_rule_gives_value_rule_and_remedy(field, value, message):
    with pytest.raises(InvalidRequest) as caught:
        replace(VALID, **{field: value})
    assert str(caught.value) == message
    assert field in caught.value.fields


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tile_px": 32}, "tile_px=32 is below the smallest tile; use 64 or more"),
        ({"tile_px": 100}, "tile_px=100 is not a multiple of 32; use 96 or 128"),
        ({"tile_overlap_px": 50}, "tile_overlap_px=50 is not a multiple of 32; use 32 or 64"),
        ({"tile_px": 64, "tile_overlap_px": 64}, "tile_overlap_px=64 is not smaller than tile_px=64; use 32 or less"),
        ({"tile_frames": 8}, "tile_frames=8 is below the smallest tile; use 16 or more"),
        ({"tile_frames": 20}, "tile_frames=20 is not a multiple of 8; use 16 or 24"),
        ({"tile_overlap_frames": 5}, "tile_overlap_frames=5 is not a multiple of 8; use 0 or 8"),
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


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 60), st.integers(0, 60))
def test_tiling_refuses_exactly_what_ltx_core_refuses(px, overlap_px, frames, overlap_frames):
    def accepted(make, *values):
        try:
            make(*values)
        except (ValueError, I2VLabError):
            return False
        return True

    theirs = accepted(SpatialTilingConfig, px, overlap_px) and accepted(TemporalTilingConfig, frames, overlap_frames)
    assert accepted(Tiling, px, overlap_px, frames, overlap_frames) == theirs


@given(st.integers(0, 60), st.integers(2, 15), st.integers(0, 14))
def test_chunks_are_the_temporal_tiles_of_ltx_core(k, size, overlap):
    assume(overlap < size)
    tiling = Tiling(tile_frames=8 * size, tile_overlap_frames=8 * overlap)
    assert tiling.chunks(8 * k + 1) == len(split_temporal_latents(size, overlap)(k + 1).starts)


@given(REQUESTS)
def test_requests_survive_json_and_pickle(request_):
    assert I2VRequest.from_json(request_.to_json()) == request_
    assert pickle.loads(pickle.dumps(request_)) == request_


@given(REQUESTS, REQUESTS)
def test_digests_are_equal_exactly_for_equal_requests(one, other):
    assert one.digest() == replace(one).digest()
    assert (one.digest() == other.digest()) == (one == other)


def test_the_still_counts_by_its_content(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (replace(VALID, image=str(tmp_path / name)).digest() for name in "abc")
    assert a == b != c


@given(REQUESTS, st.sampled_from([1, 2]))
def test_shapes_are_those_of_ltx_core(request_, stage):
    shape = request_.stage_shape(stage)
    factor = 2 if stage == 1 else 1
    assert shape == (request_.frames, request_.height // factor, request_.width // factor)
    theirs = VideoLatentShape.from_pixel_shape(VideoPixelShape(1, *shape, 24.0))
    assert shape.latent() == (theirs.frames, theirs.height, theirs.width)
    assert shape.latent().tokens == theirs.token_count()


def test_frame_rates_are_exact():
    rates = {fps: str(replace(VALID, fps=fps).frame_rate) for fps in (24.0, 25.0, 29.97, 23.976, 59.94, 12.5)}
    assert rates == {
        24.0: "24",
        25.0: "25",
        29.97: "30000/1001",
        23.976: "24000/1001",
        59.94: "60000/1001",
        12.5: "25/2",
    }


@pytest.mark.parametrize(
    "kind", [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, I2VLabError)]
)
def test_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("value, rule; remedy", value=3)))
    assert (type(error), str(error), error.fields) == (kind, "value, rule; remedy", {"value": 3})
    assert error.exit_status in (1, 2)


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "events",
        "request",
        "units",
        "pipeline.architectures",
        "pipeline.synthetic",
        "profiling.autograd_graph",
        "profiling.live_storages",
        "profiling.module_paths",
        "profiling.phase_profiler",
        "profiling.records",
    ],
)
def test_the_examples_in_docstrings_are_true(module):
    with torch.enable_grad():
        result = doctest.testmod(
            importlib.import_module(f"i2v_lab.{module}"), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        )
    assert result.attempted > 0
    assert result.failed == 0
