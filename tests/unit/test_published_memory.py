"""The published peaks: that the committed file is sound, and what is refused of a row."""

from __future__ import annotations

import csv
import io
import pickle
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from i2v_lab.errors import RecordError
from i2v_lab.paths import data_dir
from i2v_lab.studies.published_memory import COLUMNS, QUANTITIES, PublishedPeak, read_published

ROW = {
    "id": "a-run",
    "model": "wan-2.2-ti2v-5b",
    "pipeline": "WanImageToVideoPipeline",
    "width": "1280",
    "height": "704",
    "frames": "121",
    "batch": "1",
    "steps": "50",
    "dtype": "bfloat16",
    "offload": "model",
    "vae_tiling": "no",
    "quantization": "",
    "other": "dtypes.vae=float32",
    "peak_gib": "24.5",
    "printed": "24.5",
    "unit": "GB",
    "quantity": "allocated",
    "date": "2025-08",
    "source": "https://example.org/page",
}


def write(path: Path, *rows: dict[str, str]) -> Path:
    """A file of rows, each of which changes the one above."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows({**ROW, **row} for row in rows)
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    return path


def refused(path: Path) -> RecordError:
    with pytest.raises(RecordError) as caught:
        read_published(path)
    assert len(str(caught.value).splitlines()) == 1
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.fields) == (str(caught.value), caught.value.fields)
    return caught.value


# --- The committed file ---


def test_the_committed_peaks_are_many_of_many_models_and_every_one_has_an_address():
    peaks = read_published()
    assert len(peaks) >= 100
    assert len({peak.model for peak in peaks}) >= 25
    assert {urlsplit(peak.source).scheme for peak in peaks} == {"https"}
    assert {peak.quantity for peak in peaks} == set(QUANTITIES)
    by_id = {peak.id: peak for peak in peaks}
    figures = {
        "blog-hunyuanvideo-base": 60.10,
        "blog-hunyuanvideo-tiling": 43.58,
        "blog-hunyuanvideo-offload": 28.87,
        "blog-ltx-video": 17.75,
        "blog-cogvideox-1.5-5b": 36.51,
        "torchao-flux-1-dev-batch1": 33.851,
        "torchao-cogvideox-5b-bf16": 31.746,
    }
    assert {name: by_id[name].peak_gib for name in figures} == figures
    assert by_id["blog-hunyuanvideo"].peak_bytes == round(60.09 * 2**30)


# --- What a row says ---


def test_a_row_is_read_as_it_stands_and_what_is_not_stated_is_unknown(tmp_path):
    blank = dict.fromkeys(("width", "height", "frames", "steps", "dtype", "offload", "vae_tiling", "other", "date"), "")
    binary, mega, decimal = (
        {"peak_gib": "14.906", "printed": "15264", "unit": "MiB"},
        {"peak_gib": "14.215", "printed": "15264", "unit": "MB"},
        {"peak_gib": "22.817", "unit": "GB"},
    )
    path = write(
        tmp_path / "memory.csv", {}, {"id": "b", **blank, **binary}, {"id": "c", **mega}, {"id": "d", **decimal}
    )
    first, second, third, fourth = read_published(path)
    numbers = {"width": 1280, "height": 704, "frames": 121, "batch": 1, "steps": 50, "peak_gib": 24.5, "printed": 24.5}
    texts = dict.fromkeys(("vae_slicing", "quantization", "card", "versions", "note", "reason"), "")
    assert asdict(first) == {**ROW, **numbers, **texts, "line": 2}
    assert isinstance(first, PublishedPeak)
    assert (second.width, second.height, second.frames, second.steps) == (None, None, None, None)
    assert (second.offload, second.peak_bytes, third.line, fourth.peak_gib) == ("", round(14.906 * 2**30), 4, 22.817)


def test_spreadsheets_write_a_byte_order_mark_and_quotes(tmp_path):
    path = write(tmp_path / "memory.csv", {"note": 'of the "best", again'})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [peak.note for peak in read_published(path)] == ['of the "best", again']


@pytest.mark.parametrize(
    ("column", "values"),
    {
        "id": ["", "A run", "-a", "a/b", "ä"],
        "model": [""],
        "pipeline": ["", " Wan"],
        "width": ["0", "-1", "1280.0", "1e3", "1048577", "a", "٣"],
        "height": ["+704"],
        "frames": ["121 "],
        "batch": ["", "0"],
        "steps": ["many"],
        "dtype": ["bf16"],
        "offload": ["group", "cpu"],
        "vae_tiling": ["true", "Yes"],
        "vae_slicing": ["1"],
        "peak_gib": ["", "0", "24.7", "-24.5", "nan", "inf", "1e1", "24,5"],
        "printed": ["", "about 24"],
        "unit": ["", "gb", "TB"],
        "quantity": ["", "peak"],
        "date": ["2025", "2025-13", "2025-8", "08/2025"],
        "source": ["", "example.org", "http://example.org", "https://example.org/a b"],
        "note": ["two\nlines", "a\x1b[31m"],
    }.items(),
)
def test_what_breaks_a_rule_is_refused_with_its_line_id_and_column(tmp_path, column, values):
    for value in values:
        path = write(tmp_path / "memory.csv", {"id": "sound"}, {column: value})
        error = refused(path)
        wanted = {"line": 3, "id": ROW["id"] if column != "id" else value, "column": column, "value": value}
        assert error.fields["line"] >= 3  # where the row ends
        assert {**error.fields, "line": 3} == {**wanted, "path": path}, value


def test_the_peak_is_what_was_printed(tmp_path):
    error = refused(write(tmp_path / "memory.csv", {"printed": "24.5", "peak_gib": "25.4"}))
    assert (error.fields["column"], error.fields["value"]) == ("peak_gib", "25.4")
    assert "24.500 or 22.817" in str(error)


def test_files_that_are_no_table_of_peaks_are_refused(tmp_path):
    path = tmp_path / "memory.csv"
    assert refused(path).fields == {"path": path}  # there is none
    for content in (b"", b"id,model\na,b\n", b"\xff\xfe", b'"', ",".join(reversed(COLUMNS)).encode()):
        path.write_bytes(content)
        assert refused(path).fields == {"path": path}, content
    write(path, {})
    path.write_text(path.read_text(encoding="utf-8") + "a,b\n", encoding="utf-8")
    assert refused(path).fields == {"path": path, "line": 3}
    assert refused(write(path, {}, {"id": "other"}, {})).fields == {"path": path, "line": 4, "id": "a-run"}


def test_the_file_is_found_where_the_data_is():
    assert read_published(data_dir() / "published" / "memory.csv") == read_published()
