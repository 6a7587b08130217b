"""Encoding histories: order and batches do not matter, the collaborative information does."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from peft_bituning import LaserRecommender
from peft_bituning.base_models import BaseModel
from peft_bituning.block_file import BlockFile
from peft_bituning.catalog import HistoryEncoder, ItemTable, encode_items_into, table_blocks
from peft_bituning.catalog.encoder import HistorySettings
from peft_bituning.data import PromptEncoder
from peft_bituning.data.collator import HistoryCollator
from peft_bituning.errors import ArtifactError, ConfigurationError, InputError

HISTORIES = [[0, 1, 2], [5], [], [3, 4, 5, 6, 7, 8, 9], [11, 10], [1, 0, 2], [7]]


@pytest.fixture(scope="module")
def encoder(trained) -> HistoryEncoder:
    made = trained.recommender.encoder
    return HistoryEncoder(made.model, made.collator, made.id_recommender, torch.device("cpu"), batch_size=3)


@pytest.fixture(scope="module")
def alone(encoder) -> np.ndarray:
    return torch.cat([encoder.encode([history]) for history in HISTORIES]).numpy()


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(len(HISTORIES))), st.integers(1, 8))
def test_embeddings_depend_neither_on_batch_nor_on_order(encoder, alone, order: list[int], batch_size: int) -> None:
    some = HistoryEncoder(
        encoder.model, encoder.collator, encoder.id_recommender, encoder.device, batch_size=batch_size
    )
    found = some.encode([HISTORIES[row] for row in order], distributed=False)
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    assert found.numpy() == pytest.approx(alone[order], abs=1e-5)


def test_a_cpu_takes_few_tokens_a_pass(encoder, alone, monkeypatch) -> None:
    """Rows do not see each other: what a pass holds changes nothing but the order of sums, as in the test above."""
    shapes: list[tuple[int, int]] = []
    forward = HistoryEncoder.forward

    def counted(self: HistoryEncoder, *rest: Any) -> Any:
        output, batch = forward(self, *rest)
        shapes.append((batch.input_ids.shape[0], batch.input_ids.shape[1]))
        return output, batch

    monkeypatch.setattr(HistoryEncoder, "forward", counted)
    longest = max(encoder.collator.length(history) for history in HISTORIES)
    limit = 2 * longest
    monkeypatch.setattr("peft_bituning.catalog.encoder.CPU_TOKENS", limit / torch.get_num_threads())
    some = HistoryEncoder(encoder.model, encoder.collator, encoder.id_recommender, encoder.device, batch_size=4)
    assert some.encode(HISTORIES).numpy() == pytest.approx(alone, abs=1e-5)
    assert shapes[0] == (2, longest) and sum(rows for rows, _ in shapes) == len(HISTORIES)
    assert all(rows <= 4 and (rows == 1 or rows * width <= limit) for rows, width in shapes)
    monkeypatch.setattr("peft_bituning.catalog.encoder.CPU_TOKENS", 0)
    shapes.clear()
    assert some.encode(HISTORIES).numpy() == pytest.approx(alone, abs=1e-5)
    assert [rows for rows, _ in shapes] == [1] * len(HISTORIES)  # a row that is too long alone is run all the same
    some.id_recommender = None  # nothing else is to be read off then: rows share their start
    assert [len(rows) for rows in some._passes([9] * 6, world=1, batch_size=4)] == [4, 2]


def test_a_single_process_may_ask_for_sharing(encoder, alone) -> None:
    assert encoder.encode(HISTORIES, distributed=True).numpy() == pytest.approx(alone, abs=1e-5)


def test_order_within_a_history_matters(alone) -> None:
    assert np.abs(alone[0] - alone[5]).max() > 1e-3


def test_swapped_collaborative_histories_change_embeddings(encoder, alone) -> None:
    swapped = encoder.encode(HISTORIES, collaborative_histories=HISTORIES[1:] + HISTORIES[:1]).numpy()
    assert (np.abs(swapped - alone).max(axis=1) > 1e-4).all()
    same = encoder.encode(HISTORIES, collaborative_histories=HISTORIES).numpy()
    assert same == pytest.approx(alone, abs=1e-5)


def test_the_newest_states_are_made_from_the_whole_history(encoder) -> None:
    history = HISTORIES[3]
    newest = HistoryEncoder(
        encoder.model,
        encoder.collator,
        encoder.id_recommender,
        encoder.device,
        HistorySettings(max_collaborative_states=2),
    )
    batch = encoder.collator([history])
    states = encoder.id_recommender.encode(batch.item_indices, batch.item_mask)[:, -2:]
    with torch.no_grad():
        expected = encoder.model.eval()(batch.input_ids, batch.attention_mask, collaborative_embeds=states)
    # Beside a shorter history its two newest items do not stand in the last two columns.
    for histories in ([history], [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], history]):
        found = newest.encode(histories)[-1]
        assert found.numpy() == pytest.approx(expected.pooler_output[0].numpy(), abs=1e-5)
    assert np.abs(found.numpy() - encoder.encode([history])[0].numpy()).max() > 1e-4


def test_swapped_histories_stay_with_their_rows(encoder) -> None:
    """Rows are sorted by length on the way: what they swap with has to follow them."""
    others = HISTORIES[::-1]
    pairs = zip(HISTORIES, others, strict=True)
    expected = torch.cat([encoder.encode([row], collaborative_histories=[other]) for row, other in pairs])
    found = encoder.encode(HISTORIES, collaborative_histories=others)
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_items_are_one_item_histories(encoder) -> None:
    found = encoder.encode_items(4, first=3)
    expected = encoder.encode([[3], [4], [5], [6]], kind="item")
    assert found.shape == (4, 32)
    assert torch.equal(found, expected)


def test_items_by_what_they_are_scored_by(encoder, alone) -> None:
    """`embedding` changes what the prefix reads of items, and of items alone."""
    made = (encoder.model, encoder.collator, encoder.id_recommender, encoder.device)
    other = HistoryEncoder(*made, HistorySettings(item_collaborative="embedding"))
    inputs, batch = other.inputs([[3], [4]], "item")
    vectors = encoder.id_recommender.encode_items(batch.item_indices, batch.item_mask)
    assert torch.equal(inputs["collaborative_embeds"], vectors)
    assert float((other.encode_items(4, first=3) - encoder.encode_items(4, first=3)).norm(dim=1).min()) > 1e-3
    torch.testing.assert_close(other.encode(HISTORIES).numpy(), alone, atol=1e-5, rtol=0)
    with pytest.raises(ConfigurationError, match="item_collaborative must be one of history, embedding, got 'state'"):
        HistorySettings(item_collaborative="state")


def test_a_batch_has_rows(encoder) -> None:
    with pytest.raises(ConfigurationError, match="batch_size must be >= 1, got 0"):
        HistoryEncoder(encoder.model, encoder.collator, None, encoder.device, batch_size=0)


def test_no_history_gives_no_row(encoder) -> None:
    assert len(encoder.encode([])) == 0


def test_training_mode_comes_back(encoder) -> None:
    encoder.model.train()
    encoder.encode(HISTORIES[:1])
    assert encoder.model.training
    encoder.model.eval()
    encoder.encode(HISTORIES[:1])
    assert not encoder.model.training


def test_forward_keeps_gradients_and_encode_has_none(encoder) -> None:
    parameter = next(value for name, value in encoder.model.named_parameters() if "suffix" in name)
    parameter.requires_grad_(True)
    try:
        output, batch = encoder.forward(HISTORIES[:2])
        assert output.pooler_output.requires_grad
        assert batch.input_ids.shape == batch.attention_mask.shape
        assert not encoder.encode(HISTORIES[:2]).requires_grad
    finally:
        parameter.requires_grad_(False)


def test_an_embedding_that_is_not_finite_is_named_by_its_row(encoder) -> None:
    weight = encoder.model.get_input_embeddings().weight
    others = encoder.collator([[0, 1, 2], [7]]).input_ids.flatten().tolist()
    own = min(set(encoder.collator([[3]]).input_ids[0].tolist()) - set(others))
    kept = weight[own].detach().clone()
    weight.data[own] = float("nan")
    try:
        with pytest.raises(
            InputError, match=r"in rows \[1\] of 3 \(looking\); a half-precision base model can overflow"
        ):
            encoder.encode([[0, 1, 2], [3], [7]], description="looking")
        assert not encoder.model.training
    finally:
        weight.data[own] = kept


# ---------------------------------------------------------------------- into blocks


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Return a list that takes the catalog index of every item that is encoded from here on."""
    seen: list[int] = []
    forward = HistoryEncoder.forward

    def counted(self: HistoryEncoder, histories: Any, *rest: Any) -> Any:
        seen.extend(item for (item,) in histories)
        return forward(self, histories, *rest)

    monkeypatch.setattr(HistoryEncoder, "forward", counted)
    return seen


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 14), st.integers(1, 12), st.integers(0, 11))
def test_blocks_of_any_size_are_the_whole_table(encoder, tmp_path_factory, size: int, items: int, first: int) -> None:
    items = min(items, 12 - first)
    blocks = table_blocks(tmp_path_factory.mktemp("blocks"), items, {}, size, first_item=first)
    found = encode_items_into(encoder, blocks).embeddings
    expected = ItemTable.from_embeddings(encoder.encode_items(items, first)).embeddings
    # Which items share a batch decides the order of some sums, and so the last bits.
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_a_second_run_encodes_only_what_is_missing(encoder, encoded, tmp_path, caplog) -> None:
    blocks = table_blocks(tmp_path / "table", 12, {"weights": "a"}, block_size=5)
    kept = encode_items_into(encoder, blocks).embeddings.clone()
    assert sorted(encoded) == list(range(12))

    def again(size: int = 5) -> list[int]:
        encoded.clear()
        assert torch.equal(encode_items_into(encoder, replace(blocks, block_size=size)).embeddings, kept)
        return sorted(encoded)

    before = {path.name: path.stat().st_mtime_ns for path in blocks.folder.iterdir()}
    assert again() == again(size=3) == []  # a finished table is one, whatever its blocks
    assert {path.name: path.stat().st_mtime_ns for path in blocks.folder.iterdir()} == before
    damaged = bytearray(blocks.path.read_bytes())
    damaged[-6 * 32 * 4] ^= 1  # an item of the second block
    blocks.path.write_bytes(damaged)
    assert again() == [5, 6, 7, 8, 9]
    assert again() == []
    os.truncate(blocks.path, 100)
    assert again() == list(range(12)) and "the item table is damaged and is made again: " in caplog.text
    blocks.path.unlink()
    assert again() == list(range(12))


