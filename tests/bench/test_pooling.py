"""Plain LoRA, prompt tuning, P-tuning and full fine-tuning under the pooled interface."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench.pooling import PooledModel
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import PreTrainedModel

from peft_bituning import BiTuningConfig, BiTuningOutput, ILoRAConfig
from peft_bituning.base_models import BaseModel
from peft_bituning.catalog.encoder import HistoryEncoder
from peft_bituning.data import PRESETS, Interactions, PromptEncoder
from peft_bituning.data.collator import HistoryCollator
from peft_bituning.errors import ConfigurationError, InputError, UnsupportedModelError
from peft_bituning.losses import catalog_contrastive_loss

from ..tuners.architectures import ARCHITECTURES

METHODS = ["full", "lora", "prompt", "p-tuning"]
POOLINGS = ["last", "mean"]


@pytest.fixture
def make_llm() -> Callable[..., PreTrainedModel]:
    """Return a maker of two-layer models with D = 32 and V = 97, the same weights for the same family."""
    known = {each.name: each for each in ARCHITECTURES}

    def make(family: str = "Llama", **changes: Any) -> PreTrainedModel:
        architecture = known[family]
        return type(architecture)(architecture.name, architecture.model_type, "", architecture.sizes | changes).build()

    return make


def tune(method: str, llm: PreTrainedModel, task_type: str = "FEATURE_EXTRACTION") -> PeftModel | PreTrainedModel:
    """Return a model that is trained by a method, with weights that are not those of the start."""
    torch.manual_seed(1)
    if method == "full":
        return llm.eval()
    config = {
        "lora": lambda: LoraConfig(target_modules="all-linear", task_type=task_type),
        "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type=task_type),
        "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type=task_type),
        "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type=task_type),
    }[method]()
    model = get_peft_model(llm, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_inputs() -> dict[str, Tensor]:
    """Return right-padded text of 7, 4 and 1 tokens."""
    ids = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()}


@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_it_pools_what_the_model_itself_gives(
    make_llm: Callable, method: str, pooling: str, family: str, task: str
) -> None:
    """Row by row, without padding, through PEFT's own forward pass; virtual tokens are cut off."""
    model, inputs = tune(method, make_llm(family), task), make_inputs()
    found = PooledModel(model, pooling)(**inputs)
    assert type(found) is BiTuningOutput
    assert found.last_hidden_state.shape == (3, 7, 32) and found.aux_loss is None and found.router_logits is None
    for row, length in enumerate((7, 4, 1)):
        ids = inputs["input_ids"][row : row + 1, :length]
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states[-1][
            0
        ]
        assert len(states) == length + (3 if method in ("prompt", "p-tuning") else 0)
        text = states[-length:]
        expected = text.mean(0) if pooling == "mean" else text[-1]
        torch.testing.assert_close(found.pooler_output[row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.last_hidden_state[row, :length], text, rtol=1e-4, atol=1e-5)
    assert (found.last_hidden_state[inputs["attention_mask"] == 0] == 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_anywhere_and_no_collaborative_inputs(make_llm: Callable, method: str, pooling: str) -> None:
    model, inputs = PooledModel(tune(method, make_llm()), pooling), make_inputs()
    expected = model(**inputs).pooler_output
    order = torch.argsort(inputs["attention_mask"], dim=1, stable=True)
    left = {key: value.gather(1, order) for key, value in inputs.items()}
    assert torch.equal(model(**left).pooler_output, expected)
    spread = {key: torch.zeros(3, 11, dtype=torch.long) for key in inputs}
    for row, columns in enumerate(([0, 2, 3, 6, 7, 9, 10], [1, 4, 5, 8], [6])):
        for key in inputs:
            spread[key][row, columns] = inputs[key][row, : len(columns)]
    torch.testing.assert_close(model(**spread).pooler_output, expected, rtol=1e-4, atol=1e-5)
    ignored = {"collaborative_embeds": torch.full((3, 2, 6), torch.nan), "collaborative_mask": torch.ones(3, 2)}
    assert torch.equal(model(**inputs, **ignored).pooler_output, expected)
    embeds = model.language_model.get_input_embeddings()(inputs["input_ids"])
    by_embeds = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(by_embeds, expected)


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_what_the_method_trains(make_llm: Callable, method: str) -> None:
    model, inputs = PooledModel(tune(method, make_llm())), make_inputs()
    own = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all(
        {"lora": "lora_", "prompt": "prompt_encoder", "p-tuning": "prompt_encoder", "full": ""}[method] in name
        for name in own
    )
    optimizer = torch.optim.AdamW(own.values(), lr=3e-3)
    table, targets = torch.randn(5, 32, generator=torch.Generator().manual_seed(4)), torch.tensor([0, 1, 2])
    losses = []
    for _ in range(8):
        loss = catalog_contrastive_loss(model(**inputs).pooler_output, table, targets, 0.2)
        loss.backward()
        assert all(each.grad is not None or "lm_head" in name for name, each in own.items())  # the head is not run
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["lora", "prompt", "p-tuning"])
def test_disabled_it_is_the_base_model(make_llm: Callable, method: str) -> None:
    model, inputs = PooledModel(tune(method, make_llm())), make_inputs()
    expected = PooledModel(make_llm().eval())(**inputs).pooler_output
    assert not torch.allclose(model(**inputs).pooler_output, expected, atol=1e-3)
    with model.model.disable_adapter():
        torch.testing.assert_close(model(**inputs).pooler_output, expected)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_what_rows_share_runs_once(make_llm: Callable, method: str) -> None:
    model = PooledModel(tune(method, make_llm()))
    start = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(5)).expand(4, -1)
    tails = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(6))
    widths: list[tuple[int, ...]] = []
    model.language_model.model.register_forward_hook(lambda _m, _i, out: widths.append(out[0].shape[:2]))
    ids = torch.cat([start, tails], dim=1)
    found = model(ids).pooler_output
    prefix = 3 if method == "prompt" else 0
    assert widths == [(1, 30 + prefix), (4, 6)]
    model.share_start = False
    torch.testing.assert_close(model(ids).pooler_output, found, rtol=1e-4, atol=1e-5)
    assert widths[2:] == [(4, 36 + prefix)]


