"""Static prefixes: the same for every row, and exactly as large as the paper's Table 3 says."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_bituning import BiTuningConfig
from peft_bituning.tuners.bituning.encoders import NoPrefix, StaticPrefix, build_prefix_encoder


def test_every_row_has_the_same_prefix(make_config: Callable[..., BiTuningConfig]) -> None:
    torch.manual_seed(0)
    encoder = build_prefix_encoder(make_config(prefix_encoder="static", num_virtual_tokens=50), 40, 0.3)
    assert isinstance(encoder, StaticPrefix)
    assert encoder.embeddings.shape == (50, 40)
    assert 0.27 < encoder.embeddings.std().item() < 0.33
    prefix = encoder(4, None, None)
    assert prefix.embeddings is not None
    assert torch.equal(prefix.embeddings, encoder.embeddings.expand(4, 50, 40))


def test_no_prefix_is_none(make_config: Callable[..., BiTuningConfig]) -> None:
    encoder = build_prefix_encoder(make_config(prefix_encoder="none"), 40, 0.3)
    assert isinstance(encoder, NoPrefix)
    assert encoder.num_tokens == 0
    assert encoder(4, None, None).embeddings is None
    assert not list(encoder.parameters())


@pytest.mark.parametrize(("encoder", "pooling", "count"), [("static", "suffix", 33 * 4096), ("none", "suffix", 4096)])
def test_bituning_alone_has_the_papers_size(make_model: Callable, encoder: str, pooling: str, count: int) -> None:
    with torch.device("meta"):
        llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=2,
                num_attention_heads=32,
                num_key_value_heads=32,
            )
        )
    model = make_model(llm, prefix_encoder=encoder, pooling=pooling, num_virtual_tokens=32)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == count
    if encoder == "static":
        assert trainable == 135_168  # the paper's 0.135 M
    assert total == count + sum(parameter.numel() for parameter in llm.parameters() if parameter.is_meta)