def test_a_table_of_other_weights_is_refused(encoder, encoded, tmp_path) -> None:
    blocks = table_blocks(tmp_path, 12, {"weights": "a"}, block_size=5)
    encode_items_into(encoder, blocks)
    encoded.clear()
    with pytest.raises(ArtifactError, match="of another origin: identity.weights was 'a' and is 'b'; give another"):
        encode_items_into(encoder, table_blocks(tmp_path, 12, {"weights": "b"}))
    with pytest.raises(ArtifactError, match="identity.autocast was None and is 'bfloat16'"):
        encode_items_into(encoder, blocks, autocast=torch.bfloat16)
    for other, message in (
        (table_blocks(tmp_path, 11, {"weights": "a"}), r"shape was \[12\] and is \[11\]"),
        (table_blocks(tmp_path, 12, {"weights": "a"}, first_item=1), "first_item was 0 and is 1"),
        (table_blocks(tmp_path, 12, {"weights": "a"}, dtype=torch.bfloat16), "dtype was 'float32' and is 'bfloat16'"),
    ):
        with pytest.raises(ArtifactError, match=message):
            encode_items_into(encoder, other)
    assert encoded == []


def test_a_table_of_somebody_else_is_not_overwritten(encoder, encoded, tmp_path) -> None:
    table = ItemTable.from_embeddings(torch.ones(12, 4))
    table.save(tmp_path / "item_table.safetensors")
    with pytest.raises(ArtifactError, match="holds item_table.safetensors but no origin.json, so it was not made here"):
        encode_items_into(encoder, table_blocks(tmp_path, 12, {}))
    assert encoded == [] and ItemTable.load(tmp_path / "item_table.safetensors").checksum() == table.checksum()


