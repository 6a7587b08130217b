"""Text after a prefix: what `generate` gives, and when it is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from peft_bituning import BiTuningConfig
from peft_bituning.errors import ContextLengthError, InputError, UnsupportedOperationError

REFUSED = "generate needs task_type=CAUSAL_LM, got FEATURE_EXTRACTION; make the adapter with BiTuningConfig"


def greedy(model: PeftModel, inputs: dict[str, Tensor], row: int, steps: int) -> list[int]:
    """Take the best token after a row's text, append it, and run the whole row again: no cache, no padding."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
    collaborative = {key: value[row : row + 1] for key, value in inputs.items() if "collaborative" in key}
    found: list[int] = []
    for _ in range(steps):
        best = model(ids, labels=ids, **collaborative).logits[0, -1].argmax()
        found.append(int(best))
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return found


def flipped(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    order = torch.argsort(inputs["attention_mask"], dim=1, stable=True)
    return inputs | {key: inputs[key].gather(1, order) for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("encoder", ["mformer", "linear", "static", "none"])
@pytest.mark.parametrize("left", [False, True])
def test_greedy_generation_is_the_uncached_loop(
    make_model: Callable, make_inputs: Callable, encoder: str, left: bool
) -> None:
    model, inputs = make_model(task_type="CAUSAL_LM", prefix_encoder=encoder), make_inputs()
    expected = [greedy(model, inputs, row, 6) for row in range(3)]
    if encoder == "none":
        inputs = {key: value for key, value in inputs.items() if "collaborative" not in key}
    widths: list[int] = []
    handle = model.get_base_model().model.register_forward_hook(lambda _m, _i, out: widths.append(out[0].shape[1]))
    model.generation_config.eos_token_id = None
    found = model.generate(**(flipped(inputs) if left else inputs), do_sample=False, max_new_tokens=6)
    handle.remove()
    assert found.tolist() == expected  # the new tokens alone
    prompt = 7 + (0 if encoder == "none" else 3)
    assert widths == [prompt, 1, 1, 1, 1, 1]  # the cache holds prefix and prompt


def test_the_cache_changes_nothing(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(task_type="CAUSAL_LM"), make_inputs()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    cached = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, use_cache=False), cached)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **settings), cached)


def test_collaborative_information_conditions_the_text(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(task_type="CAUSAL_LM"), make_inputs()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    own = model.generate(**inputs, **settings)
    other = inputs | {"collaborative_embeds": -inputs["collaborative_embeds"]}
    found = model.generate(**other, **settings)
    assert not torch.equal(found[0], own[0])
    assert torch.equal(found[2], own[2])  # a row without items


def test_beams_samples_and_dictionaries(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(task_type="CAUSAL_LM"), make_inputs()
    out = model.generate(
        **inputs, num_beams=3, num_return_sequences=2, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True
    )
    assert out.sequences.shape == (6, 4)
    torch.manual_seed(0)
    sampled = model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=4, min_new_tokens=4)
    assert sampled.shape == (6, 4)


def test_disabled_it_is_the_base_models_own(make_model: Callable, make_inputs: Callable, make_llm: Callable) -> None:
    inputs = {key: value for key, value in flipped(make_inputs()).items() if "collaborative" not in key}
    expected = make_llm().generate(**inputs, do_sample=False, max_new_tokens=4)
    for task in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        model = make_model(task_type=task)
        with model.disable_adapter():
            assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=4), expected)
            assert torch.equal(model.base_model.generate(**inputs, do_sample=False, max_new_tokens=4), expected)


def test_an_embedding_adapter_refuses(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(), make_inputs()
    for each in (model, copy.deepcopy(model), model.base_model):
        with pytest.raises(UnsupportedOperationError, match=REFUSED):
            each.generate(**inputs, max_new_tokens=2)
    with pytest.raises(UnsupportedOperationError, match=REFUSED):
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=2)
    assert "generate" not in model.get_base_model().__dict__
    model(**inputs)
    assert "generate" not in model.get_base_model().__dict__
    base = model.unload()
    ids = inputs["input_ids"]
    assert base.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (3, 9)


def test_the_plain_wrapper_is_conditioned_too(make_model: Callable, make_inputs: Callable, make_llm: Callable) -> None:
    """`PeftModel` itself calls the base model's `generate`, past the tuner."""
    expected = make_model(task_type="CAUSAL_LM")
    llm = make_llm()
    torch.manual_seed(1)
    plain = PeftModel(llm, expected.peft_config["default"]).eval()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    assert torch.equal(plain.generate(**make_inputs(), **settings), expected.generate(**make_inputs(), **settings))


def test_a_model_without_a_head_cannot(make_model: Callable, make_inputs: Callable, make_llm: Callable) -> None:
    with pytest.raises(
        UnsupportedOperationError, match="needs a base model with a language-model head, got LlamaModel"
    ):
        make_model(make_llm().model).generate(**make_inputs())


def test_wrong_inputs_are_named(make_model: Callable, make_inputs: Callable, make_llm: Callable) -> None:
    model = make_model(make_llm(max_position_embeddings=9), task_type="CAUSAL_LM")
    with pytest.raises(ContextLengthError, match=r"\(9\), got 3 \+ 7 \+ 0 = 10, 1 tokens too many"):
        model.generate(**make_inputs())
    with pytest.raises(InputError, match="collaborative_embeds must be given to prefix_encoder='mformer'"):
        model.generate(**make_inputs(collaborative_embeds=None))
    with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds must be given, got neither"):
        model.generate(max_new_tokens=2)


def test_refused_after_a_round_trip(
    make_model: Callable, make_inputs: Callable, make_llm: Callable, tmp_path: Any
) -> None:
    make_model().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llm(), tmp_path)
    assert isinstance(loaded.peft_config["default"], BiTuningConfig)
    with pytest.raises(UnsupportedOperationError, match=REFUSED):
        loaded.generate(**make_inputs())
