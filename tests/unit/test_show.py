"""What ``show`` prints for one run and for two: tables, headlines, and their layout in a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from i2v_lab.cli.show import show
from i2v_lab.errors import I2VLabError, RecordError
from i2v_lab.profiling.records import (
    GraphRecord,
    HolderRecord,
    ModuleRecord,
    OutOfMemoryRecord,
    PhaseRecord,
    Record,
    StepRecord,
)
from i2v_lab.reporting.headlines import difference_headline, headline
from i2v_lab.reporting.run_tables import difference_table, holders_table, modules_table, phase_table
from i2v_lab.reporting.terminal import rich_table
from i2v_lab.runs.store import Run, RunWriter, read_run

MIB = 2**20
DENOISE = PhaseRecord("denoise_stage_1", None, 0, 10 * MIB, MIB, None, 10 * MIB, 0, 0.0, 2.0, True)
DECODE = PhaseRecord("decode_video", None, MIB, 50 * MIB, 2 * MIB, None, 50 * MIB, 25 * MIB, 2.0, 4.0, True)
AT_THE_PEAK: list[Record] = [
    ModuleRecord("decode_video", "", "other", 3 * MIB),
    ModuleRecord("decode_video", "video_decoder.conv_in.conv", "saved", MIB),
    ModuleRecord("decode_video", "video_decoder.up_blocks.0.conv", "saved", 10 * MIB),
    ModuleRecord("decode_video", "video_decoder.up_blocks.1.conv", "saved", 14 * MIB),
    ModuleRecord("decode_video", "video_decoder.up_blocks.1.conv", "weight", 22 * MIB),
    HolderRecord("decode_video", 22 * MIB, (11, 2**10, 2**10), "bfloat16", "weight", "video_decoder.up_blocks.1.conv"),
    HolderRecord("decode_video", 3 * MIB, (), "float32", "other", ""),
    HolderRecord("decode_video", 14 * MIB, (7, MIB), "bfloat16", "saved", "video_decoder.up_blocks.1.conv"),
]
DENOISED = [
    DENOISE,
    ModuleRecord("denoise_stage_1", "transformer", "saved", 9 * MIB),
    HolderRecord("denoise_stage_1", 9 * MIB, (9,), "bfloat16", "saved", "transformer"),
]
RECORDS: list[Record] = [StepRecord("denoise_stage_1", 1, 1, 9, 0.5), *DENOISED, DECODE, *AT_THE_PEAK]


def _run(*records: Record, status: str = "complete", **metadata: object) -> Run:
    return Run(Path("runs/a"), metadata, records, status)


def _no_grad() -> Run:
    slim = replace(DECODE, peak_bytes=25 * MIB, saved_for_backward_bytes=0, seconds=3.5)
    return _run(*DENOISED, slim, *(record for record in AT_THE_PEAK if getattr(record, "category", "") != "saved"))


def _plain(table) -> list[str]:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


# --- Tables ---


def test_phases_are_rows_with_whole_bytes():
    table = phase_table(_run(*RECORDS))
    rows = {
        "phase": ["denoise_stage_1", "decode_video"],
        "parent": [None, None],
        "times": [1, 1],
        "seconds": [2.0, 4.0],
        "start_bytes": [0, MIB],
        "peak_bytes": [10 * MIB, 50 * MIB],
        "end_bytes": [MIB, 2 * MIB],
        "saved_for_backward_bytes": [0, 25 * MIB],
        "completed": [True, True],
    }
    assert table.drop(columns="peak_reserved_bytes").to_dict("list") == rows
    assert table["peak_reserved_bytes"].isna().all()
    assert [str(kind) for kind in table.dtypes] == [str(kind) for kind in phase_table(_run()).dtypes]


def test_the_pieces_of_a_stream_are_one_row_and_its_highest_piece_is_the_peak():
    pieces = [
        replace(DECODE, start_s=float(n), start_bytes=n, end_bytes=10 + n, peak_bytes=peak, completed=n != 2)
        for n, peak in enumerate([20, 60, 40])
    ]
    details = [
        [
            ModuleRecord("decode_video", f"decoder.{n}", "saved", 5 + n),
            HolderRecord("decode_video", 5 + n, (5,), "int8", "saved", f"decoder.{n}"),
        ]
        for n in range(3)
    ]
    run = _run(*(record for piece, rest in zip(pieces, details, strict=True) for record in (piece, *rest)))
    (row,) = phase_table(run).to_dict("records")
    assert (row["times"], row["seconds"], row["start_bytes"], row["end_bytes"]) == (3, 12.0, 0, 12)
    assert (row["peak_bytes"], row["saved_for_backward_bytes"], row["completed"]) == (60, 25 * MIB, False)
    assert modules_table(run).to_dict("records") == [{"module": "decoder.1", "category": "saved", "nbytes": 6}]
    assert holders_table(run)["module"].tolist() == ["decoder.1"]
    assert headline(run) == "peak 60 B in decode_video; 6 B (10 %) of it saved for backward by decoder.1"


def test_holders_are_those_of_the_peak_the_largest_first():
    run = _run(*RECORDS)
    assert holders_table(run, top=2).to_dict("records") == [
        {
            "nbytes": 22 * MIB,
            "category": "weight",
            "dtype": "bfloat16",
            "shape": (11, 2**10, 2**10),
            "module": "video_decoder.up_blocks.1.conv",
        },
        {
            "nbytes": 14 * MIB,
            "category": "saved",
            "dtype": "bfloat16",
            "shape": (7, MIB),
            "module": "video_decoder.up_blocks.1.conv",
        },
    ]
    assert holders_table(run)["nbytes"].tolist() == [22 * MIB, 14 * MIB, 3 * MIB]
    assert holders_table(run, "denoise_stage_1")["module"].tolist() == ["transformer"]
    assert list(holders_table(_run()).columns) == list(holders_table(run).columns)


def test_modules_roll_up_to_a_depth_and_add_up_to_the_peak():
    run = _run(*RECORDS)
    assert [tuple(row) for row in modules_table(run).itertuples(index=False)] == [
        ("video_decoder.up_blocks", "saved", 24 * MIB),
        ("video_decoder.up_blocks", "weight", 22 * MIB),
        ("", "other", 3 * MIB),
        ("video_decoder.conv_in", "saved", MIB),
    ]
    assert [tuple(row) for row in modules_table(run, depth=1).itertuples(index=False)] == [
        ("video_decoder", "saved", 25 * MIB),
        ("video_decoder", "weight", 22 * MIB),
        ("", "other", 3 * MIB),
    ]
    assert len(modules_table(run, depth=9)) == 5
    assert all(modules_table(run, depth=depth)["nbytes"].sum() == 50 * MIB for depth in (1, 2, 3, 9))


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        (lambda: holders_table(_run(*RECORDS), "decode"), {"phase": "decode"}),
        (lambda: modules_table(_run(), "decode"), {"phase": "decode"}),
        (lambda: holders_table(_run(*RECORDS), top=0), {"top": 0}),
        (lambda: modules_table(_run(*RECORDS), depth=0), {"depth": 0}),
    ],
)
def test_what_a_run_does_not_have_is_refused(table, fields):
    with pytest.raises(RecordError) as refused:
        table()
    assert refused.value.fields == fields


def test_a_refused_phase_is_answered_with_those_that_there_are():
    with pytest.raises(RecordError, match="use one of: denoise_stage_1, decode_video"):
        modules_table(_run(*RECORDS), "decode")
    with pytest.raises(RecordError, match="none has ended"):
        modules_table(_run(), "decode")


def test_the_difference_is_the_second_run_less_the_first():
    extra = replace(DENOISE, phase="denoise_stage_2", start_s=2.0, peak_bytes=7)
    other = _run(DENOISE, extra, replace(DECODE, start_s=9.0, peak_bytes=25 * MIB, seconds=3.5))
    first = _run(*RECORDS, replace(DENOISE, phase="cleanup", start_s=8.0))
    table = difference_table(first, other)
    assert table["phase"].tolist() == ["denoise_stage_1", "denoise_stage_2", "decode_video", "cleanup"]
    rows = table.set_index("phase")
    assert rows.loc["decode_video"].tolist() == [50 * MIB, 25 * MIB, -25 * MIB, 4.0, 3.5, -0.5]
    assert rows.loc["denoise_stage_1", "difference_bytes"] == 0
    for phase, missing in {"denoise_stage_2": ["peak_bytes", "seconds"], "cleanup": ["other_peak_bytes"]}.items():
        assert rows.loc[phase, [*missing, "difference_bytes", "difference_s"]].isna().all()
    assert rows.loc["denoise_stage_2", "other_peak_bytes"] == 7
    assert str(table["difference_bytes"].dtype) == "Int64"
    assert difference_headline(first, other) == (
        "peak 25.0 MiB instead of 50.0 MiB: -25.0 MiB (-50 %); 7.50 s instead of 8.00 s, of one run each"
    )
    theirs = replace(other, metadata={"device_name": "NVIDIA H100"})
    assert difference_headline(replace(first, metadata={"device": "cpu"}), theirs).endswith(
        "; no comparison of times: one is of cpu, the other of NVIDIA H100"
    )
    forecast = replace(first, metadata={"device": "forecast"})
    assert "no comparison of times: a forecast without" in difference_headline(forecast, forecast)
    assert difference_table(_run(), _run()).empty
    assert difference_headline(first, _run()) == ("no comparison: a run in which no phase has ended has no peak")


# --- Sentences ---


def test_the_headline_names_what_was_saved_for_backward_and_by_which_module():
    assert headline(_run(*RECORDS)) == (
        "peak 50.0 MiB in decode_video; 25.0 MiB (50 %) of it saved for backward by video_decoder.up_blocks"
    )


@pytest.mark.parametrize(
    ("saved", "modules_named"),
    [
        ({"decoder.a.x": 8, "decoder.b": 2}, "decoder.a (80 %) and decoder.b (20 %)"),
        ({"decoder.a": 7, "decoder": 3}, "decoder.a (70 %) and decoder itself (30 %)"),
        ({"a": 4, "b": 3, "c": 2, "d": 1}, "a (40 %), b (30 %) and c (20 %)"),
        ({"": 10}, "code outside any module"),
        ({"": 6, "a": 4}, "code outside any module (60 %) and a (40 %)"),
    ],
)
def test_what_several_modules_saved_for_backward_is_given_by_their_shares(saved, modules_named):
    modules = [ModuleRecord("decode_video", module, "saved", nbytes) for module, nbytes in saved.items()]
    assert headline(_run(replace(DECODE, peak_bytes=20), *modules)) == (
        f"peak 20 B in decode_video; 10 B (50 %) of it saved for backward by {modules_named}"
    )


def test_the_headline_says_when_nothing_was_saved_and_when_it_was_not_tracked():
    peak = "peak 25.0 MiB in decode_video; "
    assert headline(_no_grad()) == f"{peak}nothing saved for backward"
    bare = replace(DECODE, peak_bytes=25 * MIB)
    weights = ModuleRecord("decode_video", "video_decoder", "weight", 25 * MIB)
    assert headline(_run(bare, weights)) == (
        f"{peak}nothing saved for backward at the peak, but up to 25.0 MiB elsewhere in that phase"
    )
    graph = GraphRecord("decode_video", "video_decoder.up_blocks.0", 25 * MIB)
    assert headline(_run(bare, graph)) == (
        f"{peak}up to 25.0 MiB saved for backward in that phase by video_decoder.up_blocks"
    )
    assert headline(_run(replace(bare, saved_for_backward_bytes=0))) == f"{peak}nothing saved for backward"
    assert (
        headline(_run(replace(bare, saved_for_backward_bytes=None)))
        == f"{peak}tensors saved for backward were not tracked"
    )
    assert headline(_run(replace(DECODE, peak_bytes=0, saved_for_backward_bytes=0))) == (
        "peak 0 B in decode_video; nothing saved for backward"
    )


def test_the_headline_says_what_ran_out_of_memory_once():
    error = OutOfMemoryRecord("decode_video", "video_decoder.conv_in", 4 * MIB, 50 * MIB, 52 * MIB, "no room [here]")
    cut = replace(DECODE, completed=False)
    outer = replace(cut, phase="cell", parent=None)
    inner = replace(cut, parent="cell")
    again = replace(error, phase="cell", alive_bytes=MIB)
    failed = "VramCapExceeded: no room"
    run = _run(error, inner, *AT_THE_PEAK, again, outer, status="failed", error=failed)
    assert headline(run).splitlines()[0] == f"failed: {failed}"
    assert headline(run).splitlines()[1] == (
        "out of memory in decode_video, at video_decoder.conv_in: 4.0 MiB requested with 50.0 MiB allocated, "
        "with a cap of 52.0 MiB"
    )
    assert headline(run).splitlines()[2].startswith("peak 50.0 MiB in decode_video; 25.0 MiB (50 %)")
    assert len(headline(run).splitlines()) == 3
    unknown = OutOfMemoryRecord("", "", None, MIB, None, "CUDA out of memory")
    assert headline(_run(unknown)) == (
        "out of memory: an unknown size requested with 1.0 MiB allocated\nno phase has ended, so there is no peak"
    )


def test_the_headline_says_plainly_that_a_run_is_unfinished():
    lines = headline(_run(*DENOISED, status="running")).splitlines()
    assert lines[0] == "unfinished: the run was stopped or is still in progress; 3 records so far"
    assert lines[1].startswith("peak 10.0 MiB in denoise_stage_1; ")
    assert headline(_run(status="running")).splitlines()[1] == "no phase has ended, so there is no peak"


# --- In a terminal ---


def test_nested_phases_are_indented_and_what_was_cut_short_says_so():
    outer = replace(DECODE, phase="cell", start_s=0.0)
    inner = replace(DECODE, parent="cell", start_s=0.5, completed=False)
    deepest = replace(DECODE, phase="tile", parent="decode_video", start_s=1.0)
    recursive = replace(DECODE, phase="tile", parent="tile", start_s=1.5)
    lines = _plain(rich_table(phase_table(_run(deepest, recursive, inner, outer)), "Phases"))
    assert [line[1:16].rstrip() for line in lines[4:8]] == ["cell", "  decode_video", "    tile", "      tile"]
    assert [line.split()[-1] for line in lines[4:8]] == ["yes", "no", "yes", "yes"]
    assert "completed" in lines[2]
    assert "completed" not in "".join(_plain(rich_table(phase_table(_run(*RECORDS)), "Phases")))


def test_brackets_in_names_are_not_markup():
    holder = HolderRecord("decode_video", 1, (1,), "int8", "other", "decoder[/red].layers[0]")
    lines = _plain(rich_table(holders_table(_run(DECODE, holder)), "The [bold]"))
    assert lines[0] == "The [bold]"
    assert lines[4].endswith("decoder[/red].layers[0]")


def _show(*arguments: object, columns: int = 100):
    app = typer.Typer()
    app.command()(show)
    result = CliRunner().invoke(app, [str(word) for word in arguments], env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    if isinstance(result.exception, I2VLabError):
        raise result.exception
    return result


def _save(folder: Path, run: Run) -> Path:
    metadata = {"model": "ltx-2.3-tiny", "device": "cpu", "started_at": "2025-01-01T00:00:00+00:00"}
    with RunWriter(folder, metadata) as writer:
        for record in run.records:
            writer.append(record)
    return folder


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    return _save(Path("escaped"), _run(*RECORDS)), _save(Path("no_grad"), _no_grad())


def test_one_run_is_a_headline_its_phases_and_the_holders_of_its_peak(folders):
    result = _show(folders[0])
    assert result.exit_code == 0
    assert [line.rstrip() for line in result.output.splitlines()] == [
        "escaped, ltx-2.3-tiny, on cpu, 2025-01-01T00:00:00+00:00",
        "peak 50.0 MiB in decode_video; 25.0 MiB (50 %) of it saved for backward by video_decoder.up_blocks",
        "Phases",
        "",
        " phase            seconds    start      peak      end     graph",
        " ──────────────────────────────────────────────────────────────",
        " denoise_stage_1   2.00 s      0 B  10.0 MiB  1.0 MiB       0 B",
        " decode_video      4.00 s  1.0 MiB  50.0 MiB  2.0 MiB  25.0 MiB",
        "",
        "Live at the peak, in decode_video, by module",
        "",
        " module                   category     bytes",
        " ───────────────────────────────────────────",
        " video_decoder.up_blocks  saved     24.0 MiB",
        " video_decoder.up_blocks  weight    22.0 MiB",
        " (outside any module)     other      3.0 MiB",
        " video_decoder.conv_in    saved      1.0 MiB",
        "",
        "The largest storages live at the peak, in decode_video",
        "",
        "    bytes  category  dtype     shape         module",
        " ──────────────────────────────────────────────────────────────────────────",
        " 22.0 MiB  weight    bfloat16  11x1024x1024  video_decoder.up_blocks.1.conv",
        " 14.0 MiB  saved     bfloat16  7x1048576     video_decoder.up_blocks.1.conv",
        "  3.0 MiB  other     float32   scalar        (outside any module)",
        "",
    ]
    assert "3.0 MiB  other     float32" not in _show(folders[0], "--top", 2).output


def test_two_runs_are_their_headlines_and_the_difference(folders):
    result = _show(*folders)
    assert [line.rstrip() for line in result.output.splitlines()] == [
        "first: escaped, ltx-2.3-tiny, on cpu, 2025-01-01T00:00:00+00:00",
        "peak 50.0 MiB in decode_video; 25.0 MiB (50 %) of it saved for backward by video_decoder.up_blocks",
        "other: no_grad, ltx-2.3-tiny, on cpu, 2025-01-01T00:00:00+00:00",
        "peak 25.0 MiB in decode_video; nothing saved for backward",
        "peak 25.0 MiB instead of 50.0 MiB: -25.0 MiB (-50 %); 5.50 s instead of 6.00 s, of one run each",
        "Phase by phase",
        "",
        "                               other                        other",
        " phase                peak      peak     change  seconds  seconds   change",
        " ─────────────────────────────────────────────────────────────────────────",
        " denoise_stage_1  10.0 MiB  10.0 MiB        0 B   2.00 s   2.00 s   0.00 s",
        " decode_video     50.0 MiB  25.0 MiB  -25.0 MiB   4.00 s   3.50 s  -0.50 s",
        "",
    ]


@pytest.mark.parametrize("columns", [80, 100])
def test_long_names_are_folded_not_cut_and_numbers_stay_whole(tmp_path, monkeypatch, columns):
    monkeypatch.chdir(tmp_path)
    path = "transformer.velocity_model." + ".".join(f"transformer_blocks.{n}" for n in range(6))
    big = replace(DECODE, phase="a_phase_with_a_name_" * 3, peak_bytes=1023 * 2**30, peak_reserved_bytes=1023 * 2**30)
    holder = HolderRecord(big.phase, 1023 * 2**30, (1, 128, 97, 1024, 1536), "float8_e4m3fn", "activation", path)
    folder = _save(Path("run"), _run(replace(big, completed=False), holder, replace(big, start_s=9.0)))
    output = _show(folder, columns=columns).output
    lines = output.splitlines()
    assert max(len(line) for line in lines) <= columns
    assert output.count("1023.00 GiB") == 4  # headline, peak, reserved, holder
    column = lines.index(next(line for line in lines if "float8_e4m3fn" in line))
    start = lines[column].index("transformer")
    assert "".join(line[start:].strip() for line in lines[column:]) == path
    both = _show(folder, folder, columns=columns).output
    assert max(len(line) for line in both.splitlines()) <= columns
    assert both.count("1023.00 GiB") == 6


def test_an_unfinished_run_is_shown_as_such(folders):
    path = folders[0] / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "running"}))
    with (folders[0] / "records.jsonl").open("a") as file:
        file.write('{"kind": "ph')
    output = _show(folders[0]).output
    assert output.splitlines()[1] == (
        f"unfinished: the run was stopped or is still in progress; {len(RECORDS)} records so far"
    )
    assert "decode_video      4.00 s" in output
    nothing = _save(Path("nothing"), _run())
    assert _show(nothing).output.splitlines()[1:] == ["no phase has ended, so there is no peak"]
    assert _show(nothing, folders[0]).exit_code == 0


def test_a_bad_folder_is_one_line_and_a_bad_number_is_a_usage_error(folders):
    for arguments in (["none"], [folders[0], "none"]):
        with pytest.raises(RecordError) as refused:
            _show(*arguments)
        assert str(refused.value) == "run 'none' does not exist; check the path"
    result = _show(folders[0], "--top", 0)
    assert result.exit_code == 2
    assert "--top" in result.output


def test_showing_a_run_does_not_import_torch(folders):
    code = (
        "import sys; from pathlib import Path; from i2v_lab.cli.show import show; show(Path(sys.argv[1])); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, folders[0]], capture_output=True, check=False).returncode == 0


def test_a_folder_read_back_says_the_same_as_the_records_did(folders):
    run = read_run(folders[0])
    assert headline(run) == headline(_run(*RECORDS))
    assert phase_table(run).equals(phase_table(_run(*RECORDS)))
    assert holders_table(run).equals(holders_table(_run(*RECORDS)))