def test_rows_of_another_width_are_not_mixed(encoder, encoded, tmp_path) -> None:
    """Where the identity does not tell two models apart."""
    narrow = replace(table_blocks(tmp_path, 12, {}, block_size=5), shape=(12, 4))
    narrow.create()
    with pytest.raises(InputError, match=r"embeddings of block 0 must be \[5, 4\] float32, got \[5, 32\]"):
        encode_items_into(encoder, table_blocks(tmp_path, 12, {}))


def test_an_unfinished_table_is_not_loaded(encoder, tmp_path, monkeypatch) -> None:
    blocks = table_blocks(tmp_path, 12, {}, block_size=5)
    write = BlockFile.write

    def stop(self: BlockFile, block: int, *rest: Any) -> None:
        if block == 1:
            raise KeyboardInterrupt
        write(self, block, *rest)

    monkeypatch.setattr(BlockFile, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        encode_items_into(encoder, blocks)
    with pytest.raises(ArtifactError, match="must be finite, got NaN or infinity; it is unfinished"):
        ItemTable.load(blocks.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 0}, r"shape must be sizes >= 1, items first, got \[0\]"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"first_item": -1}, "first_item must be >= 0, got -1"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.bfloat16, got torch.float16"),
        ({"identity": {"weights": torch.ones(1)}}, "origin must be JSON values, got .*; write hashes as strings"),
    ],
)
def test_settings_of_a_table_out_of_range(tmp_path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        table_blocks(**{"folder": tmp_path, "num_items": 4, "identity": {}, **changes})


def test_bfloat16_is_near_float32(encoder, trained, tmp_path) -> None:
    exact = ItemTable.from_embeddings(encoder.encode_items(12)).embeddings
    whole = table_blocks(tmp_path / "whole", 12, {}, block_size=5)
    halves = table_blocks(tmp_path / "halves", 12, {}, block_size=5, dtype=torch.bfloat16)
    under_autocast = encode_items_into(encoder, whole, autocast=torch.bfloat16).embeddings
    stored = encode_items_into(encoder, halves).embeddings
    smallest = encode_items_into(encoder, replace(halves, folder=tmp_path / "both"), autocast=torch.bfloat16).embeddings
    base = LlamaForCausalLM.from_pretrained(trained.base_folder, dtype=torch.bfloat16)
    tokenizer = trained.recommender.base.tokenizer
    loaded = LaserRecommender.from_pretrained(
        trained.folder, base_model=BaseModel(base, tokenizer, "tiny-llama", is_local=True), device="cpu"
    )
    in_halves = encode_items_into(
        loaded.encoder,
        table_blocks(tmp_path / "model", 12, {"dtype": "bfloat16"}, block_size=5),
        autocast=torch.bfloat16,
    ).embeddings
    assert under_autocast.dtype == in_halves.dtype == torch.float32
    assert stored.dtype == smallest.dtype == torch.bfloat16
    assert torch.equal(stored, exact.bfloat16())
    assert not torch.equal(under_autocast, exact) and not torch.equal(in_halves, exact)
    for rows in (under_autocast, stored, smallest, in_halves):
        assert float(torch.nn.functional.cosine_similarity(rows.float(), exact).min()) > 0.99


def test_prompts_cut_are_counted_and_their_tokens_are_not_kept(trained, tmp_path) -> None:
    made = trained.recommender.encoder
    old = made.collator.prompts
    prompts = PromptEncoder(old.template, old.tokenizer, old.items, old.max_length, max_item_tokens=12)
    collator = HistoryCollator(prompts, made.collator.pad_token_id, made.collator.max_items)
    encoder = HistoryEncoder(made.model, collator, made.id_recommender, made.device)
    encode_items_into(encoder, table_blocks(tmp_path, 12, {}, block_size=4))
    assert prompts.counts["items_cut"] == 12
    assert not prompts._bodies


def test_an_item_that_is_not_finite_is_named_by_its_block(encoder, tmp_path) -> None:
    weight = encoder.model.get_input_embeddings().weight
    others = encoder.collator([[item] for item in range(12) if item != 7]).input_ids.flatten().tolist()
    own = min(set(encoder.collator([[7]]).input_ids[0].tolist()) - set(others))
    kept = weight[own].detach().clone()
    weight.data[own] = float("nan")
    blocks = table_blocks(tmp_path, 12, {}, block_size=5)
    try:
        with pytest.raises(InputError, match=r"in rows \[2\] of 5 \(items 5 to 9\); a half-precision base model can"):
            encode_items_into(encoder, blocks)
    finally:
        weight.data[own] = kept
    file = blocks.begun()
    assert file is not None and file.finished() == {0}
    assert encode_items_into(encoder, blocks).embeddings.shape == (12, 32)
