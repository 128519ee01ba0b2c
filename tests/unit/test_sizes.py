"""Sizes: which a model takes, with neighbours that are allowed, and the latent grid and tiles of ltx-core."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ltx_core.model.video_vae.video_vae import split_temporal_latents, split_with_symmetric_overlaps
from ltx_core.types import VIDEO_SCALE_FACTORS, VideoLatentShape, VideoPixelShape

from i2v_lab.errors import InvalidRequest
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.contract.sizes import SizeRule
from i2v_lab.pipeline.ltx2 import tiles
from i2v_lab.pipeline.ltx_video.sizes import stage_shape as ltxv_stage_shape
from i2v_lab.pipeline.registry import RUNNERS
from i2v_lab.request import I2VRequest, Tiling, VideoShape

VALID = I2VRequest(image="still.png")
RULES = sorted({runner.sizes for runner in RUNNERS.values()}, key=lambda rule: rule.pixel_multiple)
NAMES = ("width", "height", "frames")


def _check(rule: SizeRule, **changes: int) -> InvalidRequest | None:
    try:
        rule.check(replace(VALID, **changes))
    except InvalidRequest as error:
        return error
    return None


@st.composite
def rules(draw: st.DrawFn) -> SizeRule:
    """Rules of models that are not here: the smallest size is one that the multiple allows."""
    spatial, temporal = draw(st.integers(1, 64)), draw(st.integers(1, 16))
    multiple = spatial * draw(st.integers(1, 4))
    return SizeRule(
        pixel_multiple=multiple,
        min_pixels=multiple * draw(st.integers(1, 4)),
        frame_step=temporal * draw(st.integers(1, 3)),
        spatial_scale=spatial,
        temporal_scale=temporal,
    )


# --- What is refused ---


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("height", 500, "height=500 is not a multiple of 64; use 448 or 512"),
        ("width", 1000, "width=1000 is not a multiple of 64; use 960 or 1024"),
        ("width", 1088 + 32, "width=1120 is not a multiple of 64; use 1088 or 1152"),
        ("width", 32, "width=32 is not a multiple of 64; use 64"),
        ("width", 65, "width=65 is not a multiple of 64; use 64 or 128"),
        ("frames", 96, "frames=96 is not 8k+1; use 89 or 97"),
        ("frames", 8, "frames=8 is not 8k+1; use 1 or 9"),
        ("frames", 2, "frames=2 is not 8k+1; use 1 or 9"),
    ],
)
def test_a_size_of_ltx_2_that_is_refused_comes_with_rule_and_remedy(field, value, message):
    error = _check(tiles.SIZES, **{field: value})
    assert str(error) == message
    assert error.fields == {field: value}


@given(rules() | st.sampled_from(RULES), st.sampled_from(NAMES), st.integers(1, 10**6))
def test_exactly_the_multiples_from_the_smallest_on_are_taken(rule, field, value):
    allowed = dict.fromkeys(("width", "height"), rule.pixel_multiple * 99) | {"frames": 1}
    assert _check(rule, **allowed) is None
    if field == "frames":
        right = value % rule.frame_step == 1 % rule.frame_step
    else:
        right = value % rule.pixel_multiple == 0 and value >= rule.min_pixels
    error = _check(rule, **{**allowed, field: value})
    assert (error is None) is right
    assert right or error.fields == {field: value}


@given(rules() | st.sampled_from(RULES), st.sampled_from(NAMES), st.integers(1, 10**6))
def test_what_a_refused_request_is_told_to_use_is_valid_and_next_to_it(rule, field, value):
    allowed = dict.fromkeys(("width", "height"), rule.pixel_multiple * 99) | {"frames": 1}
    error = _check(rule, **{**allowed, field: value})
    assume(error is not None)
    step = rule.frame_step if field == "frames" else rule.pixel_multiple
    smallest = 1 if field == "frames" else rule.min_pixels
    said = str(error).split("; use ")[1]
    remedies = [int(number) for number in re.findall(r"\d+", said.replace("that", str(rule.min_pixels)))]
    assert remedies
    for remedy in remedies:
        assert _check(rule, **{**allowed, field: remedy}) is None
        assert abs(remedy - value) < step or (value < smallest and remedy == smallest)


# --- What is listed ---


@given(rules() | st.sampled_from(RULES), st.integers(1, 32), st.integers(1, 32), st.integers(0, 3000))
def test_every_listed_size_is_allowed_and_no_height_is_left_out(rule, wide, high, most):
    listed = list(rule.sizes((wide, high), most))
    assert [height for _, height in listed] == [n for n in range(most + 1) if _check_height(rule, n)]
    for width, height in listed:
        assert _check(rule, width=width, height=height, frames=1) is None
        exact = height * wide / high
        assert abs(width - exact) <= rule.pixel_multiple / 2 or width == rule.min_pixels > exact


def _check_height(rule: SizeRule, height: int) -> bool:
    return height >= rule.min_pixels and height % rule.pixel_multiple == 0


@given(rules() | st.sampled_from(RULES), st.integers(0, 500))
def test_every_number_of_frames_up_to_a_limit_is_listed(rule, most):
    size = {"width": rule.min_pixels, "height": rule.min_pixels}
    assert list(rule.frame_counts(most)) == [n for n in range(1, most + 1) if _check(rule, **size, frames=n) is None]


def test_each_runner_has_sizes_of_its_own():
    assert {name: (runner.sizes.pixel_multiple, runner.sizes.min_pixels) for name, runner in RUNNERS.items()} == {
        "ltx-2": (64, 64),
        "ltx-pipelines": (64, 64),
        "ltx-video": (32, 64),
        "diffusers": (64, 64),
    }


# --- The latent grid ---


@given(rules() | st.sampled_from(RULES), st.data())
def test_an_allowed_size_loses_nothing_on_the_way_to_its_latent(rule, data):
    shape = VideoShape(
        data.draw(st.sampled_from(rule.frame_counts(200))),
        *(rule.min_pixels + rule.pixel_multiple * data.draw(st.integers(0, 30)) for _ in range(2)),
    )
    latent = rule.latent(shape)
    assert (latent.frames - 1) * rule.temporal_scale + 1 == shape.frames
    assert (latent.height * rule.spatial_scale, latent.width * rule.spatial_scale) == shape[1:]
    assert latent.tokens == latent.frames * latent.height * latent.width > 0


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.sampled_from([1, 2]))
def test_shapes_of_ltx_2_are_those_of_ltx_core(rows, columns, k, stage):
    request = replace(VALID, width=64 * columns, height=64 * rows, frames=8 * k + 1)
    tiles.SIZES.check(request)
    shape = tiles.stage_shape(request, stage)
    factor = 2 if stage == 1 else 1
    assert shape == (request.frames, request.height // factor, request.width // factor)
    theirs = VideoLatentShape.from_pixel_shape(VideoPixelShape(1, *shape, 24.0))
    assert tiles.SIZES.latent(shape) == (theirs.frames, theirs.height, theirs.width)
    assert tiles.SIZES.latent(shape).tokens == theirs.token_count()
    assert theirs.upscale()[2:] == shape  # nothing is cut off on the way to the latent


def test_scales_of_ltx_2_are_those_of_ltx_core():
    scales = (tiles.SIZES.temporal_scale, tiles.SIZES.spatial_scale, tiles.SIZES.spatial_scale)
    assert scales == tuple(VIDEO_SCALE_FACTORS)


@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 20))
def test_both_stages_of_ltx_video_are_whole_latents_and_the_second_is_twice_the_first(rows, columns, k):
    request = replace(VALID, width=32 * columns, height=32 * rows, frames=8 * k + 1)
    architecture = load_architecture("ltxv-tiny")
    first, second = (ltxv_stage_shape(architecture, request, stage) for stage in (1, 2))
    assert second == (first.frames, 2 * first.height, 2 * first.width)
    assert first.frames == request.frames
    assert first.height % 32 == first.width % 32 == 0


# --- Temporal tiles ---


@given(st.integers(0, 60), st.integers(2, 15), st.integers(0, 14))
def test_chunks_are_the_temporal_tiles_of_ltx_core(k, size, overlap):
    assume(overlap < size)
    request = replace(VALID, frames=8 * k + 1, tiling=Tiling(tile_frames=8 * size, tile_overlap_frames=8 * overlap))
    theirs = split_temporal_latents(size, overlap)(k + 1)
    assert tiles.chunk_count(request) == len(theirs.starts)
    assert len(set(zip(theirs.starts, theirs.ends, strict=True))) == len(theirs.starts)  # each tile a group of its own
    assert tiles.chunk_count(request) == len(split_with_symmetric_overlaps(size, overlap)(k + 1).starts)
    assert tiles.chunk_count(request) == len(tiles.tile_grid(request).groups)


def test_chunks_without_tiling_are_one():
    assert tiles.chunk_count(replace(VALID, tiling=None)) == 1
    assert tiles.chunk_count(replace(VALID, frames=97, tiling=Tiling(tile_frames=32, tile_overlap_frames=8))) == 4
