"""Letters as next tokens: the head's own logits, of the last position alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from bench.candidates import CandidatePrompts, LetterModel, letter_tokens
from bench.pooling import PooledModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_bituning.base_models import BaseModel
from peft_bituning.errors import ConfigurationError, UnsupportedModelError


def test_a_token_each(make_prompts: Callable[..., CandidatePrompts]) -> None:
    prompts = make_prompts(size=20)
    tokens = letter_tokens(prompts, 20)
    assert [prompts.tokenizer.decode([token]).strip() for token in tokens] == list("ABCDEFGHIJKLMNOPQRST")


def test_letters_that_are_no_tokens(make_prompts: Callable[..., CandidatePrompts]) -> None:
    prompts = make_prompts()
    core = Tokenizer(models.WordLevel({"?": 0, "a": 1, "A": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    prompts.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    with pytest.raises(ConfigurationError, match="a token for every letter from A to D, got"):
        letter_tokens(prompts, 4)


def test_the_heads_own_logits(tiny_base: Callable[[], BaseModel]) -> None:
    """Rows of other lengths, padded either way: the logits of the whole model after each row's last token."""
    base = tiny_base()
    tokens = [36, 40, 300]
    model = LetterModel(PooledModel(base.model), tokens)
    rows = [[5, 6, 7, 8, 9], [11, 12, 13], [4]]
    shapes: list[torch.Size] = []
    handle = base.model.lm_head.register_forward_hook(lambda _m, inputs, _o: shapes.append(inputs[0].shape))
    ids = torch.tensor([row + [0] * (5 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (5 - len(row)) for row in rows])
    with torch.no_grad():
        right = model(ids, mask)
        left = model(torch.stack([row.roll(5 - n) for row, n in zip(ids, (5, 3, 1), strict=True)]), mask.flip(1))
    handle.remove()
    assert shapes == [torch.Size([3, 32])] * 2
    with torch.no_grad():
        whole = [base.model(torch.tensor([row])).logits[0, -1, tokens].numpy() for row in rows]
    np.testing.assert_allclose(right.numpy(), whole, atol=1e-5)
    np.testing.assert_allclose(left.numpy(), whole, atol=1e-5)


def test_refusals(tiny_base: Callable[[], BaseModel]) -> None:
    with pytest.raises(ConfigurationError, match="pooling must be 'last' to read the next token, got 'mean'"):
        LetterModel(PooledModel(tiny_base().model, "mean"), [1])
    with pytest.raises(UnsupportedModelError, match="must have a language-model head, got LlamaModel"):
        LetterModel(PooledModel(tiny_base().model.model), [1])
