"""Charts: one valid description each, the same files for the same data, and the numbers that a pointer is told."""

from __future__ import annotations

import base64
import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import altair as alt
import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter

from i2v_lab.errors import RecordError
from i2v_lab.profiling.records import ModuleRecord, PhaseRecord, TimelineRecord
from i2v_lab.reporting.cells import NOTHING, Cells
from i2v_lab.reporting.figures import style
from i2v_lab.reporting.figures.chart import MIME, TABLE, Chart, still
from i2v_lab.reporting.figures.placements import card_map_figure, frontier_figure
from i2v_lab.reporting.figures.runs import MOMENTS, holders_figure, modules_figure, timeline_figure
from i2v_lab.reporting.figures.style import CATEGORIES
from i2v_lab.reporting.site.charts import behind_chart, behind_figure
from i2v_lab.runs.store import Run

GIB = 2**30


def _cards(last: float) -> pd.DataFrame:
    known = "12 of 56 blocks resident"
    placements = [
        ("partial", known, last),
        ("resident",) * 2 + (4.0,),
        ("none",) * 2 + (None,),
        ("lean",) * 2 + (None,),
    ]
    rows = [
        {"gpu": f"card {i}", "memory_bytes": 32 * GIB, "width": 64 * (i + 1), "height": 64, "frames": 9}
        | {"placement": placement, "name": name, "needed_bytes": 3 * GIB}
        | {"predicted_seconds": seconds, "rates": "measured" if i else "published"}
        for i, (placement, name, seconds) in enumerate(placements)
    ]
    return pd.DataFrame(rows).astype({"predicted_seconds": "Float64"})


def _frontier(last: float) -> pd.DataFrame:
    rows = [
        ("placement", "4 of 56 blocks resident", 4, 11.0),
        ("placement", "resident", 24, 10.0),
        ("placement", "none", None, None),
        ("pipeline", "ltx-pipelines", 25, 12.0),
        ("pipeline", "diffusers", 40, last),
        ("measured", "diffusers", 40, 90.0),
        ("measured", "resident", 24, 10.5),
    ]
    table = pd.DataFrame(rows, columns=["kind", "name", "gib", "seconds"]).assign(size="1024x768")
    table = table.assign(peak_bytes=(table["gib"].astype("Float64") * GIB).astype("Int64"), warm_seconds=last / 10)
    return table.astype({"seconds": "Float64"})


def _graph(last: float) -> pd.DataFrame:
    sizes = [last * GIB, *([GIB] * 11)]
    modules = [f"video_decoder.part_{i}" for i in range(12)]
    return pd.DataFrame({"module": modules, "saved_bytes": sizes, "share": np.array(sizes) / sum(sizes)})


