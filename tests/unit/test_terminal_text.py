"""Text of a user or a record in a terminal: shown as it is, never as markup, and never acted on."""

from __future__ import annotations

import io
import pickle
import re
import sys
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from i2v_lab.cli import doctor, generate, measure, output
from i2v_lab.cli.app import main
from i2v_lab.cli.progress import ProgressReport
from i2v_lab.display import escaped, printable
from i2v_lab.doctor.checks import Check, State
from i2v_lab.errors import I2VLabError
from i2v_lab.profiling.records import ModuleRecord, PhaseRecord
from i2v_lab.reporting.console import PlainConsole
from i2v_lab.reporting.tables import save_table
from i2v_lab.reporting.terminal import rich_table
from i2v_lab.reproduce.report import Outcome, RunReport, print_summary
from i2v_lab.runs.store import RunWriter

HOSTILE = [
    "[bold]x[/x]",
    "[/]",
    "[link=https://example.org]a[/link]",
    ":bug: :smile:",
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;https://example.org\x07link\x1b]8;;\x07",
    "\x1b]52;c;cm0gLXJm\x07",
    "\x9b31mred",
    "a\x07\x08\x7f\x00b",
    "seen\rover",
    "name\u202egnp.exe",
    "two\nlines\u2028three",
    "byte\udcff",
]
TEXTS = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8)), min_size=1, max_size=3).map("".join)


def _acted_on(text: str) -> list[str]:
    """What a terminal, or a reader's eye, would act on; rich's own line ends are none of it."""
    kept = "\n\t\u200c\u200d"
    return [letter for letter in text if letter not in kept and unicodedata.category(letter) in HIDDEN]


HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(TEXTS)
@example("\U000e972e>\x15")  # rich 14.3 does not end where a text begins with a letter of no width
@settings(deadline=None, max_examples=60)
def test_whatever_is_printed_is_shown_and_not_acted_on(text):
    assert _acted_on(printable(text)) == []
    assert "\n" not in printable(text, lines=False)
    assert _acted_on(escaped(text)) == []
    assert "<" not in escaped(text)
    console = PlainConsole(width=500)
    console.file = io.StringIO()
    table = Table(text, title=Text(text))
    table.add_row(text)
    table.add_row(Text(text))
    frame = rich_table(pd.DataFrame({"phase": [text], "peak_bytes": [1]}), text)
    console.print(text, soft_wrap=True)
    assert console.file.getvalue().rstrip(" \n") == printable(text).rstrip(" \n") or "\t" in text
    for each in (Text(text), table, frame):
        console.print(each)
    assert _acted_on(console.file.getvalue()) == []


def test_an_error_of_ours_shows_what_it_quotes_and_keeps_it():
    error = I2VLabError(f"image '{HOSTILE[5]}' is missing", path=HOSTILE[5])
    assert _acted_on(str(error)) == []
    assert "\\x1b]8;;" in str(error)
    assert pickle.loads(pickle.dumps(error)).fields == {"path": HOSTILE[5]}


def test_a_name_that_is_not_utf_8_is_escaped_in_a_csv_file(tmp_path):
    path = save_table(pd.DataFrame({"run": ["r\udcff\u00fc"], "peak_bytes": [1]}), tmp_path, "table")
    assert path.read_text(encoding="utf-8") == "run,peak_bytes\nr\\udcff\u00fc,1\n"


@pytest.mark.parametrize("hostile", ["[/]\x1b[31m\x07", "".join(HOSTILE[:-2]), "\n\u202e:bug:"])
def test_no_command_lets_a_terminal_act_on_what_it_was_given(hostile, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    hostile = hostile.replace("/", "\\").replace("\0", "")
    lines = [
        ["generate", "--image", hostile, "--model", hostile],
        ["generate", "--image", hostile],
        ["generate", "--image", hostile, "--memory", hostile],
        ["generate", "--image", "stills/lighthouse.png", "--out", hostile],
        ["generate", "--image", "stills/lighthouse.png", "--device", hostile],
        ["show", hostile],
        ["show", "a", "b", hostile],
        ["show", f"--{hostile}"],
        ["forecast", "--model", hostile],
        ["fit", "--gpu", hostile],
        ["fit", "--gpu", "L4", "--aspect", hostile],
        ["measure", "--plan", hostile, "--out", hostile],
        ["calibrate", hostile, "--out", hostile],
        ["reproduce", hostile],
        ["reproduce", "-p", hostile, hostile],
        ["reproduce", "-f", hostile],
        ["doctor", hostile],
        [hostile],
    ]
    for line in lines:
        monkeypatch.setattr(sys, "argv", ["i2v-lab", *line])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert ended.value.code == 2, line
        assert out == "", line
        assert _acted_on(err) == [], line
        assert err.startswith("Usage:") or err.count("\n") == 1, (line, err)


def test_a_record_that_is_hostile_in_every_name_is_shown_as_text(tmp_path, monkeypatch, capsys):
    name = "".join(HOSTILE).replace("/", "\\").replace("\0", "").replace("\udcff", "")
    folder = tmp_path / name[:120]
    phase = PhaseRecord(name, None, 0, 9, 0, None, 9, 5, 0.0, 1.0, True)
    with pytest.raises(ValueError, match="\x1b"), RunWriter(folder, {"model": name, "device": name}) as writer:
        writer.append(phase)
        writer.append(ModuleRecord(name, name, "saved", 9))
        raise ValueError(name)
    for arguments in ([], [str(folder)]):
        monkeypatch.setattr(sys, "argv", ["i2v-lab", "show", str(folder), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert _acted_on(capsys.readouterr().out) == []


def test_tables_bars_and_lines_of_commands_hold_text_only(tmp_path, capsys):
    name = "".join(HOSTILE)
    report = {"output": name, "width": 64, "height": 64, "frames": 9, "fps": 24.0, "peak_bytes": 1, "peak_phase": name}
    report |= {"model": "ltx-2.3-tiny", "weights": "random"}
    generate._print_report({**report, "phases": [{"phase": name, "seconds": 1.0, "peak_bytes": 1}]})
    measure._print_summary([measure._Outcome(name, None, name, reused=False)])
    plain_doctor = doctor.doctor_table([Check(name, State.OK, name, name)])
    output.plain_console().print(plain_doctor)
    output.say(name)
    output.log(name)
    output.print_json({"a": name})
    outcome = Outcome(Path(f"{name}.ipynb"), name, 1.0)
    with RunReport([name]) as progress:
        progress.started(name, name)
        progress.ended(name, outcome)
    print_summary([outcome], tmp_path / "[red]x[/red]")
    with ProgressReport(9) as generation:
        generation.checked(name, 1, 2)
        generation.note(name)
    captured = capsys.readouterr()
    assert _acted_on(captured.out + captured.err) == []
    assert "[red]x[/red]" in captured.out
    assert re.search(r":bug:", captured.err)
