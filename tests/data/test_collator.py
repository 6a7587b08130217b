"""From histories to padded tensors."""

import pytest
import torch

from peft_bituning.data import ItemCatalog, PromptEncoder, PromptTemplate
from peft_bituning.data.collator import HistoryCollator
from peft_bituning.errors import UnknownItemError

TEMPLATE = PromptTemplate("short", "Seen:", item_instruction="Item:")
HISTORIES = [[0, 1, 2, 3, 2], [], [3]]


@pytest.fixture
def prompts(byte_tokenizer, catalog: ItemCatalog) -> PromptEncoder:
    return PromptEncoder(TEMPLATE, byte_tokenizer, catalog)


@pytest.fixture
def collate(prompts: PromptEncoder) -> HistoryCollator:
    return HistoryCollator(prompts, pad_token_id=7, max_items=3)


def test_rows_are_prompts_padded_at_the_right(collate, prompts) -> None:
    batch = collate(HISTORIES)
    expected = [prompts.encode(history) for history in HISTORIES]
    assert batch.input_ids.shape == (3, max(map(len, expected)))
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.item_indices.dtype == torch.int64
    for row, tokens in enumerate(expected):
        assert batch.input_ids[row, : len(tokens)].tolist() == tokens
        assert (batch.input_ids[row, len(tokens) :] == 7).all()
        assert batch.attention_mask[row].tolist() == [1] * len(tokens) + [0] * (batch.input_ids.shape[1] - len(tokens))


def test_the_recommender_reads_the_newest_items(collate) -> None:
    batch = collate(HISTORIES)
    assert batch.item_indices.tolist() == [[2, 3, 2], [0, 0, 0], [3, 0, 0]]
    assert batch.item_mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert batch.item_mask.dtype == torch.bool


def test_the_recommender_may_read_other_histories(collate) -> None:
    others = [[1], [2, 0], []]
    batch = collate(HISTORIES, collaborative_histories=others)
    assert batch.item_indices.tolist() == [[1, 0], [2, 0], [0, 0]]
    assert batch.item_mask.tolist() == [[True, False], [True, True], [False, False]]
    assert torch.equal(batch.input_ids, collate(HISTORIES).input_ids)


def test_cold_starts_alone_keep_one_masked_item(collate) -> None:
    batch = collate([[], []])
    assert batch.item_indices.shape == (2, 1)
    assert not batch.item_mask.any()


def test_empty_prompts_keep_one_masked_token(byte_tokenizer, catalog) -> None:
    bare = PromptEncoder(PromptTemplate("bare"), byte_tokenizer, catalog)
    batch = HistoryCollator(bare, 7, 3)([[]])
    assert batch.input_ids.tolist() == [[7]]
    assert batch.attention_mask.tolist() == [[0]]


def test_items_have_their_own_prompt(collate, prompts) -> None:
    assert collate([[2]], kind="item").input_ids.tolist() == [prompts.encode([2], "item")]
    assert collate.length([2], "item") == len(prompts.encode([2], "item"))
    assert collate.length([2]) == len(prompts.encode([2]))
    assert collate([[2]], "item").input_ids.tolist() != collate([[2]]).input_ids.tolist()


def test_a_batch_moves_as_a_whole(collate) -> None:
    batch = collate(HISTORIES).to("meta")
    tensors = (batch.input_ids, batch.attention_mask, batch.item_indices, batch.item_mask)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_an_index_outside_the_catalog_is_refused(collate) -> None:
    with pytest.raises(UnknownItemError, match="Item index 4 is outside the catalog of 4 items"):
        collate([[0, 4]])
