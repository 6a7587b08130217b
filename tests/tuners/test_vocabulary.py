"""Tests of the vocabulary's embeddings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig

from peft_bituning.tuners.vocabulary import embedding_scale, eos_token_id


def test_virtual_tokens_start_at_the_scale_of_the_embeddings_output(make_llm: Callable) -> None:
    llm = make_llm(initializer_range=0.3)
    assert 0.28 < embedding_scale(llm) < 0.32
    with torch.device("meta"):
        assert embedding_scale(make_llm()) == 0.02
    gemma = AutoModelForCausalLM.from_config(
        GemmaConfig(
            vocab_size=60,
            hidden_size=64,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.1,
            pad_token_id=None,
        )
    )
    # Gemma multiplies by sqrt(64), inside the embedding or after it: either way its own output is measured.
    sample = gemma.get_input_embeddings()(torch.arange(60))
    assert embedding_scale(gemma) == pytest.approx(float(sample.detach().std()), rel=1e-6)


@pytest.mark.parametrize(("value", "found"), [(2, 2), ([7, 8], 7), (None, None)])
def test_the_first_eos_token_is_taken(make_llm: Callable, value: Any, found: int | None) -> None:
    assert eos_token_id(make_llm(eos_token_id=value)) == found
