"""Bytes, seconds and other values as text, to the last digit."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2v_lab.units import GIB, KIB, MIB, format_bytes, format_percent, format_seconds, format_value


def test_units_are_binary():
    assert (KIB, MIB, GIB) == (1024, 1_048_576, 1_073_741_824)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (None, "n/a"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB - 1, "1024.0 KiB"),
        (MIB, "1.0 MiB"),
        (18_454_938, "17.6 MiB"),
        (26_503_628, "25.3 MiB"),
        (GIB - 1, "1024.0 MiB"),
        (GIB, "1.00 GiB"),
        (31_686_826_557, "29.51 GiB"),
        (10_000 * GIB, "10000.00 GiB"),
        (-MIB, "-1.0 MiB"),
    ],
)
def test_bytes_are_written_with_their_unit(n_bytes, text):
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "n/a"),
        (0, "0.00 s"),
        (0.004, "4.00 ms"),
        (0.0132, "13.2 ms"),
        (0.09999, "100 ms"),
        (0.25, "0.25 s"),
        (4.71, "4.71 s"),
        (9.996, "10.0 s"),
        (38.24, "38.2 s"),
        (99.96, "100 s"),
        (121.6, "122 s"),
        (999.4, "999 s"),
        (999.6, "16.7 min"),
        (-3600, "-60.0 min"),
        (-0.5, "-0.50 s"),
    ],
)
def test_seconds_are_written_with_three_digits(seconds, text):
    assert format_seconds(seconds) == text


def test_a_difference_has_its_sign():
    assert format_bytes(MIB, signed=True) == "+1.0 MiB"
    assert format_bytes(-MIB, signed=True) == "-1.0 MiB"
    assert format_bytes(0, signed=True) == "0 B"
    assert format_seconds(0.5, signed=True) == "+0.50 s"
    assert format_seconds(0, signed=True) == "0.00 s"
    assert format_percent(0.5, signed=True) == "+50 %"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("peak_bytes", 3 * MIB, "3.0 MiB"),
        ("nbytes", np.int64(512), "512 B"),
        ("peak_reserved_bytes", None, "n/a"),
        ("saved_bytes", float("nan"), "n/a"),
        ("difference_bytes", MIB, "+1.0 MiB"),
        ("seconds", 0.25, "0.25 s"),
        ("start_s", 12.34, "12.3 s"),
        ("difference_s", np.float64(-0.5), "-0.50 s"),
        ("error", 0.0126, "+1.26 %"),
        ("worst_error", 0.026, "2.60 %"),
        ("share", 0.333, "33 %"),
        ("share_under", 0.5, "50 %"),
        ("voxel_ratio", 1.449, "1.45"),
        ("shape", (2, 128, 8), "2x128x8"),
        ("shape", (), "scalar"),
        ("completed", True, "yes"),
        ("step", 3, "3"),
        ("phase", "decode_video", "decode_video"),
        ("label_bytes", "decode_video", "decode_video"),
    ],
)
def test_the_end_of_a_name_says_the_unit(name, value, text):
    assert format_value(name, value) == text


@given(st.floats(0, 1e7))
def test_seconds_as_text_are_right_to_the_last_digit_shown(seconds):
    number, digits, unit = re.fullmatch(r"(\d+(?:\.(\d+))?) (ms|s|min)", format_seconds(seconds)).groups()
    scale, last = {"ms": 1e-3, "s": 1.0, "min": 60.0}[unit], 10.0 ** -len(digits or "")
    assert abs(float(number) * scale - seconds) <= scale * last * 0.51
    if seconds >= 1:
        assert abs(float(number) * scale / seconds - 1) <= 0.0051


@given(st.integers(0, 2**50))
def test_bytes_as_text_are_right_to_the_last_digit_shown(n_bytes):
    number, unit = re.fullmatch(r"([\d.]+) (B|KiB|MiB|GiB)", format_bytes(n_bytes)).groups()
    scale, digits = {"B": (1, 0), "KiB": (KIB, 1), "MiB": (MIB, 1), "GiB": (GIB, 2)}[unit]
    assert abs(float(number) * scale - n_bytes) <= scale * 10**-digits * 0.51
