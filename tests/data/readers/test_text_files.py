"""Lines, JSON objects and tables out of files that are not as they should be."""

import gzip
from pathlib import Path

import pytest

from peft_bituning.data import ReadReport
from peft_bituning.data.readers.text_files import json_rows, require_columns, table_rows, text_lines
from peft_bituning.errors import DataError

COLUMNS = ("user_id", "item_id")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_lines_lose_line_ends_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    report = ReadReport()
    path = write(tmp_path / "f.txt", b"\xef\xbb\xbfone\r\n\n  \ntwo\xe2\x80\xa8still two")
    assert list(text_lines(path, report, progress=True)) == [(1, "one"), (4, "two\u2028still two")]
    assert report.rows_read == {"f.txt": 2}


def test_gzip_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", gzip.compress(b'{"a": 1}\n'))
    assert next(json_rows(path, ReadReport())).record == {"a": 1}


def test_a_damaged_gzip_file_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(5000)))
    with pytest.raises(DataError, match=r"f.json.gz is damaged after line \d+"):
        list(json_rows(write(tmp_path / "f.json.gz", whole[: len(whole) // 2]), ReadReport()))


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        list(text_lines(tmp_path / "none", ReadReport()))
    with pytest.raises(DataError, match="f.txt is empty"):
        list(text_lines(write(tmp_path / "f.txt", b""), ReadReport()))
    with pytest.raises(DataError, match="f.txt holds no header"):
        list(table_rows(write(tmp_path / "f.txt", b"\n\n"), ReadReport(), COLUMNS))


def test_broken_json_lines_are_rejected_with_their_number(tmp_path: Path) -> None:
    report = ReadReport()
    path = write(tmp_path / "f.jsonl", b'{"a": 1}\n{"a": \n[1]\n{"a": 2}\n')
    assert [row.line for row in json_rows(path, report)] == [1, 4]
    assert [(row.kind, row.line) for row in report.rejected] == [("broken_json", 2), ("broken_json", 3)]


def test_python_literals_are_read_where_asked_for_and_nothing_is_run(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", b"{'a': 'it''s', 'b': [1]}\n__import__('os').getcwd()\n")
    report = ReadReport()
    assert [row.record for row in json_rows(path, report, python_literals=True)] == [{"a": "its", "b": [1]}]
    assert report.counts == {"broken_json": 1}
    assert list(json_rows(path, ReadReport())) == []


def test_other_encodings_are_rejected_unless_declared(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", "user_id,item_id\nu,caf\u00e9\nu,th\u00e9\n".encode("latin-1") + "u,é\n".encode())
    report = ReadReport()
    assert [row.line for row in table_rows(path, report, COLUMNS)] == [4]
    assert report.counts == {"bad_encoding": 2}
    declared = ReadReport()
    rows = table_rows(path, declared, COLUMNS, fallback_encoding="latin-1")
    assert [row.record["item_id"] for row in rows] == ["café", "thé", "é"]
    assert declared.counts == {}


def test_a_header_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"header of f.csv is not UTF-8.*fallback_encoding"):
        list(table_rows(write(tmp_path / "f.csv", "user_id,é".encode("latin-1")), ReadReport(), COLUMNS))


def test_rows_of_a_table(tmp_path: Path) -> None:
    report = ReadReport()
    text = b'user_id, item_id\n"a,b",007\nu\nu,i,1\n"u,i\nv,i\n'
    rows = list(table_rows(write(tmp_path / "f.csv", text), report, COLUMNS))
    assert [(row.line, dict(row.record)) for row in rows] == [
        (2, {"user_id": "a,b", "item_id": "007"}),
        (6, {"user_id": "v", "item_id": "i"}),
    ]
    assert [(row.kind, row.line) for row in report.rejected] == [
        ("wrong_column_count", 3),
        ("wrong_column_count", 4),
        ("broken_row", 5),
    ]
    assert report.rows_read == {"f.csv": 5}


def test_wrong_columns_name_those_expected_and_those_found() -> None:
    with pytest.raises(
        DataError, match="f must have the columns user_id, item_id and one of timestamp, order; found uid"
    ):
        require_columns(["uid"], "f", ("user_id", "item_id"), ("timestamp", "order"))
