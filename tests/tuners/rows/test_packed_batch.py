"""Rows packed for the language model, and prompts for generation."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedModel

from peft_bituning.errors import ContextLengthError, InputError
from peft_bituning.tuners.rows.packed_batch import PackedBatch, left_padded_prompt

from ..architectures import ARCHITECTURES


@pytest.fixture(scope="module")
def llm() -> PreTrainedModel:
    return ARCHITECTURES[0].build()


def batch_of(
    llm: PreTrainedModel, masks: list[list[int]], **extra: Any
) -> tuple[PackedBatch, torch.Tensor, torch.Tensor]:
    mask = torch.tensor(masks)
    ids = torch.randint(3, 97, mask.shape, generator=torch.Generator().manual_seed(mask.numel()))
    return PackedBatch.of(llm, llm.get_input_embeddings()(ids), mask, ids, **extra), ids, mask


rows = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=1, max_size=3)
)


@settings(deadline=None, max_examples=20)
@given(masks=rows, num_prefix=st.integers(1, 2), has_suffix=st.booleans(), pooling=st.sampled_from(["last", "mean"]))
def test_states_are_those_of_rows_alone(
    llm: LlamaForCausalLM, masks: list[list[int]], num_prefix: int, has_suffix: bool, pooling: str
) -> None:
    """Each row put together by hand, without padding, through the plain model."""
    prefix = torch.randn(len(masks), num_prefix, 32, generator=torch.Generator().manual_seed(1))
    suffix = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(2)) if has_suffix else None
    batch, ids, mask = batch_of(llm, masks, prefix=prefix, suffix=suffix)
    with torch.no_grad():
        found = batch.run(llm, pooling)
        for row in range(len(masks)):
            real = mask[row].bool()
            parts = [prefix[row : row + 1], llm.model.embed_tokens(ids[row][real])[None]]
            parts += [] if suffix is None else [suffix]
            states = llm.model(inputs_embeds=torch.cat(parts, dim=1)).last_hidden_state[0]
            text = states[num_prefix : num_prefix + int(real.sum())]
            torch.testing.assert_close(found.last_hidden_state[row][real], text, rtol=1e-4, atol=1e-5)
            assert (found.last_hidden_state[row][~real] == 0).all()
            mean = text.mean(0) if len(text) else torch.zeros(32)
            expected = mean if pooling == "mean" else states[-1]
            torch.testing.assert_close(found.pooler_output[row], expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(masks=rows)
def test_prompts_stand_at_the_right_edge(llm: PreTrainedModel, masks: list[list[int]]) -> None:
    _, ids, mask = batch_of(llm, masks, suffix=torch.zeros(1, 1, 32))
    tokens = llm.get_input_embeddings()(ids).detach()
    prompt = left_padded_prompt(llm, tokens, mask, ids)
    by_embeds = left_padded_prompt(llm, tokens, mask, None)
    width = int(mask.sum(1).max())
    assert prompt["input_ids"].shape == prompt["attention_mask"].shape == (len(masks), width)
    assert torch.equal(by_embeds["attention_mask"], prompt["attention_mask"])
    for row in range(len(masks)):
        real = ids[row][mask[row].bool()].numpy()
        padding = width - len(real)
        np.testing.assert_array_equal(prompt["input_ids"][row], np.r_[np.zeros(padding, int), real])
        np.testing.assert_array_equal(prompt["attention_mask"][row], [0] * padding + [1] * len(real))
        assert torch.equal(by_embeds["inputs_embeds"][row, padding:], tokens[row][mask[row].bool()])


def test_prompts_are_padded_by_the_models_own_token() -> None:
    llm = ARCHITECTURES[0].build()
    llm.config.pad_token_id = 5
    _, ids, mask = batch_of(llm, [[1, 1, 0], [1, 0, 0]])
    prompt = left_padded_prompt(llm, llm.get_input_embeddings()(ids), mask, ids)
    assert prompt["input_ids"].tolist() == [ids[0, :2].tolist(), [5, int(ids[1, 0])]]


def test_a_loss_over_the_text(llm: LlamaForCausalLM) -> None:
    batch, ids, mask = batch_of(llm, [[1, 1, 1, 0], [0, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    found = batch.run(llm, "last", labels)
    right = torch.stack([ids[0], ids[1].roll(-1)])
    right_mask = torch.tensor([[1, 1, 1, 0]] * 2)
    expected = llm(input_ids=right, attention_mask=right_mask, labels=right.masked_fill(right_mask == 0, -100))
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits[1, 1:], expected.logits[1, :3])
    assert batch.run(llm, "last").loss is None


def test_what_does_not_fit(llm: PreTrainedModel) -> None:
    with pytest.raises(
        InputError, match=r"at least one token of text, got none in rows \[1\]; give a text, or use a tr"
    ):
        batch_of(llm, [[1, 1], [0, 0]])
    short = ARCHITECTURES[0].build()
    short.config.max_position_embeddings = 4
    with pytest.raises(ContextLengthError, match=r"\(4\), got 0 \+ 4 \+ 1 = 5, 1 tokens too many"):
        batch_of(short, [[1, 1, 1, 1]], suffix=torch.zeros(1, 1, 32))
    batch, _, _ = batch_of(short, [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]], suffix=torch.zeros(1, 1, 32))
    assert batch.rows.shape == (2, 4, 32)  # padding alone is too long
    assert batch.run(short, "last").last_hidden_state.shape == (2, 5, 32)
