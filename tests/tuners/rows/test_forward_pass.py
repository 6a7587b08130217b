"""Models that read token ids: per-layer embeddings, and code from outside transformers (a stand-in for ChatGLM2)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from peft_bituning import BiTuningConfig
from peft_bituning.errors import ContextLengthError, InputError

from ..architectures import ARCHITECTURES

WIDTH = 16
PER_LAYER = [architecture for architecture in ARCHITECTURES if architecture.kind == "per-layer embeddings"]


class SequenceFirstConfig(PreTrainedConfig):
    """As ChatGLM2's: no `max_position_embeddings`, the context is `seq_length`."""

    model_type = "sequence-first"

    def __init__(self, seq_length: int = 24, **kwargs: Any) -> None:
        self.seq_length, self.vocab_size = seq_length, 97
        super().__init__(**kwargs)


class SequenceFirstModel(PreTrainedModel):
    """Reads `input_ids.shape`, takes no embeddings, and works on [T, B, D], as ChatGLM2's own code does."""

    config_class = SequenceFirstConfig
    base_model_prefix = "transformer"

    def __init__(self, config: SequenceFirstConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(97, WIDTH)
        self.positions = nn.Embedding(config.seq_length, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True, **_: Any
    ) -> BaseModelOutputWithPast:
        rows, width = input_ids.shape
        mask = torch.ones(rows, width) if attention_mask is None else attention_mask
        where = (mask.cumsum(1) - 1).clamp(min=0).long()
        states = (self.word_embeddings(input_ids) + self.positions(where)).transpose(0, 1)  # [T, B, D]
        scores = torch.einsum("tbd,sbd->bts", self.query(states), self.key(states)) * WIDTH**-0.5
        seen = torch.ones(width, width).tril().bool() & mask.bool().unsqueeze(1)
        scores = scores.masked_fill(~seen, -1e9).softmax(-1)
        return BaseModelOutputWithPast(
            last_hidden_state=states + torch.einsum("bts,sbd->tbd", scores, self.value(states))
        )


class SequenceFirstForCausalLM(PreTrainedModel, GenerationMixin):
    """The head beside it; logits are [B, T, V] again."""

    config_class = SequenceFirstConfig
    base_model_prefix = "transformer"

    def __init__(self, config: SequenceFirstConfig) -> None:
        super().__init__(config)
        self.transformer = SequenceFirstModel(config)
        self.head = nn.Linear(WIDTH, 97, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        states = self.transformer(input_ids, attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=self.head(states).transpose(0, 1))


@pytest.fixture
def sequence_first(make_config: Callable[..., BiTuningConfig]) -> Callable[..., PeftModel]:
    """Return a maker of Bi-Tuned sequence-first models."""

    def make(**changes: Any) -> PeftModel:
        torch.manual_seed(0)
        model = SequenceFirstForCausalLM(SequenceFirstConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
        core = model.transformer
        for layer in (core.word_embeddings, core.query, core.key, core.value):
            nn.init.normal_(layer.weight, std=0.7)
        return get_peft_model(model, make_config(**changes)).eval()

    return make


def test_a_sequence_first_model_by_hand(sequence_first: Callable, make_inputs: Callable) -> None:
    model, inputs = sequence_first(), make_inputs()
    base = model.base_model
    prefix = base.prefix_encoder(3, inputs["collaborative_embeds"], inputs["collaborative_mask"].bool()).embeddings
    suffix = base.model.virtual_tokens.suffix("default")[0]
    core = base.model.transformer
    for row, length in enumerate((7, 4, 1)):
        text = core.word_embeddings(inputs["input_ids"][row, :length])
        tokens = torch.cat([prefix[row], text, suffix])
        tokens = tokens + core.positions.weight[: len(tokens)]
        scores = core.query(tokens[-1]) @ core.key(tokens).T * WIDTH**-0.5
        expected = tokens[-1] + scores.softmax(-1) @ core.value(tokens)
        torch.testing.assert_close(model(**inputs).pooler_output[row], expected, atol=1e-5, rtol=0)


def test_as_many_rows_as_columns(sequence_first: Callable, make_inputs: Callable) -> None:
    model, inputs = sequence_first(task_type="CAUSAL_LM"), make_inputs()
    once = model(**inputs, labels=inputs["input_ids"])
    many = {key: value.repeat_interleave(4, dim=0)[:11] for key, value in inputs.items()}  # P + T + 1 = 11
    square = model(**many, labels=many["input_ids"])
    assert square.logits.shape == (11, 7, 97)
    for name in ("pooler_output", "last_hidden_state", "logits"):
        torch.testing.assert_close(square[name][::4], once[name], atol=1e-5, rtol=0)


def test_gradients_reach_the_adapter(sequence_first: Callable, make_inputs: Callable) -> None:
    model = sequence_first().train()
    model(**make_inputs()).pooler_output.pow(2).sum().backward()
    found = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert any("suffix" in name for name in found) and any("projection.weight" in name for name in found)
    assert all("bituning_" in name for name in found)


def test_text_given_as_embeddings(sequence_first: Callable, make_inputs: Callable) -> None:
    model, inputs = sequence_first(), make_inputs()
    expected = model(**inputs).pooler_output
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=embeds, **inputs).pooler_output, expected)


def test_the_hook_is_gone_afterwards_even_after_an_error(
    sequence_first: Callable, make_inputs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = sequence_first(), make_inputs()
    core = model.base_model.model.transformer
    before = core(inputs["input_ids"]).last_hidden_state
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(core.value, "forward", lambda _states: 1 // 0)
        model(**inputs)
    model(**inputs)
    assert not core.word_embeddings._forward_hooks and not core._forward_hooks
    assert torch.equal(core(inputs["input_ids"]).last_hidden_state, before)


def test_a_context_too_long(sequence_first: Callable) -> None:
    with pytest.raises(ContextLengthError, match=r"got 3 \+ 21 \+ 1 = 25, 1 tokens too many"):
        sequence_first(prefix_encoder="static")(torch.ones(1, 21, dtype=torch.long))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("dictionary", [False, True])
def test_generation(sequence_first: Callable, make_inputs: Callable, beams: int, dictionary: bool) -> None:
    model, inputs = sequence_first(task_type="CAUSAL_LM"), make_inputs()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams}
    found = model.generate(**inputs, **settings, use_cache=False, return_dict_in_generate=dictionary)
    together = found.sequences if dictionary else found
    assert together.shape == (3, 4)
    for row, length in enumerate((7, 4, 1)):
        alone = {key: value[row : row + 1] for key, value in inputs.items() if "collaborative" in key}
        ids = inputs["input_ids"][row : row + 1, :length]
        assert torch.equal(model.generate(ids, **alone, **settings, use_cache=False)[0], together[row])
    other = inputs | {"collaborative_embeds": inputs["collaborative_embeds"].flip(0) * 5}
    assert not torch.equal(model.generate(**other, **settings, use_cache=False), together)


@pytest.mark.parametrize("architecture", PER_LAYER, ids=lambda architecture: architecture.name)
def test_per_layer_embeddings_are_not_lost(architecture: Any, make_config: Callable, make_inputs: Callable) -> None:
    base, inputs = architecture.build(), make_inputs()
    expected = base.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    model = get_peft_model(base, make_config(prefix_encoder="none", pooling="last")).eval()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**text).last_hidden_state[real], expected[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", PER_LAYER, ids=lambda architecture: architecture.name)
def test_per_layer_embeddings_need_ids(architecture: Any, make_config: Callable) -> None:
    model = get_peft_model(architecture.build(), make_config(prefix_encoder="static"))
    with pytest.raises(InputError, match="input_ids must be given to .* per-layer embeddings by id, got inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
