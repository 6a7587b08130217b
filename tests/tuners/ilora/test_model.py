"""The forward pass: what an embedding depends on, and what it does not."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_bituning import BiTuningOutput, ILoRAConfig
from peft_bituning.errors import ConfigurationError, InputError, UnsupportedModelError, UnsupportedOperationError
from peft_bituning.tuners.ilora import ILoRAOutput

from .conftest import FAMILIES, alone, stir

POOLINGS = ["last", "mean", "suffix"]


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
def test_shapes(make_model: Callable, make_inputs: Callable, pooling: str) -> None:
    model, inputs = make_model(pooling=pooling), make_inputs()
    out = model(**inputs)
    assert isinstance(out, ILoRAOutput) and isinstance(out, BiTuningOutput)
    assert out.last_hidden_state.shape == out[0].shape == (3, 7, 32)
    assert out.pooler_output.shape == (3, 32) and out.gates.shape == (3, 4)
    assert (out.last_hidden_state[inputs["attention_mask"] == 0] == 0).all()
    assert out.loss is None and out.logits is None and out.router_logits is None and out.aux_loss is None
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("ilora_" in name or "lora_A" in name or "lora_B" in name for name in names)
    assert ("suffix" in "".join(names)) == (pooling == "suffix")
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_has_weights_of_its_own(
    make_model: Callable, make_inputs: Callable, make_llm: Callable, family: str, pooling: str
) -> None:
    """A row of the batch is that row through the base model with its own sum of experts in the weights."""
    model, inputs = make_model(family, pooling=pooling), make_inputs()
    found = model(**inputs)
    for row, length in enumerate((7, 4, 1)):
        merged = make_llm(family)
        for name, layer in model.get_base_model().named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            parts = zip(
                layer.lora_A["default"].weight.split(2), layer.lora_B["default"].weight.split(2, 1), strict=True
            )
            delta = sum(gate * up @ down for gate, (down, up) in zip(found.gates[row], parts, strict=True)) * 8 / 2
            base = merged.get_submodule(name)
            base.weight.data += (delta.T if isinstance(base, Conv1D) else delta).detach()
        rows = merged.get_input_embeddings()(inputs["input_ids"][row : row + 1, :length])
        if pooling == "suffix":
            rows = torch.cat([rows, model.base_model._layer.suffix("default")], dim=1)
        states = merged.base_model(inputs_embeds=rows).last_hidden_state[0]
        expected = states[:length].mean(0) if pooling == "mean" else states[-1]
        torch.testing.assert_close(found.pooler_output[row], expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found.last_hidden_state[row, :length], states[:length], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_does_not_depend_on_padding_or_batch_mates(
    make_model: Callable, make_inputs: Callable, family: str, pooling: str
) -> None:
    model, inputs = make_model(family, pooling=pooling), make_inputs()
    expected = model(**inputs)
    left = model(**left_padded(inputs))
    assert torch.equal(left.pooler_output, expected.pooler_output)
    assert torch.equal(left.last_hidden_state[:, -1], expected.last_hidden_state[torch.arange(3), [6, 3, 0]])
    torch.testing.assert_close(model(**holed(inputs)).pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)
    as_bool = inputs | {key: inputs[key].bool() for key in ("attention_mask", "collaborative_mask")}
    assert torch.equal(model(**as_bool).pooler_output, expected.pooler_output)
    for row in range(3):
        single = model(**alone(inputs, row)).pooler_output[0]
        torch.testing.assert_close(single, expected.pooler_output[row], rtol=1e-4, atol=1e-5)
    others = make_inputs(seed=9)  # row 1 among others
    for key in ("input_ids", "attention_mask", "collaborative_embeds", "collaborative_mask"):
        others[key][1] = inputs[key][1]
    torch.testing.assert_close(model(**others).pooler_output[1], expected.pooler_output[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_is_inert_whatever_it_holds(make_model: Callable, make_inputs: Callable, pooling: str) -> None:
    model, inputs = make_model(pooling=pooling), make_inputs()
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    spoilt = inputs | {
        "inputs_embeds": embeds.masked_fill(inputs["attention_mask"].unsqueeze(-1) == 0, float("nan")),
        "collaborative_embeds": inputs["collaborative_embeds"].masked_fill(
            inputs["collaborative_mask"].unsqueeze(-1) == 0, float("nan")
        ),
    }
    found = model(**spoilt)
    assert torch.equal(found.pooler_output, expected.pooler_output) and torch.equal(found.gates, expected.gates)
    found.pooler_output.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.requires_grad)


def test_rows_without_items_use_null_and_no_others_do(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(), make_inputs()
    before = model(**inputs)
    with torch.no_grad():
        model.base_model.gate.null.add_(3.0)
    after = model(**inputs)
    assert torch.equal(after.pooler_output[:2], before.pooler_output[:2])
    assert not torch.allclose(after.pooler_output[2], before.pooler_output[2], atol=1e-3)


def test_swapping_collaborative_information_swaps_gates(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(), make_inputs()
    expected, order = model(**inputs), torch.tensor([1, 0, 2])
    swapped = {key: inputs[key][order] for key in ("collaborative_embeds", "collaborative_mask")}
    found = model(**(inputs | swapped))
    torch.testing.assert_close(found.gates, expected.gates[order])
    assert not torch.allclose(found.pooler_output[:2], expected.pooler_output[:2], atol=1e-3)
    torch.testing.assert_close(found.pooler_output[2], expected.pooler_output[2])


def test_gradients_reach_experts_gate_null_and_suffix_and_no_weight_of_the_model(
    make_model: Callable, make_inputs: Callable
) -> None:
    model = make_model(pooling="suffix")
    output = model(**make_inputs()).pooler_output
    (output * torch.linspace(-1, 1, 32)).sum().backward()
    for name, parameter in model.named_parameters():
        if "ilora_" in name or "lora_A" in name or "lora_B" in name:
            assert parameter.requires_grad and float(parameter.grad.abs().max()) > 1e-4, name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name


def test_it_learns_a_gate(make_model: Callable, make_inputs: Callable) -> None:
    """Two rows of the same text are told apart by their collaborative information alone."""
    model, inputs = make_model(), make_inputs()
    inputs = {key: value[:1].expand(2, *value.shape[1:]) for key, value in inputs.items()}
    inputs["collaborative_embeds"] = torch.stack([torch.ones(4, 6), -torch.ones(4, 6)])
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    goal = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(
            nn.functional.normalize(model(**inputs).pooler_output), nn.functional.normalize(goal)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert not torch.allclose(*model(**inputs).pooler_output, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"collaborative_embeds": None},
            "must be given to iLoRA, whose gate reads them, got None; pass the recommender's",
        ),
        ({"collaborative_embeds": torch.ones(3, 4, 5)}, "must be [B, N, C] = [3, N, 6], got [3, 4, 5]; pass"),
        ({"collaborative_embeds": torch.full((3, 4, 6), torch.nan)}, "got NaN or infinity in rows [0, 1]; check"),
        ({"collaborative_mask": torch.ones(3, 5)}, "collaborative_mask must be [B, N] = [3, 4], got [3, 5]; give"),
        ({"attention_mask": torch.ones(3, 8)}, "attention_mask must be [B, T] = [3, 7], got [3, 8]"),
        ({"attention_mask": torch.zeros(3, 7)}, "at least one token of text, got none in rows [0, 1, 2]; give a text"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds must be given, got neither"),
        ({"labels": torch.ones(3, 7)}, "labels need task_type=CAUSAL_LM, got FEATURE_EXTRACTION; train embeddings"),
    ],
)
def test_wrong_inputs_are_named(
    make_model: Callable, make_inputs: Callable, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make_model()(**make_inputs(**changes))


def test_a_suffix_does_without_text(make_model: Callable, make_inputs: Callable) -> None:
    empty = make_inputs(attention_mask=torch.zeros(3, 7))
    assert torch.isfinite(make_model(pooling="suffix")(**empty).pooler_output).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_keeps_a_float32_adapter(
    make_model: Callable, make_inputs: Callable, make_llm: Callable, dtype: torch.dtype
) -> None:
    model, inputs = make_model(make_llm().to(dtype), pooling="suffix"), make_inputs()
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in own} == {torch.float32}
    out = model(**inputs)
    assert out.pooler_output.dtype == dtype and out.gates.dtype == torch.float32
    exact = make_model(pooling="suffix")(**inputs).pooler_output
    assert torch.nn.functional.cosine_similarity(out.pooler_output.float(), exact).min() > 0.99
    out.pooler_output.float().sum().backward()
    assert model.base_model.gate.weight.grad.dtype == torch.float32


def test_an_adapter_in_the_models_own_type(make_inputs: Callable, make_llm: Callable, make_config: Callable) -> None:
    model = get_peft_model(make_llm().to(torch.bfloat16), make_config(pooling="suffix"), autocast_adapter_dtype=False)
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.bfloat16}
    assert torch.isfinite(model(**make_inputs()).pooler_output).all()


def test_autocast(make_model: Callable, make_inputs: Callable) -> None:
    """Mixed precision as accelerate has it."""
    model, inputs = make_model().train(), make_inputs()
    exact = model(**inputs).pooler_output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(**inputs).pooler_output
    assert torch.nn.functional.cosine_similarity(mixed.float(), exact).min() > 0.99
    mixed.float().sum().backward()
    assert torch.isfinite(model.base_model.gate.weight.grad).all()


# ---------------------------------------------------------------------- CAUSAL_LM


@pytest.mark.parametrize("pooling", POOLINGS)
def test_labels_give_the_language_models_loss(make_model: Callable, make_inputs: Callable, pooling: str) -> None:
    model, inputs = make_model(task_type="CAUSAL_LM", pooling=pooling), make_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    out = model(**inputs, labels=labels)
    llm, real = model.get_base_model(), inputs["attention_mask"].bool()
    assert out.logits.shape == (3, 7, 97)
    torch.testing.assert_close(out.logits[real], llm.lm_head(out.last_hidden_state)[real])
    torch.testing.assert_close(out.loss, llm.loss_function(logits=out.logits, labels=labels, vocab_size=97))
    without = model(**inputs)
    assert without.loss is None and without.logits is None
    torch.testing.assert_close(without.pooler_output, out.pooler_output)
    left = left_padded(inputs)
    moved = left["input_ids"].masked_fill(left["attention_mask"] == 0, -100)
    torch.testing.assert_close(model(**left, labels=moved).loss, out.loss)
    counted = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=2 * counted).loss, out.loss / 2)
    other = model(**(inputs | {"collaborative_embeds": -inputs["collaborative_embeds"]}), labels=labels)
    assert not torch.allclose(other.loss, out.loss, atol=1e-4)
    out.loss.backward()
    assert float(model.base_model.gate.weight.grad.abs().max()) > 1e-4
    with pytest.raises(InputError, match=re.escape("labels must be [B, T] = [3, 7], got [3, 6]")):
        model(**inputs, labels=labels[:, :6])


# ---------------------------------------------------------------------- refused


def test_adapters_cannot_be_mixed_within_a_batch(make_model: Callable, make_inputs: Callable) -> None:
    with pytest.raises(UnsupportedOperationError, match=r"cannot mix adapters within a batch \(adapter_names\); call"):
        make_model()(**make_inputs(), adapter_names=["default"] * 3)


def test_one_adapter_at_a_time(make_model: Callable, make_inputs: Callable, make_config: Callable) -> None:
    model = make_model()
    model.add_adapter("second", make_config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedOperationError, match=r"exactly one .* active, got \['default', 'second'\]; a row"):
        model(**make_inputs())


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head|embed_tokens"])
def test_experts_stand_in_linear_layers(make_llm: Callable, make_config: Callable, target: str) -> None:
    message = "must stand in linear layers, got Embedding at 'model.embed_tokens'; leave it out by target_modules"
    with pytest.raises(UnsupportedModelError, match=message):
        get_peft_model(make_llm(), make_config(target_modules=target.split("|")))


def test_an_encoder_is_refused(make_config: Callable) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=50, **sizes))
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        get_peft_model(bert, make_config())


def test_a_config_of_another_method_is_refused(make_llm: Callable) -> None:
    from peft import LoraConfig

    from peft_bituning import ILoRAModel

    with pytest.raises(ConfigurationError, match="peft_config must be an ILoRAConfig, got LoraConfig"):
        ILoRAModel(make_llm(), LoraConfig(target_modules=["q_proj"]), "default")


def test_the_context_is_checked(make_model: Callable, make_inputs: Callable, make_llm: Callable) -> None:
    inputs = make_inputs()
    short = make_model(make_llm(max_position_embeddings=7), pooling="suffix")
    with pytest.raises(InputError, match=r"\(7\), got 0 \+ 7 \+ 1 = 8, 1 tokens too many"):
        short(**inputs)
    wide = inputs | {key: nn.functional.pad(inputs[key], (6, 0)) for key in ("input_ids", "attention_mask")}
    found = make_model(make_llm(max_position_embeddings=8), pooling="suffix")(**wide)  # padding alone is too long
    torch.testing.assert_close(found.pooler_output, make_model(pooling="suffix")(**inputs).pooler_output)
    assert found.last_hidden_state.shape == (3, 13, 32)


@pytest.mark.slow
def test_compiled_it_is_the_same(make_llm: Callable, make_inputs: Callable) -> None:
    """One graph for a length, a second one for all others; nothing falls out of it."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    config = ILoRAConfig(collaborative_dim=6, pooling="suffix", lora_dropout=0.0)
    model = get_peft_model(make_llm(), config).train()
    stir(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    own = [each for each in model.parameters() if each.requires_grad]
    for width in (7, 5, 6, 7):
        inputs = make_inputs()
        inputs |= {key: inputs[key][:, :width] for key in ("input_ids", "attention_mask")}
        expected, found = (
            torch.autograd.grad(each(**inputs).pooler_output.pow(3).sum(), own) for each in (model, compiled)
        )
        for left, right in zip(expected, found, strict=True):
            torch.testing.assert_close(right, left)
    assert counter.frame_count == 2
