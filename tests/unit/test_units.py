"""Bytes as people read them, to the last digit."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2v_lab.units import GIB, KIB, MIB, format_bytes, gib


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


def test_gib_is_a_plain_quotient_and_unavailable_stays_unavailable():
    assert gib(None) is None
    assert gib(0) == 0.0
    assert gib(GIB) == 1.0
    assert gib(31_686_826_557) == 31_686_826_557 / 2**30


@given(st.integers(0, 2**50))
def test_what_is_written_is_what_was_given_to_the_last_digit_shown(n_bytes):
    number, unit = re.fullmatch(r"([\d.]+) (B|KiB|MiB|GiB)", format_bytes(n_bytes)).groups()
    scale, digits = {"B": (1, 0), "KiB": (KIB, 1), "MiB": (MIB, 1), "GiB": (GIB, 2)}[unit]
    assert abs(float(number) * scale - n_bytes) <= scale * 10**-digits * 0.51
