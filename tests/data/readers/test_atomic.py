"""RecBole's atomic files."""

from pathlib import Path

import pytest

from peft_bituning.data import Interactions, ReadReport
from peft_bituning.data.readers.atomic import read_atomic
from peft_bituning.errors import DataError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
MOVIES = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\tprice:float\n"
    "1\tToy Story\t1995\tAnimation Children's Comedy\t3.5\n02\tGolden \"Eye\t\tAction\t\n"
)


def read(path: Path, **options: str) -> tuple[Interactions, ReadReport]:
    report = ReadReport()
    return read_atomic(path, report, **options), report


def test_movies_get_our_column_names_and_quotes_are_text(tmp_path: Path) -> None:
    (tmp_path / "ml.item").write_text(MOVIES)
    (tmp_path / "ml.inter").write_text(INTER + "9\t02\t3\t881250949\n9\t1\t3\t8.81e8\n8\t1\t3\t5\n")
    data, report = read(tmp_path)
    assert data.items.attributes == (
        {"title": "Toy Story", "year": "1995", "genres": "Animation Children's Comedy"},
        {"title": 'Golden "Eye', "genres": "Action"},
    )
    assert (data.user_ids, data.histories, data.source) == (("9", "8"), ((0, 1), (0,)), "ml")
    assert not report.rejected


def test_parts_of_a_benchmark_are_read_together(tmp_path: Path) -> None:
    (tmp_path / "ml.item").write_text("item_id:token\tname:token_seq\ttitle:token_seq\n1\tn\tt\n2\tn\tt\n")
    for part, rows in (("train", "u\t1\t1\t1\n"), ("valid", "u\t2\t1\t2\n"), ("test", "u\t1\t1\t3\n")):
        (tmp_path / f"ml.{part}.inter").write_text(INTER + rows)
    data = read(tmp_path)[0]
    assert data.histories == ((0, 1, 0),)
    assert data.items.attributes[0] == {"name": "n", "title": "t"}


def test_one_of_several_data_sets_is_named_by_its_prefix(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.item").write_text(MOVIES)
        (tmp_path / f"{name}.inter").write_text(INTER + "u\t1\t1\t1\n")
    assert read(tmp_path / "two")[0].source == "two"
    with pytest.raises(DataError, match="of one data set, found one, two"):
        read(tmp_path)
    with pytest.raises(DataError, match="neither a folder"):
        read(tmp_path / "three")


def test_latin_1_only_where_declared(tmp_path: Path) -> None:
    (tmp_path / "ml.item").write_bytes("item_id:token\ttitle:token_seq\n1\tCaf\u00e9\n2\tB\n".encode("latin-1"))
    (tmp_path / "ml.inter").write_text(INTER + "u\t2\t1\t1\n")
    data, report = read(tmp_path)
    assert (data.items.item_ids, report.counts) == (("2",), {"bad_encoding": 1})
    assert read(tmp_path, fallback_encoding="latin-1")[0].items.attributes[0] == {"title": "Café"}


def test_wrong_columns_and_missing_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "ml.inter").write_text("user_id:token\titem_id:token\nu\t1\n")
    with pytest.raises(DataError, match="There is no file .*ml.item"):
        read(tmp_path)
    (tmp_path / "ml.item").write_text(MOVIES)
    with pytest.raises(DataError, match="user_id, item_id, timestamp; found user_id, item_id"):
        read(tmp_path)
    (tmp_path / "ml.item").write_text("id:token\n1\n")
    with pytest.raises(DataError, match="ml.item must have the columns item_id; found id"):
        read(tmp_path)
