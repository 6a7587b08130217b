"""The forward pass: what an embedding depends on, and what it does not."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from peft_bituning import BiTuningOutput
from peft_bituning.errors import ConfigurationError, InputError, UnsupportedOperationError
from peft_bituning.losses import load_balancing_loss

POOLINGS = ["suffix", "eos", "mean", "last"]
ENCODERS = ["mformer", "linear", "static", "none"]


def move(inputs: dict[str, Tensor], columns: list[int]) -> dict[str, Tensor]:
    """Reorder text columns so that each row's real tokens keep their order but padding moves."""
    order = torch.tensor(columns)
    return inputs | {"input_ids": inputs["input_ids"][:, order], "attention_mask": inputs["attention_mask"][:, order]}


def left_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same rows with their padding on the left."""
    order = torch.argsort(inputs["attention_mask"], dim=1, stable=True)
    return inputs | {key: inputs[key].gather(1, order) for key in ("input_ids", "attention_mask")}


def holed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same rows with their tokens spread over eleven columns."""
    ids, mask = torch.full((3, 11), 5), torch.zeros(3, 11, dtype=torch.long)
    for row, columns in enumerate(([0, 2, 3, 6, 7, 9, 10], [1, 4, 5, 8], [6])):
        ids[row, columns] = inputs["input_ids"][row, : len(columns)]
        mask[row, columns] = 1
    return inputs | {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_shapes(make_model: Callable, make_inputs: Callable, pooling: str, encoder: str) -> None:
    model = make_model(prefix_encoder=encoder, pooling=pooling)
    out = model(**make_inputs())
    assert isinstance(out, BiTuningOutput)
    assert out.last_hidden_state.shape == out[0].shape == (3, 7, 32)
    assert out.pooler_output.shape == (3, 32)
    assert (out.last_hidden_state[make_inputs()["attention_mask"] == 0] == 0).all()
    assert out.loss is None and out.logits is None and out.hidden_states is None
    if encoder == "mformer":
        assert out.router_logits.shape == (3, 4, 4)
        assert out.aux_loss.shape == ()
    else:
        assert out.router_logits is None and out.aux_loss is None
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("bituning_" in name for name in names)
    assert ("suffix" in "".join(names)) == (pooling == "suffix")


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_pooling_by_hand(
    make_model: Callable, make_inputs: Callable, make_llm: Callable, pooling: str, encoder: str
) -> None:
    """Each row alone, put together by hand, run through the plain model."""
    model, inputs = make_model(prefix_encoder=encoder, pooling=pooling), make_inputs()
    found = model(**inputs)
    llm, tuner = make_llm(), model.base_model
    embeds, mask = inputs["collaborative_embeds"], inputs["collaborative_mask"].bool()
    prefix = tuner.prefix_encoder(3, embeds.masked_fill(~mask.unsqueeze(-1), 0), mask).embeddings
    for row, length in enumerate((7, 4, 1)):
        text = llm.model.embed_tokens(inputs["input_ids"][row, :length])
        parts = [text] if prefix is None else [prefix[row], text]
        if pooling == "suffix":
            parts.append(tuner._layer.bituning_suffix["default"].weight)
        if pooling == "eos":
            parts.append(llm.model.embed_tokens(torch.tensor([2])))
        states = llm.model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0]
        start = 0 if prefix is None else 3
        expected = states[start : start + length].mean(0) if pooling == "mean" else states[-1]
        torch.testing.assert_close(found.pooler_output[row], expected, rtol=1e-4, atol=1e-5)
        text_states = states[start : start + length]
        torch.testing.assert_close(found.last_hidden_state[row, :length], text_states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_embedding_does_not_depend_on_padding_or_batch_mates(
    make_model: Callable, make_inputs: Callable, make_llm: Callable, pooling: str, attention: str
) -> None:
    model = make_model(make_llm(attn_implementation=attention), pooling=pooling)
    model.base_model.prefix_encoder.qformer.config._attn_implementation = attention
    assert model.base_model.backbone.config._attn_implementation == attention
    inputs = make_inputs()
    expected = model(**inputs)
    left = model(**left_padded(inputs))
    assert torch.equal(left.pooler_output, expected.pooler_output)
    assert torch.equal(left.last_hidden_state[:, -1], model(**inputs).last_hidden_state[torch.arange(3), [6, 3, 0]])
    torch.testing.assert_close(model(**holed(inputs)).pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)
    as_bool = inputs | {key: inputs[key].bool() for key in ("attention_mask", "collaborative_mask")}
    assert torch.equal(model(**as_bool).pooler_output, expected.pooler_output)
    for row, (length, items) in enumerate(((7, 4), (4, 2), (1, 0))):
        alone = model(
            inputs["input_ids"][row : row + 1, :length],
            collaborative_embeds=inputs["collaborative_embeds"][row : row + 1, :items],
        )
        torch.testing.assert_close(alone.pooler_output[0], expected.pooler_output[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("pooling", ["suffix", "mean"])
def test_padding_is_inert_whatever_it_holds(
    make_model: Callable, make_inputs: Callable, make_llm: Callable, attention: str, garbage: float, pooling: str
) -> None:
    model = make_model(make_llm(attn_implementation=attention), pooling=pooling)
    model.base_model.prefix_encoder.qformer.config._attn_implementation = attention
    inputs = make_inputs()
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    spoilt = {
        "inputs_embeds": embeds.masked_fill(inputs["attention_mask"].unsqueeze(-1) == 0, garbage),
        "collaborative_embeds": inputs["collaborative_embeds"].masked_fill(
            inputs["collaborative_mask"].unsqueeze(-1) == 0, garbage
        ),
    }
    found = model(**(inputs | spoilt))
    for name in ("pooler_output", "last_hidden_state", "router_logits", "aux_loss"):
        assert torch.equal(found[name], expected[name]), name
    found.pooler_output.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_other_ids_at_padding_change_nothing(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(), make_inputs()
    other = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 96)
    assert torch.equal(model(**(inputs | {"input_ids": other})).pooler_output, model(**inputs).pooler_output)


@pytest.mark.parametrize("encoder", ["mformer", "linear"])
def test_rows_without_items_use_null_and_no_others_do(
    make_model: Callable, make_inputs: Callable, encoder: str
) -> None:
    model, inputs = make_model(prefix_encoder=encoder), make_inputs()
    before = model(**inputs)
    with torch.no_grad():
        model.base_model.prefix_encoder.null.add_(3.0)
    after = model(**inputs)
    assert torch.equal(after.pooler_output[:2], before.pooler_output[:2])
    assert not torch.allclose(after.pooler_output[2], before.pooler_output[2])
    null = model.base_model.prefix_encoder.null.detach()
    as_item = inputs["collaborative_embeds"].clone()
    as_item[2, 0] = null
    mask = inputs["collaborative_mask"].clone()
    mask[2, 0] = 1
    same = model(**(inputs | {"collaborative_embeds": as_item, "collaborative_mask": mask}))
    torch.testing.assert_close(same.pooler_output, after.pooler_output)
    if encoder == "mformer":
        assert torch.equal(after.aux_loss, before.aux_loss)  # null is no item: it does not count
        weights = model.base_model.prefix_encoder.router.weight
        logits = inputs["collaborative_embeds"] @ weights.T
        expected = load_balancing_loss(logits[:2], inputs["collaborative_mask"][:2])
        torch.testing.assert_close(after.aux_loss, expected)
        assert not torch.allclose(same.aux_loss, after.aux_loss)


def test_a_batch_of_cold_rows_alone(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(), make_inputs()
    inputs["collaborative_mask"] = torch.zeros(3, 4)
    out = model(**inputs)
    assert float(out.aux_loss.detach()) == 0.0
    assert torch.isfinite(out.pooler_output).all()
    empty = inputs | {"collaborative_embeds": torch.zeros(3, 0, 6), "collaborative_mask": torch.zeros(3, 0)}
    torch.testing.assert_close(model(**empty).pooler_output, out.pooler_output)


def test_collaborative_dropout_is_for_training(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(collaborative_dropout=0.999), make_inputs()
    expected = model(**inputs).pooler_output
    cold = model(**(inputs | {"collaborative_mask": torch.zeros(3, 4)}))
    assert not torch.allclose(cold.pooler_output[:2], expected[:2])
    torch.manual_seed(0)
    dropped = model.train()(**inputs)
    assert torch.equal(dropped.pooler_output, cold.pooler_output)
    assert float(dropped.aux_loss.detach()) == 0.0
    assert torch.equal(model.eval()(**inputs).pooler_output, expected)


def test_swapping_collaborative_information_swaps_prefixes(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).pooler_output
    order = torch.tensor([1, 0, 2])
    swapped = {key: inputs[key][order] for key in ("collaborative_embeds", "collaborative_mask")}
    found = model(**(inputs | swapped)).pooler_output
    assert not torch.allclose(found[:2], expected[:2], atol=1e-3)
    torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collaborative_embeds": None}, "collaborative_embeds must be given to prefix_encoder='mformer', got None"),
        ({"collaborative_embeds": torch.ones(3, 4, 5)}, "must be [B, N, C] = [3, N, 6], got [3, 4, 5]; pass"),
        ({"collaborative_embeds": torch.full((3, 4, 6), torch.nan)}, "got NaN or infinity in rows [0, 1]; check"),
        ({"collaborative_mask": torch.ones(3, 5)}, "collaborative_mask must be [B, N] = [3, 4], got [3, 5]; give"),
        ({"attention_mask": torch.ones(3, 8)}, "attention_mask must be [B, T] = [3, 7], got [3, 8]"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds must be given, got neither"),
        ({"inputs_embeds": torch.ones(3, 7, 32)}, "exactly one of input_ids and inputs_embeds must be given, got both"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, "input_ids must be [B, T], got [3]"),
        (
            {"input_ids": None, "inputs_embeds": torch.ones(3, 7, 31)},
            "inputs_embeds must be [B, T, D] with D = 32, got [3, 7, 31]",
        ),
    ],
)
def test_wrong_inputs_are_named(
    make_model: Callable, make_inputs: Callable, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make_model()(**make_inputs(**changes))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_row_without_text_needs_a_prefix_or_a_suffix(
    make_model: Callable, make_inputs: Callable, pooling: str
) -> None:
    inputs = make_inputs()
    inputs["attention_mask"][2] = 0
    with pytest.raises(InputError, match=r"every row must have at least one token of text, got none in rows \[2\]"):
        make_model(prefix_encoder="none", pooling=pooling)(**inputs)
    for kept in ({"prefix_encoder": "static", "pooling": pooling}, {"prefix_encoder": "none", "pooling": "suffix"}):
        assert torch.isfinite(make_model(**kept)(**inputs).pooler_output).all()


def test_eos_pooling_needs_an_eos_token(make_model: Callable, make_llm: Callable) -> None:
    with pytest.raises(ConfigurationError, match="names no eos_token_id, got 'eos'"):
        make_model(make_llm(eos_token_id=None), pooling="eos")


def test_tuples_hidden_states_and_attentions(make_model: Callable, make_inputs: Callable, make_llm: Callable) -> None:
    model, inputs = make_model(make_llm(attn_implementation="eager")), make_inputs()
    expected = model(**inputs)
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected.last_hidden_state) and torch.equal(as_tuple[1], expected.pooler_output)
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in out.hidden_states] == [(3, 11, 32)] * 3  # embeddings and two layers
    assert [weights.shape for weights in out.attentions] == [(3, 4, 11, 11)] * 2


@pytest.mark.parametrize("encoder", ["mformer", "linear", "static"])
def test_gradients_reach_prefix_and_suffix_and_no_weight_of_the_model(
    make_model: Callable, make_inputs: Callable, encoder: str
) -> None:
    model = make_model(prefix_encoder=encoder)
    model(**make_inputs()).pooler_output.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if "bituning_" in name:
            assert parameter.requires_grad
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            if name.endswith(("projection.weight", "bituning_suffix.default.weight", "default.embeddings")):
                assert parameter.grad.abs().sum() > 0, name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    make_model: Callable, make_inputs: Callable, reentrant: bool
) -> None:
    found = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.base_model.backbone.gradient_checkpointing
        out = model(**make_inputs())
        (out.pooler_output.pow(2).sum() + out.aux_loss).backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_keeps_a_float32_adapter(
    make_model: Callable, make_inputs: Callable, make_llm: Callable, dtype: torch.dtype
) -> None:
    model, inputs = make_model(make_llm().to(dtype)), make_inputs()
    own = [parameter for name, parameter in model.named_parameters() if "bituning_" in name]
    assert {parameter.dtype for parameter in own} == {torch.float32}
    out = model(**inputs)
    assert out.pooler_output.dtype == dtype
    exact = make_model()(**inputs).pooler_output
    assert torch.nn.functional.cosine_similarity(out.pooler_output.float(), exact).min() > 0.99
    out.pooler_output.float().sum().backward()
    assert model.base_model.prefix_encoder.projection.weight.grad.dtype == torch.float32


def test_an_adapter_in_the_models_own_type(make_inputs: Callable, make_llm: Callable, make_config: Callable) -> None:
    from peft import get_peft_model

    model = get_peft_model(make_llm().to(torch.bfloat16), make_config(), autocast_adapter_dtype=False)
    own = [parameter for name, parameter in model.named_parameters() if "bituning_" in name]
    assert {parameter.dtype for parameter in own} == {torch.bfloat16}
    assert torch.isfinite(model(**make_inputs()).pooler_output).all()


# ---------------------------------------------------------------------- CAUSAL_LM


def test_labels_give_loss_and_logits(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(task_type="CAUSAL_LM"), make_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    out = model(**inputs, labels=labels)
    assert out.logits.shape == (3, 7, 97)
    llm = model.get_base_model()
    assert torch.equal(out.loss, llm.loss_function(logits=out.logits, labels=labels, vocab_size=97))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], llm.lm_head(out.last_hidden_state)[real])
    without = model(**inputs)
    assert without.loss is None and without.logits is None
    torch.testing.assert_close(without.pooler_output, out.pooler_output)
    out.loss.backward()
    assert model.base_model.prefix_encoder.projection.weight.grad.abs().sum() > 0
    assert model.base_model._layer.bituning_suffix["default"].weight.grad.abs().sum() == 0  # it comes after the text


def test_the_prefix_conditions_the_logits(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(task_type="CAUSAL_LM"), make_inputs()
    first = model(**inputs, labels=inputs["input_ids"])
    other = inputs | {"collaborative_embeds": inputs["collaborative_embeds"].flip(0)}
    second = model(**other, labels=inputs["input_ids"])
    assert not torch.allclose(first.logits[:2], second.logits[:2], atol=1e-3)
    assert not torch.allclose(first.loss, second.loss)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_a_prefix_it_is_the_base_models_loss(
    make_model: Callable, make_inputs: Callable, make_llm: Callable, pooling: str
) -> None:
    inputs = {key: value for key, value in make_inputs().items() if "collaborative" not in key}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = make_llm()(**inputs, labels=labels)
    model = make_model(task_type="CAUSAL_LM", prefix_encoder="none", pooling=pooling)
    found = model(**inputs, labels=labels)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-4, atol=1e-5)
    left = left_padded(inputs | {"input_ids": inputs["input_ids"]})
    moved = left["input_ids"].masked_fill(left["attention_mask"] == 0, -100)
    torch.testing.assert_close(model(**left, labels=moved).loss, expected.loss)


def test_num_items_in_batch_reaches_the_loss(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(task_type="CAUSAL_LM"), make_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    mean = model(**inputs, labels=labels).loss
    counted = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=2 * counted).loss, mean / 2)


