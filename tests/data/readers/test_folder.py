"""A folder of items and interactions, good and bad."""

from collections.abc import Callable
from pathlib import Path

import pytest

from peft_bituning.data import Interactions, ReadReport, load_interactions
from peft_bituning.data.readers.frames import read_folder
from peft_bituning.errors import DataError

ITEMS: list[object] = [
    {"item_id": "007", "title": "Bond"},
    {"item_id": "b", "title": "B", "brand": "X"},
    {"item_id": "c"},
]
Writer = Callable[..., Path]


def read(folder: Path) -> tuple[Interactions, ReadReport]:
    report = ReadReport()
    return read_folder(folder, report), report


def test_order_and_timestamp_tables(write_folder: Writer) -> None:
    folder = write_folder(ITEMS, "user_id,item_id,order\nu,b,1\nu,007,0\nv,b,10\nv,c,9\n")
    assert read(folder)[0].histories == ((0, 1), (2, 1))
    write_folder(ITEMS, "timestamp,user_id,item_id\n2020-01-02,u,b\n2020-01-01,u,007\n2020-01-01,u,c\n")
    assert read(folder)[0].histories == ((0, 2, 1),)


def test_timestamp_wins_over_order(write_folder: Writer) -> None:
    folder = write_folder(ITEMS, "user_id,item_id,order,timestamp\nu,b,0,20\nu,c,1,10\n")
    assert read(folder)[0].histories == ((2, 1),)


def test_ids_stay_strings(write_folder: Writer) -> None:
    folder = write_folder([{"item_id": "007"}, {"item_id": 7}], "user_id,item_id,order\n01,007,0\n1,7,0\n")
    data, report = read(folder)
    assert data.user_ids == ("01", "1")
    assert data.items.item_ids == ("007", "7")
    assert data.histories == ((0,), (1,))
    assert not report.rejected


def test_items_never_bought_stay_and_missing_titles_are_counted(write_folder: Writer) -> None:
    data, report = read(write_folder(ITEMS, "user_id,item_id,order\nu,b,0\n"))
    assert len(data.items) == 3
    assert report.notes == {"items_without_title": 1}


def test_all_kinds_of_bad_rows_are_written_with_line_numbers(write_folder: Writer, tmp_path: Path) -> None:
    bad = b"u,b,1\n,b,1\nu,,1\nu,zz,1\nu,b,later\nu,b\nu,caf\xe9,1\nu,007,nan\n"
    table = b"user_id,item_id,timestamp\nu,b,1\n" + bad + b"u,007,2\n"
    folder = write_folder([*ITEMS, "{broken", {"title": "no id"}, ITEMS[0]], table)
    rejects = tmp_path / "rejects.jsonl"
    data = load_interactions(f"folder:{folder}", rejects_path=rejects, max_rejected=1.0)
    assert data.histories == ((1, 0),)
    assert data.report.counts == {
        "bad_timestamp": 2,
        "broken_json": 1,
        "missing_item_id": 2,
        "duplicate_item": 1,
        "duplicate_event": 1,
        "missing_user_id": 1,
        "unknown_item": 1,
        "wrong_column_count": 1,
        "bad_encoding": 1,
    }
    assert '"file": "interactions.csv", "line": 6' in rejects.read_text()
    assert sum(data.report.rows_read.values()) == 6 + 10
    with pytest.raises(DataError, match="rows of items.jsonl were rejected"):
        load_interactions(f"folder:{folder}")


def test_duplicate_events_do_not_stop_a_run(write_folder: Writer) -> None:
    folder = write_folder(ITEMS, "user_id,item_id,order\n" + "u,b,0\n" * 10)
    data = load_interactions(f"folder:{folder}")
    assert data.histories == ((1,),)
    assert data.counts()["rejected"] == {"duplicate_event": 9}


@pytest.mark.parametrize(
    ("items", "table", "message"),
    [
        ([], "user_id,item_id,order\nu,b,0\n", "items.jsonl is empty"),
        (ITEMS, "", "interactions.csv is empty"),
        (ITEMS, "user_id,item_id,order\n", "no usable event"),
        (ITEMS, "user,item,time\nu,b,0\n", "user_id, item_id and one of timestamp, order; found user, item, time"),
        (ITEMS, "user_id,item_id\nu,b\n", "one of timestamp, order; found user_id, item_id"),
        ([{"asin": "b"}], "user_id,item_id,order\nu,b,0\n", "expected a column item_id, found asin"),
    ],
)
def test_unusable_folders_are_errors(write_folder: Writer, items: list[object], table: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write_folder(items, table))


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold items.jsonl and interactions.csv"):
        read(tmp_path / "none")
    with pytest.raises(DataError, match="There is no file"):
        read(tmp_path)
