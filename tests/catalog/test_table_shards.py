"""Shards on disk: what is kept, what is noticed, what is refused, and the table made of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_bituning.catalog.table_shards import INDEX_FILE, TABLE_FILE
from safetensors.torch import load_file, save_file

from peft_bituning.catalog import ItemTable, TableShards
from peft_bituning.errors import ArtifactError, ConfigurationError, InputError

IDENTITY = {"weights": "ab12", "limits": {"max_length": 64, "max_history": None}, "fields": ["brand"]}


def embeddings_of(shards: TableShards, width: int = 3, seed: int = 0) -> torch.Tensor:
    return 5 * torch.randn(shards.num_items, width, generator=torch.Generator().manual_seed(seed))


def write_all(shards: TableShards, embeddings: torch.Tensor) -> None:
    for number in range(len(shards)):
        rows = shards.rows(number)
        shards.write(number, embeddings[rows.start - shards.first_item : rows.stop - shards.first_item])


@pytest.fixture
def shards(tmp_path: Path) -> TableShards:
    """Return ten items in four shards, written and assembled."""
    made = TableShards(tmp_path / "table", 10, IDENTITY, shard_size=3)
    made.prepare()
    write_all(made, embeddings_of(made))
    made.assemble()
    return made


def without_table(shards: TableShards) -> TableShards:
    for name in (TABLE_FILE, INDEX_FILE):
        (shards.folder / name).unlink()
    return shards


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 35), st.integers(0, 7), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_table_is_that_of_all_rows_at_once(
    tmp_path_factory, items: int, size: int, first: int, dtype: torch.dtype
) -> None:
    shards = TableShards(tmp_path_factory.mktemp("shards"), items, IDENTITY, size, dtype, first)
    covered = [row for number in range(len(shards)) for row in shards.rows(number)]
    assert covered == list(range(first, first + items))
    embeddings = embeddings_of(shards)
    assert not shards.is_complete()
    write_all(shards, embeddings)
    assert all(shards.is_whole(number) for number in range(len(shards)))
    shards.assemble()
    shards.check()
    assert shards.is_complete()
    found = shards.table().embeddings
    assert found.dtype == dtype
    rows = embeddings.numpy().astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert found.float().numpy() == pytest.approx(unit, abs=1e-6 if dtype == torch.float32 else 4e-3)
    assert torch.equal(found, ItemTable.from_embeddings(embeddings).embeddings.to(dtype))


def test_the_index_is_laid_out_as_that_of_a_model(shards) -> None:
    index = json.loads((shards.folder / INDEX_FILE).read_text())
    table = shards.table()
    assert index["metadata"] == {
        "total_size": 10 * 3 * 4,
        "width": 3,
        "sha256": table.checksum(),
        "num_items": 10,
        "first_item": 0,
        "shard_size": 3,
        "dtype": "float32",
        "identity": IDENTITY,
    }
    assert list(index["weight_map"].values()) == [f"item_table-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    parts = [load_file(shards.folder / file)[name] for name, file in sorted(index["weight_map"].items())]
    assert torch.equal(torch.cat(parts), table.embeddings)


def test_the_table_needs_its_shards_no_more(shards) -> None:
    before = shards.table().checksum()
    for number in range(len(shards)):
        shards.path(number).unlink()
    shards.check()
    assert shards.is_complete()
    assert shards.table().checksum() == before == ItemTable.load(shards.folder / TABLE_FILE, 10).checksum()


# ---------------------------------------------------------------------- what is noticed


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_shard_is_noticed(shards, caplog) -> None:
    whole = shards.path(1).read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:5], b""):
        shards.path(1).write_bytes(damaged)
        without_table(shards).check()
        assert [shards.is_whole(number) for number in range(4)] == [True, False, True, True]
        assert "item_table-00002-of-00004.safetensors is damaged and is encoded again" in caplog.text
        shards.path(1).write_bytes(whole)
        shards.assemble()
    flip(shards.path(1), -1)
    assert [shards.is_whole(number) for number in range(4)] == [True, False, True, True]
    shards.path(1).unlink()
    assert not shards.is_whole(1)


def test_a_damaged_table_is_noticed(shards, caplog) -> None:
    path = shards.folder / TABLE_FILE
    whole = path.read_bytes()
    for place in (-1, 9):
        flip(path, place)
        assert not shards.is_complete()
        assert "item_table.safetensors is damaged and is made again" in caplog.text
        path.write_bytes(whole)
        assert shards.is_complete()
    path.write_bytes(whole[:-2])
    assert not shards.is_complete()
    shards.assemble()
    assert path.read_bytes() == whole
    path.unlink()
    assert not shards.is_complete()


def test_what_a_kill_left_is_removed_and_nothing_else(shards) -> None:
    kept = sorted(path.name for path in shards.folder.iterdir())
    for name in (f".{TABLE_FILE}.tmp", f".{INDEX_FILE}.tmp", ".item_table-00001-of-00004.safetensors.tmp"):
        (shards.folder / name).write_bytes(b"half")
    (shards.folder / "notes.tmp").write_text("mine")
    shards.prepare()
    assert sorted(path.name for path in shards.folder.iterdir()) == sorted([*kept, "notes.tmp"])


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": {**IDENTITY, "weights": "cd34"}}, r"identity.weights was 'ab12' and is 'cd34'; give another"),
        ({"identity": {**IDENTITY, "limits": {"max_length": 9}}}, "identity.limits.max_length was 64 and is 9"),
        ({"identity": {}}, "identity.weights was 'ab12' and is None"),
        ({"shard_size": 4}, "shard_size was 3 and is 4"),
        ({"num_items": 11}, "num_items was 10 and is 11"),
        ({"first_item": 2}, "first_item was 0 and is 2"),
        ({"dtype": torch.bfloat16}, "dtype was 'float32' and is 'bfloat16'"),
    ],
)
def test_another_table_is_refused(shards, finished: bool, changes, message: str) -> None:
    if not finished:
        without_table(shards)
    before = {path: path.read_bytes() for path in shards.folder.iterdir()}
    first = INDEX_FILE if finished else shards.path(0).name
    with pytest.raises(ArtifactError, match=rf"{first} in .* is of another table: .*{message}"):
        replace(shards, **changes).check()
    assert {path: path.read_bytes() for path in shards.folder.iterdir()} == before


def test_an_equal_identity_in_other_words_is_the_same(shards) -> None:
    replace(shards, identity={**IDENTITY, "fields": ("brand",)}).check()


def test_a_damaged_shard_of_another_cut_is_refused(shards) -> None:
    without_table(shards)
    for number in range(4):
        shards.path(number).write_bytes(b"")
    with pytest.raises(
        ArtifactError, match="item_table-00001-of-00004.* must be one of 2 shards of 5 items, got a dam"
    ):
        replace(shards, shard_size=5).check()


def test_a_table_of_somebody_else_is_not_overwritten(tmp_path) -> None:
    ItemTable.from_embeddings(torch.ones(4, 2)).save(tmp_path / TABLE_FILE)
    with pytest.raises(ArtifactError, match="holds item_table.safetensors but no readable .*index.json, .* of its own"):
        TableShards(tmp_path, 4, IDENTITY).check()


def test_a_model_in_shards_of_this_name_is_refused(tmp_path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "item_table-00001-of-00001.safetensors")
    with pytest.raises(ArtifactError, match="is of another table: .*num_items was None and is 4"):
        TableShards(tmp_path, 4, IDENTITY).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 0}, "num_items must be >= 1, got 0"),
        ({"shard_size": 0}, "shard_size must be >= 1, got 0"),
        ({"first_item": -1}, "first_item must be >= 0, got -1"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.bfloat16, got torch.float16"),
        ({"identity": {"weights": torch.ones(1)}}, "identity must be a mapping of JSON values, got .*; write hashes"),
    ],
)
def test_settings_out_of_range(shards, changes, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(shards, **changes)


def test_a_shard_takes_its_own_rows(shards) -> None:
    with pytest.raises(InputError, match="embeddings must be the 1 rows of shard 3, got 3"):
        shards.write(3, torch.ones(3, 3))
    with pytest.raises(InputError, match=r"must be finite, got NaN or infinity at catalog indices \[0\]"):
        shards.write(3, torch.full((1, 3), float("nan")))
    assert shards.is_whole(3)


def test_shards_of_two_widths_make_no_table(shards) -> None:
    before = (shards.folder / TABLE_FILE).read_bytes()
    shards.write(2, torch.ones(3, 4))
    with pytest.raises(ArtifactError, match="item_table-00003-of-00004.safetensors must be of width 3, got 4"):
        shards.assemble()
    assert (shards.folder / TABLE_FILE).read_bytes() == before


def test_a_missing_shard_makes_no_table(shards) -> None:
    shards.path(2).unlink()
    with pytest.raises(ArtifactError, match="item_table-00003-of-00004.safetensors cannot be read .*one shared folder"):
        shards.assemble()


def test_a_table_of_another_type_is_named(shards) -> None:
    with pytest.raises(ArtifactError, match="item_table.safetensors must be torch.bfloat16, got torch.float32"):
        replace(shards, dtype=torch.bfloat16).table()
