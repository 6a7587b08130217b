"""The file of an item table: as safetensors writes it, chunk by chunk, whole or not at all."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_bituning.catalog.table_file import chunks, non_finite_rows, sha256_of, whole_file, write_rows
from safetensors.torch import load, load_file, save_file

from peft_bituning.catalog import table_file
from peft_bituning.errors import InputError

SHAPES = st.tuples(st.integers(0, 40), st.integers(1, 9))


def rows_of(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]), st.lists(st.integers(0, 40), max_size=4))
def test_any_parts_give_the_file_that_safetensors_reads(tmp_path_factory, shape, dtype, cuts: list[int]) -> None:
    rows = rows_of(shape, 0).to(dtype)
    places = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    path = tmp_path_factory.mktemp("file") / "rows.safetensors"
    digest = write_rows(path, [rows[start:stop] for start, stop in zip(places, places[1:], strict=False)], shape, dtype)
    found = load_file(path)
    assert list(found) == ["embeddings"] and found["embeddings"].dtype == dtype
    assert torch.equal(found["embeddings"], rows)
    halves = rows.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)  # numpy knows no bfloat16
    assert digest == hashlib.sha256(halves.numpy().tobytes()).hexdigest()


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.integers(1, 200))
def test_chunks_are_the_rows_in_order_and_small(shape: tuple[int, int], size: int) -> None:
    rows = rows_of(shape, 1)
    before, table_file.CHUNK_BYTES = table_file.CHUNK_BYTES, size
    try:
        found = list(chunks(rows))
        digest, columns = sha256_of(rows), sha256_of(rows.T.contiguous().T)
        bad = non_finite_rows(rows.index_fill(0, torch.arange(0, len(rows), 3), float("inf")), limit=4)
    finally:
        table_file.CHUNK_BYTES = before
    assert torch.equal(torch.cat(found), rows)
    assert all(len(chunk) == 1 or chunk.numel() * 4 <= size for chunk in found)
    assert digest == columns == hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    assert bad == list(range(0, len(rows), 3))[:4]


def test_a_row_with_one_value_that_is_not_finite_is_found() -> None:
    rows = rows_of((9, 4), 2)
    rows[2, 3], rows[7, 0] = float("nan"), float("-inf")
    assert non_finite_rows(rows) == [2, 7]
    assert non_finite_rows(rows[:2]) == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([torch.ones(3, 2)], "parts must be 4 rows together, got 3"),
        ([torch.ones(3, 2), torch.ones(1, 3)], "the rows from 3 on must be torch.float32 of width 2, got .* width 3"),
        ([torch.ones(4, 2).double()], "the rows from 0 on must be torch.float32 of width 2, got torch.float64"),
    ],
)
def test_parts_have_to_fit(tmp_path: Path, parts: list[torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_rows(tmp_path / "rows.safetensors", parts, (4, 2), torch.float32)


def test_a_failure_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    save_file({"embeddings": torch.ones(2, 2)}, path)
    before = path.read_bytes()
    with pytest.raises(InputError), whole_file(path) as temporary:
        write_rows(temporary, [torch.ones(1, 2)], (2, 2), torch.float32)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["rows.safetensors"]


def test_a_mapped_tensor_outlives_the_replacement_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    rows = rows_of((50_000, 16), 3)
    write_rows(path, [rows], (50_000, 16), torch.float32)
    mapped = load_file(path)["embeddings"]
    with whole_file(path) as temporary:
        write_rows(temporary, [torch.zeros(1, 16)], (1, 16), torch.float32)
    assert np.array_equal(mapped.numpy(), rows.numpy())
    assert load(path.read_bytes())["embeddings"].shape == (1, 16)
