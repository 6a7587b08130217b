"""The item table against numpy, and its file."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft_bituning.catalog import ItemTable, item_table
from peft_bituning.catalog.item_table import chunks, non_finite_rows
from peft_bituning.errors import ArtifactError, InputError

SHAPES = st.tuples(st.integers(0, 40), st.integers(1, 9))


def rows_of(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.integers(1, 200))
def test_chunks_are_the_rows_in_order_and_small(shape: tuple[int, int], size: int) -> None:
    rows = rows_of(shape, 1)
    before, item_table.CHUNK_BYTES = item_table.CHUNK_BYTES, size
    try:
        found = list(chunks(rows))
        digest, columns = ItemTable(rows).checksum(), ItemTable(rows.T.contiguous().T).checksum()
        bad = non_finite_rows(rows.index_fill(0, torch.arange(0, len(rows), 3), float("inf")), limit=4)
    finally:
        item_table.CHUNK_BYTES = before
    assert torch.equal(torch.cat(found), rows)
    assert all(len(chunk) == 1 or chunk.numel() * 4 <= size for chunk in found)
    assert digest == columns == hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    assert bad == list(range(0, len(rows), 3))[:4]


def test_a_row_with_one_value_that_is_not_finite_is_found() -> None:
    rows = rows_of((9, 4), 2)
    rows[2, 3], rows[7, 0] = float("nan"), float("-inf")
    assert non_finite_rows(rows) == [2, 7]
    assert non_finite_rows(rows[:2]) == []


@pytest.fixture
def table() -> ItemTable:
    return ItemTable.from_embeddings(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_scores_are_cosines(items: int, width: int, users: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(users, width)), random.normal(size=(items, width))
    table = ItemTable.from_embeddings(torch.from_numpy(right))
    assert table.embeddings.dtype == torch.float32
    assert table.embeddings.norm(dim=1).numpy() == pytest.approx(np.ones(items), abs=1e-6)
    cosines = (left @ right.T) / np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))
    assert table.scores(torch.from_numpy(left)).numpy() == pytest.approx(cosines, abs=1e-5)


def test_half_precision_is_widened_before_it_is_normalised() -> None:
    rows = torch.full((1, 4), 200.0, dtype=torch.float16)  # its square sum would overflow
    assert ItemTable.from_embeddings(rows).embeddings.tolist() == [[0.5] * 4]


def test_bfloat16_rows_are_scored_in_float32(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(50, 24, generator=generator), dim=1).bfloat16()
    users = torch.randn(3, 24, generator=generator)
    monkeypatch.setattr(item_table, "CHUNK_BYTES", 7 * 48)  # seven rows
    found = ItemTable(rows).scores(users)
    left, right = users.double().numpy(), rows.double().numpy()
    expected = left @ right.T / np.linalg.norm(left, axis=1, keepdims=True)
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(expected, abs=1e-6)
    cosines = expected / np.linalg.norm(right, axis=1)
    assert found.numpy() == pytest.approx(cosines, abs=4e-3)


def test_a_bfloat16_table_is_extended_saved_and_loaded_as_one(tmp_path) -> None:
    table = ItemTable(torch.eye(3).bfloat16()).extended(torch.tensor([[0.0, 3.0, 4.0]]))
    assert table.embeddings.dtype == torch.bfloat16
    table.save(tmp_path / "table.safetensors")
    again = ItemTable.load(tmp_path / "table.safetensors", 4)
    assert torch.equal(again.embeddings, table.embeddings) and again.embeddings.dtype == torch.bfloat16
    assert again.checksum() == table.checksum()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_have_to_be_finite(value: float) -> None:
    rows = torch.ones(4, 2)
    rows[[1, 3], 0] = value
    with pytest.raises(InputError, match=r"must be finite, got NaN or infinity at catalog indices \[1, 3\]"):
        ItemTable.from_embeddings(rows)


def test_rows_have_to_be_rows() -> None:
    with pytest.raises(InputError, match=r"item embeddings must be \[I, D\], got \[4\]"):
        ItemTable.from_embeddings(torch.ones(4))


def test_new_items_come_last_and_change_nothing(table) -> None:
    longer = table.extended(torch.tensor([[3.0, 4.0, 0.0]]))
    assert len(table) == 5 and len(longer) == 6
    assert torch.equal(longer.embeddings[:5], table.embeddings)
    assert longer.embeddings[5].tolist() == pytest.approx([0.6, 0.8, 0.0])
    with pytest.raises(InputError, match=r"must be \[J, D\] with D = 3, got \[1, 2\]"):
        table.extended(torch.ones(1, 2))
    with pytest.raises(InputError, match="must be finite"):
        table.extended(torch.full((1, 3), float("nan")))


def test_the_checksum_is_that_of_the_values(table) -> None:
    assert table.checksum() == ItemTable(table.embeddings.clone()).checksum()
    assert table.checksum() == ItemTable(table.embeddings.T.contiguous().T).checksum()
    changed = table.embeddings.clone()
    changed[4, 2] = torch.nextafter(changed[4, 2], torch.tensor(2.0))
    assert table.checksum() != ItemTable(changed).checksum()


def test_saving_keeps_every_bit(table, tmp_path) -> None:
    table.save(tmp_path / "table.safetensors")
    again = ItemTable.load(tmp_path / "table.safetensors", 5)
    assert torch.equal(again.embeddings, table.embeddings)
    assert again.checksum() == table.checksum()


def test_the_file_is_the_one_that_safetensors_writes(table, tmp_path) -> None:
    save_file({"embeddings": table.embeddings}, tmp_path / "theirs.safetensors")
    for same in (table, ItemTable(table.embeddings.T.contiguous().T)):
        same.save(tmp_path / "ours.safetensors")
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert table.checksum() == hashlib.sha256(table.embeddings.numpy().tobytes()).hexdigest()


def test_a_table_is_saved_over_the_file_that_it_is_mapped_from(tmp_path) -> None:
    path = tmp_path / "table.safetensors"
    ItemTable.from_embeddings(torch.randn(60_000, 8, generator=torch.Generator().manual_seed(2))).save(path)
    mapped = ItemTable.load(path)
    before = mapped.checksum()
    mapped.save(path)
    assert mapped.checksum() == ItemTable.load(path, 60_000).checksum() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embeddings": torch.ones(4, 3)}, "must have 5 rows, one an item, got 4"),
        ({"embedding": torch.ones(5, 3)}, "must hold one tensor `embeddings`, got embedding;"),
        ({"embeddings": torch.ones(5, 3), "more": torch.ones(1)}, "one tensor `embeddings`, got embeddings, more;"),
        ({"embeddings": torch.ones(15)}, r"must be \[I, D\] torch.float32 or torch.bfloat16, got \[15\] torch.float32"),
        ({"embeddings": torch.ones(5, 3).half()}, r"or torch.bfloat16, got \[5, 3\] torch.float16; save"),
        ({"embeddings": torch.full((5, 3), float("nan"))}, "must be finite, got NaN or infinity; it is unfinished"),
    ],
)
def test_another_content_is_refused(tmp_path, tensors, message: str) -> None:
    save_file(tensors, tmp_path / "table.safetensors")
    with pytest.raises(ArtifactError, match=message):
        ItemTable.load(tmp_path / "table.safetensors", 5)


def test_a_missing_or_damaged_file_is_refused(table, tmp_path) -> None:
    path = tmp_path / "table.safetensors"
    with pytest.raises(ArtifactError, match="table.safetensors cannot be read .*; it is missing or damaged"):
        ItemTable.load(path)
    table.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="table.safetensors cannot be read .*; it is missing or damaged"):
        ItemTable.load(path)
