"""Text through experts that rows weigh for themselves, and when it is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from peft_bituning.errors import InputError, UnsupportedOperationError

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


def flipped(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    order = torch.argsort(inputs["attention_mask"], dim=1, stable=True)
    return inputs | {key: inputs[key].gather(1, order) for key in ("input_ids", "attention_mask")}


def greedy(model: PeftModel, inputs: dict[str, Tensor], row: int, steps: int) -> list[int]:
    """Take the best token after a row's text, append it, and run the whole row again: no cache, no padding."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
    collaborative = {key: value[row : row + 1] for key, value in inputs.items() if "collaborative" in key}
    found: list[int] = []
    for _ in range(steps):
        scores = model(ids, labels=ids, **collaborative).logits[0, -1]
        scores[2] = -torch.inf  # the end comes after `min_new_tokens`
        found.append(int(scores.argmax()))
        ids = torch.cat([ids, torch.tensor([[found[-1]]])], dim=1)
    return found


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Qwen2"])
@pytest.mark.parametrize("left", [False, True])
def test_greedy_generation_is_the_uncached_loop(
    make_model: Callable, make_inputs: Callable, family: str, left: bool
) -> None:
    model, inputs = make_model(family, task_type="CAUSAL_LM", pooling="suffix"), make_inputs()
    expected = [greedy(model, inputs, row, 5) for row in range(3)]
    given = flipped(inputs) if left else inputs
    found = model.generate(**given, **GREEDY)
    assert found[:, 7:].tolist() == expected
    real = flipped(inputs)["attention_mask"].bool()
    assert torch.equal(found[:, :7][real], flipped(inputs)["input_ids"][real])  # the prompt, padded on the left
    assert torch.equal(model.generate(**given, **GREEDY, use_cache=False), found)
    embeds = model.get_input_embeddings()(given.pop("input_ids"))
    assert torch.equal(model.generate(inputs_embeds=embeds, **given, **GREEDY), found[:, 7:])


@pytest.mark.parametrize("settings", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}], ids=str)
def test_beams_of_a_row_share_its_gates(make_model: Callable, make_inputs: Callable, settings: dict[str, int]) -> None:
    """Beams stand one after the other, and a row's are its own in any batch."""
    model, inputs = make_model(task_type="CAUSAL_LM"), make_inputs()
    count = settings.get("num_return_sequences", 1)
    found = model.generate(**inputs, **settings, **GREEDY)
    assert found.shape == (3 * count, 12)
    for row, length in enumerate((7, 4, 1)):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        one |= {key: one[key][:, :length] for key in ("input_ids", "attention_mask")}
        assert torch.equal(
            found[row * count : (row + 1) * count, 7:], model.generate(**one, **settings, **GREEDY)[:, length:]
        )
    torch.manual_seed(0)
    sampled = model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=4, min_new_tokens=4)
    assert sampled.shape == (6, 11)


def test_uniform_gates_write_what_plain_lora_writes(
    make_model: Callable, make_inputs: Callable, make_llm: Callable
) -> None:
    model, inputs = make_model(task_type="CAUSAL_LM"), flipped(make_inputs())
    with torch.no_grad():
        model.base_model.gate.weight.zero_()
    plain = get_peft_model(
        make_llm(), LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    plain.load_state_dict(model.state_dict(), strict=False)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    expected = plain.eval().generate(**text, num_beams=2, **GREEDY)
    assert torch.equal(model.generate(**inputs, num_beams=2, **GREEDY)[:, 7:], expected[:, 7:])


def test_collaborative_information_conditions_the_text(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(task_type="CAUSAL_LM"), make_inputs()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    own = model.generate(**inputs, **settings)
    found = model.generate(**(inputs | {"collaborative_embeds": -3 * inputs["collaborative_embeds"]}), **settings)
    assert not torch.equal(found[:2], own[:2])
    assert torch.equal(found[2], own[2])  # a row without items


def test_disabled_it_is_the_base_models_own(make_model: Callable, make_inputs: Callable, make_llm: Callable) -> None:
    text = {key: value for key, value in flipped(make_inputs()).items() if "collaborative" not in key}
    expected = make_llm().generate(**text, **GREEDY)
    for task in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        model = make_model(task_type=task)
        with model.disable_adapter():
            assert torch.equal(model.generate(**text, **GREEDY), expected)


def test_refusals(make_model: Callable, make_inputs: Callable, make_llm: Callable) -> None:
    inputs = make_inputs()
    embedder = make_model()
    for each in (embedder, embedder.base_model):
        with pytest.raises(UnsupportedOperationError, match="generate needs task_type=CAUSAL_LM, got FEATURE_EXTR"):
            each.generate(**inputs, max_new_tokens=2)
    assert "generate" not in embedder.get_base_model().__dict__
    with pytest.raises(UnsupportedOperationError, match="a language-model head, got LlamaModel; load one with"):
        make_model(make_llm().model).generate(**inputs)
    writer = make_model(task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="collaborative_embeds must be given to iLoRA"):
        writer.generate(**make_inputs(collaborative_embeds=None), max_new_tokens=2)
    with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds must be given, got neither"):
        writer.generate(max_new_tokens=2)
    assert writer.base_model._layer.row_gates.rows is None
