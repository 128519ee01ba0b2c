"""Figures and tables say what their data say, the same data give the same file, and the README's are up to date."""

from __future__ import annotations

import base64
import re
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from i2v_lab.reporting.cells import NOTHING, Cells, absent, sentence
from i2v_lab.reporting.figures import studies as study_figures
from i2v_lab.reporting.figures import style
from i2v_lab.reporting.figures import techniques as memory_figures
from i2v_lab.reporting.figures.style import save_figure
from i2v_lab.reporting.tables import readable
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.studies.tiling import tile_layouts, tiling_specs

GIB = 2**30
TOP = Path(__file__).parents[2]


def _phases(last: float) -> pd.DataFrame:
    rows = [
        {"decode_scope": scope, "phase": phase, "peak_so_far_bytes": round(peak * GIB), "published_so_far_bytes": None}
        for scope, end in (("escaped", last), ("no_grad", 24))
        for phase, peak in (("encode_prompt", 23), ("decode_video", end))
    ]
    return pd.DataFrame(rows)


def _tilings(last: float) -> pd.DataFrame:
    row = {"tiling": "768 px", "status": "complete", "published_bytes": 80 * GIB, "published_outcome": "out of memory"}
    row |= {"published_note": "another process beside it"}
    return pd.DataFrame(
        [
            {**row, "decode_scope": "escaped", "decode_peak_bytes": round(last * GIB)},
            {**row, "decode_scope": "no_grad", "decode_peak_bytes": 5 * GIB},
        ]
    )


def _flat(last: float) -> pd.DataFrame:
    rows = [
        (m, phase, g) for m, g in ((0.8, 5), (3.1, last)) for phase, g in (("decode_video", g), ("encode_prompt", 23))
    ]
    table = pd.DataFrame(rows, columns=["megapixels", "phase", "gib"])
    highest = table.groupby("megapixels")["gib"].transform("max")
    known = {"published_bytes": 30 * GIB, "published_outcome": "complete"}
    return table.assign(peak_bytes=(table["gib"] * GIB).astype("int64"), decides=table["gib"] == highest, **known)


def _leak(last: float) -> pd.DataFrame:
    rows = [
        {
            "consumer": c,
            "decode_scope": s,
            "generation": n,
            "allocated_bytes": round(n * last * GIB * (c == "left_open")),
        }
        for c in ("plain", "left_open")
        for s in ("escaped", "no_grad")
        for n in (1, 2)
    ]
    return pd.DataFrame(rows)


def _errors(last: float) -> pd.DataFrame:
    return pd.DataFrame({"phase": ["encode_prompt", "decode_video"], "error": [0.0001, last / 1e4]})


def _steps(last: float) -> pd.DataFrame:
    rows = [
        ("as upstream does it", 100, "denoise_stage_2", "", None, None),
        ("tokens by chunks", 90, "encode_prompt", "denoise_stage_2", 100, 80),
        ("decoder by bands", last, "decode_video", "decode_video", 90, last),
    ]
    columns = ["label", "peak_bytes", "peak_phase", "target_phase", "before_bytes", "after_bytes"]
    table = pd.DataFrame(rows, columns=columns)
    sizes = ["peak_bytes", "before_bytes", "after_bytes"]
    return table.assign(**{name: (table[name].astype("Float64") * GIB).astype("Int64") for name in sizes})


def _policies(last: float) -> pd.DataFrame:
    rows = [
        {"size": "1024x768", "policy": policy, "phase": phase, "peak_bytes": round(gib * GIB), "recorded_bytes": known}
        for policy, gib, known in (("resident", 23.5, 23 * GIB), ("streamed", last, None))
        for phase in ("encode_prompt", "decode_video")
    ]
    return pd.DataFrame(rows).astype({"recorded_bytes": "Int64"})


