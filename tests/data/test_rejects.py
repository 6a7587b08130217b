"""Counts, the rejects file, and the threshold."""

import json
from pathlib import Path

import pytest

from peft_bituning.data import ReadReport
from peft_bituning.data.rejects import settled_report
from peft_bituning.errors import DataError


def report_of(rows: int, *kinds: str) -> ReadReport:
    report = ReadReport()
    for _ in range(rows):
        report.add_row("events.csv")
    for line, kind in enumerate(kinds, start=2):
        report.reject(kind, "events.csv", line, "because")
    return report


def test_rejected_rows_are_counted_and_written(tmp_path: Path) -> None:
    report = report_of(100, "unknown_item", "bad_timestamp", "unknown_item")
    assert report.counts == {"unknown_item": 2, "bad_timestamp": 1}
    lines = report.write(tmp_path / "made" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"kind": "unknown_item", "file": "events.csv", "line": 2, "reason": "because"}
    assert len(lines) == 3


def test_the_threshold_is_a_share_of_the_rows_read() -> None:
    report_of(20, "unknown_item").check(0.05)
    with pytest.raises(DataError, match=r"1 of 19 rows of events.csv were rejected \(5.3%, at most 5.0% allowed\)"):
        report_of(19, "unknown_item").check(0.05)
    report_of(2, "unknown_item", "bad_timestamp").check(1.0)


def test_the_message_names_kinds_the_first_row_the_file_and_the_next_step() -> None:
    with pytest.raises(DataError) as caught:
        report_of(4, "bad_timestamp", "unknown_item", "unknown_item").check(0.05, "out/rejects.jsonl")
    for part in (
        "2 unknown_item, 1 bad_timestamp",
        "line 2, because",
        "listed in out/rejects.jsonl",
        "raise max_rejected",
    ):
        assert part in str(caught.value)


def test_exact_duplicates_are_counted_but_stop_nothing() -> None:
    report = report_of(3, "duplicate_event", "duplicate_event")
    report.check(0.0)
    assert report.counts == {"duplicate_event": 2}


def test_a_long_file_does_not_hide_a_broken_one() -> None:
    report = report_of(10, *["unknown_item"] * 5)
    for _ in range(10_000):
        report.add_row("items.jsonl")
    with pytest.raises(DataError, match="5 of 10 rows of events.csv"):
        report.check(0.05)


def test_the_rejects_file_is_written_even_when_reading_fails(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    with pytest.raises(DataError, match="no event"), settled_report(path) as report:
        report.reject("unknown_item", "events.csv", 2, "because")
        raise DataError("no event")
    assert "unknown_item" in path.read_text()


def test_the_threshold_must_be_a_share() -> None:
    with pytest.raises(DataError, match="max_rejected must be a share from 0 to 1, got 5"), settled_report(None, 5):
        pass
