"""The peaks by release of diffusers: that the committed file is sound, its verdicts those of its bytes."""

from __future__ import annotations

import pytest

from i2v_lab.errors import RecordError
from i2v_lab.pipeline.contract.architectures import model_names
from i2v_lab.studies.releases import (
    COLUMNS,
    forecast_release,
    merged_rows,
    read_releases,
    released_models,
    releases_table,
    write_releases,
)

IN_RANGE = {"0.39", "0.40", "0.41", "0.42"}


def row(release: str, peak: int | None, model: str = "a") -> dict[str, str]:
    values = {**dict.fromkeys(COLUMNS, ""), "model": model, "release": release}
    return {**values, "peak_bytes": str(peak or ""), "note": "" if peak else "no such class"}


def test_the_committed_file_has_every_model_with_every_release_in_the_range():
    rows = read_releases()
    for name in released_models():
        mine = {peak.release.rpartition(".")[0]: peak for peak in rows if peak.model == name}
        assert set(mine) >= IN_RANGE, name
        assert all(peak.run and peak.date and peak.torch and peak.code for peak in mine.values())
        assert mine["0.42"].peak_bytes, name
        assert all(bool(peak.peak_bytes) == bool(peak.phase) for peak in mine.values())
    assert {peak.model for peak in rows} <= set(model_names())
    assert len(releases_table()) == len(rows)


def test_verdicts_follow_from_the_bytes_of_the_release_before(tmp_path):
    peaks = {"0.9.0": None, "0.38.0": 1000, "0.39.0": 1005, "0.40.0": None, "0.41.0": 1011, "0.42.1": 900}
    rows = merged_rows([row("0.38.0", 7), row("0.39.0", 1005)], [row(*pair) for pair in reversed(peaks.items())])
    assert {each["release"]: each["verdict"] for each in rows} == {
        "0.9.0": "none",
        "0.38.0": "first",
        "0.39.0": "same",
        "0.40.0": "none",
        "0.41.0": "worse",
        "0.42.1": "better",
    }
    path = tmp_path / "releases.csv"
    write_releases(rows, path)
    assert [(peak.release, peak.peak_bytes) for peak in read_releases(path)] == list(peaks.items())


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"verdict": "better"}, "verdict"),
        ({"peak_bytes": "-1"}, "peak_bytes"),
        ({"note": "no such class"}, "note"),
        ({"release": "main"}, "release"),
        ({"release": "0.37.0"}, "release"),  # not sorted
    ],
)
def test_a_row_that_its_bytes_contradict_is_refused_in_one_line(tmp_path, changes, column):
    rows = merged_rows([], [row("0.38.0", 1000), row("0.39.0", 1000)])
    rows[1] |= changes
    path = tmp_path / "releases.csv"
    write_releases(rows, path)
    with pytest.raises(RecordError) as caught:
        read_releases(path)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.fields["column"] == column


def test_files_that_are_no_table_of_releases_are_refused(tmp_path):
    path = tmp_path / "releases.csv"
    for content in (None, b"", b"model\n", b"\xff", (",".join(COLUMNS) + "\na,b\n").encode()):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RecordError) as caught:
            read_releases(path)
        assert caught.value.fields == {"path": path}


def test_a_forecast_becomes_a_row():
    made = forecast_release("wan-2.2-ti2v-5b-tiny")
    assert (int(made["peak_bytes"]) > 0, bool(made["phase"]), made["note"]) == (True, True, "")
    assert set(made) | {"verdict"} == set(COLUMNS)