def test_labels_need_the_causal_task(make_model: Callable, make_inputs: Callable) -> None:
    inputs = make_inputs()
    with pytest.raises(InputError, match="labels need task_type=CAUSAL_LM, got FEATURE_EXTRACTION; train embeddings"):
        make_model()(**inputs, labels=inputs["input_ids"])


# ---------------------------------------------------------------------- refused


def test_adapters_cannot_be_mixed_within_a_batch(make_model: Callable, make_inputs: Callable) -> None:
    with pytest.raises(UnsupportedOperationError, match=r"cannot mix adapters within a batch \(adapter_names\)"):
        make_model()(**make_inputs(), adapter_names=["default"] * 3)


def test_one_adapter_at_a_time(make_model: Callable, make_inputs: Callable, make_config: Callable) -> None:
    model = make_model()
    model.add_adapter("second", make_config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedOperationError, match=r"exactly one .* active, got \['default', 'second'\]"):
        model(**make_inputs())


def test_the_headless_model_gives_the_same(
    make_model: Callable, make_inputs: Callable, make_llm: Callable[..., LlamaForCausalLM]
) -> None:
    inputs = make_inputs()
    assert torch.equal(make_model(make_llm().model)(**inputs).pooler_output, make_model()(**inputs).pooler_output)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_longer_than_the_context(
    make_model: Callable, make_inputs: Callable, make_llm: Callable, pooling: str
) -> None:
    inputs = make_inputs()
    expected = make_model(pooling=pooling)(**inputs)
    short = make_model(make_llm(max_position_embeddings=12), pooling=pooling)
    columns = torch.nn.functional.pad
    wide = inputs | {key: columns(inputs[key], (6, 0)) for key in ("input_ids", "attention_mask")}
    found = short(**wide)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)
    assert found.last_hidden_state.shape == (3, 13, 32)
    torch.testing.assert_close(found.last_hidden_state[:, 6:], expected.last_hidden_state)
