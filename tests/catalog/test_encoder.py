"""Encoding histories: order and batches do not matter, the collaborative information does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.catalog import HistoryEncoder
from peft_bituning.errors import InputError

HISTORIES = [[0, 1, 2], [5], [], [3, 4, 5, 6, 7, 8, 9], [11, 10], [1, 0, 2], [7]]


@pytest.fixture(scope="module")
def encoder(trained) -> HistoryEncoder:
    made = trained.recommender.encoder
    return HistoryEncoder(made.model, made.collator, made.recommender, torch.device("cpu"), batch_size=3)


@pytest.fixture(scope="module")
def alone(encoder) -> np.ndarray:
    return torch.cat([encoder.encode([history]) for history in HISTORIES]).numpy()


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(len(HISTORIES))), st.integers(1, 8))
def test_embeddings_depend_neither_on_batch_nor_on_order(encoder, alone, order: list[int], batch_size: int) -> None:
    some = HistoryEncoder(encoder.model, encoder.collator, encoder.recommender, encoder.device, batch_size)
    found = some.encode([HISTORIES[row] for row in order], distributed=False)
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    assert found.numpy() == pytest.approx(alone[order], abs=1e-5)


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
        encoder.model, encoder.collator, encoder.recommender, encoder.device, max_collaborative_states=2
    )
    batch = encoder.collator([history])
    states = encoder.recommender.encode(batch.item_indices, batch.item_mask)[:, -2:]
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
