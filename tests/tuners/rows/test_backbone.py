"""Which module is run, which models are refused, and what a context holds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    OPTConfig,
    PreTrainedConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from peft_bituning.errors import ContextLengthError, UnsupportedModelError
from peft_bituning.tuners.rows.backbone import (
    check_context,
    find_backbone,
    max_positions,
    token_embeddings,
    token_width,
)

BERT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def test_the_headless_part_of_a_causal_lm(make_llm: Callable) -> None:
    llm = make_llm()
    assert find_backbone(llm) is llm.model
    assert find_backbone(llm.model) is llm.model
    assert token_embeddings(llm) is llm.model.embed_tokens


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2),
        OPTConfig(
            vocab_size=50,
            hidden_size=32,
            word_embed_proj_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
            max_position_embeddings=32,
        ),
    ],
)
def test_the_width_is_the_embeddings_not_the_hidden_size(config: PreTrainedConfig) -> None:
    for model in (AutoModelForCausalLM.from_config(config), AutoModel.from_config(config)):
        backbone = find_backbone(model)
        assert token_width(model) == 16
        assert "lm_head" not in dict(backbone.named_children())
        states = backbone(inputs_embeds=torch.zeros(1, 2, 16)).last_hidden_state
        assert states.shape[:2] == (1, 2)


def encoders() -> list[Any]:
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    modern = ModernBertConfig(**BERT, pad_token_id=0)
    distil = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    bert = BertConfig(**BERT)
    return [
        BertModel(bert),
        BertForMaskedLM(bert),
        ModernBertModel(modern),
        ModernBertForMaskedLM(modern),
        DistilBertModel(distil),
        T5EncoderModel(t5),
        T5ForConditionalGeneration(t5),
    ]


@pytest.mark.parametrize("model", encoders(), ids=lambda model: type(model).__name__)
def test_encoders_are_refused(model: Any, make_model: Callable) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        make_model(model)
    assert "the base model must be a decoder-only (causal) language model, got the encoder" in str(caught.value)
    assert type(model).__name__ in str(caught.value)
    assert "AutoModelForCausalLM" in str(caught.value)


def test_bert_as_a_decoder_is_causal() -> None:
    model = BertLMHeadModel(BertConfig(**BERT, is_decoder=True))
    assert find_backbone(model) is model.bert


def test_other_modules_are_refused() -> None:
    vision = ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
        )
    )
    for model in (vision, torch.nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError, match=f"the base model must .*got {type(model).__name__}"):
            find_backbone(model)


@pytest.mark.parametrize(("init_weights", "low", "high"), [(True, 0.4, 0.6), (False, 0.015, 0.025)])
def test_init_weights_chooses_the_scale(
    make_llm: Callable, make_model: Callable, init_weights: bool, low: float, high: float
) -> None:
    model = make_model(
        make_llm(initializer_range=0.5), prefix_encoder="static", num_virtual_tokens=40, init_weights=init_weights
    )
    assert low < float(model.base_model.prefix_encoder.embeddings.detach().std()) < high
    assert low / 1.5 < float(model.base_model._layer.suffix("default").detach().std()) < high * 1.5


def test_a_context_too_long_says_by_how_much(make_llm: Callable) -> None:
    llm = make_llm(max_position_embeddings=20)
    assert max_positions(llm) == 20
    check_context(llm, 5, 14, 1)
    with pytest.raises(ContextLengthError, match=r"\(20\), got 5 \+ 17 \+ 1 = 23, 3 tokens too many; shorten the text"):
        check_context(llm, 5, 17, 1)


def test_only_the_real_tokens_count_in_a_row(make_llm: Callable, make_model: Callable) -> None:
    model = make_model(make_llm(max_position_embeddings=10), prefix_encoder="static")
    ids = torch.ones(2, 9, dtype=torch.long)
    mask = torch.tensor([[1] * 4 + [0] * 5, [0] * 5 + [1] * 4])
    with pytest.raises(ContextLengthError, match=r"got 3 \+ 9 \+ 1 = 13, 3 tokens too many"):
        model(ids)
    padded = model(ids, mask).pooler_output  # 3 + 4 + 1 of 10
    torch.testing.assert_close(padded, model(ids[:, :4]).pooler_output)
