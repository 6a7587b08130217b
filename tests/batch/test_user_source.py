"""Users come out in blocks: all of them, in order, checked, and never more than a block at once."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.batch.user_source import block_digest, open_users
from peft_bituning.errors import ConfigurationError, DataError

USERS = ["u0", "007", "8", "ü3", "u4"]
HISTORIES = [["a", "b"], [], ["c"], ["a", "a", "ß"], ["b"]]


def write(path: Path, users: Any = USERS, histories: Any = HISTORIES, **settings: Any) -> Path:
    pq.write_table(pa.table({"junk": [0.0] * len(users), "user_id": users, "history": histories}), path, **settings)
    return path


def read(source: Any, size: int = 2, **columns: str) -> list[tuple[list[str], list[list[str]]]]:
    blocks = list(open_users(source, **columns).blocks(size))
    assert [block.number for block in blocks] == list(range(len(blocks)))
    found = [block.users() for block in blocks]
    assert [len(users) for users, _ in found] == [block.rows for block in blocks]
    assert [block.first for block in blocks] == [size * number for number in range(len(blocks))]
    return found


@given(
    st.lists(st.lists(st.lists(st.sampled_from("abc"), max_size=3), max_size=7), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_blocks_do_not_follow_files_or_row_groups(files: list[list[list[str]]], size: int, row_group: int) -> None:
    expected = [history for histories in files for history in histories]
    with tempfile.TemporaryDirectory() as folder:
        for number, histories in enumerate(files):
            columns = pa.array(histories, pa.list_(pa.string()))
            write(Path(folder) / f"{number}.parquet", [f"{number}"] * len(histories), columns, row_group_size=row_group)
        found = read(folder, size)
    assert [history for _, histories in found for history in histories] == expected
    assert [user for users, _ in found for user in users] == [f"{n}" for n, rows in enumerate(files) for _ in rows]
    assert all(len(users) == size for users, _ in found[:-1])


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "users.parquet")
    columns = {"user_id": USERS, "history": HISTORIES}
    rows = [{"user_id": user, "history": history} for user, history in zip(USERS, HISTORIES, strict=True)]
    sources = [
        path,
        [str(path)],
        Dataset.from_dict(columns),
        Dataset.from_dict(columns).with_format("numpy"),
        Dataset.from_dict(columns).to_iterable_dataset(),
        IterableDataset.from_generator(lambda: iter(rows)),
        load_dataset("parquet", data_files=str(path), split="train", streaming=True),
    ]
    expected = [(USERS[first : first + 2], HISTORIES[first : first + 2]) for first in (0, 2, 4)]
    for source in sources:
        assert read(source) == expected
        assert open_users(source).rows in (5, None)


def test_ids_are_the_users_own_strings(tmp_path: Path) -> None:
    numbers = write(tmp_path / "0.parquet", [7, 8], [[1, 2], []])
    gaps = write(tmp_path / "1.parquet", pa.array([1.0, 2.0]), pa.array([[3.0], [4.5]]))
    large = pa.array([["y"]], pa.large_list(pa.large_string()))
    write(tmp_path / "2.parquet", pa.array(["007"], pa.large_string()), large)
    found = read([numbers, gaps, tmp_path / "2.parquet"], size=9)
    assert found == [(["7", "8", "1", "2", "007"], [["1", "2"], [], ["3"], ["4.5"], ["y"]])]
    arrays = [{"user_id": np.int64(5), "history": np.array(["a", "b"])}]
    source = IterableDataset.from_generator(lambda: iter(arrays))
    assert read(source) == [(["5"], [["a", "b"]])]


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    digest = block_digest(USERS, HISTORIES)
    assert digest == block_digest(list(USERS), [list(history) for history in HISTORIES])
    changed = [[*HISTORIES[0], "c"], *HISTORIES[1:]]
    assert len({digest, block_digest(USERS, changed), block_digest(USERS[::-1], HISTORIES)}) == 3


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("user", "history", "message"),
    [
        (None, ["a"], r"user_id must be an id, got None in row 1 of b.parquet \(the first is 0\); give every user one"),
        (" ", ["a"], "user_id must be an id, got ' ' in row 1 of b.parquet"),
        ("u", None, r"history must be a list of item ids, got None in row 1 of b.parquet .*; write \[\] for a user"),
        ("u", ["a", None], "history must be a list of item ids, got None as one of them in row 1 of b.parquet"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, user: Any, history: Any, message: str) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", ["fine", user], [["a"], history])
    with pytest.raises(DataError, match=message):
        read(tmp_path, size=3)


def test_a_history_that_is_no_list(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["u"], ["a b c"])
    with pytest.raises(DataError, match="history must be a list of item ids, got 'a b c' in row 0 of a.parquet"):
        read(tmp_path)
    with pytest.raises(DataError, match="got 'a b c' in row 0 of the Dataset"):
        read(Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache")))
    rows = [{"user_id": "u", "history": ["a"]}, {"user_id": "v", "history": 3}]
    with pytest.raises(DataError, match="got 3 in row 1 of the IterableDataset"):
        read(IterableDataset.from_generator(lambda: iter(rows)))


# ---------------------------------------------------------------------- columns and files


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "users.parquet")
    message = (
        r"user_column must be a column of users.parquet \(junk, user_id, history\), got 'id'; give its name as user_"
    )
    with pytest.raises(ConfigurationError, match=message):
        open_users(path, user_column="id")
    pq.write_table(pa.table({"user_id": ["u"], "items": [["a"]]}), tmp_path / "z.parquet")
    with pytest.raises(ConfigurationError, match=r"history_column must be a column of z.parquet \(user_id, items\)"):
        open_users(tmp_path)  # before anything is read
    data = Dataset.from_dict({"user": ["u"], "items": [["a"]]})
    assert read(data, user_column="user", history_column="items") == [(["u"], [["a"]])]
    for source, where in ((data, "the Dataset"), (data.to_iterable_dataset(), "the IterableDataset")):
        with pytest.raises(ConfigurationError, match=f"user_column must be a column of {where} .user, items"):
            open_users(source)
    rows = [{"user_id": "u", "history": ["a"]}, {"user_id": "v"}]
    with pytest.raises(ConfigurationError, match=r"history_column must be a column of row 1 of the Iter.*\(user_id\)"):
        read(IterableDataset.from_generator(lambda: iter(rows)))


def test_files_of_folders_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("b/x", "a/y", "a/x", ".hidden/x", "b/__old/x", "b/.x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / f"{name}.parquet", [name], [["i"]])
    (tmp_path / "notes.txt").write_text("no parquet")
    assert read(tmp_path, 9)[0][0] == ["a/x", "a/y", "b/x"]
    assert read(f"{tmp_path}/*/x.parquet", 9)[0][0] == ["a/x", "b/x"]
    assert read([tmp_path / "b", str(tmp_path / "a" / "x.parquet")], 9)[0][0] == ["b/x", "a/x"]
    assert open_users(tmp_path).description["files"].keys() == {"a/x.parquet", "a/y.parquet", "b/x.parquet"}


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.parquet", "hf://datasets/me/users/*.parquet", []])
def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="source must name parquet files, got"):
        open_users(source)


def test_another_kind_of_source() -> None:
    split = Dataset.from_dict({"user_id": ["u"], "history": [["a"]]})
    for source in ({"u": ["a"]}, DatasetDict(train=split), [split], 3):
        with pytest.raises(ConfigurationError, match="source must be parquet files.*; of a DatasetDict give one split"):
            open_users(source)  # type: ignore[arg-type]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "users.parquet", [f"u{n}" for n in range(3000)], [["a", f"{n}"] for n in range(3000)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"users.parquet must be a parquet file, got one that cannot be read"):
        open_users(path)
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(DataError, match=r"users.parquet must be a parquet file, got one that cannot be read"):
        read(path)


def test_overlap(tmp_path: Path) -> None:
    write(tmp_path / "users.parquet")
    assert open_users(tmp_path).overlaps(tmp_path / "recs")
    assert not open_users(tmp_path / "users.parquet").overlaps(tmp_path / "recs")
    assert open_users(f"{tmp_path}/*.parquet").overlaps(tmp_path)
    assert not open_users(Dataset.from_dict({"user_id": ["u"], "history": [["a"]]})).overlaps(tmp_path)


# ---------------------------------------------------------------------- memory


def test_a_row_group_is_not_held_at_once(tmp_path: Path) -> None:
    count = 400_000
    items = pa.array([f"item {number}" for number in range(5000)]).take(pa.array(np.arange(count * 10) * 7 % 5000))
    histories = pa.ListArray.from_arrays(pa.array(np.arange(0, count * 10 + 1, 10), pa.int32()), items)
    whole = histories.nbytes
    path = write(tmp_path / "users.parquet", [f"u{user}" for user in range(count)], histories)
    assert pq.read_metadata(path).num_row_groups == 1
    del items, histories
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in open_users(path).blocks(1000)]
    assert len(held) == count // 1000
    assert max(held) < whole / 5


def test_a_stream_is_read_block_by_block() -> None:
    read_so_far = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal read_so_far
        for user in range(100):
            read_so_far += 1
            yield {"user_id": f"u{user}", "history": ["a"]}

    for block in open_users(IterableDataset.from_generator(rows)).blocks(10):
        assert read_so_far == 10 * (block.number + 1)