def _run(last: float, name: str = "escaped", moments: int = 3, **metadata: Any) -> Run:
    held = [ModuleRecord("decode_video", "video_decoder.up_blocks.8", "saved", 3 * GIB)]
    phase = PhaseRecord("decode_video", None, 0, GIB, 0, None, GIB, 0, 0.0, 1.0, True)
    points = [
        TimelineRecord(phase, offset + step, GIB, round(last * GIB * (step == moments // 2)), 7, 0)
        for phase, offset in (("encode_prompt", 0.0), ("decode_video", float(moments)))
        for step in range(moments)
    ]
    return Run(Path(name), {"device": "cpu", **metadata}, (phase, *points, *held), "complete")


def _holders(last: float) -> pd.DataFrame:
    rows = [("video_decoder", "saved", round(last * GIB)), ("video_decoder", "weight", GIB), ("", "other", 5)]
    return pd.DataFrame(rows, columns=["module", "category", "nbytes"])


CHARTS = {
    "timeline": lambda last: timeline_figure(_run(last), _run(4, "no_grad")),
    "modules": lambda last: modules_figure(_graph(last)),
    "holders": lambda last: holders_figure(_holders(last), "decode_video"),
    "cards": lambda last: card_map_figure(_cards(last)),
    "frontier": lambda last: frontier_figure(_frontier(last)),
}


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_valid_and_its_files_are_the_same_for_the_same_data(name, tmp_path):
    chart = CHARTS[name](100.0)
    alt.Chart.from_dict(dict(chart.spec), validate=True)
    assert json.loads(json.dumps(chart.spec, allow_nan=False)) == chart.spec
    svg, png = chart.save(tmp_path, "a")
    text = svg.read_text()
    assert text == CHARTS[name](100.0).svg()
    assert chart.spec != CHARTS[name](80.0).spec
    assert png.read_bytes().startswith(b"\x89PNG")
    sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)px"', text)]
    assert min(sizes) >= 10, "9 pixels on a page of 1280, whose column is a tenth narrower"
    drawn = set(re.findall(r'(?:fill|stroke)="(#\w{6})"', text))
    assert name == "cards" or drawn <= set(style.MEANINGS), "one colour, one meaning"
    assert "currentColor" in text, "text has the colour of the page"
    assert not re.search(r'fill="white"', text), "which is its ground too"


def test_what_only_a_pointer_uses_is_not_in_the_still():
    chart = CHARTS["timeline"](9.0)
    names = [layer.get("name") for layer in still(chart.spec)["layer"]]
    assert "pointer" not in names
    assert "pointer" in [layer.get("name") for layer in chart.spec["layer"]]
    assert set(still(CHARTS["cards"](9.0).spec)["datasets"]) == {"cells"}, "no data that nothing draws"


def test_a_timeline_keeps_the_highest_moment_of_every_part_and_every_exact_byte():
    long = _run(40.0, moments=10 * MOMENTS + 1)
    table = timeline_figure(long).table
    assert table["phase"].value_counts().max() <= MOMENTS + 1
    assert table["total_bytes"].max() == 41 * GIB + 7
    assert (table[list(CATEGORIES)].sum(axis=1) == table["total_bytes"]).all()
    assert table["time_s"].min() == 0
    assert table["time_s"].max() == 20 * MOMENTS + 1, "the run does not end earlier"
    short = _run(40.0)
    assert len(timeline_figure(short).table) == 6, "few moments are all there"


def test_a_second_run_is_stretched_phase_by_phase_and_has_its_own_seconds():
    slow = _run(2.0, "slow")
    slow = replace(
        slow,
        records=tuple(replace(r, time_s=2 * r.time_s) if isinstance(r, TimelineRecord) else r for r in slow.records),
    )
    table = timeline_figure(_run(9.0), slow).table
    ours, theirs = (table[table["run"] == name] for name in ("escaped", "all of slow"))
    assert ours["axis_s"].to_list() == ours["time_s"].to_list() == [0, 1, 2, 3, 4, 5]
    assert theirs["axis_s"].to_list() == [0, 1, 2, 3, 4, 5]
    assert theirs["time_s"].to_list() == [0, 2, 4, 6, 8, 10]
    phases = pd.DataFrame(timeline_figure(_run(9.0)).spec["datasets"]["phases"])
    assert phases["module"].to_list() == ["not recorded", "video_decoder.up_blocks.8"]
    assert phases["module_bytes"].to_list()[1] == 3 * GIB


def test_a_forecasts_timeline_has_the_clock_of_a_card_or_none():
    def axis(**metadata: str) -> tuple[str, float]:
        spec = timeline_figure(_run(9.0, **metadata)).spec
        x = next(layer["encoding"]["x"] for layer in spec["layer"] if layer.get("name") == "pointer")
        return x["title"], x["scale"]["domain"][1]

    assert axis(device="forecast") == ("progress of the run (this forecast has no clock)", 5.0)
    assert axis(device="forecast", clock="RTX 4090") == ("predicted time on RTX 4090 (s)", 5.0)
    assert axis(device="cpu") == ("time (s)", 5.0)


def test_a_run_without_a_timeline_is_refused_by_name():
    with pytest.raises(RecordError) as refused:
        timeline_figure(Run(Path("runs/cuda"), {"device": "cuda"}, (), "complete"))
    assert refused.value.fields == {"run": "runs/cuda"}


def test_the_map_says_what_each_pair_takes_and_the_bars_what_each_module_holds():
    cells = pd.DataFrame(CHARTS["cards"](100.0).spec["datasets"]["cells"])
    assert cells["time"].to_list() == ["100 s", "4 s", "no placement", "time not known"]
    assert cells["kept"].to_list() == ["12 of 56 blocks", "resident", "needs 3.00 GiB", "lean"]
    assert cells["card"].to_list()[:2] == ["card 0, 32.00 GiB", "card 1, 32.00 GiB, rates measured"]
    svg = CHARTS["cards"](100.0).svg()
    for words in ("no placement", "needs 3.00 GiB", "time not known", "From published rates"):
        assert words in svg
    bars = CHARTS["modules"](100.0).spec["datasets"]["bars"]
    assert len(bars) == 11
    assert bars[-1] == {
        "module": "2 others", "category": "saved", "nbytes": 2 * GIB, "series": "saved for backward",
        "phase": "",
        "share": 2 / 111, "all_bytes": 2 * GIB,
    }  # fmt: skip
    held = pd.DataFrame(CHARTS["holders"](4.0).spec["datasets"]["bars"])
    assert held["all_bytes"].to_list() == [5 * GIB, 5 * GIB, 5]
    assert held["module"].to_list()[-1] == "outside any module"
    assert set(held["phase"]) == {"decode_video"}


def test_every_series_can_be_hidden_by_the_legend_and_time_can_be_zoomed():
    signals = {"timeline": ["zoom_axis_s"], "frontier": ["zoom_gib", "zoom_seconds"]}
    for name, params in {"timeline": {"shown", "zoom", "pointed"}, "frontier": {"shown", "sizes", "zoom"}}.items():
        spec = CHARTS[name](9.0).spec
        assert {each["name"] for each in spec["params"]} == params
        assert [f"zoom_{field}" for field in spec["usermeta"]["zooms"].values()] == signals[name]
    shown = {each["name"]: each for each in CHARTS["timeline"](9.0).spec["params"]}["shown"]
    assert shown["bind"] == "legend"
    assert [each["series"] for each in shown["value"]][-1] == "all of no_grad"
    assert len(shown["value"]) == len(CATEGORIES) + 1


def test_behind_every_other_figure_is_the_table_of_its_csv_too(tmp_path):
    file = tmp_path / "a.csv"
    assert behind_figure(file, "Tiles") == "", "no file, no table"
    file.write_text('tiling,top,note\n768 px,0,"a, <b>"\n', encoding="utf-8")
    table = ElementTree.fromstring(behind_figure(file, "Tiles"))
    assert [[cell.text for cell in row] for row in table.iter("tr")] == [
        ["tiling", "top", "note"],
        ["768 px", "0", "a, <b>"],
    ]
    assert [cell.get("scope") for cell in table.iter("th")] == ["col", "col", "col", "row"]


def test_a_notebook_and_its_page_get_the_description_and_the_same_table(tmp_path):
    cells = Cells(tmp_path, "09_test")
    assert cells.holders("holders", None).data == NOTHING
    assert cells.holders("holders", Run(Path("cuda"), {}, (), "complete")).data == NOTHING
    shown = {
        "holders": cells.holders("holders", _run(9.0)),
        "map": cells.figure("map", card_map_figure, _cards(100.0)),
        "timeline": cells.timeline("timeline", _run(9.0), _run(4, "no_grad")),
    }
    for name, figure in shown.items():
        data, metadata = DisplayFormatter().format(figure)
        stem = tmp_path / "figures" / f"09_test_{name}"
        assert data["image/svg+xml"] == stem.with_suffix(".svg").read_text()
        assert base64.b64decode(data["image/png"]) == stem.with_suffix(".png").read_bytes()
        assert metadata["i2v-lab"] == {"name": stem.name}
        assert data[MIME]["datasets"][TABLE]
        table = re.search(r"<table.*</table>", behind_chart(data[MIME]), re.DOTALL)[0]
        rows = [
            [cell.text or "" for cell in row.iter() if cell is not row]
            for row in ElementTree.fromstring(table).iter("tr")
        ]
        assert rows == list(csv.reader(stem.with_suffix(".csv").read_text().splitlines()))
    assert isinstance(DisplayFormatter().format(CHARTS["modules"](9.0))[0][MIME], dict), "without Cells too"
    assert Chart(data[MIME]).label == "Live tensor storages by category: escaped, and all of no_grad"
