"""Ids stay the user's own, times order, text is one line."""

import datetime as dt

import numpy as np
import pandas as pd
import pytest

from peft_bituning.data.values import as_id, as_text, as_timestamp


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("007", "007"),
        (7, "7"),
        (7.0, "7"),
        (7.5, "7.5"),
        (np.int64(7), "7"),
        (np.float32(7.0), "7"),
        (2**60 + 1, str(2**60 + 1)),
        (" a ", " a "),
        ("ünï", "ünï"),
    ],
)
def test_as_id_keeps_the_users_own_string(value: object, expected: str) -> None:
    assert as_id(value) == expected


@pytest.mark.parametrize(
    "value",
    [None, "", "  ", float("nan"), float("inf"), pd.NA, pd.NaT, True, [], ["a"], {"a": 1}, "\ud800", np.ones(2)],
)
def test_as_id_is_none_where_there_is_no_id(value: object) -> None:
    assert as_id(value) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1356220800, 1356220800),
        ("1356220800", 1356220800),
        ("1.3562208e9", 1356220800.0),
        (1356220800000, 1356220800.0),
        ("1356220800000", 1356220800.0),
        (1356220800 * 10**9, 1356220800.0),
        ("2012-12-23", 1356220800.0),
        ("2012-12-23T00:00:00Z", 1356220800.0),
        ("2012-12-23 01:00:00+01:00", 1356220800.0),
        (dt.date(2012, 12, 23), 1356220800.0),
        (pd.Timestamp("2012-12-23"), 1356220800.0),
        (np.datetime64("2012-12-23T00:00:00.000000000"), 1356220800.0),
        (-1, -1),
    ],
)
def test_as_timestamp_reads_seconds_milliseconds_and_dates(value: object, expected: float) -> None:
    assert as_timestamp(value) == expected


@pytest.mark.parametrize(
    "value",
    ["yesterday", "", None, "nan", "inf", float("nan"), float("inf"), "1_000", "0x10", True, [1], "2012-13-01", pd.NaT],
)
def test_as_timestamp_is_none_where_there_is_no_time(value: object) -> None:
    assert as_timestamp(value) is None


def test_as_timestamp_leaves_order_numbers_alone() -> None:
    assert as_timestamp("20230101120000", scale=False) == 20230101120000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Rope &amp;\n  drill ", "Rope & drill"),
        (1995.0, "1995"),
        (["a ", None, "b"], "a b"),
        (np.array(["a", "b"]), "a b"),
        ({"k": "v"}, '{"k": "v"}'),
        (None, ""),
        (float("nan"), ""),
        ("a\ud800b", "a?b"),
    ],
)
def test_as_text_is_one_clean_line(value: object, expected: str) -> None:
    assert as_text(value) == expected