def test_in_place_of_a_bi_tuning_model(tiny_base: Callable[[], BaseModel], tiny_data: Interactions) -> None:
    """The package's own encoder runs it."""
    base = tiny_base()
    model = PooledModel(get_peft_model(base.model, LoraConfig(target_modules="all-linear")), "mean")
    prompts = PromptEncoder(PRESETS["no_instruction"], base.tokenizer, tiny_data.items, 256)
    encoder = HistoryEncoder(model, HistoryCollator(prompts, 0, 4), None, torch.device("cpu"), batch_size=2)
    table = encoder.encode_items(3)
    assert table.shape == (3, 32)
    torch.testing.assert_close(encoder.encode([[2]]), table[2:], rtol=1e-4, atol=1e-5)


def test_refusals(make_llm: Callable) -> None:
    with pytest.raises(ConfigurationError, match="pooling must be one of last, mean, got 'suffix'"):
        PooledModel(make_llm(), "suffix")
    with pytest.raises(ConfigurationError, match="center_embeddings must be True or False, got 'yes'"):
        PooledModel(make_llm(), center_embeddings="yes")  # type: ignore[arg-type]
    for config in (BiTuningConfig(prefix_encoder="static"), ILoRAConfig(collaborative_dim=6)):
        with pytest.raises(UnsupportedModelError, match="gives no pooled embedding, got .*; call the model itself"):
            PooledModel(get_peft_model(make_llm(), config))
    with pytest.raises(UnsupportedModelError, match="got PREFIX_TUNING, whose prompt is more than tokens before"):
        PooledModel(tune("prefix", make_llm()))
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        from transformers import BertConfig, BertModel

        PooledModel(BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
    with pytest.raises(
        InputError, match=re.escape("must have at least one token of text, got none in rows [0]; give a")
    ):
        PooledModel(make_llm())(torch.ones(1, 2, dtype=torch.long), torch.zeros(1, 2))
    with pytest.raises(InputError, match=r"\(9\), got 3 \+ 7 \+ 0 = 10, 1 tokens too many"):
        PooledModel(tune("prompt", make_llm(max_position_embeddings=9)))(**make_inputs())
