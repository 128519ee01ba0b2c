"""What each study makes of its runs: geometry, tables, and verdicts that follow from the figures."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltx_core.model.video_vae.tiling import SpatialTilingConfig, TemporalTilingConfig, TilingConfig
from ltx_core.model.video_vae.video_vae import VideoDecoder

from i2v_lab.capacity.device_profile import device_profile
from i2v_lab.capacity.time_model import predicted_seconds
from i2v_lab.errors import InvalidRequest, UnknownModel
from i2v_lab.pipeline.ltx2.tiles import SIZES, tile_grid
from i2v_lab.profiling.records import (
    CostRecord,
    Forecast,
    GenerationRecord,
    GraphRecord,
    OutOfMemoryRecord,
    PhaseRecord,
    Record,
    TimelineRecord,
)
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.runs.sources import Observation, Source, as_run, phases_frame, runs_frame
from i2v_lab.runs.spec import Consumer, RunSpec
from i2v_lab.runs.store import Run
from i2v_lab.studies import card_map, leak, localization, no_grad, resolution, tiling
from i2v_lab.studies.first_look import first_look_verdict
from i2v_lab.studies.published import (
    beside_published,
    citation,
    published,
    published_runs,
    to_size,
    to_tiling,
    varied,
)
from i2v_lab.studies.times import time_heading, timed

GIB = 2**30
REQUEST = I2VRequest(image="still.png", width=1024, height=768, frames=97)


def seen(spec: RunSpec, *records: Record, status: str = "complete", **peaks: float) -> Observation:
    """An observation whose phases have these peaks, in GiB."""
    phases = [
        PhaseRecord(name, None, 0, round(p * GIB), 0, round(p * GIB), round(p * GIB), 0, float(i), 1.0, True)
        for i, (name, p) in enumerate(peaks.items())
    ]
    metadata = {"device": "cuda", "device_name": "a card", "model": spec.model}
    return Observation(spec, Source.MEASURE, Run(Path("x"), metadata, (*phases, *records), status))


def unseen(spec: RunSpec) -> Observation:
    return Observation(spec, Source.RECORDED, None)


# --- Tiling ---

decoder_sizes = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(
    width=decoder_sizes,
    height=decoder_sizes,
    latent_frames=st.integers(1, 20),
    px=st.sampled_from([64, 96, 128, 384, 768]),
    over_px=st.sampled_from([0, 32, 64]),
    frames=st.sampled_from([16, 24, 32, 80]),
    over_frames=st.sampled_from([0, 8, 16]),
)
def test_tiles_lie_where_the_decoder_of_ltx_core_puts_them(
    width, height, latent_frames, px, over_px, frames, over_frames
):
    chosen = Tiling(px, min(over_px, px - 32), frames, min(over_frames, frames - 8))
    request = I2VRequest(image="x", width=width * 64, height=height * 64, frames=latent_frames * 8 - 7, tiling=chosen)
    config = TilingConfig(
        SpatialTilingConfig(chosen.tile_px, chosen.tile_overlap_px),
        TemporalTilingConfig(chosen.tile_frames, chosen.tile_overlap_frames),
    )
    decoder = object.__new__(VideoDecoder)
    torch.nn.Module.__init__(decoder)
    latent = SIZES.latent(request.shape)
    empty = torch.empty(1, 128, latent.frames, latent.height, latent.width, device="meta")
    decoder.video_downscale_factors = VideoDecoder.__init__.__globals__["SpatioTemporalScaleFactors"](8, 32, 32)
    theirs = {
        tuple((axis.start, axis.stop) for axis in tile.out_coords[2:]) for tile in decoder._prepare_tiles(empty, config)
    }
    grid = tile_grid(request)
    assert theirs == {(g, r, c) for g in grid.groups for r in grid.rows for c in grid.columns}
    assert grid.tiles == len(theirs)
    assert grid.voxels == sum((a[1] - a[0]) * (b[1] - b[0]) * (c[1] - c[0]) for a, b, c in theirs)


def test_without_tiling_there_is_one_tile_and_every_voxel_is_decoded_once():
    grid = tile_grid(I2VRequest(image="x", width=1024, height=768, frames=97, tiling=None))
    assert (grid.tiles, grid.voxels) == (1, 1024 * 768 * 97)


def _tilings(*peaks: tuple[float, float]) -> list[Observation]:
    chosen = [Tiling(768, 64, 80, 24), Tiling(512, 64, 64, 24), Tiling(384, 64, 32, 8)][: len(peaks)]
    specs = tiling.tiling_specs(REQUEST, "ltx-2.3-22b", chosen)
    return [
        seen(each, decode_video=peak) for each, peak in zip(specs, [p for pair in peaks for p in pair], strict=True)
    ]


@pytest.mark.parametrize(
    ("peaks", "verdict"),
    [
        ([(102, 4.9), (150, 3.0), (186, 2.0)], "refined"),  # it rises
        ([(100, 5), (105, 3), (109, 2)], "confirmed"),
        ([(100, 5), (95, 3), (91, 2)], "confirmed"),
        ([(100, 5), (80, 3), (60, 2)], "refuted"),
        ([(100, 5)], "no data"),
    ],
)
def test_the_verdict_on_tiling_follows_from_the_change_of_the_peak(peaks, verdict):
    results = tiling.tiling_verdict(_tilings(*peaks))
    assert results["verdict"] == verdict
    if len(peaks) > 1:
        assert results["retained_change"] == pytest.approx(peaks[-1][0] / peaks[0][0] - 1)


def test_tilings_stand_beside_the_published_ones():
    table = tiling.tiling_table(_tilings((102, 5), (150, 3), (186, 2)))
    first = table.iloc[0]
    assert (first["tiling"], first["tiles"]) == ("768 px, 80 frames, overlap 64, 24", 8)
    assert first["voxel_ratio"] == pytest.approx(1088 * 832 * 122 / (1024 * 768 * 97))
    assert first["published_bytes"] == round(83.51 * GIB)
    assert table.iloc[4]["published_outcome"] == "out of memory"
    assert table["published_end"][4] == "out of memory: another process held a part of the card"
    assert table["published_end"][0] == "complete"
    assert table["decode_seconds"].to_list() == [1.0] * 6
    assert table[table["tiling"] == "512 px, 64 frames, overlap 64, 24"]["published_bytes"].isna().all()


def test_a_run_that_ends_on_a_card_hides_what_it_did_not_reach():
    spec = tiling.tiling_specs(REQUEST, "ltx-2.3-22b", [Tiling()])[0]
    moments = [
        TimelineRecord("decode_video", float(i), GIB, gib * GIB, 0, 0) for i, gib in enumerate((10, 80, 60, 180))
    ]
    found = tiling.hidden_demand([seen(spec, *moments, decode_video=181)], 95 * GIB).iloc[0]
    assert found["fails"]
    assert [found[f"{name}_bytes"] / GIB for name in ("demanded", "reached", "hidden")] == [181, 81, 100]
    found = tiling.hidden_demand([seen(spec, *moments, decode_video=181)], 200 * GIB).iloc[0]
    assert (found["fails"], found["hidden_bytes"]) == (False, 0)
    assert tiling.hidden_demand([seen(spec, decode_video=181)], 95 * GIB).empty  # CUDA has no timeline


# --- Localization, the fix ---


def _scopes(escaped: dict[str, float], fixed: dict[str, float]) -> list[Observation]:
    before, after = localization.scope_specs(REQUEST, "ltx-2.3-22b")
    return [seen(before, **escaped), seen(after, **fixed)]


@pytest.mark.parametrize(
    ("escaped", "fixed", "verdict", "fix"),
    [
        ((20, 100), (20, 5), "confirmed", "confirmed"),
        ((20, 39), (20, 5), "confirmed", "refined"),  # not halved
        ((21, 100), (20, 5), "refined", "refined"),  # another phase differs too
        ((60, 50), (60, 5), "confirmed", "refined"),  # the peak is elsewhere
        ((20, 5), (20, 5), "refuted", "refuted"),
    ],
)
def test_the_verdicts_on_the_peaks_place_and_on_the_fix(escaped, fixed, verdict, fix):
    names = ("encode_prompt", "decode_video")
    found = _scopes(dict(zip(names, escaped, strict=True)), dict(zip(names, fixed, strict=True)))
    assert localization.localization_verdict(found)["verdict"] == verdict
    assert no_grad.fix_verdict(found, True, "refused")["verdict"] == fix
    assert no_grad.fix_verdict(found, False, "refused")["verdict"] == "refuted"
    if fix == "confirmed":
        assert no_grad.fix_verdict(found, True, "")["verdict"] == "refined"  # inference_mode was not refused


def test_the_named_results_of_the_fix_are_exact():
    found = _scopes({"encode_prompt": 20, "decode_video": 100}, {"encode_prompt": 20, "decode_video": 5})
    results = no_grad.fix_verdict(found, True, "refused")
    assert results["escaped_peak_bytes"] == 100 * GIB
    assert results["no_grad_peak_bytes"] == 20 * GIB
    assert (results["peak_ratio"], results["decode_peak_ratio"]) == (5, 20)
    assert (results["excess_bytes"], results["excess_phase"]) == (95 * GIB, "decode_video")
    assert results["device"] == "a card"
    assert "20.00 GiB instead of 100.00 GiB, 5.00 times less" in results["finding"]


def test_the_gap_the_floor_and_the_boundaries():
    found = _scopes({"encode_prompt": 20, "decode_video": 100}, {"encode_prompt": 20, "decode_video": 5})
    gap = localization.gap_table(found).set_index("decode_scope")
    assert gap["gap_bytes"].to_dict() == {"escaped": 80 * GIB, "no_grad": 0}
    assert gap["published_whole_bytes"].to_dict() == {"escaped": round(83.51 * GIB), "no_grad": round(29.51 * GIB)}
    assert gap[["inside_seconds", "whole_seconds"]].loc["escaped"].to_list() == [1.0, 2.0]
    assert localization.floor_table(found)["phase"].to_list() == ["encode_prompt", "decode_video"]
    assert localization.floor_table(found)["seconds"].to_list() == [1.0, 1.0]
    by_phase = no_grad.peaks_by_phase(found)
    assert by_phase.columns.to_list() == [
        "phase",
        "escaped_bytes",
        "no_grad_bytes",
        "escaped_seconds",
        "no_grad_seconds",
    ]
    assert by_phase["phase"].to_list() == ["encode_prompt", "decode_video"]
    assert by_phase["no_grad_seconds"].to_list() == [1.0, 1.0]
    boundaries = localization.boundaries_table(found)
    assert boundaries["published_so_far_bytes"].to_list()[1] == round(83.51 * GIB)
    assert boundaries["published_so_far_bytes"].isna().to_list() == [True, False, True, True]


def test_the_graph_is_rolled_up_by_module():
    before = localization.scope_specs(REQUEST, "ltx-2.3-22b")[0]
    graphs = [GraphRecord("decode_video", f"video_decoder.up_blocks.{i}.conv", 100 * i) for i in (1, 2)]
    graphs.append(GraphRecord("decode_video", "video_decoder.up_blocks.2.norm", 300))
    table = no_grad.graph_table([seen(before, *graphs, decode_video=1)])
    assert table["module"].to_list() == ["video_decoder.up_blocks.2", "video_decoder.up_blocks.1"]
    assert table["saved_bytes"].to_list() == [500, 100]


def _video(path: Path, last: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for value in (0, 100, last):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_the_digest_of_a_video_is_of_every_frame(tmp_path):
    one, same, other = (_video(tmp_path / f"{i}.mp4", last) for i, last in enumerate((200, 200, 210)))
    assert no_grad.frames_digest(one) == no_grad.frames_digest(same) != no_grad.frames_digest(other)


# --- Resolution, leak, cards, first look ---


@pytest.mark.parametrize(
    ("small", "large", "verdict"),
    [((23, 5), (26, 8), "refined"), ((23, 5), (26, 5.2), "confirmed"), ((23, 5), (40, 8), "refuted")],
)
def test_the_verdict_on_flatness_looks_at_the_decoder_too(small, large, verdict):
    specs = resolution.resolution_specs(REQUEST, "ltx-2.3-22b", ["1024x768", "2048x1536"])
    found = [
        seen(each, denoise_stage_2=peaks[0], decode_video=peaks[1])
        for each, peaks in zip(specs, (small, large), strict=True)
    ]
    results = resolution.flatness_verdict(found, [])
    assert results["verdict"] == verdict
    assert results["pixel_growth"] == 4
    assert resolution.flatness_table(found)["published_seconds"].to_list() == [135.2, 348]
    differences = resolution.published_difference_table(found)
    left = [round(theirs * GIB) - round(ours[0] * GIB) for theirs, ours in ((29.51, small), (33.55, large))]
    assert differences["difference_bytes"].to_list() == left
    deciding = resolution.deciding_table(found)
    assert deciding[deciding["decides"]]["phase"].to_list() == ["denoise_stage_2"] * 2


@pytest.mark.parametrize(
    ("consumed", "left_open", "verdict"),
    [
        ((0, 0), (90, 2), "refined"),  # only where streams are left open
        ((90, 0), (90, 2), "confirmed"),
        ((0, 0), (2, 2), "refuted"),
        ((90, 90), (90, 90), "refuted"),
    ],
)
def test_the_verdict_on_the_leak_is_of_the_growth(consumed, left_open, verdict):
    specs = leak.leak_specs(REQUEST, "ltx-2.3-22b", 2)
    growths = [*consumed, *left_open]
    found = [
        seen(each, *(GenerationRecord(n, (5 + n * growth) * GIB) for n in (1, 2)), encode_prompt=1)
        for each, growth in zip(specs, growths, strict=True)
    ]
    assert leak.leak_verdict(found)["verdict"] == verdict
    table = leak.leak_table(found)
    assert table["growth_bytes"].to_list()[:2] == [(5 + growths[0]) * GIB, growths[0] * GIB]
    assert (table["peak_bytes"][0], table["seconds"][0]) == (GIB, 1.0)
    rows = leak.growth_table(table).to_dict("records")
    assert [row["last_bytes"] for row in rows] == [(5 + 2 * growth) * GIB for growth in growths]
    assert {(row["generations"], row["first_peak_bytes"], row["seconds"]) for row in rows} == {(2, GIB, 1.0)}


def test_a_run_that_ended_early_for_want_of_memory_counts_with_what_it_left():
    specs = leak.leak_specs(REQUEST, "ltx-2.3-22b", 5)
    ends = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [3, 5, 7, 9, 11], [100]]  # GiB after each generation
    refused = OutOfMemoryRecord("decode_video", "decoder", 2**27, 137 * GIB, None, "CUDA out of memory")
    order = sorted(specs, key=lambda each: (each.consumer.value != "plain", each.request.decode_scope == "escaped"))
    found = [
        seen(each, *(GenerationRecord(n, left * GIB) for n, left in enumerate(lefts, 1)), encode_prompt=1)
        for each, lefts in zip(order, ends, strict=True)
    ]
    found[-1] = seen(order[-1], GenerationRecord(1, 100 * GIB), refused, status="failed", encode_prompt=1)
    results = leak.leak_verdict(found)
    assert results["verdict"] == "refined"
    assert results["open_escaped_growth_bytes"] == 100 * GIB
    assert results["open_no_grad_growth_bytes"] == 2 * GIB
    ended = "With the defect and with unfinished streams, generation 2 of 5 ran out of memory."
    assert results["finding"].endswith(ended)
    found[-1] = seen(order[-1], refused, status="failed", encode_prompt=1)
    assert leak.leak_verdict(found)["open_escaped_growth_bytes"] == 137 * GIB


def test_a_first_look_is_confirmed_while_little_is_left_between_phases():
    spec = RunSpec(request=REQUEST)
    assert first_look_verdict([seen(spec, encode_prompt=20, decode_video=5)])["verdict"] == "confirmed"
    left = PhaseRecord("decode_video", None, 2 * GIB, 5 * GIB, 0, None, 5 * GIB, 0, 9.0, 1.0, True)
    assert first_look_verdict([seen(spec, left, encode_prompt=20)])["verdict"] == "refuted"


def test_a_first_look_is_refined_where_the_transformer_alone_stays_between_the_stages():
    stays = [
        PhaseRecord(name, None, 18 * GIB, 19 * GIB, 18 * GIB, None, 19 * GIB, 0, 9.0, 1.0, True)
        for name in ("upsample_latent", "denoise_stage_2")
    ]
    results = first_look_verdict([seen(RunSpec(request=REQUEST), *stays, encode_prompt=20, decode_video=5)])
    assert results["verdict"] == "refined"
    assert (results["largest_between_bytes"], results["largest_elsewhere_bytes"]) == (18 * GIB, 0)
    assert "at most 18.00 GiB stay allocated (0 B without the transformer" in results["finding"]


def test_where_there_is_no_record_the_verdict_says_so_and_names_it():
    specs = tiling.tiling_specs(REQUEST, "ltx-2.3-22b", [Tiling(), None])
    absent = [unseen(each) for each in specs]
    fixes = [unseen(each) for each in no_grad.fix_specs(REQUEST, "ltx-2.3-22b")]
    leaks = [unseen(each) for each in leak.leak_specs(REQUEST, "ltx-2.3-22b", 3)]
    for results in (
        tiling.tiling_verdict(absent),
        localization.localization_verdict(fixes[:2]),
        no_grad.fix_verdict(fixes, True, "refused"),
        resolution.flatness_verdict(absent, []),
        leak.leak_verdict(leaks),
        first_look_verdict(absent[:1]),
        card_map.card_verdict(absent, card_map.card_table(absent), pd.DataFrame()),
    ):
        assert results["verdict"] == "no data"
        assert "data/measured has no record of 1024x768x97" in results["finding"]
    assert no_grad.fix_verdict(fixes, True, "")["escaped_peak_bytes"] is None
    for table in (tiling.tiling_table(absent), resolution.flatness_table(absent), leak.leak_table(leaks)):
        assert table.empty
    assert no_grad.peaks_by_phase(fixes).empty
    assert no_grad.graph_table(fixes).empty
    assert localization.gap_table(fixes[:2]).empty


# --- Times ---


def test_a_forecast_has_the_seconds_of_a_named_card_and_a_run_its_own():
    row = ("pointwise", "bfloat16", 1000, 0, 2 * GIB)
    phase = PhaseRecord("decode_video", None, 0, GIB, 0, GIB, GIB, 0, 0.0, 0.1, True)
    forecast, spec = Forecast((CostRecord("decode_video", 1, (row,)), phase), 0, 0.1), RunSpec(request=REQUEST)
    plain = [Observation(spec, Source.FORECAST, as_run(spec, forecast))]
    assert runs_frame(plain)["seconds"].isna().all()
    assert time_heading(plain) == "time"
    for gpu, words in (
        ("H200", "time, predicted for H200"),
        ("RTX 4090", "time, predicted for RTX 4090 by published rates"),
    ):
        on_card = timed(plain, gpu)
        seconds = predicted_seconds(forecast, device_profile(gpu))
        assert runs_frame(on_card)["seconds"][0] == phases_frame(on_card)["seconds"][0] == pytest.approx(seconds)
        assert time_heading(on_card) == words
        assert time_heading(on_card, device=False) == "time, predicted"
    measured = [seen(spec, decode_video=1), unseen(spec)]
    assert timed(measured) == measured
    assert time_heading(measured) == "time, measured on a card"
    assert time_heading(measured, device=False) == "time, measured"


# --- Published figures and parameters ---


def test_published_runs_are_each_there_once_and_join_only_what_they_are_about():
    runs = published_runs()
    assert len(runs) == 7
    assert (runs["published_outcome"] == "out of memory").sum() == 2
    same, other = RunSpec(request=REQUEST), RunSpec(request=I2VRequest(image="x", frames=25))
    tiny = RunSpec(request=REQUEST, model="ltx-2.3-tiny")
    guarded = RunSpec(request=REQUEST, consumer=Consumer.GUARDED)
    table = beside_published(runs_frame([seen(each, decode_video=1) for each in (same, other, tiny, guarded)]))
    assert table["published_bytes"].isna().to_list() == [False, True, True, True]


def test_the_published_study_is_cited_by_author_title_and_address():
    study = published()
    assert study["url"].startswith("https://dev.to/")
    assert citation() == (
        f"{study['author']}, [My high-res image-to-video kept OOMing - turns out I was decoding outside no_grad]"
        f"({study['url']}), DEV Community. Its set-up: {study['setup']}."
    )


def test_what_is_varied_is_given_or_the_models_own():
    assert varied("ltx-2.3-22b", "frames") == [25, 49, 97, 121]
    assert varied("ltx-2.3-22b", "frames", [9]) == [9]
    assert varied("wan-2.2-ti2v-5b", "frames") == [61, 121]
    with pytest.raises(UnknownModel) as unknown:
        varied("other", "frames")
    assert unknown.value.fields == {"model": "other"}
    assert to_size("1024x768") == (1024, 768)
    assert to_tiling("512/64/64/24") == Tiling(512, 64, 64, 24)
    assert to_tiling("none") is None
    for wrong in ("1024", "axb", "1x2x3"):
        with pytest.raises(InvalidRequest) as refused:
            to_size(wrong)
        assert refused.value.fields == {"size": wrong}
    for wrong in ("512", "a/b/c/d", "512/64/64"):
        with pytest.raises(InvalidRequest) as refused:
            to_tiling(wrong)
        assert refused.value.fields == {"tiling": wrong}
