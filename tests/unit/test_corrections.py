"""Corrections of a forecast, and interleaved times, from made-up rows."""

from __future__ import annotations

import pandas as pd
import pytest

from i2v_lab.runs.interleaved import ratio_table
from i2v_lab.studies.accuracy import halves_table

GIB = 2**30


def test_a_correction_is_fitted_to_every_second_spec_and_judged_on_the_others():
    rows = [  # a forecast 2 % too low in the first phase of all, and one that is off in another half only
        ("a", "encode", 100, 98, 100, 100),
        ("a", "encode", 100, 98, 100, 100),
        ("b", "encode", 1000, 980, 100, 50),
        ("c", "encode", 200, 196, 100, 100),
        ("d", "decode", 100, 90, 100, 100),  # a phase that no fitted spec has stays as it is
    ]
    columns = ["spec", "phase", "peak_bytes", "forecast_bytes", "peak_reserved_bytes", "forecast_reserved_bytes"]
    table = halves_table(pd.DataFrame(rows, columns=columns)).set_index("counted")
    assert table[["fitted", "judged"]].to_numpy().tolist() == [[2, 2], [2, 2]]
    assert table.loc["allocated", "median_error"] == pytest.approx(0.06)
    assert table.loc["allocated", "corrected_median_error"] == pytest.approx(0.05)
    assert table.loc["allocated", "corrected_worst_error"] == pytest.approx(0.1)
    assert table.loc["reserved", "worst_error"] == table.loc["reserved", "corrected_worst_error"] == 0.5
    assert halves_table(pd.DataFrame(rows[:2], columns=columns)).empty


def test_arms_are_compared_within_their_round_and_a_round_cut_short_is_left_out():
    rows = [
        {
            "round": number,
            "place": 1,
            "arm": arm,
            "seconds": number * seconds,
            "event_seconds": events and number * events,
        }
        for number in range(1, 9)
        for arm, seconds, events in (("no profiler", 2.0, None), ("phase boundaries", 2.2, 0.022))
    ]
    table = ratio_table(pd.DataFrame([*rows, rows[0] | {"round": 9, "seconds": 99.0}])).set_index("arm")
    assert table["rounds"].to_list() == [8, 8]
    measured = table.loc["phase boundaries", ["ratio", "low_ratio", "high_ratio"]].to_list()
    assert measured == pytest.approx([1.1, 1.1, 1.1])
    assert table.loc["phase boundaries", "event_share"] == pytest.approx(0.01)