FIGURES = {
    "waterfall": lambda last: memory_figures.waterfall_figure(_steps(last), 110 * GIB),
    "policies": lambda last: memory_figures.policies_figure(_policies(last)),
    "boundaries": lambda last: study_figures.boundaries_figure(_phases(last)),
    "tiling": lambda last: study_figures.tiling_figure(_tilings(last), 95 * GIB, "a card"),
    "flatness": lambda last: study_figures.flatness_figure(_flat(last), _flat(last), "megapixels", "megapixels"),
    "leak": lambda last: study_figures.leak_figure(_leak(last)),
    "accuracy": lambda last: study_figures.accuracy_figure(_errors(last)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_the_same_for_the_same_data_and_another_for_others(name, tmp_path):
    svg, png = save_figure(FIGURES[name](100.0), tmp_path, "a")
    again, _ = save_figure(FIGURES[name](100.0), tmp_path, "b")
    other, _ = save_figure(FIGURES[name](80.0), tmp_path, "c")
    assert svg.read_bytes() == again.read_bytes() != other.read_bytes()
    assert png.stat().st_size > 5_000


def _texts(figure) -> str:
    axes = figure.get_axes()
    words = [text.get_text() for each in axes for text in [*each.texts, each.xaxis.label, each.yaxis.label]]
    words += [label.get_text() for each in axes for label in [*each.get_yticklabels(), *each.get_xticklabels()]]
    return "\n".join(words)


def test_figures_name_what_they_show_with_its_unit():
    assert "outside no_grad\n100.00 GiB" in _texts(FIGURES["boundaries"](100.0))
    assert "peak so far (GiB)" in _texts(FIGURES["boundaries"](100.0))
    words = _texts(FIGURES["tiling"](100.0))
    assert "100.00 GiB, outside no_grad" in words
    assert "a card" in words
    legend = FIGURES["tiling"](100.0).legends[0]
    assert legend.get_texts()[0].get_text() == "published, out of memory at that size\nanother process beside it"
    assert "decode video, 8.00" in _texts(FIGURES["flatness"](8.0))
    words = _texts(FIGURES["waterfall"](40.0))
    assert "published study" in words
    assert " 110.00 GiB" in words
    assert "denoise stage 2: 100.00 GiB to 80.00 GiB" in words
    assert "decode video: " not in words, "what holds the peak is not told twice"
    ours, theirs = (
        FIGURES["waterfall"](40.0).get_axes()[0],
        memory_figures.waterfall_figure(_steps(40.0)).get_axes()[0],
    )
    assert len(ours.patches) == len(theirs.patches) == 5, "another set-up is no step: it has a mark, and no bar"
    assert " 23.50" in _texts(FIGURES["policies"](3.0))
    failed = _tilings(100.0).assign(status="failed")
    assert "outside no_grad, out of memory" in _texts(study_figures.tiling_figure(failed))


def test_one_colour_has_one_meaning_in_every_figure():
    palettes = [
        *(style.COLOURS.values()),
        *(style.PHASE_COLOURS.values()),
        *(style.VERDICT_COLOURS.values()),
        *(colour for name, (_, colour) in style.CATEGORIES.items() if name != "saved_bytes"),
    ]
    assert len(set(palettes)) == len(palettes)
    assert style.CATEGORIES["saved_bytes"][1] == style.COLOURS["escaped"], "both are the retained graph"
    assert set(palettes) <= set(style.MEANINGS)
    assert len(set(style.MEANINGS.values())) == len(style.MEANINGS)
    for phase, colour in style.PHASE_COLOURS.items():
        assert style.MEANINGS[colour] == phase
    neutral = {"#000000", "#ffffff", "#999999", "#dddddd", "#333333", "#555555", "#666666"}
    for name in ("waterfall", "policies", "boundaries", "tiling", "flatness", "leak", "accuracy"):
        figure = FIGURES[name](100.0)
        for axes in figure.get_axes():
            drawn = {to_hex(patch.get_facecolor()) for patch in axes.patches}
            drawn |= {to_hex(line.get_color()) for line in axes.lines}
            assert drawn <= neutral | {colour.lower() for colour in style.MEANINGS}, name


def test_no_label_is_struck_through_by_a_line_or_the_grid():
    for name in ("waterfall", "policies", "boundaries", "tiling", "flatness", "leak"):
        for axes in FIGURES[name](100.0).get_axes():
            labels = [text for text in axes.texts if text.get_transform() != axes.get_yaxis_transform()]
            assert labels
            for text in labels:
                ground = text.get_bbox_patch()
                assert ground is not None, (name, text.get_text())
                assert to_hex(ground.get_facecolor()) == "#ffffff"
                assert text.get_zorder() > max(line.get_zorder() for line in [*axes.lines, *axes.patches])
            legend = axes.get_legend()
            assert legend is None or legend.get_frame().get_alpha() == 1


def _tiles() -> Figure:
    request = I2VRequest(image="x", width=1024, height=768, frames=97)
    return study_figures.tile_figure(tile_layouts(tiling_specs(request, "ltx-2.3-22b", [None, Tiling()])))


@pytest.mark.parametrize("draw", [*FIGURES.values(), lambda _: _tiles()], ids=[*FIGURES, "tiles"])
def test_no_line_of_text_begins_above_or_left_of_its_figure(draw, tmp_path):
    svg, _ = save_figure(draw(100.0), tmp_path, "a")
    lines = re.findall(r"translate\((\S+) (\S+)\) scale\((\S+) ", svg.read_text())
    assert lines
    for left, baseline, hundredth in lines:
        assert float(left) >= 0
        assert float(baseline) >= 73 * float(hundredth), "capitals and digits are 0.73 of the font's size"


def test_tiles_are_drawn_one_rectangle_each():
    figure = _tiles()
    assert [len(axes.patches) for axes in figure.get_axes()] == [1, 4, 1, 2]
    request = I2VRequest(image="x", width=1024, height=768, frames=97)
    tilings = [None, Tiling(), Tiling(512, 64, 64, 24), Tiling(384, 64, 32, 8)]
    four = study_figures.tile_figure(tile_layouts(tiling_specs(request, "ltx-2.3-22b", tilings)))
    assert [axes.get_visible() for axes in four.get_axes()] == [True] * 7 + [False] * 2 + [True] + [False] * 2


# --- Cells ---


def test_cells_leave_a_file_for_everything_they_show(tmp_path):
    cells = Cells(tmp_path, "09_test")
    table = pd.DataFrame({"phase": ["decode_video"], "peak_bytes": [2 * GIB], "other_bytes": [None], "seconds": [1.25]})
    names = {"phase": "phase", "peak_bytes": "peak", "other_bytes": "published", "seconds": "time"}
    shown = cells.table("peaks", table, names)
    assert shown.to_dict("index") == {"decode_video": {"peak": "2.00 GiB", "time": "1.25 s"}}
    assert pd.read_csv(tmp_path / "tables" / "09_test_peaks.csv")["peak_bytes"].to_list() == [2 * GIB]
    cells.figure("errors", study_figures.accuracy_figure, _errors(3))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"09_test_errors.{s}" for s in ("csv", "png", "svg")
    }
    (tmp_path / "video.mp4").write_bytes(b"video")
    assert cells.video("shown", tmp_path / "video.mp4") == tmp_path / "videos" / "09_test_shown.mp4"


def test_an_output_carries_its_svg_its_png_and_the_name_of_its_files(tmp_path):
    """An executed notebook is shown where SVG is not, and a page finds the files behind what it shows."""
    cells, formatter = Cells(tmp_path, "09_test"), DisplayFormatter()
    request = I2VRequest(image="x", width=1024, height=768, frames=97)
    layouts = tile_layouts(tiling_specs(request, "ltx-2.3-22b", [Tiling()]))
    shown = {
        "errors": cells.figure("errors", study_figures.accuracy_figure, _errors(3)),
        "tiles": cells.layouts("tiles", study_figures.tile_figure, layouts),
    }
    for name, figure in shown.items():
        data, metadata = formatter.format(figure)
        path = tmp_path / "figures" / f"09_test_{name}"
        assert data["image/svg+xml"] == path.with_suffix(".svg").read_text()
        assert base64.b64decode(data["image/png"]) == path.with_suffix(".png").read_bytes()
        assert metadata == {"i2v-lab": {"name": path.name}}
    tiles = pd.read_csv(tmp_path / "figures" / "09_test_tiles.csv")
    assert len(tiles) == len(layouts[0][2].groups) * len(layouts[0][2].rows) * len(layouts[0][2].columns)
    assert (tiles["bottom"].max(), tiles["right"].max(), tiles["end"].max()) == (768, 1024, 97)
    table = cells.table("peaks", _errors(3), {"phase": "phase", "error": "error"})
    data, metadata = formatter.format(table)
    assert metadata == {"i2v-lab": {"name": "09_test_peaks"}}
    assert "<td>+0.03 %</td>" in data["text/html"]


def test_cells_say_where_there_is_nothing(tmp_path):
    cells = Cells(tmp_path, "09_test")
    assert cells.table("peaks", _errors(1).head(0), {"phase": "phase"}).data == NOTHING
    assert cells.figure("errors", study_figures.accuracy_figure, _errors(1).head(0)).data == NOTHING
    assert "No timeline" in cells.timeline("timeline", None).data
    assert absent([]).data == ""
    assert absent(["a", "b"]).data == "*`data/measured` has no record of a, b.*"
    assert sentence({"verdict": "refined", "finding": "So it is."}).data == "**Refined.** So it is."


def test_readable_knows_units_shares_and_what_is_not_known():
    table = pd.DataFrame(
        {"name": ["a", "b"], "voxel_ratio": [1.449, 2.0], "share": [0.333, 1.0], "worst_error": [0.026, 0.0]}
        | {"fails": [True, False], "decode_scope": ["escaped", "no_grad"], "saved_bytes": [1536, None]}
    )
    shown = readable(table, {name: name for name in table.columns})
    assert shown.loc["a"].to_list() == ["1.45", "33 %", "2.60 %", "yes", "outside no_grad", "1.5 KiB"]
    assert shown.loc["b", "saved_bytes"] == "n/a"


# --- The README's figures ---


def test_the_readmes_figures_are_what_the_code_draws(tmp_path):
    drawn = runpy.run_path(str(TOP / "docs" / "draw_figures.py"))["draw"](tmp_path)
    summary = (TOP / "docs" / "summary.md").read_text()
    assert len(drawn) == 3
    for path in drawn:
        kept = TOP / "docs" / "figures" / path.name
        assert f"(figures/{path.name})" in summary
        ours, theirs = (np.asarray(Image.open(each).convert("L"), dtype=float) for each in (path, kept))
        assert ours.shape == theirs.shape, f"{kept} is out of date: make figures"
        off = float(np.abs(ours - theirs).mean())  # of 255; another version of the fonts moves an edge or two
        assert off < 0.5, f"{kept} is out of date ({off:.2f}): make figures"
